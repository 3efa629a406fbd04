"""A worker: one process that runs one stage. It owns the connection, the leases, the engine and the end.

The stage's module offers `async def serve(worker: Worker) -> None` under the entry-point group
`sglang_nats.stages`, so that a new kind of consumer is one module and one line of packaging.
"""

import asyncio
import gc
import signal
import time
import uuid
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Any

import structlog
import uvloop

from pipeline import metrics, spans
from pipeline.bus import Bus, Others
from pipeline.canary import EngineWatch, Verdict
from pipeline.cancel import Cancellations
from pipeline.commands import Commands
from pipeline.config import WorkerSettings
from pipeline.engine.build import build_engine
from pipeline.engine.protocol import Engine, EngineInfo
from pipeline.errors import Busy, ConfigError, EngineDied, NotSupported, PipelineError
from pipeline.health import ENGINE, BrokerClock, Facts, Health, QueueWatch, assess, queues_of
from pipeline.lease import LeaseKeeper
from pipeline.presence import Announcer, Presence
from pipeline.probes import Probes
from pipeline.responses import StreamLog
from pipeline.runner import Runner
from pipeline.stage import Stage
from pipeline.tokenizer_files import OfferedTokenizer
from subjects import names, streams
from subjects.codec import encode
from subjects.limits import HEARTBEAT_S
from subjects.messages import Heartbeat, Load, MetricsSnapshot, ModelCard
from subjects.streams import ConsumerSpec

STAGES = "sglang_nats.stages"
CONNECT_S_MAX = 30.0
SLOTS_DEFAULT = 64
"""Tasks at once for a stage without an engine."""

log = structlog.get_logger()


