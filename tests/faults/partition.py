"""A proxy before the broker that can part a worker from it: its bytes wait, and nothing tells either side."""

import asyncio
import contextlib
import re
from collections import defaultdict
from typing import Final

from pipeline.nats_server import NatsServer

CHUNK_BYTES: Final = 256 * 1024
_NAME: Final = re.compile(rb'"name":\s*"([^".]*)')  # the worker's: it begins the names of all its connections


class Proxy:
    """On a free port of this machine, in front of one broker that may come and go."""

    def __init__(self, server: NatsServer) -> None:
        self._broker = server
        self._joined: defaultdict[str, asyncio.Event] = defaultdict(_set)  # by worker
        self._carrying: set[asyncio.Task[None]] = set()

    async def start(self) -> str:
        """The URL that leads through the proxy."""
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return f"nats://127.0.0.1:{self._listener.sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        self._listener.close()
        for task in self._carrying:
            task.cancel()
        await asyncio.gather(*self._carrying, return_exceptions=True)

    async def part(self, worker: str, seconds: float) -> None:
        """Let nothing of the worker's through for so long, on connections that it makes meanwhile neither."""
        self._joined[worker].clear()
        try:
            await asyncio.sleep(seconds)
        finally:
            self._joined[worker].set()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry in a task of our own: of one that asyncio makes for a connection, it logs the cancel as an error."""
        task = asyncio.create_task(self._carry(reader, writer), name="carry")
        self._carrying.add(task)
        task.add_done_callback(self._carrying.discard)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Until one side is gone, which the other is told by the end of its connection."""
        with contextlib.closing(writer), contextlib.suppress(OSError):
            there, back = await asyncio.open_connection("127.0.0.1", self._broker.port)
            with contextlib.closing(back):
                await _send(writer, await there.readline())  # INFO: the broker speaks first
                hello = await reader.read(CHUNK_BYTES)
                found = _NAME.search(hello)
                joined = self._joined[found[1].decode() if found else ""]
                await joined.wait()
                await _send(back, hello)
                await _either(_pump(reader, back, joined), _pump(there, writer, joined))


def _set() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, joined: asyncio.Event) -> None:
    while chunk := await source.read(CHUNK_BYTES):
        await joined.wait()
        await _send(sink, chunk)


async def _send(sink: asyncio.StreamWriter, chunk: bytes) -> None:
    """Raises OSError where the sink is gone, as it may be after any wait; uvloop's own word is a RuntimeError."""
    if sink.is_closing():
        raise ConnectionResetError("the connection is closed")
    sink.write(chunk)
    await sink.drain()


async def _either(*pumps) -> None:
    """Until one ends; then the other ends too."""
    tasks = [asyncio.ensure_future(pump) for pump in pumps]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
