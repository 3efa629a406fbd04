"""The prefix index of a model, kept up to date over the bus: KV events heard live, snapshots where they are not enough.

Only ranks of workers that presence holds alive are followed, so the index has no dead worker for longer than
presence takes to notice. The last message of each worker, which nothing follows that would show its loss, is read
from the stream now and then.
"""

import asyncio
import contextlib
import time
from dataclasses import dataclass
from typing import Final

import msgspec
import structlog

from pipeline.bus import Bus, Received, Subscription
from pipeline.errors import BusUnavailable, NoResponders
from pipeline.jetstream import STATUS
from pipeline.kv_reader import KvReader
from pipeline.prefix_index import PrefixIndex, RankId
from pipeline.presence import Presence
from subjects import names, streams
from subjects.codec import decode, encode
from subjects.messages import KvEvents, KvSnapshot, KvSnapshotRequest

ROLES: Final = frozenset({"decode", "prefill"})
LOOK_S: Final = 0.5  # how soon a new worker is followed
SNAPSHOT_S_MAX: Final = 10.0
SNAPSHOTS_AT_ONCE: Final = 4
RETRY_S_MIN: Final = 0.25
RETRY_S_MAX: Final = 30.0
"""A rank that gives no snapshot is asked again after twice the time, up to this: workers without KV events, too."""
LAST_READ_S: Final = 10.0
RANKS_MAX: Final = 4_096

log = structlog.get_logger()


@dataclass(slots=True)
class _Followed:
    """A rank, and the one task that gets its snapshots."""

    reader: KvReader
    asking: asyncio.Task[None] | None = None
    failures: int = 0
    ask_from_s: float = 0.0  # on the monotonic clock
    answer: asyncio.Future[None] | None = None  # done when the attempt under way has an end


