"""The runner: the only place that fetches tasks, keeps their leases, publishes emits and acks.

What becomes of a task, in one table:

| outcome of the stage             | answer to the client  | to JetStream                          |
|----------------------------------|-----------------------|---------------------------------------|
| it finished                      | its own frames        | ack, after every PubAck               |
| `Permanent`, deadline, cancelled | terminal error frames | ack                                   |
| `Transient`                      | none yet              | nak with a delay                      |
| `EngineDied`, anything else      | none yet              | nak with a delay, and the failure     |
|                                  |                       | noted down                            |
| the same on a second worker      | terminal error frames | a dead letter, then ack               |
| `ATTEMPTS_MAX` deliveries        | terminal error frames | a dead letter, then ack               |
| the lease ran out                | nothing               | nothing: another worker has the task  |
| the worker drains                | none yet              | once the log has every frame, nak:    |
|                                  |                       | another worker goes on                |

A stage that yields `ACCEPTED` has its task acked there and then; whatever ends it afterwards is answered.
"""

import asyncio
import contextlib
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Final

import msgspec
import structlog

from pipeline import metrics, tracing
from pipeline.bus import Bus, Delivery, Others, Puller, Received
from pipeline.cancel import Cancellations
from pipeline.errors import (
    AttemptsExhausted,
    BusUnavailable,
    Cancelled,
    DeadlineExceeded,
    EngineDied,
    InvalidRequest,
    Permanent,
    PipelineError,
    Transient,
)
from pipeline.fence import BrokerAge, Fence
from pipeline.lease import Lease, LeaseKeeper, LeaseLost
from pipeline.reader import watched
from pipeline.stage import ACCEPTED, Emit, Stage, Task
from pipeline.task_trace import TaskTrace
from subjects import headers, names, streams
from subjects.codec import decode, encode
from subjects.limits import ATTEMPTS_MAX, FAILURES_MAX
from subjects.messages import DeadLetter, Failure, OwnedTask, Work
from subjects.streams import ConsumerSpec

RETRY_S: Final = 1.0
DRAIN_S: Final = 30.0

log = structlog.get_logger()


class HandOver(Exception):
    """The worker drains, or its engine stands still: another one is to go on with the task."""


@dataclass(slots=True)
class _Running:
    """A task in progress, and why it is to stop if someone wants it to."""

    delivery: Delivery
    fence: Fence
    lease: Lease
    trace: TaskTrace
    job: asyncio.Task[None]
    since_s: float = field(default_factory=time.monotonic)
    task: Task[Any] | None = None  # None: not read yet, or unreadable
    owned: bool = False
    stop: Exception | None = None
    settling: bool = False  # the stage is over and its outcome on the way to the broker

    def end(self, why: Exception) -> None:
        """Break the stage off; `why` decides the outcome. The first reason stands."""
        if self.stop is None and not self.settling:
            self.stop = why
            self.job.cancel()


