"""The pipeline as a picture, once a second: made once for all who look on, and only while somebody does."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

import msgspec
import structlog

from pipeline.bus import Bus, Received, Subscription
from pipeline.errors import BusUnavailable, Overloaded
from pipeline.presence import Presence, WorkerState
from pipeline.queues import QueueReader, Queues
from pipeline.rates import Rates, Speed
from pipeline.top_screen import STATE_STYLES, state_word, wrong
from subjects import names, streams
from subjects.codec import decode
from subjects.limits import PRESENCE_S
from subjects.messages import MetricsSnapshot

TICK_S: Final = 1.0
LINGER_S: Final = 40.0
"""So long after the last viewer has left, rates are kept up for the next one: a page that is loaded anew shows them at
once, and they reach back as far as a window does."""
VIEWERS_MAX: Final = 64
WORKERS_MAX: Final = 250
"""Shown at most; those in trouble come first. A state of so many is about 100 KB."""
MODELS_MAX: Final = 50
GONE_S: Final = 60.0
"""A worker that died is shown so long, even where nothing else remembers it; that it was restarted, as long again."""
GONE_MAX: Final = 256
GONE: Final = "gone"

log = structlog.get_logger()


class WorkerNow(msgspec.Struct, frozen=True, kw_only=True):
    """A worker as it is drawn."""

    role: str
    worker: str
    model: str | None = None
    state: str  # ready, starting, draining, paused, unhealthy, gone
    wrong: tuple[str, ...] = ()  # codes of `pipeline.health`
    engine: str | None = None
    slots: int = 0
    in_flight: int = 0
    running: int = 0
    waiting: int = 0
    kv_tokens_used: int = 0
    kv_tokens: int = 0
    tasks_per_s: float | None = None
    tokens_per_s: float | None = None
    silent_s: float = 0.0  # since its last heartbeat
    died_unix_s: float | None = None  # its last death, of the last `GONE_S`
    restarted_unix_s: float | None = None  # its successor under the same name was first heard of


class DepthNow(msgspec.Struct, frozen=True, kw_only=True):
    """What a queue holds for one model, in work or not."""

    queue: str
    model: str
    messages: int


class LeasesNow(msgspec.Struct, frozen=True, kw_only=True):
    """What the consumers of a queue have handed out. `model` None: for every model."""

    queue: str
    model: str | None
    leased: int
    oldest_s: float
    paused_until_unix_s: float | None


class Now(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that is drawn at one moment."""

    unix_s: float
    broker: bool | None  # None: it has not been asked yet
    total: Speed
    models: dict[str, Speed]
    workers: tuple[WorkerNow, ...]
    workers_left_out: int
    depths: tuple[DepthNow, ...]
    leases: tuple[LeasesNow, ...]
    dead_letters: int | None
    watched_s: float  # how far back rates, percentiles and errors reach


@dataclass(frozen=True)
class Death:
    """A worker's death, and what became of its name. Times are of this gateway's clock."""

    state: WorkerState  # the last that was known
    died_unix_s: float
    restarted_unix_s: float | None = None

    @property
    def latest_unix_s(self) -> float:
        return self.restarted_unix_s or self.died_unix_s


