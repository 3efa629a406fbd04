"""A real nats-server for each test, and connections to it that are closed at the end."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
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
