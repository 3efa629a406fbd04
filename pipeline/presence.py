"""Presence: which workers are there, what they serve, and word of a worker that went away.

A worker announces itself in two ways: a model card in a key-value bucket says what it can serve, and a
heartbeat each second says that it lives and whether it takes work. Nobody is judged by the silence of an
outage: all clocks begin anew with each connection, and after any stall of this process's own event loop.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Final

import msgspec
import structlog

from pipeline.bus import Bucket, Bus, Received, Subscription, Watch
from pipeline.errors import BusUnavailable, Overloaded, WorkerGone
from subjects import names, streams
from subjects.codec import decode, encode
from subjects.limits import HEARTBEAT_S, PRESENCE_S
from subjects.messages import Heartbeat, ModelCard

TICK_S: Final = 0.1  # how late a silence may be noticed
STALL_S: Final = 0.5  # a tick that comes this late: heartbeats may lie unread
CLOSE_S_MAX: Final = 2.0
MODELS_SEEN_MAX: Final = 10_000

log = structlog.get_logger()

OnDown = Callable[[str, str], None]
"""Called with the worker's name and the incarnation that went away."""


@dataclass(frozen=True)
class WorkerState:
    """A worker as it is known now."""

    role: str
    worker: str
    card: ModelCard | None  # None: serves nothing yet, or any model
    heartbeat: Heartbeat | None  # the last one
    age_s: float  # since the last heartbeat; infinite where there was none
    down: bool

    @property
    def ready(self) -> bool:
        """Takes new work."""
        beat = self.heartbeat
        return beat is not None and beat.ready and not beat.draining and not self.down

    @property
    def registered(self) -> bool:
        """Its card is of the life that its heartbeats are of."""
        card, beat = self.card, self.heartbeat
        return card is not None and beat is not None and card.incarnation == beat.incarnation


@dataclass(slots=True)
class _Known:
    """What has been heard of one worker. Times are of the monotonic clock."""

    card: ModelCard | None = None
    heartbeat: Heartbeat | None = None
    heard_s: float = -math.inf
    down: bool = False


