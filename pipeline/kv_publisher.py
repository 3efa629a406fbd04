"""Announces what becomes of one rank's KV blocks, and answers readers that ask for all of them.

The engine's thread hands events over and never waits: they are numbered and taken into the set of announced blocks at
once, and published by the bus' loop. What cannot be published is dropped. Its number is missing then, so that readers
ask for a snapshot, which is always whole; and where nothing else would show the gap, an empty message does.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import structlog

from pipeline.bus import Bus, Received
from pipeline.errors import PipelineError
from pipeline.kv_blocks import RUN_BLOCKS_MAX, KvBlocks, batches, blocks_in
from subjects import names
from subjects.codec import Format, encode, format_of
from subjects.messages import BlocksStored, KvEvent, KvEvents, KvSnapshot

QUEUED_BLOCKS_MAX: Final = 1 << 20
"""Blocks in events that wait for the broker: 8 MiB. What comes on top is dropped."""
QUEUED_MESSAGES_MAX: Final = 1 << 14
READERS_MAX: Final = 256
"""Readers that wait for one snapshot; another one asks again."""
STEP_PAUSE_S: Final = 0.001
"""Between two steps of a snapshot: the engine's thread must get the interpreter in between."""

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class KvRank:
    """Whose blocks they are."""

    model: str  # the served name
    worker: str
    incarnation: str
    dp_rank: int = 0
    block_tokens: int


class KvPublisher:
    """One rank's events and snapshots on the bus. Made and started on the bus' loop."""

    def __init__(self, bus: Bus, rank: KvRank) -> None:
        self._bus, self._rank = bus, rank
        self._subject = names.KV_EVENTS.of(model=rank.model, worker=rank.worker)
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()  # over what the engine's thread and the loop share: the next six
        self._blocks = KvBlocks()
        self._seq = 0
        self._queue: deque[KvEvents] = deque()
        self._queued_blocks = 0
        self._gap = False  # readers may lack messages, and nothing that was published since shows it
        self._dropped = 0  # messages, in all
        self._work = asyncio.Event()
        self._readers: list[tuple[str, Format]] = []  # reply subjects that wait for a snapshot
        self._asked = asyncio.Event()

    async def start(self) -> None:
        """Begin to publish and to answer. Raises BusUnavailable."""
        self._bus.on_reconnect(self._reconnected)
        subject = names.KV_SNAPSHOT.of(worker=self._rank.worker, rank=str(self._rank.dp_rank))
        await self._bus.subscribe(subject, self._hear)
        self._bus.spawn(self._send())
        self._bus.spawn(self._answer())

    @property
    def seq(self) -> int:
        """Of the last message."""
        return self._seq

    @property
    def dropped(self) -> int:
        """Messages that were numbered and not published."""
        return self._dropped

    def publish(self, events: Sequence[KvEvent]) -> None:
        """Announce what happened in one step of the engine. From any thread; never waits for the broker."""
        with self._lock:
            for event in events:
                self._blocks.apply(event)
            for group in batches(events):
                self._enqueue(group)
        self._loop.call_soon_threadsafe(self._work.set)

    def _enqueue(self, events: tuple[KvEvent, ...]) -> None:
        """Number a message and queue it, where there is room. Under the lock."""
        rank = self._rank
        self._seq += 1
        message = KvEvents(
            worker=rank.worker,
            incarnation=rank.incarnation,
            dp_rank=rank.dp_rank,
            seq=self._seq,
            block_tokens=rank.block_tokens,
            events=events,
        )
        blocks = blocks_in(events)
        if self._queued_blocks + blocks > QUEUED_BLOCKS_MAX or len(self._queue) == QUEUED_MESSAGES_MAX:
            self._gap = True
            self._dropped += 1
            return
        self._queue.append(message)
        self._queued_blocks += blocks

    # --- publishing -----------------------------------------------------------------------------------

    async def _send(self) -> None:
        while True:
            await self._work.wait()
            self._work.clear()
            while (message := self._next()) is not None:
                await self._publish(message)

    def _next(self) -> KvEvents | None:
        """The next message; after a loss at last an empty one, by which readers see it."""
        with self._lock:
            if not self._queue and self._gap and self._bus.connected:
                self._gap = False
                self._enqueue(())
                log.info("kv_events_gap_told", subject=self._subject, reason=f"{self._dropped} dropped so far")
            if not self._queue:
                return None
            message = self._queue.popleft()
            self._queued_blocks -= blocks_in(message.events)
            return message

    async def _publish(self, message: KvEvents) -> None:
        try:
            await self._bus.publish(self._subject, encode(message))
        except PipelineError as error:
            with self._lock:
                first, self._gap = not self._gap, True
                self._dropped += 1
            if first:
                log.warning("kv_events_dropped", subject=self._subject, code=error.code, reason=str(error))

    async def _reconnected(self) -> None:
        """What was on its way when the connection broke may be lost."""
        with self._lock:
            self._gap = True
        self._work.set()

    # --- snapshots ------------------------------------------------------------------------------------

    def _hear(self, received: Received) -> None:
        if not received.reply:
            return
        if len(self._readers) == READERS_MAX:
            log.warning("kv_snapshot_refused", subject=received.subject, reason=f"{READERS_MAX} readers wait")
            return
        form = format_of(received.payload) if received.payload else Format.JSON  # asked by hand
        self._readers.append((received.reply, form))
        self._asked.set()

    async def _answer(self) -> None:
        """One snapshot at a time, for all who asked before it began."""
        while True:
            await self._asked.wait()
            self._asked.clear()
            readers, self._readers = self._readers, []
            parts = await self._snapshot()
            for reply, form in readers:
                await self._reply(reply, form, parts)

    async def _snapshot(self) -> list[KvSnapshot]:
        with self._lock:
            blocks, seq = self._blocks.copy(), self._seq
        runs: list[BlocksStored] = []
        since_pause = 0
        for run in blocks.runs():
            runs.append(run)
            since_pause += len(run.hashes)
            if since_pause >= RUN_BLOCKS_MAX:
                since_pause = 0
                await asyncio.sleep(STEP_PAUSE_S)
        groups = list(batches(runs)) or [()]
        rank = self._rank
        return [
            KvSnapshot(
                worker=rank.worker,
                incarnation=rank.incarnation,
                dp_rank=rank.dp_rank,
                seq=seq,
                block_tokens=rank.block_tokens,
                part=part,
                parts=len(groups),
                blocks=group,
            )
            for part, group in enumerate(groups)
        ]

    async def _reply(self, reply: str, form: Format, parts: list[KvSnapshot]) -> None:
        try:
            for part in parts:
                await self._bus.publish(reply, encode(part, form))
                await asyncio.sleep(0)
        except PipelineError as error:
            log.warning("kv_snapshot_not_sent", worker=self._rank.worker, code=error.code)