class Worker:
    """What a stage's `serve` works with. Made, opened and closed by `run_worker`."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        self.name = settings.worker
        self.incarnation = uuid.uuid4().hex[:12]
        self.engine: Engine | None = None
        self.info: EngineInfo | None = None
        self.ready = False
        self.failure: PipelineError | None = None  # why the worker ended by itself
        self.leases = LeaseKeeper(settings.nats, settings.worker)
        self._draining = asyncio.Event()
        self._load = Load()
        self._runner: Runner | None = None
        self._in_progress: Callable[[], int] | None = None  # of a stage that takes no tasks
        self._broker = BrokerClock()
        self._queues: QueueWatch | None = None
        self._engine_watch: EngineWatch | None = None
        self._wedged: asyncio.TimerHandle | None = None  # until the engine is given up
        self._probes: Probes | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self) -> None:
        """Connect, provision and begin to send heartbeats. Raises SetupError with a sentence."""
        settings = self.settings
        if settings.health.port is not None:
            self._probes = Probes(self.name, self.health, settings.health.host, settings.health.port)
        self.bus = await Bus.connect(settings.nats, name=self.name, timeout_s=CONNECT_S_MAX)
        self._broker.watch(self.bus)
        kept = streams.with_retention(settings.responses_kept_s)
        await self.bus.provision(kept, streams.CONSUMERS, streams.BUCKETS, replicas=settings.replicas)
        await self.leases.start()
        self.cancellations = Cancellations(self.bus)
        await self.cancellations.start()
        self.presence = Presence(self.bus)
        await self.presence.start()
        self.responses = StreamLog(self.bus)
        self._announcer = Announcer(
            self.bus, settings.role, self.name, settings.model, self.incarnation, self._heartbeat
        )
        await self._announcer.start()
        self._commands = Commands(self)
        await self._commands.start()
        self._tasks.append(asyncio.create_task(self._report(), name="metrics"))
        if (queues := queues_of(settings.role, settings.model)) is not None:
            self._queues = QueueWatch(self.bus, *queues)
            self._tasks.append(asyncio.create_task(self._queues.run(), name="queues"))

    @property
    def model(self) -> str:
        """The served model's name. Raises ConfigError for a role that needs one and has none."""
        if not self.settings.model:
            raise ConfigError(f"a {self.settings.role} worker needs a model: give --model NAME", field="model")
        return names.token(self.settings.model)

    @property
    def slots(self) -> int:
        """Most tasks at once; 0 where nothing limits them."""
        if self._in_progress is not None:
            return 0
        return self.settings.slots or (self.info.max_running_requests if self.info else SLOTS_DEFAULT)

    @property
    def in_flight(self) -> int:
        """Tasks in work."""
        if self._in_progress is not None:
            return self._in_progress()
        return self._runner.in_flight if self._runner else 0

    def works_without_tasks(self, in_progress: Callable[[], int]) -> None:
        """For a stage that pulls nothing: what it has in work is asked for here."""
        self._in_progress = in_progress

    @property
    def draining(self) -> bool:
        """Whether it takes no more work until its end."""
        return self._draining.is_set()

    @property
    def paused(self) -> tuple[str, ...]:
        """Why it takes no work for now; empty where it does."""
        return self._runner.paused if self._runner else ()

    def taking(self) -> Runner:
        """What takes tasks here, to be paused and resumed. Raises Busy or NotSupported where there is nothing."""
        if self._runner is None:
            if self.ready:
                raise NotSupported(f"a {self.settings.role} worker takes no tasks")
            raise Busy(f"{self.name} is still starting")
        return self._runner

    @property
    def disaggregated(self) -> bool:
        """Whether this worker's engine meets others in rooms."""
        return self.info is not None and self.info.disaggregation != "aggregated"

    async def start_engine(self) -> Engine:
        """Start the engine that the settings name, and warm it up. Raises EngineStartError."""
        started_s = time.monotonic()
        self.engine = build_engine(self.settings, self.incarnation)
        self.info = await self.engine.start()
        await self.engine.warm_up()
        log.info("engine_started", model=self.model, duration_ms=round(1e3 * (time.monotonic() - started_s)))
        self._tasks.append(asyncio.create_task(self._watch_load(), name="load"))
        self._tasks.append(asyncio.create_task(self._watch_engine(), name="engine"))
        self._engine_watch = EngineWatch(
            self.engine,
            self.info.dp_size,
            every_s=self.settings.health.canary_s,
            silent_s_max=self.settings.health.silent_s_max,
            may_ask=lambda: not self._paused_by_others(),
            on_change=self._on_engine,
        )
        self._tasks.append(asyncio.create_task(self._engine_watch.run(), name="canary"))
        return self.engine

    async def publish_card(self) -> None:
        """Register the model: from now on its requests come here."""
        assert self.info is not None, "the engine is started first"
        info = self.info
        tokenizer_files = await self._offer_tokenizer(info)
        card = ModelCard(
            worker=self.name,
            role=self.settings.role,  # type: ignore[arg-type]
            model=self.model,
            incarnation=self.incarnation,
            model_path=info.model_path,
            engine=info.name,
            context_len_tokens=info.context_len_tokens,
            max_running_requests=info.max_running_requests,
            max_prefill_tokens=info.max_prefill_tokens,
            kv_blocks=info.kv_blocks,
            kv_block_tokens=info.kv_block_tokens,
            disaggregation=info.disaggregation,
            disaggregation_endpoint=names.BOOTSTRAP.any(worker=self.name) if self.disaggregated else None,
            dp_size=info.dp_size,
            tp_size=info.tp_size,
            reasoning_parser=info.reasoning_parser,
            tool_call_parser=info.tool_call_parser,
            sampling=dict(info.sampling),
            embedding=info.embedding,
            served_name=self.settings.model if self.settings.model != self.model else None,
            tokenizer_files=tokenizer_files,
            started_unix_s=time.time(),
        )
        await self._announcer.publish_card(card)

    async def _offer_tokenizer(self, info: EngineInfo) -> dict[str, str]:
        """Put the model's tokenizer files where preprocess workers get them, and keep them there; for the card."""
        path = info.tokenizer_path or self.settings.model_path
        if path is None:
            return {}
        tokenizer = OfferedTokenizer(self.bus, path, info.tokenizer_revision)
        await tokenizer.offer()
        self._tasks.append(asyncio.create_task(tokenizer.keep(), name="tokenizer"))
        return tokenizer.files

    async def run(
        self, stage: Stage[Any], consumers: Sequence[ConsumerSpec], *, slots: int, others: Others | None = None
    ) -> None:
        """Pull tasks for the stage until the worker is told to drain; returns when nothing is left.

        The consumers share the slots; what waits at the first is taken before what waits at the next. `others` are
        helped out where that leaves slots free.
        """
        self._runner = Runner(self.bus, self.leases, self.cancellations, stage)
        if self._engine_watch is not None and self._engine_watch.verdict is not None:
            await self._runner.pause(ENGINE)
        await self._runner.pull(*consumers, slots=slots, others=others)
        self.set_ready()
        log.info("worker_ready", worker=self.name, stage=stage.name, model=self.settings.model)
        await self.until_drained()
        await self._runner.drain()

    def set_ready(self) -> None:
        """Take work from now on.

        What is loaded by now stays, so no garbage collection looks at it any more: one over all that SGLang and its
        libraries make stops a process for about a second.
        """
        gc.collect()
        gc.freeze()
        self.ready = True

    async def until_drained(self) -> None:
        """Wait until the worker is told to stop taking work."""
        await self._draining.wait()

    def drain(self) -> None:
        """Take no more work; `run` returns when what is in flight is done or handed over."""
        self.ready = False
        self._draining.set()

    def health(self) -> Health:
        """As it is now; callable from any thread."""
        return assess(
            Facts(
                started=self.ready,
                draining=self.draining,
                paused=self.paused,
                broker_lost_s=self._broker.lost_s(),
                loop_silent_s=self.leases.loop_silent_s,
                engine=self._engine_watch.verdict if self._engine_watch else None,
                engine_death=str(self.failure) if self.failure else None,
                full=self._queues.full if self._queues else (),
            )
        )

    async def close(self) -> None:
        """End everything that `open` and `start_engine` began. Each step is bounded."""
        if self._wedged is not None:
            self._wedged.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._commands.close()
        await self._announcer.close()
        if self.engine:
            await self.engine.close()
        await self.leases.close()
        await self.bus.close()
        if self._probes is not None:
            await asyncio.to_thread(self._probes.close)

    def _heartbeat(self) -> Heartbeat:
        health = self.health()
        return Heartbeat(
            worker=self.name,
            role=self.settings.role,  # type: ignore[arg-type]
            incarnation=self.incarnation,
            model=self.settings.model,
            ready=health.ready,
            draining=self.draining,
            paused=bool(self.paused),
            slots=self.slots,
            in_flight=self.in_flight,
            load=self._load,
            unhealthy=tuple(reason.code for reason in health.reasons),
            sent_unix_s=time.time(),
        )

    async def _watch_engine(self) -> None:
        """A worker without an engine is of no use: it hands its tasks on and ends, to be started again."""
        assert self.engine is not None
        self.failure = EngineDied(await self.engine.died())
        log.error("engine_died", worker=self.name, code=self.failure.code, reason=str(self.failure))
        self.drain()

    def _paused_by_others(self) -> bool:
        return self._runner is not None and any(why != ENGINE for why in self._runner.paused)

    def _on_engine(self, verdict: Verdict | None) -> None:
        """The engine's state has changed: an engine that cannot generate gets no work, and loses what it has."""
        if self._wedged is not None:
            self._wedged.cancel()
            self._wedged = None
        if verdict is None:
            log.info("engine_well", worker=self.name)
            if self._runner is not None:
                self._runner.resume(ENGINE)
            return
        log.error("engine_unwell", worker=self.name, code=verdict.code, reason=verdict.message)
        if self._runner is not None:
            self.bus.spawn(self._runner.pause(ENGINE))
        if verdict.code == "engine_wedged":
            if self._runner is not None:
                self._runner.hand_over(None if verdict.stopped else EngineDied(verdict.message))
            if wedged_s_max := self.settings.health.wedged_s_max:
                self._wedged = asyncio.get_running_loop().call_later(wedged_s_max, self._give_up_engine)

    def _give_up_engine(self) -> None:
        """Nothing short of a new start helps a wedged engine, unless someone stopped it and lets it go on in time."""
        limit_s = self.settings.health.wedged_s_max
        self.failure = EngineDied(f"the engine has been wedged for {limit_s:g} s", limit=limit_s)
        log.error("engine_given_up", worker=self.name, code="engine_wedged", reason=str(self.failure))
        self.drain()

    async def _watch_load(self) -> None:
        assert self.engine is not None
        while True:
            self._load = await self.engine.load()
            await asyncio.sleep(HEARTBEAT_S)

    async def _report(self) -> None:
        subject = names.METRICS.of(role=self.settings.role, worker=self.name)
        while True:
            metrics.IN_FLIGHT.labels(self.settings.role).set(self.in_flight)
            metrics.OLDEST_TASK_SECONDS.labels(self.settings.role).set(self._runner.oldest_s if self._runner else 0)
            of_engine = self.engine.series() if self.engine and self.info else {}
            for process, families in {"": metrics.bounded(metrics.snapshot()), **of_engine}.items():
                snapshot = MetricsSnapshot(
                    worker=self.name,
                    role=self.settings.role,  # type: ignore[arg-type]
                    model=self.settings.model,
                    process=process,
                    families=families,
                )
                await self.bus.publish(subject, encode(snapshot))
            await asyncio.sleep(HEARTBEAT_S)


