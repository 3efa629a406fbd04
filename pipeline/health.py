"""A worker's health as one value: whether it lives, whether it takes work, and every reason against either.

| code                 | it is                                          | live     | takes work |
|----------------------|------------------------------------------------|----------|------------|
| `starting`           | its engine loads, or it has not registered yet | yes      | no         |
| `draining`           | told to end: it finishes what it has           | yes      | no         |
| `paused`             | told to take nothing                           | yes      | no         |
| `broker_lost`        | without a connection to NATS                   | yes      | no         |
| `queue_full`         | up, but its model's queue turns requests away  | yes      | yes        |
| `engine_wedged`      | up, but its engine stands still; see `canary`  | yes      | no         |
| `engine_failing`     | up, but its engine refuses its canary          | yes      | no         |
| `event_loop_blocked` | stuck; after 30 s its leases are let go        | at first | no         |
| `engine_died`        | without its engine: it ends by itself          | no       | no         |

A worker that does not live is to be started again; one that is only not ready may become so by itself.
"""

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import structlog

from pipeline.bus import Bus
from pipeline.canary import Verdict
from pipeline.errors import BrokerRefused, BusUnavailable
from pipeline.lease import STALL_S_MAX
from subjects import names, streams
from subjects.streams import StreamSpec

LOOP_S_MAX: Final = 5.0
"""An event loop that has not turned for this long serves nobody well."""
QUEUES_S: Final = 5.0
"""How often the broker is asked how full the worker's queues are."""
FULL: Final = 0.95
"""A queue this full is called so: at its very limit it turns requests away and takes others, in turns."""
ENGINE: Final = "engine"
"""The runner's word for a pause that health asked for; others are operators'."""
_HARMLESS: Final = frozenset({"queue_full"})
"""Reasons for which a worker does not stop to take work."""

log = structlog.get_logger()


@dataclass(frozen=True)
class Reason:
    """One thing that is not as it should be."""

    code: str
    message: str


@dataclass(frozen=True)
class Health:
    """What is to be known of a worker."""

    live: bool
    ready: bool
    reasons: tuple[Reason, ...] = ()

    @property
    def healthy(self) -> bool:
        return not self.reasons

    def to_dict(self) -> dict[str, Any]:
        """As it travels, in JSON and in MessagePack."""
        reasons = [{"code": reason.code, "message": reason.message} for reason in self.reasons]
        return {"live": self.live, "ready": self.ready, "reasons": reasons}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Health":
        """What `to_dict` made. Raises KeyError, TypeError for anything else."""
        reasons = tuple(Reason(each["code"], each["message"]) for each in fields["reasons"])
        return cls(fields["live"], fields["ready"], reasons)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All that health follows from."""

    started: bool = True  # pulls tasks, or serves in another way
    draining: bool = False
    paused: tuple[str, ...] = ()  # who wants it
    broker_lost_s: float | None = None  # without a connection for so long; None: there is one
    loop_silent_s: float = 0.0
    engine: Verdict | None = None
    engine_death: str | None = None
    full: tuple[str, ...] = ()  # a sentence for each queue


def assess(facts: Facts) -> Health:
    """The health that follows; the worst reasons come first."""
    reasons = list(_reasons(facts))
    codes = {reason.code for reason in reasons}
    dead = "engine_died" in codes or facts.loop_silent_s > STALL_S_MAX
    return Health(live=not dead, ready=codes <= _HARMLESS, reasons=tuple(reasons))


def _reasons(facts: Facts) -> Iterable[Reason]:
    if facts.engine_death is not None:
        yield Reason("engine_died", facts.engine_death)
    if facts.loop_silent_s > LOOP_S_MAX:
        yield Reason("event_loop_blocked", f"the event loop has not turned for {facts.loop_silent_s:.0f} s")
    if facts.broker_lost_s is not None:
        yield Reason("broker_lost", f"no connection to NATS for {facts.broker_lost_s:.0f} s")
    if facts.engine is not None:
        yield Reason(facts.engine.code, facts.engine.message)
    if facts.draining:
        yield Reason("draining", "it finishes what it has and then ends")
    elif not facts.started:
        yield Reason("starting", "it does not take work yet")
    if others := [who for who in facts.paused if who != ENGINE]:
        yield Reason("paused", f"it takes no work until it is resumed: {', '.join(others)}")
    yield from (Reason("queue_full", sentence) for sentence in facts.full)


class BrokerClock:
    """Since when there is no connection. Readable from any thread."""

    def __init__(self) -> None:
        self._bus: Bus | None = None
        self._seen_s = time.monotonic()

    def watch(self, bus: Bus) -> None:
        """There is a bus now."""
        self._bus = bus

    def lost_s(self) -> float | None:
        """For how long it has been away; None while it is there."""
        now_s = time.monotonic()
        if self._bus is not None and self._bus.connected:
            self._seen_s = now_s
            return None
        return now_s - self._seen_s


class QueueWatch:
    """Which of a worker's queues turn requests away."""

    def __init__(self, bus: Bus, stream: StreamSpec, subject: str) -> None:
        self._bus, self._stream, self._subject = bus, stream, subject
        self.full: tuple[str, ...] = ()
        """A sentence for each."""

    async def run(self) -> None:
        """Look now and then, for ever. A broker that does not answer has told nothing new."""
        while True:
            try:
                self.full = tuple(await self._look())
            except (BusUnavailable, BrokerRefused) as error:
                log.debug("queues_unseen", stream=self._stream.name, code=error.code)
            await asyncio.sleep(QUEUES_S)

    async def _look(self) -> list[str]:
        found = []
        spec, limit = self._stream, self._stream.max_msgs_per_subject
        for subject, count in sorted((await self._bus.subjects_state(spec.name, self._subject)).items()):
            if limit and count >= FULL * limit:
                found.append(f"{count:,} of at most {limit:,} wait on {subject}")
        size = (await self._bus.stream_state(spec.name)).bytes
        if size >= FULL * spec.max_bytes:
            found.append(f"{spec.name} holds {size:,} bytes of at most {spec.max_bytes:,}")
        return found


def queues_of(role: str, model: str | None) -> tuple[StreamSpec, str] | None:
    """The stream and the subjects that a worker takes its tasks from; None where it has no queue."""
    named = names.token(model) if model else None
    match role:
        case "preprocess":
            return streams.REQUESTS, names.REQUESTS.any()
        case "decode" if named:
            return streams.WORK, names.tasks_of(names.DECODE_TASKS, named)
        case "prefill" if named:
            return streams.WORK, names.tasks_of(names.PREFILL_TASKS, named)
        case "embed" if named:
            return streams.WORK, names.EMBED_ANY.of(model=named)
    return None