class KvIndexFeed:
    """Follows the KV blocks of one model's workers in `index`, from `start` until `close`."""

    def __init__(self, bus: Bus, presence: Presence, model: str, blocks_max: int) -> None:
        self.index = PrefixIndex(blocks_max)
        self.model = model
        self._bus, self._presence = bus, presence
        self._followed: dict[RankId, _Followed] = {}
        self._alive: set[str] = set()  # workers
        self._at_once = asyncio.Semaphore(SNAPSHOTS_AT_ONCE)
        self._subscription: Subscription | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._caught_up = asyncio.Event()

    async def start(self) -> None:
        """Begin to follow. Raises BusUnavailable."""
        self._subscription = await self._bus.subscribe(names.KV_EVENTS.any(model=self.model), self._hear)
        self._presence.on_down(self._forget_worker)
        self._bus.on_reconnect(self._ask_all)
        self._look()
        self._tasks = [
            asyncio.create_task(self._keep_looking(), name="kv feed"),
            asyncio.create_task(self._keep_reading_last(), name="kv feed, last messages"),
        ]

    async def close(self) -> None:
        """End; the index stays as it is."""
        for task in self._tasks:
            task.cancel()
        if self._subscription:
            await self._subscription.unsubscribe()
            self._subscription = None
        for followed in self._followed.values():
            if followed.asking:
                followed.asking.cancel()

    def behind(self) -> list[RankId]:
        """The ranks whose blocks are not all known."""
        return sorted(rank for rank, followed in self._followed.items() if followed.reader.behind)

    async def wait_caught_up(self, timeout_s: float) -> bool:
        """Wait until no rank is behind; False when the time is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.behind():
                    await self._caught_up.wait()
                return True
        return False

    # --- whom to follow -------------------------------------------------------------------------------

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                self._look()
            except Exception:  # the outermost guard: without it the index would never change again
                log.exception("kv_feed_failed", model=self.model)

    def _look(self) -> None:
        """Follow the ranks of workers that are alive and no others; ask for the snapshots that are due."""
        states = [s for s in self._presence.workers(model=self.model) if s.role in ROLES and s.heartbeat and not s.down]
        self._alive = {state.worker for state in states}
        for worker in {rank.worker for rank in self._followed} - self._alive:
            self._forget(worker)
        for state in states:
            for dp_rank in range(state.card.dp_size if state.card else 0):
                if followed := self._follow(RankId(state.worker, dp_rank)):
                    self._ask(followed)

    def _follow(self, rank: RankId) -> _Followed | None:
        """None where too many are followed already."""
        followed = self._followed.get(rank)
        if followed is None and len(self._followed) < RANKS_MAX:
            followed = self._followed[rank] = _Followed(KvReader(rank, self.index))
        return followed

    def _forget_worker(self, worker: str, incarnation: str) -> None:
        """It is down; if another incarnation took its name, that one is followed soon."""
        self._alive.discard(worker)
        self._forget(worker)

    def _forget(self, worker: str) -> None:
        for rank in [rank for rank in self._followed if rank.worker == worker]:
            followed = self._followed.pop(rank)
            if followed.asking:
                followed.asking.cancel()
            followed.reader.drop()
        self._note_change()

    # --- events and snapshots -------------------------------------------------------------------------

    def _hear(self, received: Received) -> None:
        self._take(received.subject, received.payload)

    def _take(self, subject: str, payload: bytes) -> None:
        """A message of KV events, live or from the stream; of a worker that presence does not know nothing is kept."""
        try:
            events = decode(KvEvents, payload)
        except msgspec.DecodeError as error:
            log.warning("kv_events_unreadable", subject=subject, reason=str(error))
            return
        if events.worker not in self._alive:
            return
        if followed := self._follow(RankId(events.worker, events.dp_rank)):
            attempt = followed.reader.attempt
            followed.reader.take(events)
            if followed.reader.attempt != attempt:  # a new life: what was asked of the former is void
                _end(followed)
            self._ask(followed)

    async def _ask_all(self) -> None:
        """After an outage: nobody knows what was published in it."""
        for followed in list(self._followed.values()):
            followed.reader.lose()
            followed.failures, followed.ask_from_s = 0, 0.0
            self._ask(followed)

    def _ask(self, followed: _Followed) -> None:
        """Begin to get a snapshot where one is needed, none is under way, and the pause after a failure is over."""
        if followed.reader.behind and followed.asking is None and time.monotonic() >= followed.ask_from_s:
            followed.asking = asyncio.create_task(self._bring_up(followed), name="kv snapshot")

    async def _bring_up(self, followed: _Followed) -> None:
        """Get one snapshot; if the reader is still behind, the next may be asked for after a pause."""
        rank = followed.reader.rank
        try:
            async with self._at_once:
                if followed.reader.behind:
                    await self._get_snapshot(followed)
        except (BusUnavailable, TimeoutError) as error:
            reason = str(error) or f"not all of it came within {SNAPSHOT_S_MAX:g} s"
            log.debug("kv_snapshot_failed", worker=rank.worker, attempt=followed.failures + 1, reason=reason)
        finally:
            followed.asking = None
        if followed.reader.behind:
            followed.ask_from_s = time.monotonic() + min(RETRY_S_MIN * 2 ** min(followed.failures, 10), RETRY_S_MAX)
            followed.failures += 1
        else:
            followed.failures = 0
            self._note_change()

    async def _get_snapshot(self, followed: _Followed) -> None:
        """Ask the rank and wait for the last part, or until a new life voids it.

        Raises NoResponders, BusUnavailable, TimeoutError.
        """
        reader = followed.reader
        attempt, followed.answer = reader.begin_snapshot(), asyncio.get_running_loop().create_future()

        def hear(received: Received) -> None:
            if (received.headers or {}).get(STATUS) == "503":
                _end(followed, NoResponders(f"{reader.rank.worker} gives no snapshots"))
                return
            try:
                reader.take_part(attempt, decode(KvSnapshot, received.payload))
            except msgspec.DecodeError as error:
                _end(followed, BusUnavailable(f"{reader.rank.worker} sends what is no snapshot: {error}"))
            if reader.attempt != attempt:
                _end(followed)

        subscription = await self._bus.subscribe(self._bus.new_inbox(), hear)
        try:
            subject = names.KV_SNAPSHOT.of(worker=reader.rank.worker, rank=str(reader.rank.dp_rank))
            await self._bus.publish(subject, encode(KvSnapshotRequest()), reply=subscription.subject)
            async with asyncio.timeout(SNAPSHOT_S_MAX):
                await followed.answer
        finally:
            await subscription.unsubscribe()

    async def _keep_reading_last(self) -> None:
        """Hear each worker's last message again: one that was missed has nothing after it to show that."""
        while True:
            await asyncio.sleep(LAST_READ_S)
            for worker in sorted(self._alive):
                subject = names.KV_EVENTS.of(model=self.model, worker=worker)
                try:
                    last = await self._bus.last(streams.KV_EVENTS.name, subject)
                except BusUnavailable as error:
                    log.debug("kv_events_unread", worker=worker, code=error.code, reason=str(error))
                    continue
                if last is not None:
                    self._take(subject, last.payload)

    def _note_change(self) -> None:
        caught_up, self._caught_up = self._caught_up, asyncio.Event()
        caught_up.set()


def _end(followed: _Followed, error: BusUnavailable | None = None) -> None:
    """End the wait for an attempt, if there is one."""
    answer = followed.answer
    if answer is None or answer.done():
        return
    if error:
        answer.set_exception(error)
    else:
        answer.set_result(None)
