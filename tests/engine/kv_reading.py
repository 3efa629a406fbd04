"""Reads one rank's KV events and snapshots off the bus, with deadlines: what tests of publishers share."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from pipeline.bus import Bus, Received
from pipeline.kv_blocks import KvBlocks
from subjects import names
from subjects.codec import decode, encode
from subjects.messages import KvEvents, KvSnapshot, KvSnapshotRequest

DEADLINE_S = 30.0


@dataclass
class Reader:
    """Every message in the order in which it came, and the blocks that they come to."""

    messages: list[KvEvents] = field(default_factory=list)
    blocks: KvBlocks = field(default_factory=KvBlocks)
    _grew: asyncio.Event = field(default_factory=asyncio.Event)

    @classmethod
    async def of(cls, bus: Bus, model: str) -> "Reader":
        reader = cls()
        await bus.subscribe(names.KV_EVENTS.any(model=model), reader._hear)
        await bus.flush()
        return reader

    def _hear(self, received: Received) -> None:
        message = decode(KvEvents, received.payload)
        self.messages.append(message)
        for event in message.events:
            self.blocks.apply(event)
        self._grew.set()

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not holds():
                self._grew.clear()
                await self._grew.wait()

    def held(self) -> set[int]:
        return {block for run in self.blocks.runs() for block in run.hashes}

    def seqs(self) -> list[int]:
        return [message.seq for message in self.messages]


async def snapshot(bus: Bus, worker: str, payload: bytes | None = None) -> list[KvSnapshot]:
    """Every part of what rank 0 of the worker holds."""
    inbox, parts, whole = bus.new_inbox(), [], asyncio.Event()

    def hear(received: Received) -> None:
        parts.append(decode(KvSnapshot, received.payload))
        if len(parts) == parts[0].parts:
            whole.set()

    subscription = await bus.subscribe(inbox, hear)
    asked = encode(KvSnapshotRequest()) if payload is None else payload
    await bus.publish(names.KV_SNAPSHOT.of(worker=worker, rank="0"), asked, reply=inbox)
    async with asyncio.timeout(DEADLINE_S):
        await whole.wait()
    await subscription.unsubscribe()
    return parts


def hashes_of(parts: list[KvSnapshot]) -> set[int]:
    return {block for part in parts for run in part.blocks for block in run.hashes}
