"""Telemetry: everything that the workers report and the broker knows, under one Prometheus `/metrics`.

It has no task queue: it listens to the metrics snapshots, heartbeats and KV events that workers publish and asks
the broker for its streams and consumers. Any number of telemetry workers may run; each one shows everything.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final

import msgspec
import structlog
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from pipeline import metrics
from pipeline.bus import Received
from pipeline.errors import ConfigError
from pipeline.metrics_page import MetricsPage
from pipeline.presence import Presence, WorkerState
from pipeline.queues import MODELS_MAX, QueueReader, Queues
from pipeline.snapshots import Snapshots, merged
from pipeline.worker import Worker
from subjects import names
from subjects.codec import decode
from subjects.messages import BlocksRemoved, BlocksStored, KvEvents, MetricsSnapshot

BROKER_S: Final = 1.0
"""How often the broker is asked."""
KV_SERIES_MAX: Final = 4096
SERVING_ROLES: Final = ("decode", "prefill", "embed")

log = structlog.get_logger()


class KvCounts:
    """How many KV blocks came and went, by model, worker, event and tier."""

    def __init__(self) -> None:
        self._blocks: dict[tuple[str, str, str, str], int] = {}

    def add(self, model: str, message: KvEvents) -> None:
        for event in message.events:
            if isinstance(event, BlocksStored):
                self._count((model, message.worker, "stored", event.tier), len(event.hashes))
            elif isinstance(event, BlocksRemoved):
                self._count((model, message.worker, "removed", event.tier), len(event.hashes))
            else:
                self._count((model, message.worker, "cleared", ""), 1)

    def forget_others(self, workers: set[str]) -> None:
        """Drop what is of none of these workers."""
        for key in [key for key in self._blocks if key[1] not in workers]:
            del self._blocks[key]

    def family(self) -> Metric:
        about = 'KV blocks in a worker\'s KV events, by cache tier; with event "cleared", how often it lost them all.'
        labels = ("model", "worker", "event", "tier")
        family = CounterMetricFamily(f"{metrics.PREFIX}_kv_event_blocks", about, labels=labels)
        for key, count in list(self._blocks.items()):  # a copy: the event loop goes on counting
            family.add_metric(key, count)
        return family

    def _count(self, key: tuple[str, str, str, str], blocks: int) -> None:
        if key in self._blocks or len(self._blocks) < KV_SERIES_MAX:
            self._blocks[key] = self._blocks.get(key, 0) + blocks


class Telemetry:
    """The state behind `/metrics`: written on the event loop, read by the HTTP server's threads.

    What the threads read is replaced as a whole and never changed, so that no lock is needed.
    """

    def __init__(self, connected: Callable[[], bool] = lambda: True) -> None:
        """`connected`: whether the broker is there now; without it, what it said is not shown any more."""
        self._connected = connected
        self._heard = Snapshots()
        self._kv = KvCounts()
        self._serving: dict[tuple[str, str], int] = {}
        self.snapshots: tuple[MetricsSnapshot, ...] = ()
        self.workers: tuple[WorkerState, ...] = ()
        self.queues: Queues | None = None
        self.malformed = 0

    def hear(self, received: Received) -> None:
        """A process's snapshot came in."""
        try:
            self._heard.add(decode(MetricsSnapshot, received.payload), time.monotonic())
        except msgspec.DecodeError:
            self.malformed += 1  # counted and shown; a log line a second would only hide others

    def hear_kv(self, received: Received) -> None:
        """KV events came in."""
        parts = names.KV_EVENTS.parse(received.subject)
        assert parts, received.subject
        try:
            self._kv.add(parts["model"], decode(KvEvents, received.payload))
        except msgspec.DecodeError:
            self.malformed += 1

    def refresh(self, workers: Iterable[WorkerState], queues: Queues | None) -> None:
        """Show what is known now. `queues` None: the broker did not answer, and what it said before no longer holds."""
        self._heard.forget_silent(time.monotonic())
        self.snapshots = self._heard.current()
        self.workers = tuple(workers)
        self._kv.forget_others({state.worker for state in self.workers})
        self._serving = serving(self._serving, self.workers)
        self.queues = queues

    def collect(self) -> Iterator[Metric]:
        """All families, as prometheus_client's registry asks for them at each scrape."""
        queues = self.queues if self._connected() else None
        yield _gauge("broker_up", "1 where the broker answers telemetry.", queues is not None)
        yield from _broker_families(queues or Queues())
        yield from _queue_families(queues or Queues())
        yield from _worker_families(self.workers)
        yield from _engine_families(self.workers)
        yield _serving_family(self._serving)
        yield self._kv.family()
        families, left_out = merged(self.snapshots)
        yield from families
        yield _gauge("samples_left_out", "Samples of workers beyond the limits of telemetry.", left_out)
        yield _gauge("snapshots_malformed", "Messages of workers that could not be decoded.", self.malformed)


