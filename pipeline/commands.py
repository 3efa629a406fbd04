"""A worker's side of control: answers operators on `sglang.control.<worker>.<operation>`, as a micro service.

Every request is answered once, with a result or with an error that says why. What an engine does alone goes one
at a time. An operation for which the engine has to be idle pauses the worker, waits, and resumes it afterwards;
where it is not idle in time nothing is done.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

import msgspec
import structlog

from pipeline import log as logs
from pipeline import operations
from pipeline.bus import Received
from pipeline.errors import Busy, DeadlineExceeded, InvalidRequest, NotSupported, PayloadTooLarge, PipelineError
from pipeline.micro import Endpoint, Identity, MicroService, error_headers
from pipeline.operations import Arguments, LogLevel, Operation, WithIdleEngine
from subjects import names
from subjects.codec import Format, decode, encode, format_of
from subjects.messages import ControlReply, ControlRequest, Failure

if TYPE_CHECKING:
    from pipeline.worker import Worker

AT_ONCE_MAX: Final = 32
"""Requests in work at once; more are refused."""
CLOSE_S_MAX: Final = 1.0
OPERATOR: Final = "operator"
"""The pause that `pause` begins and `resume` ends."""
OPERATION: Final = "operation"
"""The pause around an operation that needs an idle engine."""
SUSPENDED: Final = "engine_suspended"
"""The pause for as long as the engine can generate nothing."""

log = structlog.get_logger()


class Commands:
    """Carries out what operators ask of one worker."""

    def __init__(self, worker: "Worker") -> None:
        self._worker = worker
        self._answers: set[asyncio.Task[None]] = set()
        self._alone: asyncio.Task[dict[str, Any]] | None = None  # the operation that must be alone
        self._doing, self._since_s = "", 0.0
        self._by_worker: dict[str, Callable[[Arguments], Awaitable[dict[str, Any]]]] = {
            "ping": self._ping,
            "health": self._health,
            "drain": self._drain,
            "pause": self._pause,
            "resume": self._resume,
            "log_level": self._log_level,
        }
        self._service = MicroService(worker.bus, _identity(worker), self._endpoints)

    async def start(self) -> None:
        """Begin to answer, and to be found as a micro service."""
        await self._worker.bus.subscribe(names.CONTROL.any(worker=self._worker.name), self._hear)
        await self._service.start()

    async def close(self) -> None:
        """Break off what is in work, and answer it."""
        if self._alone is not None:
            self._alone.cancel()
        if self._answers:
            await asyncio.wait(self._answers, timeout=CLOSE_S_MAX)

    def _endpoints(self) -> list[Endpoint]:
        """What this worker can do."""
        return [
            Endpoint(
                name=operation.name,
                subject=names.CONTROL.of(worker=self._worker.name, operation=operation.name),
                metadata={"about": operation.about, "arguments": operations.describe_arguments(operation)},
            )
            for operation in operations.ALL
            if operation.by == "worker" or self._worker.engine is not None
        ]

    def _hear(self, received: Received) -> None:
        answer = asyncio.create_task(self._answer(received), name="control")
        self._answers.add(answer)
        answer.add_done_callback(self._answers.discard)

    async def _answer(self, received: Received) -> None:
        """Do what is asked and say what came of it, in kind; to one by hand, without a payload, in JSON."""
        started_s = time.monotonic()
        parts = names.CONTROL.parse(received.subject)
        assert parts, received.subject
        form = format_of(received.payload) if received.payload else Format.JSON
        try:
            operation = operations.find(parts["operation"])
            reply = ControlReply(ok=True, result=await self._do(operation, _arguments(operation, received.payload)))
        except PipelineError as error:
            reply = ControlReply(ok=False, error=error.failure())
        except Exception as error:  # the outermost guard: an operator must not wait for an answer that never comes
            log.exception("operation_failed", subject=received.subject, code=type(error).__name__)
            failure = Failure(code="internal", message=f"{type(error).__name__}: {error}", status=500)
            reply = ControlReply(ok=False, error=failure)
        if parts["operation"] in operations.BY_NAME:
            self._service.count(parts["operation"], started_s, reply.error.message if reply.error else "")
        await self._respond(received, reply, form)

    async def _respond(self, received: Received, reply: ControlReply, form: Format) -> None:
        marks = error_headers(reply.error.message, reply.error.status) if reply.error else None
        try:
            await self._worker.bus.respond(received, encode(reply, form), marks)
        except PayloadTooLarge as error:
            await self._respond(received, ControlReply(ok=False, error=error.failure()), form)
        except PipelineError as error:
            log.warning("operation_unanswered", subject=received.subject, code=error.code, reason=str(error))

    async def _do(self, operation: Operation, arguments: Arguments) -> dict[str, Any]:
        if len(self._answers) > AT_ONCE_MAX:
            raise Busy(f"{self._worker.name} is at work on {AT_ONCE_MAX} operations; ask again", limit=AT_ONCE_MAX)
        if operation.by == "engine" and self._worker.engine is None:
            role = self._worker.settings.role
            raise NotSupported(f"{operation.name}: {self._worker.name} is a {role} worker, without an engine")
        work = self._by_worker[operation.name] if operation.by == "worker" else self._by_engine(operation)
        if not operation.alone:
            return await _within(operation.timeout_s, operation, asyncio.ensure_future(work(arguments)))
        if self._alone is not None:
            raise Busy(
                f"{self._worker.name} has been at work on {self._doing} for {time.monotonic() - self._since_s:.1f} s; "
                f"{operation.name} has to wait for its end"
            )
        self._alone = asyncio.create_task(_coroutine(work(arguments)), name=operation.name)
        self._doing, self._since_s = operation.name, time.monotonic()
        self._alone.add_done_callback(self._end_alone)
        log.info("operation_began", worker=self._worker.name, reason=operation.name)
        return await _within(operation.deadline_s(arguments), operation, self._alone)

    def _end_alone(self, task: asyncio.Task[dict[str, Any]]) -> None:
        """Also where nobody waits for it any more."""
        duration_ms = round(1e3 * (time.monotonic() - self._since_s))
        error = None if task.cancelled() else task.exception()
        outcome = "operation_broken_off" if task.cancelled() else "operation_refused" if error else "operation_done"
        log.info(outcome, worker=self._worker.name, reason=str(error or self._doing), duration_ms=duration_ms)
        self._alone, self._doing = None, ""

    # --- by the worker itself ---------------------------------------------------------------------------

    async def _ping(self, arguments: Arguments) -> dict[str, Any]:
        worker = self._worker
        return {
            "worker": worker.name,
            "role": worker.settings.role,
            "model": worker.settings.model,
            "incarnation": worker.incarnation,
            "version": version("sglang-nats"),
            "engine": worker.info.name if worker.info else None,
            "ready": worker.ready,
            "draining": worker.draining,
            "paused": list(worker.paused),
            "in_flight": worker.in_flight,
            "operation": self._doing or None,
        }

    async def _health(self, arguments: Arguments) -> dict[str, Any]:
        return self._worker.health().to_dict()

    async def _drain(self, arguments: Arguments) -> dict[str, Any]:
        log.info("drain_asked", worker=self._worker.name)
        self._worker.drain()
        return await self._ping(arguments)

    async def _pause(self, arguments: Arguments) -> dict[str, Any]:
        await self._worker.taking().pause(OPERATOR)
        return await self._ping(arguments)

    async def _resume(self, arguments: Arguments) -> dict[str, Any]:
        runner = self._worker.taking()
        if OPERATOR not in runner.paused and runner.paused:
            raise Busy(f"{self._worker.name} was not paused by an operator; it is for: {', '.join(runner.paused)}")
        runner.resume(OPERATOR)
        return await self._ping(arguments)

    async def _log_level(self, arguments: Arguments) -> dict[str, Any]:
        assert isinstance(arguments, LogLevel)
        before = logs.set_level(arguments.level)
        return {"level": arguments.level, "before": before}

    # --- by its engine ----------------------------------------------------------------------------------

    def _by_engine(self, operation: Operation) -> Callable[[Arguments], Awaitable[dict[str, Any]]]:
        engine = self._worker.engine
        assert engine is not None

        async def control(arguments: Arguments) -> dict[str, Any]:
            self._refuse_while_starting()
            if not isinstance(arguments, WithIdleEngine):
                result = await engine.control(operation.name, arguments)
                await self._mind_suspension()
                return result
            async with self._idle(arguments.wait_s):
                return await engine.control(operation.name, arguments)

        return control

    def _refuse_while_starting(self) -> None:
        if not self._worker.ready and not self._worker.draining:
            raise Busy(f"{self._worker.name} is still starting")

    @contextlib.asynccontextmanager
    async def _idle(self, wait_s: float) -> AsyncIterator[None]:
        """With the worker paused and nothing in its engine. Raises Busy where that does not come in time."""
        runner = self._worker.taking()
        await runner.pause(OPERATION)
        try:
            if not await runner.until_idle(wait_s):
                raise Busy(
                    f"{runner.in_flight} requests still run on {self._worker.name} after {wait_s:g} s, so nothing was "
                    "done: give them more time with wait_s, or pause the worker and come again"
                )
            yield
        finally:
            await self._mind_suspension()
            runner.resume(OPERATION)

    async def _mind_suspension(self) -> None:
        """No tasks for an engine that can do none."""
        assert self._worker.engine is not None
        if self._worker.engine.suspended:
            await self._worker.taking().pause(SUSPENDED)
        else:
            self._worker.taking().resume(SUSPENDED)


def _identity(worker: "Worker") -> Identity:
    settings = worker.settings
    what = f"{settings.role} worker {worker.name}" + (f" of model {settings.model}" if settings.model else "")
    return Identity(
        name=f"sglang-{settings.role}",
        id=worker.incarnation,
        version=version("sglang-nats"),
        description=what,
        metadata={"worker": worker.name, "role": settings.role, "model": settings.model or ""},
    )


def _arguments(operation: Operation, payload: bytes) -> Arguments:
    """Raises InvalidRequest for a payload that is no ControlRequest, and for arguments that do not fit."""
    try:
        request = decode(ControlRequest, payload) if payload.strip() else ControlRequest()
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"not a ControlRequest: {error}") from None
    return operations.parse(operation, request.arguments)


async def _coroutine(work: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    return await work


async def _within(timeout_s: float, operation: Operation, work: asyncio.Future[dict[str, Any]]) -> dict[str, Any]:
    """The result, if it comes in time. What is late goes on: an engine's operation cannot be taken back."""
    await asyncio.wait({work}, timeout=timeout_s)
    if not work.done():
        raise DeadlineExceeded(f"{operation.name} is not done within {timeout_s:g} s; it goes on", limit=timeout_s)
    if work.cancelled():
        raise Busy(f"{operation.name} was broken off: the worker ends")
    return work.result()