class Overview:
    """What is known of the pipeline, for viewers."""

    def __init__(self, bus: Bus, presence: Presence, ended: Callable[[], bool]) -> None:
        """`ended`: whether viewers are to leave."""
        self._bus, self._presence, self._ended = bus, presence, ended
        self._rates, self._reader = Rates(), QueueReader(bus)
        self._queues: Queues | None = None
        self._asked = False
        self._gone: dict[tuple[str, str], Death] = {}  # by role and worker
        self._viewers, self._left_s = 0, 0.0
        self._latest: bytes | None = None
        self._changed, self._due = asyncio.Event(), asyncio.Event()
        self._running: asyncio.Task[None] | None = None
        presence.on_down(self._note_down)

    def begin(self) -> None:
        """Count a viewer in; `end` counts it out. Raises Overloaded."""
        if self._viewers >= VIEWERS_MAX:
            raise Overloaded(
                f"{self._viewers} look at this gateway's console already", limit=VIEWERS_MAX, retry_after_s=10.0
            )
        self._viewers += 1
        if self._running is None or self._running.done():
            self._latest = None
            self._running = asyncio.create_task(self._run(), name="console.overview")

    def end(self) -> None:
        self._viewers, self._left_s = self._viewers - 1, time.monotonic()

    async def states(self) -> AsyncIterator[bytes]:
        """Each moment's `Now` as JSON; who reads slowly misses some. Ends with the gateway."""
        seen = None
        while not self._ended():
            changed = self._changed
            if self._latest is not None and self._latest is not seen:
                seen = self._latest
                yield seen
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(2 * TICK_S):
                    await changed.wait()

    async def close(self) -> None:
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait({self._running})

    def now(self) -> Now:
        """Everything as it stands."""
        queues = self._queues or Queues()
        dead = queues.streams.get(streams.DEAD.name)
        self._rates.forget_silent(time.monotonic(), PRESENCE_S)
        models = {*self._presence.models(), *(model for _, model in queues.depths)}
        everyone = _drawn(self._presence.workers(), self._remembered(), self._rates)
        return Now(
            unix_s=time.time(),
            broker=self._queues is not None if self._asked else None,
            total=self._rates.speed(),
            models={model: self._rates.speed(model) for model in sorted(models)[:MODELS_MAX]},
            workers=_those_in_trouble_first(everyone),
            workers_left_out=max(0, len(everyone) - WORKERS_MAX),
            depths=tuple(
                DepthNow(queue=queue, model=model, messages=messages)
                for (queue, model), messages in sorted(queues.depths.items())
            ),
            leases=leases(queues),
            dead_letters=dead.messages if dead else None,
            watched_s=self._rates.watched_s,
        )

    async def _run(self) -> None:
        hearing: Subscription | None = None
        asking = asyncio.create_task(self._ask(), name="console.queues")
        try:
            while self._viewers > 0 or time.monotonic() - self._left_s < LINGER_S:
                if hearing is None:
                    with contextlib.suppress(BusUnavailable):  # in an outage: the next tick tries again
                        hearing = await self._bus.subscribe(names.METRICS.any(), self._hear)
                try:
                    self._tell(msgspec.json.encode(self.now()))
                except Exception:  # the outermost guard: one moment that cannot be drawn must not end the others
                    log.exception("console_state_failed")
                await self._pause()
        finally:
            asking.cancel()
            if hearing is not None:
                await hearing.unsubscribe()

    async def _pause(self) -> None:
        """Until the next moment: at once where a worker went down."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TICK_S):
                await self._due.wait()
        self._due.clear()

    async def _ask(self) -> None:
        """Ask the broker once a second; apart from the moments, which do not wait for one that is away."""
        while True:
            began_s = time.monotonic()
            self._queues = await self._reader.read(self._presence.models())
            self._asked = True
            await asyncio.sleep(max(0.0, TICK_S - (time.monotonic() - began_s)))

    def _tell(self, state: bytes) -> None:
        self._latest = state
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _hear(self, received: Received) -> None:
        with contextlib.suppress(msgspec.DecodeError):  # of another release: its worker is shown, its rates are not
            self._rates.add(decode(MetricsSnapshot, received.payload), time.monotonic())

    def _note_down(self, worker: str, incarnation: str) -> None:
        """Remember a death. Who took its leave has not died."""
        for state in self._presence.workers():
            beat = state.heartbeat
            if beat is None or (state.worker, beat.incarnation) != (worker, incarnation) or beat.draining:
                continue
            self._gone.pop((state.role, worker), None)
            self._gone[state.role, worker] = Death(state, time.time())
            if len(self._gone) > GONE_MAX:
                del self._gone[next(iter(self._gone))]
        self._due.set()

    def _remembered(self) -> Mapping[tuple[str, str], Death]:
        """The deaths of late; notes who is back under a name of the dead."""
        since_unix_s = time.time() - GONE_S
        for state in self._presence.workers():
            death = self._gone.get((state.role, state.worker))
            if death and death.restarted_unix_s is None and _succeeds(state, death.state):
                self._gone[state.role, state.worker] = replace(death, restarted_unix_s=time.time())
        self._gone = {key: death for key, death in self._gone.items() if death.latest_unix_s > since_unix_s}
        return self._gone


def _succeeds(state: WorkerState, dead: WorkerState) -> bool:
    """Whether it is a new life; a worker that was only silent goes on with its old one."""
    if state.heartbeat is None or dead.heartbeat is None or state.down:
        return False
    return state.heartbeat.incarnation != dead.heartbeat.incarnation


def _drawn(known: Iterable[WorkerState], died: Mapping[tuple[str, str], Death], rates: Rates) -> list[WorkerNow]:
    """Those that are heard of, and those that have died and nobody knows any more."""
    drawn = []
    for state in known:
        if state.heartbeat is not None:
            death = died.get((state.role, state.worker))
            drawn.append(_worker(state, death, rates.speed_of(state.role, state.worker)))
    there = {(box.role, box.worker) for box in drawn}
    drawn += [_worker(death.state, death, Speed()) for key, death in died.items() if key not in there]
    return sorted(drawn, key=lambda box: (box.role, len(box.worker), box.worker))


def _worker(state: WorkerState, death: Death | None, speed: Speed) -> WorkerNow:
    beat, word = state.heartbeat, state_word(state)
    assert beat is not None
    down = word == "silent"
    return WorkerNow(
        role=state.role,
        worker=state.worker,
        model=beat.model,
        state=GONE if down else word,
        wrong=tuple(wrong(state)),
        engine=state.card.engine if state.card else None,
        slots=beat.slots,
        in_flight=0 if down else beat.in_flight,
        running=0 if down else beat.load.running,
        waiting=0 if down else beat.load.waiting,
        kv_tokens_used=0 if down else beat.load.kv_tokens_used,
        kv_tokens=beat.load.kv_tokens,
        tasks_per_s=speed.tasks_per_s,
        tokens_per_s=speed.tokens_per_s,
        silent_s=round(state.age_s, 1),
        died_unix_s=death.died_unix_s if death else None,
        restarted_unix_s=death.restarted_unix_s if death else None,
    )


def _those_in_trouble_first(workers: list[WorkerNow]) -> tuple[WorkerNow, ...]:
    """At most `WORKERS_MAX`, in the order in which they came."""
    if len(workers) <= WORKERS_MAX:
        return tuple(workers)
    order = [GONE, *STATE_STYLES]
    kept = sorted(range(len(workers)), key=lambda index: order.index(workers[index].state))[:WORKERS_MAX]
    return tuple(workers[index] for index in sorted(kept))


def leases(queues: Queues) -> tuple[LeasesNow, ...]:
    """By queue and model: the sum over the consumers that take from it, and the age of the oldest task of all."""
    found: dict[tuple[str, str | None], LeasesNow] = {}
    for key, state in queues.consumers.items():
        queue, model = queues.takes[key]
        before = found.get((queue, model))
        found[queue, model] = LeasesNow(
            queue=queue,
            model=model,
            leased=state.ack_pending + (before.leased if before else 0),
            oldest_s=max(queues.oldest_s.get(key, 0.0), before.oldest_s if before else 0.0),
            paused_until_unix_s=state.paused_until_unix_s or (before.paused_until_unix_s if before else None),
        )
    return tuple(found.values())