class Presence:
    """The workers as one process sees them."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._known: dict[tuple[str, str], _Known] = {}  # by role and worker
        self._models_seen: dict[tuple[str, str], None] = {}  # by role and model
        self._on_down: list[OnDown] = []
        self._clocks: dict[str, set[asyncio.Timeout]] = {}  # of what lasts while a worker is up
        self._changed = asyncio.Event()
        self._clocks_from_s = 0.0
        self._watch: Watch | None = None
        self._subscription: Subscription | None = None
        self._ticker: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to listen; returns when all cards there are have been read. Raises ProvisionError, BusUnavailable."""
        self._clocks_from_s = time.monotonic()
        self._subscription = await self._bus.subscribe(names.HEARTBEAT.any(), self._hear)
        bucket = await self._bus.bucket(streams.CARDS)
        self._watch = await bucket.watch(self._take_card)
        try:
            async with asyncio.timeout(PRESENCE_S):
                await self._watch.synced.wait()
        except TimeoutError:
            raise BusUnavailable(f"the model cards could not be read within {PRESENCE_S:g} s") from None
        self._ticker = asyncio.create_task(self._tick(), name="presence")

    async def close(self) -> None:
        if self._ticker:
            self._ticker.cancel()
        if self._watch:
            await self._watch.stop()
        if self._subscription:
            await self._subscription.unsubscribe()

    @contextlib.asynccontextmanager
    async def while_up(self, worker: str) -> AsyncIterator[None]:
        """Break the block off when the worker goes down. Raises WorkerGone."""
        try:
            async with asyncio.timeout(None) as clock:
                clocks = self._clocks.setdefault(worker, set())
                clocks.add(clock)
                try:
                    yield
                finally:
                    clocks.discard(clock)
                    if not clocks and self._clocks.get(worker) is clocks:
                        del self._clocks[worker]
        except TimeoutError:
            if not clock.expired():
                raise
            raise WorkerGone(f"{worker} went down") from None

    def on_down(self, callback: OnDown) -> None:
        """Call when a worker's heartbeats stop, it takes its leave, or another incarnation takes its name."""
        self._on_down.append(callback)

    def workers(self, role: str | None = None, model: str | None = None) -> list[WorkerState]:
        """Everyone heard of, sorted by role and name; those that are down until their card's time ends."""
        return [
            state
            for state in (self._state(key, known) for key, known in sorted(self._known.items()))
            if role in (None, state.role) and (model is None or _model_of(state) == model)
        ]

    def ready(self, model: str, role: str = "decode") -> bool:
        """Whether a worker has registered the model, in its present life, and takes work."""
        return any(state.ready and state.registered for state in self.workers(role, names.token(model)))

    def models(self) -> set[str]:
        """The models of all registered workers."""
        return {known.card.model for known in self._known.values() if known.card}

    def known(self, model: str, role: str = "decode") -> bool:
        """Whether a worker of the role has registered the model since this process began to listen."""
        return (role, names.token(model)) in self._models_seen

    async def wait_ready(self, model: str, role: str = "decode", timeout_s: float = 10.0) -> bool:
        """Wait until `ready`; False when the time is over."""
        return await self.wait_for(lambda: self.ready(model, role), timeout_s)

    async def wait_for(self, holds: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until something holds that follows from who is there; False when the time is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not holds():
                    await self._changed.wait()
                return True
        return False

    def _state(self, key: tuple[str, str], known: _Known) -> WorkerState:
        return WorkerState(
            role=key[0],
            worker=key[1],
            card=known.card,
            heartbeat=known.heartbeat,
            age_s=time.monotonic() - known.heard_s,
            down=known.down,
        )

    def _hear(self, received: Received) -> None:
        """A heartbeat."""
        try:
            beat = decode(Heartbeat, received.payload)
        except msgspec.DecodeError as error:
            log.warning("heartbeat_unreadable", subject=received.subject, reason=str(error))
            return
        key = (beat.role, beat.worker)
        known = self._known.setdefault(key, _Known())
        before = self._state(key, known).ready
        if known.heartbeat and known.heartbeat.incarnation != beat.incarnation:
            self._judge_down(key, known, "another incarnation took its name")
        known.heartbeat, known.heard_s, known.down = beat, time.monotonic(), False
        if before != self._state(key, known).ready:
            self._note_change()

    def _take_card(self, key: str, value: bytes | None) -> None:
        """A card that was put, or None: deleted, expired, or lost with the broker's store."""
        if key.count(".") != 2:
            log.warning("card_unreadable", reason=f"not a card's key: {key}")
            return
        role, _, worker = key.split(".")
        known = self._known.setdefault((role, worker), _Known())
        if value is not None:
            try:
                known.card = decode(ModelCard, value)
            except msgspec.DecodeError as error:
                log.warning("card_unreadable", worker=worker, reason=str(error))
                return
            if len(self._models_seen) < MODELS_SEEN_MAX:
                self._models_seen[role, known.card.model] = None
        else:
            known.card = None
            beat = known.heartbeat
            if beat is None or known.down:
                del self._known[role, worker]
            elif beat.draining:  # its leave; without `draining` its heartbeats go on: a lost card is put again
                self._judge_down((role, worker), known, "it took its leave")
                del self._known[role, worker]
        self._note_change()

    async def _tick(self) -> None:
        due_s = time.monotonic()
        while True:
            due_s += TICK_S
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            now_s = time.monotonic()
            if now_s - due_s > STALL_S:
                self._clocks_from_s = due_s = now_s
            if self._bus.connected:
                self._judge_silence(now_s)

    def _judge_silence(self, now_s: float) -> None:
        """Workers not heard of for `PRESENCE_S` of uninterrupted listening are down."""
        listening_since_s = max(self._clocks_from_s, self._bus.connected_since_s)
        for key, known in list(self._known.items()):
            if known.down or known.heartbeat is None:
                continue
            if now_s - max(known.heard_s, listening_since_s) > PRESENCE_S:
                self._judge_down(key, known, "its heartbeats stopped")
                if known.card is None:
                    del self._known[key]

    def _judge_down(self, key: tuple[str, str], known: _Known, why: str) -> None:
        if known.down or known.heartbeat is None:
            return
        known.down = True
        log.warning("worker_down", role=key[0], worker=key[1], reason=why)
        for clock in self._clocks.pop(key[1], ()):
            clock.reschedule(0)
        for callback in list(self._on_down):
            try:
                callback(key[1], known.heartbeat.incarnation)
            except Exception:  # the outermost guard: one callback's failure must not keep others from theirs
                log.exception("down_callback_failed", worker=key[1])
        self._note_change()

    def _note_change(self) -> None:
        """Wake all that wait; the next change has an event of its own."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


def _model_of(state: WorkerState) -> str | None:
    if state.card:
        return state.card.model
    return state.heartbeat.model if state.heartbeat else None


class Announcer:
    """A worker's own voice: heartbeats from `start` on, and its card from `publish_card` on, until `close`."""

    def __init__(
        self,
        bus: Bus,
        role: str,
        worker: str,
        model: str | None,
        incarnation: str,
        state: Callable[[], Heartbeat],
    ) -> None:
        self._bus, self._state, self.incarnation = bus, state, incarnation
        self._subject = names.HEARTBEAT.of(role=role, worker=worker)
        self._key = names.card_key(role, model, worker)
        self._card: bytes | None = None
        self._card_due = asyncio.Event()
        self._bucket: Bucket | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Begin to send heartbeats."""
        self._tasks.append(asyncio.create_task(self._beat(), name="heartbeats"))

    async def publish_card(self, card: ModelCard) -> None:
        """Register the worker. Raises ProvisionError, BusUnavailable: a worker that cannot register must say so."""
        self._card = encode(card)
        if self._bucket is None:
            self._bucket = await self._bus.bucket(streams.CARDS)
            await self._bucket.put(self._key, self._card)
            self._bus.on_reconnect(self._renew_card)
            self._tasks.append(asyncio.create_task(self._keep_card(self._bucket), name="card"))
        else:
            await self._bucket.put(self._key, self._card)
        await self._send(self._state())

    async def close(self) -> None:
        """Take leave: a last heartbeat that says so, and no card any more."""
        for task in self._tasks:
            task.cancel()
        self._card = None
        with contextlib.suppress(BusUnavailable, Overloaded, TimeoutError):
            async with asyncio.timeout(CLOSE_S_MAX):
                await self._send(msgspec.structs.replace(self._state(), ready=False, draining=True))
                if self._bucket:
                    await self._bucket.delete(self._key)

    async def _beat(self) -> None:
        while True:
            try:
                await self._send(self._state())
            except Exception:  # the outermost guard: without it one bad heartbeat would be a worker's death
                log.exception("heartbeat_failed", subject=self._subject)
            await asyncio.sleep(HEARTBEAT_S)

    async def _send(self, beat: Heartbeat) -> None:
        """Send a heartbeat now or not at all: one that waited for an outage to end would be a lie."""
        if self._bus.connected:
            await self._bus.publish(self._subject, encode(msgspec.structs.replace(beat, sent_unix_s=time.time())))

    async def _renew_card(self) -> None:
        self._card_due.set()

    async def _keep_card(self, bucket: Bucket) -> None:
        """Put the card again before it expires, and after each outage."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(streams.CARDS.ttl_s / 3):
                    await self._card_due.wait()
            self._card_due.clear()
            try:
                if self._card is not None:
                    await bucket.put(self._key, self._card)
            except (BusUnavailable, Overloaded) as error:
                log.warning("card_not_renewed", code=error.code, reason=str(error))
