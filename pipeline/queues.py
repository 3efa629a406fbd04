"""What the broker says of the pipeline's streams, consumers and queues."""

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from pipeline.bus import Bus, ConsumerState, StreamState
from pipeline.errors import PipelineError
from pipeline.peers import all_consumers
from subjects import names, streams
from subjects.streams import ConsumerSpec

ASK_S_MAX: Final = 3.0
"""The broker answers all questions within this time, or counts as away."""
REREAD_S: Final = 10.0
"""The oldest task of a consumer whose floor stands still is looked up again this often: it may have been purged."""
QUEUED: Final = tuple(kind for kind in names.ALL if kind.any() in (*streams.REQUESTS.subjects, *streams.WORK.subjects))
"""The subjects of work; a model's that begin alike are one queue."""
QUEUES: Final = tuple(dict.fromkeys(kind.template.split(".")[1] for kind in QUEUED))
MODELS_MAX: Final = 256
OTHER: Final = "other"
"""Takes the place of the models beyond `MODELS_MAX`: anyone may publish to a model's subject that is none."""


@dataclass(frozen=True)
class Storage:
    """What JetStream takes of this account."""

    memory_bytes: int = 0
    file_bytes: int = 0
    api_errors: int = 0


@dataclass(frozen=True)
class Queues:
    """What the broker said at one moment."""

    streams: dict[str, StreamState] = field(default_factory=dict)
    consumers: dict[tuple[str, str], ConsumerState] = field(default_factory=dict)  # by stream and consumer
    takes: dict[tuple[str, str], tuple[str, str | None]] = field(default_factory=dict)
    """A consumer's queue and model; None: of every model."""
    oldest_s: dict[tuple[str, str], float] = field(default_factory=dict)  # age of a consumer's oldest unsettled task
    depths: dict[tuple[str, str], int] = field(default_factory=dict)  # messages by queue and model
    storage: Storage = Storage()


class QueueReader:
    """Asks one broker, again and again."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._oldest: dict[tuple[str, str], _Oldest] = {}

    async def read(self, models: Iterable[str]) -> Queues | None:
        """The state of everything that a pipeline with these models has; None where the broker does not answer.

        A consumer that is not there yet (no worker of its kind has ever started) is left out.
        """
        try:
            async with asyncio.timeout(ASK_S_MAX):
                return await self._read(models)
        except (TimeoutError, PipelineError):
            return None

    async def _read(self, models: Iterable[str]) -> Queues:
        served = tuple(models)
        queues = Queues(storage=await self._storage(), depths=await self._depths(served))
        for stream in streams.STREAMS:
            queues.streams[stream.name] = await self._bus.stream_state(stream.name)
        for consumer in await all_consumers(self._bus, served):
            key = (consumer.stream, consumer.name)
            try:
                state = await self._bus.consumer_state(*key)
            except PipelineError:
                continue
            queues.consumers[key], queues.takes[key] = state, _takes(consumer)
            queues.oldest_s[key] = await self._oldest_s(consumer, state)
        return queues

    async def _storage(self) -> Storage:
        info = await self._bus.api("INFO")
        return Storage(memory_bytes=info["memory"], file_bytes=info["storage"], api_errors=info["api"]["errors"])

    async def _depths(self, served: Iterable[str]) -> dict[tuple[str, str], int]:
        found: dict[str, int] = {}
        for stream in (streams.REQUESTS, streams.WORK):
            for subject in stream.subjects:
                found.update(await self._bus.subjects_state(stream.name, subject))
        return by_queue(found, served)

    async def _oldest_s(self, consumer: ConsumerSpec, state: ConsumerState) -> float:
        """The age of the oldest task that waits or is in work; 0 where there is none.

        A look-up reads one whole message, so it is made only where the consumer has moved on since the last one.
        """
        key = (consumer.stream, consumer.name)
        if not state.pending and not state.ack_pending:
            self._oldest.pop(key, None)
            return 0.0
        known, now_s = self._oldest.get(key), time.monotonic()
        if known is None or known.ack_floor != state.ack_floor or now_s - known.read_s > REREAD_S:
            known = _Oldest(state.ack_floor, await self._stored_unix_s(consumer, state), now_s)
            self._oldest[key] = known
        return max(0.0, time.time() - known.stored_unix_s)

    async def _stored_unix_s(self, consumer: ConsumerSpec, state: ConsumerState) -> float:
        subject = consumer.filter_subject or names.REQUESTS.any()
        message = await self._bus.next_stored(consumer.stream, subject, state.ack_floor + 1)
        return message.stored_unix_s if message else time.time()  # None: settled meanwhile


@dataclass(frozen=True)
class _Oldest:
    ack_floor: int  # the consumer's, when it was looked up
    stored_unix_s: float
    read_s: float  # of the monotonic clock


def _takes(consumer: ConsumerSpec) -> tuple[str, str | None]:
    subject = consumer.filter_subject or names.REQUESTS.any()
    kind = next(kind for kind in QUEUED if kind.parse(subject))
    return subject.split(".")[1], None if consumer.filter_subject is None else (kind.parse(subject) or {})["model"]


def by_queue(subjects: dict[str, int], served: Iterable[str] = ()) -> dict[tuple[str, str], int]:
    """Messages by subject as messages by queue and model, 0 for the queues of `served` models that are empty.

    The models beyond `MODELS_MAX` count together as `OTHER`.
    """
    models = set(sorted(served)[:MODELS_MAX])
    depths = dict.fromkeys(((queue, model) for model in sorted(models) for queue in QUEUES), 0)
    for subject, count in sorted(subjects.items()):
        for kind in QUEUED:
            if parts := kind.parse(subject):
                model = parts["model"] if parts["model"] in models or len(models) < MODELS_MAX else OTHER
                models.add(model)
                key = (subject.split(".")[1], model)
                depths[key] = depths.get(key, 0) + count
                break
    return depths
