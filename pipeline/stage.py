"""What a stage is: a typed task in, emits out, no I/O but its engine. `pipeline.runner` does all the rest.

    @stage(name="echo", takes=PreprocessedRequest, answer=answer)
    async def echo(task: Task[PreprocessedRequest], engine: Engine) -> AsyncIterator[Emit]:
        yield emit_frame(task.payload.client, task.payload.request_id, Frame(...))

Calling the stage with its resources binds them: `runner.run(echo.bind(engine=engine), consumer, slots=8)`.
"""

from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final, Generic, TypeVar

from pipeline.errors import PipelineError
from subjects import names
from subjects.codec import Format, encode
from subjects.messages import Frame, Message, OwnedTask, Timing

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Task(Generic[T]):
    """One delivery of one message. A redelivery is a new task with a higher `attempt`."""

    payload: T
    headers: dict[str, str] = field(default_factory=dict)
    subject: str
    stream_seq: int
    attempt: int = 1
    stored_unix_s: float = 0.0
    ended: set[int] = field(default_factory=set)
    """Choices whose terminal frame is out; the runner adds what it publishes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Emit:
    """A message to publish: acknowledged by JetStream where it has a `msg_id`, else fire and forget."""

    subject: str
    payload: bytes
    msg_id: str | None = None
    headers: dict[str, str] | None = None
    frame: Frame | None = None  # what the payload holds, for the runner's metrics


ACCEPTED: Final = Emit(subject="", payload=b"")
"""Yielded by a stage whose task is done once it has begun: the runner acks it now, and hands it out no more."""

Run = Callable[..., AsyncIterator[Emit]]
Answer = Callable[[Task[Any], PipelineError], Iterable[Emit]]


@dataclass(frozen=True, kw_only=True)
class Stage(Generic[T]):
    """A stage's declaration. `takes` is bytes for a stage that parses its payload itself."""

    name: str
    takes: type[T]
    run: Run
    answer: Answer
    """The terminal frames that end a task's request with an error."""

    def bind(self, **resources: Any) -> "Stage[T]":
        """The stage with its resources (an engine, a log) given."""
        return replace(self, run=partial(self.run, **resources))


def stage(*, name: str, takes: type[T], answer: Answer) -> Callable[[Run], Stage[T]]:
    """Declare an async generator function to be a stage."""
    return lambda run: Stage(name=name, takes=takes, run=run, answer=answer)


def terminal_msg_id(client: str, request_id: str, choice: int) -> str:
    """The `Nats-Msg-Id` of a choice's last frame: JetStream keeps the first and marks a second as duplicate."""
    return f"{client}.{request_id}.{choice}.end"


def emit_frame(client: str, request_id: str, frame: Frame, form: Format = Format.MSGPACK) -> Emit:
    """A frame to a client: the terminal one is acknowledged, the others leave at core speed."""
    return Emit(
        subject=names.RESPONSES.of(client=client, request_id=request_id),
        payload=encode(frame, form),
        msg_id=terminal_msg_id(client, request_id, frame.choice) if frame.finish_reason else None,
        frame=frame,
    )


def begin_frames(request: OwnedTask, attempt: int, worker: str) -> Iterable[Emit]:
    """A later owner's first word on each choice: whoever reads it drops what an earlier one sends after it."""
    for choice in range(request.choices):
        frame = Frame(request_id=request.request_id, choice=choice, attempt=attempt, worker=worker)
        emit = emit_frame(request.client, request.request_id, frame, request.reply_format)
        yield replace(emit, msg_id=f"{request.client}.{request.request_id}.{choice}.{attempt}.begin")


def emit_work(subject: str, message: Message, msg_id: str) -> Emit:
    """A task for another stage."""
    return Emit(subject=subject, payload=encode(message), msg_id=msg_id)


def answer_owned(task: Task[OwnedTask], error: PipelineError) -> Iterable[Emit]:
    """The terminal error frame of each choice that has none yet, from the task's owner."""
    for choice in range(task.payload.choices):
        if choice not in task.ended:
            yield end_with_error(task.payload, choice, error, task.attempt)


def end_with_error(request: OwnedTask, choice: int, error: PipelineError, attempt: int) -> Emit:
    """The terminal frame of a choice that ends in an error; "abort" where someone asked for the end."""
    failure = error.failure()
    return emit_frame(
        request.client,
        request.request_id,
        Frame(
            request_id=request.request_id,
            choice=choice,
            attempt=attempt,
            finish_reason="abort" if failure.code == "cancelled" else "error",
            error=failure,
            timing=Timing(accepted_unix_s=request.accepted_unix_s),
        ),
        request.reply_format,
    )