def serving(before: dict[tuple[str, str], int], workers: Iterable[WorkerState]) -> dict[tuple[str, str], int]:
    """How many workers take work, by model and role; 0, and not nothing, for a model that has lost its last one."""
    counts = dict.fromkeys(before, 0)
    for state in workers:
        model = state.card.model if state.card else state.heartbeat.model if state.heartbeat else None
        if model is None or state.role not in SERVING_ROLES or not state.ready:
            continue
        key = (names.token(model), state.role)
        if key in counts or len(counts) < MODELS_MAX:
            counts[key] = counts.get(key, 0) + 1
    return counts


def _serving_family(counts: dict[tuple[str, str], int]) -> Metric:
    about = "Workers that take work for a model; 0 where it had one since telemetry started, and has none now."
    family = _family("model_workers_ready", about, ("model", "role"))
    for key, count in counts.items():
        family.add_metric(key, count)
    return family


def _worker_families(workers: Iterable[WorkerState]) -> list[Metric]:
    """What heartbeats say of workers."""
    labels = ("role", "worker", "model")
    ready = _family("worker_ready", "1 where the worker takes new work.", labels)
    draining = _family("worker_draining", "1 where the worker takes no more work and finishes what it has.", labels)
    slots = _family("worker_slots", "The most tasks that it takes at once.", labels)
    in_flight = _family("worker_in_flight", "Tasks that it works on.", labels)
    for state in workers:
        beat = state.heartbeat
        if beat is None or state.down:
            continue
        of = (beat.role, beat.worker, beat.model or "")
        ready.add_metric(of, float(state.ready))
        draining.add_metric(of, float(beat.draining))
        slots.add_metric(of, beat.slots)
        in_flight.add_metric(of, beat.in_flight)
    return [ready, draining, slots, in_flight]


def _engine_families(workers: Iterable[WorkerState]) -> list[Metric]:
    """What heartbeats say of engines, be they SGLang's or simulated: what routing and admission go by."""
    labels = ("role", "worker", "model")
    figures = {
        "running": "Choices that the engine generates now.",
        "waiting": "Choices that wait inside the engine.",
        "kv_tokens_used": "Tokens whose KV running choices hold.",
        "kv_tokens": "Tokens whose KV fits.",
        "waiting_prefill_tokens": "Prompt tokens that wait inside the engine to be computed.",
        "generated_tokens_per_s": "Tokens that it generates a second.",
        "cached_share": "Of the prompt tokens that were prefilled last, the share found in its cache, in [0, 1].",
    }
    families = {name: _family(f"engine_{name}", about, labels) for name, about in figures.items()}
    for state in workers:
        beat = state.heartbeat
        if beat is None or state.down or not beat.load.kv_tokens:
            continue
        load = msgspec.structs.asdict(beat.load)
        for name, family in families.items():
            family.add_metric((beat.role, beat.worker, beat.model or ""), load[name])
    return list(families.values())


