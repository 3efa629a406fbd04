"""The proxy that parts workers from the broker ends quietly, however its connections end."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from partition import Proxy

from pipeline.nats_server import NatsServer

DEADLINE_S = 5.0
PARTED_S = 0.3
RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER: on, for no time


@pytest_asyncio.fixture
async def proxy(tmp_path: Path) -> AsyncIterator[Proxy]:
    server = NatsServer(tmp_path)
    server.start()
    proxy = Proxy(server)
    yield proxy
    await proxy.close()
    server.kill()


class RawClient:
    """A connection that says hello under a name and is heard line by line."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def connect(cls, url: str, name: str) -> "RawClient":
        client = cls(*await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2])))
        await client.round_trip(f'CONNECT {{"verbose": false, "name": "{name}"}}\r\n')
        return client

    async def round_trip(self, lines: str) -> None:
        """Send and wait until the broker has taken it."""
        self.send(f"{lines}PING\r\n")
        async with asyncio.timeout(DEADLINE_S):
            while await self._reader.readline() != b"PONG\r\n":
                pass

    def send(self, lines: str) -> None:
        self._writer.write(lines.encode())

    async def ended(self) -> bool:
        """Wait for the other side to close."""
        async with asyncio.timeout(DEADLINE_S):
            return await self._reader.read() == b""

    def reset(self) -> None:
        """Go away without a word, as a process that is killed with bytes unread does."""
        self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        self._writer.transport.abort()


async def quiet(caplog: pytest.LogCaptureFixture) -> bool:
    """Whether asyncio had nothing to say; what a callback says comes a turn of the loop after it."""
    await asyncio.sleep(0)
    return not [record for record in caplog.records if record.name == "asyncio"]


async def test_its_end_logs_nothing_and_ends_what_it_carried(proxy: Proxy, caplog: pytest.LogCaptureFixture):
    client = await RawClient.connect(await proxy.start(), "w")
    await proxy.close()
    assert await client.ended()
    assert await quiet(caplog), caplog.text


async def test_a_parted_worker_that_dies_meanwhile_logs_nothing(proxy: Proxy, caplog: pytest.LogCaptureFixture):
    url = await proxy.start()
    worker, other = await RawClient.connect(url, "w"), await RawClient.connect(url, "other")
    await worker.round_trip("SUB news 1\r\n")
    parting = asyncio.create_task(proxy.part("w", PARTED_S))
    await asyncio.sleep(0)  # it has begun
    worker.send("PING\r\n")
    await other.round_trip("PUB news 1\r\na\r\n")  # bytes wait in both directions
    worker.reset()
    await parting
    await other.round_trip("")
    assert await quiet(caplog), caplog.text