def run_worker(settings: WorkerSettings) -> int:
    """Run a worker until it is told to stop; the process's exit code. Errors are printed as a sentence."""
    try:
        spans.start(settings.role, settings.worker)
        uvloop.run(_serve(settings))
    except PipelineError as error:
        log.error("worker_failed", worker=settings.worker, code=error.code, reason=str(error))
        return 1
    finally:
        spans.stop()
    return 0


async def _serve(settings: WorkerSettings) -> None:
    """Find the stage, open a worker for it, and serve until a signal or the stage's own end."""
    found = {point.name: point for point in entry_points(group=STAGES)}
    if settings.role not in found:
        raise ConfigError(f"no stage is called {settings.role!r}; there are {', '.join(sorted(found))}", field="role")
    serve = found[settings.role].load()
    worker = Worker(settings)
    await worker.open()
    serving = asyncio.create_task(serve(worker), name="serve")

    def stop() -> None:
        worker.drain()
        if worker.engine is not None and worker.info is None:
            serving.cancel()  # its engine still starts: there is nothing to finish

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    try:
        await serving
    except asyncio.CancelledError:
        log.info("worker_stopped_early", worker=worker.name)
    finally:
        await worker.close()
        log.info("worker_stopped", worker=worker.name)
    if worker.failure is not None:
        raise worker.failure