def _broker_families(queues: Queues) -> list[Metric]:
    """What the broker keeps."""
    messages = _family("stream_messages", "Messages that a stream holds.", ("stream",))
    size = _family("stream_bytes", "Bytes that a stream holds.", ("stream",))
    for stream, state in queues.streams.items():
        messages.add_metric((stream,), state.messages)
        size.add_metric((stream,), state.bytes)
    storage = _family("jetstream_bytes", "What JetStream holds of this account.", ("storage",))
    errors = CounterMetricFamily(f"{metrics.PREFIX}_jetstream_api_errors", "Requests that JetStream's API refused.")
    if queues.streams:
        storage.add_metric(("memory",), queues.storage.memory_bytes)
        storage.add_metric(("file",), queues.storage.file_bytes)
        errors.add_metric((), queues.storage.api_errors)
    return [messages, size, storage, errors]


def _queue_families(queues: Queues) -> list[Metric]:
    """What the broker says of tasks."""
    labels = ("stream", "consumer")
    pending = _family("consumer_pending", "Tasks that nobody has taken yet.", labels)
    in_work = _family("consumer_ack_pending", "Tasks that are handed out and not settled.", labels)
    again = _family("consumer_redelivered", "Unsettled tasks that were handed out more than once.", labels)
    waiting = _family("consumer_waiting", "Open pull requests: workers with free slots.", labels)
    paused = _family("consumer_paused", "1 where an operator has paused the consumer.", labels)
    oldest = _family("consumer_oldest_seconds", "Age of the oldest task that waits or is in work; 0: none.", labels)
    for key, consumer in queues.consumers.items():
        pending.add_metric(key, consumer.pending)
        in_work.add_metric(key, consumer.ack_pending)
        again.add_metric(key, consumer.redelivered)
        waiting.add_metric(key, consumer.waiting)
        paused.add_metric(key, float(consumer.paused_until_unix_s is not None))
        oldest.add_metric(key, queues.oldest_s.get(key, 0.0))
    depth = _family("queue_depth", "Tasks in a model's queue, handed out ones included.", ("queue", "model"))
    for queue, count in queues.depths.items():
        depth.add_metric(queue, count)
    return [pending, in_work, again, waiting, paused, oldest, depth]


def _family(name: str, about: str, labels: tuple[str, ...]) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"{metrics.PREFIX}_{name}", about, labels=labels)


def _gauge(name: str, about: str, value: float) -> Metric:
    return GaugeMetricFamily(f"{metrics.PREFIX}_{name}", about, value=value)


async def keep_fresh(telemetry: Telemetry, reader: QueueReader, presence: Presence) -> None:
    """Refresh what `/metrics` shows, for ever."""
    while True:
        queues = await reader.read(presence.models())
        telemetry.refresh(presence.workers(), queues)
        await asyncio.sleep(BROKER_S)


async def serve(worker: Worker) -> None:
    """Listen, and serve `/metrics` until the worker drains."""
    telemetry = Telemetry(lambda: worker.bus.connected)
    await worker.bus.subscribe(names.METRICS.any(), telemetry.hear)
    await worker.bus.subscribe(names.KV_EVENTS.any(), telemetry.hear_kv)
    registry = CollectorRegistry()
    registry.register(telemetry)
    host, port = worker.settings.metrics_host, worker.settings.metrics_port
    try:
        page = MetricsPage(registry, host, port)
    except OSError as error:
        raise ConfigError(f"/metrics cannot listen on {host}:{port}: {error.strerror}", field="metrics_port") from None
    log.info("metrics_served", worker=worker.name, url=page.url)
    worker.set_ready()
    try:
        async with asyncio.TaskGroup() as group:
            refreshing = group.create_task(
                keep_fresh(telemetry, QueueReader(worker.bus), worker.presence), name="telemetry"
            )
            await worker.until_drained()
            refreshing.cancel()
    finally:
        await asyncio.to_thread(page.close)
