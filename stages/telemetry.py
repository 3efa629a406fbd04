"""Telemetry: everything that the workers report and the broker knows, under one Prometheus `/metrics`.

It has no task queue: it listens to the metrics snapshots and heartbeats that workers publish once a second and asks
the broker for its streams and consumers. Any number of telemetry workers may run; each one shows everything.
"""

import asyncio
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

import msgspec
import structlog
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric

from pipeline import metrics
from pipeline.bus import Bus, ConsumerState, Received, StreamState
from pipeline.errors import ConfigError, PipelineError
from pipeline.presence import Presence, WorkerState
from pipeline.worker import Worker
from subjects import names, streams
from subjects.codec import decode
from subjects.limits import PRESENCE_S
from subjects.messages import MetricFamily, MetricsSnapshot

HOST: Final = "127.0.0.1"
BROKER_S: Final = 1.0
"""How often the broker is asked."""
WORKERS_MAX: Final = 1024
SAMPLES_A_WORKER_MAX: Final = 5_000
SAMPLES_MAX: Final = 200_000
"""More would be too much for a scrape; what is left out is counted in `sglang_nats_samples_left_out`."""

log = structlog.get_logger()


@dataclass(frozen=True)
class Broker:
    """What the broker said last."""

    streams: dict[str, StreamState] = field(default_factory=dict)
    consumers: dict[tuple[str, str], ConsumerState] = field(default_factory=dict)  # by stream and consumer
    queued: dict[str, int] = field(default_factory=dict)  # messages by subject of the two work queues


class Snapshots:
    """The last snapshot of every worker that is still heard of. `now_s` is of the monotonic clock."""

    def __init__(self) -> None:
        self._by_worker: dict[tuple[str, str], tuple[MetricsSnapshot, float]] = {}

    def add(self, snapshot: MetricsSnapshot, now_s: float) -> None:
        """Take a worker's snapshot in; a new worker beyond `WORKERS_MAX` is left out."""
        key = (snapshot.role, snapshot.worker)
        if key in self._by_worker or len(self._by_worker) < WORKERS_MAX:
            self._by_worker[key] = (snapshot, now_s)

    def forget_silent(self, now_s: float) -> None:
        """Drop the workers not heard of for `PRESENCE_S`: their series end instead of standing still."""
        for key, (_, heard_s) in list(self._by_worker.items()):
            if now_s - heard_s > PRESENCE_S:
                del self._by_worker[key]

    def current(self) -> tuple[MetricsSnapshot, ...]:
        return tuple(snapshot for snapshot, _ in self._by_worker.values())


class Telemetry:
    """The state behind `/metrics`: written on the event loop, read by the HTTP server's threads.

    What the threads read is replaced as a whole and never changed, so that no lock is needed.
    """

    def __init__(self) -> None:
        self._heard = Snapshots()
        self.snapshots: tuple[MetricsSnapshot, ...] = ()
        self.workers: tuple[WorkerState, ...] = ()
        self.broker = Broker()
        self.malformed = 0

    def hear(self, received: Received) -> None:
        """A worker's snapshot came in."""
        try:
            self._heard.add(decode(MetricsSnapshot, received.payload), time.monotonic())
        except msgspec.DecodeError:
            self.malformed += 1  # counted and shown; a log line a second would only hide others

    def refresh(self, workers: Iterable[WorkerState], broker: Broker | None) -> None:
        """Show what is known now. `broker` None: it did not answer, and what it said before no longer holds."""
        self._heard.forget_silent(time.monotonic())
        self.snapshots = self._heard.current()
        self.workers = tuple(workers)
        self.broker = broker or Broker()

    def collect(self) -> Iterator[Metric]:
        """All families, as prometheus_client's registry asks for them at each scrape."""
        yield from _worker_families(self.workers)
        yield from _broker_families(self.broker)
        families, left_out = merged(self.snapshots)
        yield from families
        yield _gauge("samples_left_out", "Samples of workers beyond the limits of telemetry.", left_out)
        yield _gauge("snapshots_malformed", "Metrics messages that could not be decoded.", self.malformed)


def merged(snapshots: Iterable[MetricsSnapshot]) -> tuple[list[Metric], int]:
    """The workers' families, each once, with `role` and `worker` on every sample; and how many samples were left out.

    A family that two workers declare with different types keeps the first one's: Prometheus takes a name only once.
    """
    families: dict[str, Metric] = {}
    total = left_out = 0
    for snapshot in snapshots:
        of_worker = 0
        for family in snapshot.families:
            known = families.setdefault(family.name, Metric(family.name, family.help, family.type))
            room = min(SAMPLES_A_WORKER_MAX - of_worker, SAMPLES_MAX - total)
            taken = 0 if known.type != family.type else min(len(family.samples), room)
            _add_samples(known, snapshot, family, taken)
            of_worker, total = of_worker + taken, total + taken
            left_out += len(family.samples) - taken
    return list(families.values()), left_out


def _add_samples(metric: Metric, snapshot: MetricsSnapshot, family: MetricFamily, count: int) -> None:
    labels = {"role": snapshot.role, "worker": snapshot.worker}
    if snapshot.model:
        labels["model"] = snapshot.model
    for sample in family.samples[:count]:
        metric.add_sample(sample.name, sample.labels | labels, sample.value)


