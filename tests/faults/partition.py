"""A proxy before the broker that can part a worker from it: its bytes wait, and nothing tells either side."""

import asyncio
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
        self._listener = await asyncio.start_server(self._carry, "127.0.0.1", 0)
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

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._carrying.add(task)
        task.add_done_callback(self._carrying.discard)
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._broker.port)
        except OSError:
            writer.close()
            return
        try:
            writer.write(await there.readline())  # INFO: the broker speaks first
            hello = await reader.read(CHUNK_BYTES)
            found = _NAME.search(hello)
            joined = self._joined[found[1].decode() if found else ""]
            await joined.wait()
            back.write(hello)
            await _either(_pump(reader, back, joined), _pump(there, writer, joined))
        except OSError:
            pass  # one side is gone: the other is told below
        finally:
            writer.close()
            back.close()


def _set() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, joined: asyncio.Event) -> None:
    while chunk := await source.read(CHUNK_BYTES):
        await joined.wait()
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
