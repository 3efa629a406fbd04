"""`cancel`, `drain` and `control`: end one request, let a worker finish and go, or have workers do something."""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from pipeline import operations
from pipeline.bus import Bus, Received
from pipeline.errors import ConfigError, NoResponders, PipelineError, from_failure
from pipeline.operations import Arguments, Operation
from pipeline.presence import Presence
from pipeline.runner import DRAIN_S
from pipeline.screen import err, out
from subjects import limits, names, streams
from subjects.codec import decode, encode
from subjects.messages import Cancel, ControlReply, ControlRequest, Frame

CONNECT_S_MAX: Final = 3.0
ENDED_S_MAX: Final = 2.0
"""A worker that holds a request ends it within this time."""
GONE_S_MAX: Final = DRAIN_S + 15.0
LOOK_S: Final = 0.1
ANSWER_S_MAX: Final = 2.0
"""Added to an operation's own deadline for the way there and back."""
HEARD_S: Final = 1.3
"""Long enough to hear one heartbeat of everyone."""


async def cancel(url: str, request_id: str, reason: str) -> int:
    """Cancel a request and say what came of it; the exit code, 1 where it had ended already. Raises BusUnavailable."""
    if not names.is_token(request_id):
        raise ConfigError(f"{request_id!r} is no request id", field="request_id")
    bus = await Bus.connect(url, name="cancel", timeout_s=CONNECT_S_MAX)
    try:
        ended: asyncio.Future[Frame] = asyncio.get_running_loop().create_future()
        answers = names.RESPONSES.any(request_id=request_id)
        await bus.subscribe(answers, lambda received: _note_end(received, ended))
        await bus.flush()
        stored = [decode(Frame, message.payload) async for message in bus.read(streams.RESPONSES.name, answers)]
        if any(frame.finish_reason for frame in stored):
            err.print(f"request {request_id} has ended already", markup=False)
            return 1
        await bus.publish_durable(names.CANCEL.of(request_id=request_id), encode(Cancel(reason=reason)))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ENDED_S_MAX):
                frame = await ended
                err.print(f"request {request_id} has ended: {frame.finish_reason}", markup=False)
                return 0
        err.print(
            f"no worker holds request {request_id}; one that takes it within {limits.CANCELS_KEPT_S:g} s ends it",
            markup=False,
        )
        return 0
    finally:
        await bus.close()


def _note_end(received: Received, ended: asyncio.Future[Frame]) -> None:
    frame = decode(Frame, received.payload)
    if frame.finish_reason and not ended.done():
        ended.set_result(frame)


async def drain(url: str, worker: str) -> int:
    """Have a worker take no more work, and wait until it has finished or handed over what it has; the exit code.

    Raises ConfigError where no such worker is up.
    """
    bus = await Bus.connect(url, name="drain", timeout_s=CONNECT_S_MAX)
    try:
        asked = await command(bus, worker, "drain")
        with err.status(f"{worker} drains"):
            gone = await _until_gone(bus, worker, asked.result)
    finally:
        await bus.close()
    if gone:
        err.print(f"{worker} has finished and ended", markup=False)
        return 0
    err.print(f"{worker} takes no more work, but has not ended within {GONE_S_MAX:g} s", markup=False)
    return 1