class Runner:
    """Runs one stage over one or more consumers until it is drained."""

    def __init__(self, bus: Bus, leases: LeaseKeeper, cancellations: Cancellations, stage: Stage[Any]) -> None:
        self._bus, self._leases, self._cancellations, self._stage = bus, leases, cancellations, stage
        self._broker_age = BrokerAge(bus)
        self._running: dict[str, _Running] = {}  # by ack subject
        self._pullers: list[Puller] = []
        self._paused: dict[str, None] = {}  # why, in order
        self._idle = asyncio.Event()
        self._idle.set()
        bus.on_reconnect(self._catch_up)

    @property
    def in_flight(self) -> int:
        return len(self._running)

    @property
    def oldest_s(self) -> float:
        """How long the oldest task in progress is held; 0 without one."""
        held = [running.since_s for running in self._running.values()]
        return time.monotonic() - min(held) if held else 0.0

    async def pull(self, *consumers: ConsumerSpec, slots: int, others: Others | None = None) -> None:
        """Begin to take tasks, the first consumer's before the next one's: never more at once than `slots`."""
        puller: Puller | None = None

        def take(delivery: Delivery) -> None:
            lease = self._leases.hold(delivery, lambda: running.end(LeaseLost()))
            fence = Fence(self._bus, self._broker_age, delivery, lease)
            trace = TaskTrace(self._stage.name, delivery)
            job = asyncio.create_task(self._work(delivery), name=f"{self._stage.name}.{delivery.stream_seq}")
            running = self._running[delivery.ack_subject] = _Running(delivery, fence, lease, trace, job)
            self._idle.clear()
            job.add_done_callback(lambda _: finish(delivery))

        def finish(delivery: Delivery) -> None:
            del self._running[delivery.ack_subject]
            if not self._running:
                self._idle.set()
            assert puller is not None
            puller.add_credit()

        if not self._pullers:
            await self._bus.subscribe(f"{names.LEADER_ELECTED}.{streams.RESPONSES.name}", self._hear_election)
        at_first = 0 if self._paused else slots
        puller = await self._bus.pull(consumers, take, credit=at_first, others=others)
        self._pullers.append(puller)
        if self._paused:
            await puller.pause()
        puller.add_credit(slots - at_first)

    @property
    def paused(self) -> tuple[str, ...]:
        """Why no tasks are taken; empty where they are."""
        return tuple(self._paused)

    async def pause(self, why: str) -> None:
        """Take no more tasks until `resume` with the same word; what runs goes on. Others may pause it as well."""
        self._paused[why] = None
        for puller in self._pullers:
            await puller.pause()

    def resume(self, why: str) -> None:
        """Take tasks again, unless someone else wants the pause to last. Does nothing where `why` did not pause."""
        if self._paused.pop(why, self) is None and not self._paused:
            for puller in self._pullers:
                puller.unpause()

    def hand_over(self, failure: EngineDied | None = None) -> None:
        """Give what runs to other workers at once, each task with its checkpoint.

        With a `failure` any of them may be what broke the engine: it is counted against each, as an engine's death is.
        """
        for running in self._running.values():
            running.end(failure or HandOver())

    async def drain(self, timeout_s: float = DRAIN_S) -> None:
        """Take no more, let what runs finish, and hand over what is left at the end of `timeout_s`."""
        for puller in self._pullers:
            await puller.stop()
        await self.until_idle(timeout_s)
        self.hand_over()
        await self._idle.wait()

    async def until_idle(self, timeout_s: float) -> bool:
        """Wait until nothing runs; whether that came in time."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        return self._idle.is_set()

    def _hear_election(self, _: Received) -> None:
        """The log had no leader for a while, and live frames wait for no confirmation."""
        self._bus.doubt()
        self._bus.spawn(self._catch_up())

    async def _catch_up(self) -> None:
        """After an outage: let each task's log be whole before anyone else reads it."""
        for running in list(self._running.values()):
            try:
                await running.fence.ready()
            except LeaseLost as lost:
                running.end(lost)

    async def _work(self, delivery: Delivery) -> None:
        """One delivery, from its lease to its ack. Raises nothing."""
        started_s = time.monotonic()
        running = self._running[delivery.ack_subject]
        running.trace.enter()
        context = log.bind(
            stage=self._stage.name,
            subject=delivery.subject,
            stream_seq=delivery.stream_seq,
            attempt=delivery.attempt,
        )
        try:
            await self._supersede(running)
            outcome = await self._outcome(running, context)
        except LeaseLost:
            context.warning("lease_lost", code="lease_lost")
            outcome = "lease_lost"
        except BusUnavailable as error:
            context.warning("task_left_to_redelivery", code=error.code)
            outcome = "unsettled"
        except Exception:
            context.exception("runner_failed", code="internal")
            outcome = "unsettled"
        finally:
            self._leases.release(running.lease)
        running.trace.end(outcome, running.task and running.task.payload)
        if delivery.attempt > 1:
            metrics.REDELIVERIES.labels(self._stage.name).inc()
        metrics.STAGE_SECONDS.labels(self._stage.name, outcome).observe(time.monotonic() - started_s)

    async def _supersede(self, running: _Running) -> None:
        """The same task may come here again: its older delivery is over, and its engine's request with it."""
        of = running.delivery
        for older in list(self._running.values()):
            same = (older.delivery.stream, older.delivery.stream_seq) == (of.stream, of.stream_seq)
            if same and older is not running and not older.fence.accepted:
                older.end(LeaseLost())
                await asyncio.wait({older.job})

    async def _outcome(self, running: _Running, context: Any) -> str:
        """Run the stage and settle the delivery; the outcome's name, for the metrics. Raises LeaseLost."""
        delivery, fence = running.delivery, running.fence
        try:
            running.task = self._read(delivery)
        except InvalidRequest as error:
            return await self._give_up(running, error, context)
        try:
            await self._run(running)
        except LeaseLost:
            raise
        except Exception as error:
            context.debug("stage_ended_early", code=type(error).__name__)
            if fence.accepted:
                return await self._answer_accepted(running.task, error, context)
            fence.check_lease()
            return await self._outcome_of(error, running, context)
        if not fence.accepted:
            await fence.ack()
        return "done"

    async def _outcome_of(self, error: Exception, running: _Running, context: Any) -> str:
        """What an error makes of a task."""
        delivery = running.delivery
        match error:
            case HandOver():
                await running.fence.hand_over()
                return "handed_over"
            case Permanent():
                context.info("task_ended_in_error", code=error.code)
                return await self._answer(running, error)
            case EngineDied():
                return await self._retry_failed(error, running, context)
            case Transient():
                context.info("task_retried", code=error.code, reason=str(error))
                if delivery.attempt >= ATTEMPTS_MAX:
                    return await self._give_up(running, error, context)
                await running.fence.nak(error.retry_after_s or RETRY_S)
                return "retried"
            case _:
                context.exception("stage_failed", code=type(error).__name__)
                return await self._retry_failed(error, running, context)

    async def _retry_failed(self, error: Exception, running: _Running, context: Any) -> str:
        """The task may be what broke the stage or its engine: another worker tries it, but not one after another."""
        delivery = running.delivery
        failures = await self._count_failure(delivery, _identity(running.task)[0] if running.task else None, error)
        if failures >= FAILURES_MAX or delivery.attempt >= ATTEMPTS_MAX:
            return await self._give_up(running, _exhausted(failures, FAILURES_MAX, error), context)
        context.info("task_retried", code=type(error).__name__, reason=str(error))
        await running.fence.nak(RETRY_S)
        return "retried"

    async def _count_failure(self, delivery: Delivery, request_id: str | None, error: Exception) -> int:
        """Note down that the task's stage or engine broke; how often that has happened, on whichever worker."""
        task = f"{delivery.stream}-{delivery.stream_seq}-{int(1e6 * delivery.stored_unix_s)}"
        subject = names.FAILED.of(stage=self._stage.name, task=task)
        failure = Failure(code=type(error).__name__, message=str(error), status=500)
        about = tracing.outgoing() | ({headers.REQUEST: request_id} if request_id else {})
        stored = await self._bus.publish_durable(
            subject, encode(failure), msg_id=f"{task}.{delivery.consumer_seq}", headers=about
        )
        return (await self._bus.subjects_state(stored.stream, subject)).get(subject, 0)

    async def _answer_accepted(self, task: Task[Any], error: Exception, context: Any) -> str:
        """An accepted task cannot go to another worker: whoever waits for it is told."""
        if isinstance(error, HandOver):
            error = EngineDied(f"the worker that was to {self._stage.name} it gave it up")
        elif not isinstance(error, PipelineError):
            context.error("stage_failed", code=type(error).__name__, exc_info=error)
            error = EngineDied(f"{self._stage.name} broke off: {type(error).__name__}: {error}")
        await self._publish_all(self._stage.answer(task, error))
        return error.code

    async def _run(self, running: _Running) -> None:
        """Run the stage to its end; raises what ended it early."""
        task = running.task
        if running.delivery.attempt > ATTEMPTS_MAX:
            raise _exhausted(running.delivery.attempt, ATTEMPTS_MAX, None)
        request_id, deadline_unix_s = _identity(task)
        try:
            if request_id:
                self._cancellations.watch(request_id, lambda reason: running.end(Cancelled(reason)))
                if reason := self._cancellations.reason(request_id):
                    raise Cancelled(reason)
            task = await self._own(running)
            with self._while_read(running):
                await self._emit(running, task, deadline_unix_s)
        except asyncio.CancelledError:
            if running.stop is None:
                raise
            running.job.uncancel()
            raise running.stop from None
        finally:
            running.settling = True
            if request_id:
                self._cancellations.unwatch(request_id)
        running.fence.check_lease()

    def _while_read(self, running: _Running) -> contextlib.AbstractContextManager[None]:
        """Cancel a request that has a reader when that is gone."""
        work = running.task.payload
        reader = work.reader if isinstance(work, OwnedTask) else None
        return watched(self._bus, reader, lambda: running.end(Cancelled("its reader is gone")))

    async def _emit(self, running: _Running, task: Task[Any], deadline_unix_s: float | None) -> None:
        """Publish what the stage says, as it says it. Raises DeadlineExceeded, and what the stage raises."""
        async with _deadline(deadline_unix_s), contextlib.aclosing(self._stage.run(task)) as emits:
            async for emit in emits:
                if emit is ACCEPTED:
                    await self._accept(running)
                    continue
                await self._publish(emit, running.fence)
                running.trace.note(emit.frame)
                if emit.frame is not None and emit.frame.finish_reason:
                    task.ended.add(emit.frame.choice)

    async def _own(self, running: _Running) -> Task[Any]:
        """Become the task's only worker: the task, with an attempt above all earlier ones. Does nothing twice."""
        if not running.owned:
            attempt = await running.fence.attempt()
            if isinstance(running.task.payload, OwnedTask):
                attempt = await running.fence.own(running.task.payload, attempt)
            running.task, running.owned = replace(running.task, attempt=attempt), True
        return running.task

    async def _accept(self, running: _Running) -> None:
        running.fence.accepted = True
        self._leases.release(running.lease)
        await running.fence.ack()

    def _read(self, delivery: Delivery) -> Task[Any]:
        """The delivery as the stage's task. Raises InvalidRequest where the payload is not the stage's."""
        payload: Any = delivery.payload
        if self._stage.takes is not bytes:
            try:
                payload = decode(self._stage.takes, delivery.payload)
            except msgspec.DecodeError as error:
                raise InvalidRequest(f"not a {self._stage.takes.__name__}: {error}") from None
        return Task(
            payload=payload,
            headers=delivery.headers or {},
            subject=delivery.subject,
            stream_seq=delivery.stream_seq,
            attempt=delivery.attempt,
            stored_unix_s=delivery.stored_unix_s,
        )

    async def _publish(self, emit: Emit, fence: Fence | None = None) -> None:
        """Frames stay behind their fence; other emits are known by their message id, whoever sends them."""
        emit = tracing.carried(emit)
        if fence is not None:
            await fence.publish(emit)
        elif emit.msg_id is None:
            await self._bus.publish(emit.subject, emit.payload, headers=emit.headers)
        else:
            await self._bus.publish_durable(emit.subject, emit.payload, msg_id=emit.msg_id, headers=emit.headers)
        if emit.frame is not None and emit.frame.error is not None:
            metrics.ERRORS.labels(emit.frame.error.code).inc()

    async def _answer(self, running: _Running, error: PipelineError) -> str:
        """End the task's request with terminal error frames, then the task."""
        await self._publish_all(self._stage.answer(await self._own(running), error), running.fence)
        await running.fence.ack()
        return error.code

    async def _give_up(self, running: _Running, error: PipelineError, context: Any) -> str:
        """Dead-letter a task that cannot be worked on, and answer its client if it is known."""
        delivery, task = running.delivery, running.task
        context.error("task_dead_lettered", code=error.code)
        letter = DeadLetter(
            stage=self._stage.name,
            subject=delivery.subject,
            stream_seq=delivery.stream_seq,
            attempts=delivery.attempt,
            error=error.failure(),
            payload=delivery.payload,
            request_id=_identity(task)[0] if task else None,
            headers=(delivery.headers or {}) | tracing.outgoing(),
            died_unix_s=time.time(),
        )
        subject = names.DEAD.of(stage=self._stage.name, model=delivery.subject.split(".")[2])
        msg_id = f"dead.{delivery.stream}.{delivery.stream_seq}"
        await self._bus.publish_durable(subject, encode(letter), msg_id=msg_id, headers=tracing.outgoing())
        if task:
            await self._publish_all(self._stage.answer(await self._own(running), error), running.fence)
        await running.fence.ack()
        return "dead"

    async def _publish_all(self, emits: Iterable[Emit], fence: Fence | None = None) -> None:
        for emit in emits:
            await self._publish(emit, fence)


def _identity(task: Task[Any]) -> tuple[str | None, float | None]:
    """The request's id and deadline; None for both where the stage itself reads them from its payload."""
    work = task.payload
    return (work.request_id, work.deadline_unix_s) if isinstance(work, Work) else (None, None)


def _exhausted(times: int, limit: int, cause: Exception | None) -> AttemptsExhausted:
    why = f"; the last error: {cause}" if cause else ""
    return AttemptsExhausted(f"given to {times} workers without an end{why}", size=times, limit=limit)


@contextlib.asynccontextmanager
async def _deadline(unix_s: float | None):
    """Raises DeadlineExceeded when the wall clock passes `unix_s`."""
    if unix_s is None:
        yield
        return
    remaining_s = unix_s - time.time()
    error = DeadlineExceeded("the request's deadline passed before its answer was whole", field="deadline")
    if remaining_s <= 0:
        raise error
    try:
        async with asyncio.timeout(remaining_s) as clock:
            yield
    except TimeoutError:
        raise (error if clock.expired() else TimeoutError("a wait inside the stage ran out")) from None