def _worker_families(workers: Iterable[WorkerState]) -> list[Metric]:
    """What heartbeats say."""
    labels = ("role", "worker", "model")
    ready = _family("worker_ready", "1 where the worker takes new work.", labels)
    slots = _family("worker_slots", "The most tasks that it takes at once.", labels)
    in_flight = _family("worker_in_flight", "Tasks that it works on.", labels)
    running = _family("engine_running", "Choices that the engine generates now.", labels)
    waiting = _family("engine_waiting", "Choices that wait inside the engine.", labels)
    kv_used = _family("engine_kv_tokens_used", "Tokens whose KV is held.", labels)
    kv_tokens = _family("engine_kv_tokens", "Tokens whose KV fits.", labels)
    for state in workers:
        beat = state.heartbeat
        if beat is None or state.down:
            continue
        of = (beat.role, beat.worker, beat.model or "")
        ready.add_metric(of, float(state.ready))
        slots.add_metric(of, beat.slots)
        in_flight.add_metric(of, beat.in_flight)
        running.add_metric(of, beat.load.running)
        waiting.add_metric(of, beat.load.waiting)
        kv_used.add_metric(of, beat.load.kv_tokens_used)
        kv_tokens.add_metric(of, beat.load.kv_tokens)
    return [ready, slots, in_flight, running, waiting, kv_used, kv_tokens]


def _broker_families(broker: Broker) -> list[Metric]:
    """What the broker says of queues."""
    messages = _family("stream_messages", "Messages that a stream holds.", ("stream",))
    size = _family("stream_bytes", "Bytes that a stream holds.", ("stream",))
    for stream, state in broker.streams.items():
        messages.add_metric((stream,), state.messages)
        size.add_metric((stream,), state.bytes)
    of_consumer = ("stream", "consumer")
    pending = _family("consumer_pending", "Tasks that nobody has taken yet.", of_consumer)
    in_work = _family("consumer_ack_pending", "Tasks that are handed out and not settled.", of_consumer)
    again = _family("consumer_redelivered", "Unsettled tasks that were handed out more than once.", of_consumer)
    waiting = _family("consumer_waiting", "Open pull requests: workers with free slots.", of_consumer)
    for key, consumer in broker.consumers.items():
        pending.add_metric(key, consumer.pending)
        in_work.add_metric(key, consumer.ack_pending)
        again.add_metric(key, consumer.redelivered)
        waiting.add_metric(key, consumer.waiting)
    depth = _family("queue_depth", "Tasks in a work queue, handed out ones included.", ("subject",))
    for subject, count in broker.queued.items():
        depth.add_metric((subject,), count)
    return [messages, size, pending, in_work, again, waiting, depth]


def _family(name: str, about: str, labels: tuple[str, ...]) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"{metrics.PREFIX}_{name}", about, labels=labels)


def _gauge(name: str, about: str, value: float) -> Metric:
    return GaugeMetricFamily(f"{metrics.PREFIX}_{name}", about, value=value)


async def ask_broker(bus: Bus, models: Iterable[str]) -> Broker | None:
    """The state of every stream and consumer; None where the broker does not answer.

    A consumer that is not there yet (no decode worker of the model has ever started) is left out.
    """
    broker = Broker()
    try:
        for stream in streams.STREAMS:
            broker.streams[stream.name] = await bus.stream_state(stream.name)
        for queue in (streams.REQUESTS, streams.WORK):
            for subject in queue.subjects:
                broker.queued.update(await bus.subjects_state(queue.name, subject))
    except PipelineError:
        return None
    for consumer in streams.all_consumers(models):
        try:
            state = await bus.consumer_state(consumer.stream, consumer.name)
        except PipelineError:
            continue
        broker.consumers[consumer.stream, consumer.name] = state
    return broker


async def keep_fresh(telemetry: Telemetry, bus: Bus, presence: Presence) -> None:
    """Refresh what `/metrics` shows, for ever."""
    while True:
        broker = await ask_broker(bus, presence.models())
        telemetry.refresh(presence.workers(), broker)
        await asyncio.sleep(BROKER_S)


async def serve(worker: Worker) -> None:
    """Listen, and serve `/metrics` on the loopback address until the worker drains."""
    telemetry = Telemetry()
    await worker.bus.subscribe(names.METRICS.any(), telemetry.hear)
    registry = CollectorRegistry()
    registry.register(telemetry)
    port = worker.settings.metrics_port
    try:
        server, thread = start_http_server(port, HOST, registry)
    except OSError as error:
        raise ConfigError(f"/metrics cannot listen on {HOST}:{port}: {error.strerror}", field="metrics_port") from None
    log.info("metrics_served", worker=worker.name, url=f"http://{HOST}:{server.server_port}/metrics")
    worker.ready = True
    try:
        async with asyncio.TaskGroup() as group:
            refreshing = group.create_task(keep_fresh(telemetry, worker.bus, worker.presence), name="telemetry")
            await worker.until_drained()
            refreshing.cancel()
    finally:
        await asyncio.to_thread(server.shutdown)
        server.server_close()
        thread.join()