async def command(bus: Bus, worker: str, operation: str, arguments: Arguments | None = None) -> ControlReply:
    """Ask a worker for an operation. Raises ConfigError where nobody is called so, and the worker's own error."""
    asked = operations.find(operation)
    arguments = arguments or asked.arguments()
    request = encode(ControlRequest(arguments=msgspec.to_builtins(arguments)))
    subject = names.CONTROL.of(worker=worker, operation=operation)
    try:
        received = await bus.request(subject, request, timeout_s=asked.deadline_s(arguments) + ANSWER_S_MAX)
    except NoResponders:
        raise ConfigError(
            f"no worker is called {worker!r}; `sglang-nats workers` lists those that are up", field="worker"
        ) from None
    reply = decode(ControlReply, received.payload)
    if reply.error:
        raise from_failure(reply.error)
    return reply


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Workers by what they are, rather than by name."""

    everyone: bool = False
    role: str | None = None
    model: str | None = None

    def __bool__(self) -> bool:
        return self.everyone or self.role is not None or self.model is not None


async def control(url: str, words: Sequence[str], chosen: Chosen, *, as_json: bool) -> int:
    """Have workers do an operation, print each one's answer, and give the exit code: 1 where one could not.

    `words`: WORKER OPERATION KEY=VALUE..., without WORKER where workers are chosen. Raises ConfigError, InvalidRequest.
    """
    worker, name, given = _read(words, by_name=not chosen)
    operation = operations.find(name)
    arguments = operations.parse(operation, given, as_text=True)
    bus = await Bus.connect(url, name="control", timeout_s=CONNECT_S_MAX)
    try:
        whom = [worker] if worker else await _workers(bus, chosen, operation)
        if not whom:
            raise ConfigError("no such worker is up; `sglang-nats workers` lists those that are", field="worker")
        with err.status(f"{', '.join(whom)}: {name}"):
            answers = await asyncio.gather(*(_ask(bus, one, operation, arguments) for one in whom))
    finally:
        await bus.close()
    for one, answer in zip(whom, answers, strict=True):
        _print(one, answer, as_json=as_json, headed=len(whom) > 1)
    return 1 if any(isinstance(answer, PipelineError) for answer in answers) else 0


def _read(words: Sequence[str], *, by_name: bool) -> tuple[str, str, dict[str, str]]:
    """Worker (empty where it is not named), operation and arguments. Raises ConfigError."""
    count = 2 if by_name else 1
    if len(words) < count or any("=" in word for word in words[:count]):
        usage = "WORKER OPERATION" if by_name else "OPERATION"
        raise ConfigError(f"give {usage} [KEY=VALUE...]; `sglang-nats control --list` shows them", field="operation")
    *worker, operation = words[:count]
    given = {}
    for word in words[count:]:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"{word!r} is not KEY=VALUE", field=word)
        given[key] = value
    return (worker[0] if worker else ""), operation, given


async def _workers(bus: Bus, chosen: Chosen, operation: Operation) -> list[str]:
    """The names of the chosen workers that are heard of, those without an engine left out where it takes one."""
    presence = Presence(bus)
    await presence.start()
    with err.status("listening for heartbeats"):
        await asyncio.sleep(HEARD_S)
    states = presence.workers(chosen.role, names.token(chosen.model) if chosen.model else None)
    await presence.close()
    able = [state for state in states if not state.down and (operation.by == "worker" or state.card is not None)]
    return sorted(state.worker for state in able)


async def _ask(bus: Bus, worker: str, operation: Operation, arguments: Arguments) -> ControlReply | PipelineError:
    try:
        return await command(bus, worker, operation.name, arguments)
    except PipelineError as error:
        return error


def _print(worker: str, answer: ControlReply | PipelineError, *, as_json: bool, headed: bool) -> None:
    if isinstance(answer, PipelineError):
        err.print(f"{worker}: {answer.code}: {answer}", markup=False)
        return
    if as_json:
        out.print(msgspec.json.encode({"worker": worker, **answer.result}).decode(), markup=False)
        return
    if headed:
        out.print(worker, style="bold", markup=False)
    rows = [(key, _shown(value)) for key, value in answer.result.items()]
    width = max((len(key) for key, _ in rows), default=0)
    for key, value in rows:
        out.print(f"{key.ljust(width)}  {value}", markup=False)


def _shown(value: Any) -> str:
    """A value as a person reads it."""
    match value:
        case None | [] | "":
            return "-"
        case bool():
            return "yes" if value else "no"
        case list() if not any(isinstance(part, list | dict) for part in value):
            return ", ".join(str(part) for part in value)
        case list() | dict():
            return msgspec.json.encode(value).decode()
    return str(value)


def show_operations() -> None:
    """Print every operation: what it does, who can do it, and its arguments."""
    for by in ("worker", "engine"):
        out.print("any worker" if by == "worker" else "\nworkers with an engine", style="bold")
        for operation in operations.ALL:
            if operation.by == by:
                out.print(f"  {operation.name.ljust(26)}{operation.about}", markup=False)
                if arguments := operations.describe_arguments(operation):
                    out.print(f"  {'':26}{arguments}", markup=False, style="dim")
    out.print("\nsglang-nats control WORKER OPERATION [KEY=VALUE...]", markup=False)


async def _until_gone(bus: Bus, worker: str, asked: dict[str, Any]) -> bool:
    """Whether the process that was asked ends in time; one that was started again under its name is another."""
    deadline_s = time.monotonic() + GONE_S_MAX
    while time.monotonic() < deadline_s:
        try:
            if (await command(bus, worker, "ping")).result["incarnation"] != asked["incarnation"]:
                return True
        except ConfigError:
            return True
        await asyncio.sleep(LOOK_S)
    return False
