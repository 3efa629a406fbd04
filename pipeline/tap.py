"""A tap: which of our subjects carried how many messages while one looked on."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from typing import Final

from pipeline.bus import Bus, Received
from subjects import names

SETTLE_S_MAX: Final = 2.0


@dataclass
class Seen:
    """What one kind of subject carried."""

    subject: str  # the last one in full
    flow: str
    messages: int = 0
    payload_bytes: int = 0


class Tap:
    """Counts messages by kind of subject. JetStream's subjects are heard as well: publishing is one and the same."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._seen: dict[str, Seen] = {}

    @classmethod
    @contextlib.asynccontextmanager
    async def on(cls, url: str) -> AsyncIterator["Tap"]:
        """Listen to every subject that may be listened to. Raises BusConnectError."""
        bus = await Bus.connect(url, name="tap")
        tap = cls(bus)
        try:
            for kind in names.READABLE:
                await bus.subscribe(kind.any(), partial(tap._count, kind))
            await bus.flush()
            yield tap
        finally:
            await bus.close()

    async def settle(self) -> None:
        """Wait for what the broker has already sent this way."""
        await self._bus.flush(SETTLE_S_MAX)

    def seen(self) -> list[Seen]:
        """Every kind of subject that carried something, in the order of their declaration."""
        return [self._seen[kind.template] for kind in names.READABLE if kind.template in self._seen]

    def _count(self, kind: names.Subject, received: Received) -> None:
        seen = self._seen.setdefault(kind.template, Seen(received.subject, kind.flow))
        seen.subject = received.subject
        seen.messages += 1
        seen.payload_bytes += len(received.payload)
