"""A real nats-server for each test, and connections to it that are closed at the end."""

import asyncio
import json
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from pipeline.bus import Bus
from pipeline.nats_server import NatsServer
from subjects.streams import BucketSpec, ConsumerSpec, StreamSpec

DEADLINE_S = 10.0

QUEUE = StreamSpec(
    name="QUEUE",
    subjects=("queue.*",),
    about="A work queue for tests.",
    retention="workqueue",
    storage="file",
    discard="new",
    max_bytes=64 * 1024 * 1024,
    max_msgs_per_subject=20_000,
    duplicate_window_s=60,
)
TAKERS = ConsumerSpec(name="takers", stream=QUEUE.name, filter_subject="queue.a", ack_wait_s=1.0)
VALUES = BucketSpec(name="VALUES", about="A bucket for tests.", storage="memory", max_bytes=1024 * 1024)


class Log:
    """What callbacks heard, in order; `until` waits for it with a deadline."""

    def __init__(self) -> None:
        self.items: list[Any] = []
        self._grew = asyncio.Event()

    def add(self, *item: Any) -> None:
        self.items.append(item[0] if len(item) == 1 else item)
        grew, self._grew = self._grew, asyncio.Event()
        grew.set()

    async def until(self, holds: Callable[[list[Any]], bool], timeout_s: float = DEADLINE_S) -> list[Any]:
        try:
            async with asyncio.timeout(timeout_s):
                while not holds(self.items):
                    await self._grew.wait()
        except TimeoutError:
            raise AssertionError(f"not within {timeout_s:g} s; heard {len(self.items)}: {self.items[-5:]}") from None
        return self.items


class RawClient:
    """NATS by hand over a blocking socket: while it waits, nothing else in this process runs."""

    def __init__(self, server: NatsServer) -> None:
        self._socket = socket.create_connection(("127.0.0.1", server.port), timeout=DEADLINE_S)
        self._file = self._socket.makefile("rb")
        self._file.readline()  # INFO
        self._socket.sendall(b'CONNECT {"verbose": false}\r\nSUB _INBOX_raw 1\r\n')

    def publish(self, subject: str, payloads: Iterable[bytes]) -> None:
        """Publish, and wait until the broker has sent them on to its subscribers."""
        frames = (b"PUB %s %d\r\n%s\r\n" % (subject.encode(), len(payload), payload) for payload in payloads)
        self._socket.sendall(b"".join(frames) + b"PING\r\n")
        while self._file.readline() != b"PONG\r\n":
            pass

    def request(self, subject: str) -> dict[str, Any]:
        """Ask the broker's API; its answer."""
        self._socket.sendall(b"PUB %s _INBOX_raw 0\r\n\r\n" % subject.encode())
        size = int(self._file.readline().split()[-1])
        return json.loads(self._file.read(size + 2))

    def close(self) -> None:
        self._file.close()
        self._socket.close()


def freeze(server: NatsServer) -> None:
    """Stop the server's process as it stands; `thaw` lets it go on."""
    os.kill(server.pid, signal.SIGSTOP)
    os.waitpid(server.pid, os.WUNTRACED)


def thaw(server: NatsServer) -> None:
    os.kill(server.pid, signal.SIGCONT)


@pytest.fixture
def raw_client(nats_server: NatsServer) -> Iterator[RawClient]:
    client = RawClient(nats_server)
    yield client
    client.close()


@pytest.fixture
def nats_server(tmp_path: Path) -> Iterator[NatsServer]:
    server = NatsServer(tmp_path / "nats")
    server.start()
    yield server
    server.kill()


@pytest_asyncio.fixture
async def connect() -> AsyncIterator[Callable[..., Awaitable[Bus]]]:
    """Makes connections, by default named "test"."""
    made: list[Bus] = []

    async def make(url: str, name: str = "test", **options: Any) -> Bus:
        made.append(await Bus.connect(url, name=name, **options))
        return made[-1]

    yield make
    for bus in made:
        await bus.close()


@pytest_asyncio.fixture
async def bus(nats_server: NatsServer, connect: Callable[..., Awaitable[Bus]]) -> Bus:
    return await connect(nats_server.url)


@pytest_asyncio.fixture
async def queue(bus: Bus) -> Bus:
    """A connection with the stream QUEUE, its consumer and the bucket VALUES provisioned."""
    await bus.provision([QUEUE], [TAKERS], [VALUES])
    return bus


@pytest.fixture
def back(bus: Bus) -> asyncio.Event:
    """Set when `bus` has recovered from an outage; clear it before the next."""
    event = asyncio.Event()

    async def note() -> None:
        event.set()

    bus.on_reconnect(note)
    return event


@pytest.fixture
def log() -> Log:
    return Log()
