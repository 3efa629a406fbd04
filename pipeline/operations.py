"""What an operator can have a worker do: each operation once, as data, with the limits of its arguments.

The worker's side is `pipeline.commands`, the operator's `pipeline.control`, and what an engine does of it
`Engine.control`.
"""

import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

import msgspec

from pipeline.errors import InvalidRequest

PATH_CHARS_MAX: Final = 4096
WAIT_S_MAX: Final = 3_600.0
STEPS_MAX: Final = 10_000

AbsolutePath = Annotated[str, msgspec.Meta(pattern="^/", max_length=PATH_CHARS_MAX)]
Steps = Annotated[int, msgspec.Meta(ge=1, le=STEPS_MAX)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=WAIT_S_MAX)]


class Arguments(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An operation's arguments; this one takes none."""


class WithIdleEngine(Arguments, frozen=True, kw_only=True):
    """Of an operation for which the worker is paused first, and waits until nothing runs any more."""

    wait_s: Seconds = 30.0  # so long; then nothing is done


MemoryKind = Literal["kv_cache", "weights", "cuda_graph"]


class ReleaseMemory(WithIdleEngine, frozen=True, kw_only=True):
    kinds: tuple[MemoryKind, ...] = ()  # empty: all


class ResumeMemory(Arguments, frozen=True, kw_only=True):
    kinds: tuple[MemoryKind, ...] = ()  # empty: all that was released


class UpdateWeights(WithIdleEngine, frozen=True, kw_only=True):
    model_path: AbsolutePath  # a folder on every machine of the engine
    weight_version: Annotated[str, msgspec.Meta(min_length=1, max_length=256)] | None = None


class StartProfile(Arguments, frozen=True, kw_only=True):
    output_dir: AbsolutePath | None = None  # None: the engine's own
    num_steps: Steps | None = None  # None: until stop_profile
    activities: tuple[Literal["CPU", "GPU"], ...] = ()  # empty: both
    by_stage: bool = False  # prefill and decode in files of their own; needs num_steps
    with_stack: bool = False  # Python's call stacks; costs much
    record_shapes: bool = False


class LogLevel(Arguments, frozen=True, kw_only=True):
    level: Literal["debug", "info", "warning", "error"]


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One operation: what it takes, who can do it, and how long it may take."""

    name: str
    about: str
    arguments: type[Arguments] = Arguments
    by: Literal["worker", "engine"] = "worker"  # "engine": only by a worker that has one
    alone: bool = False  # at most one of these at a time in a worker
    timeout_s: float = 2.0

    def deadline_s(self, arguments: Arguments) -> float:
        """When the asker has an answer at the latest."""
        return self.timeout_s + (arguments.wait_s if isinstance(arguments, WithIdleEngine) else 0.0)


def _engine(name: str, about: str, arguments: type[Arguments] = Arguments, *, timeout_s: float) -> Operation:
    return Operation(name=name, about=about, arguments=arguments, by="engine", alone=True, timeout_s=timeout_s)


ALL: Final = (
    Operation(name="ping", about="Say who it is, and what it is doing."),
    Operation(name="drain", about="Take no more work, finish or hand over what runs, and end."),
    Operation(name="pause", about="Take no more work until `resume`; what runs goes on.", alone=True, timeout_s=5.0),
    Operation(name="resume", about="Take work again after `pause`.", alone=True, timeout_s=5.0),
    Operation(name="log_level", about="Change the level of the worker's log.", arguments=LogLevel),
    Operation(name="health", about="Say whether it lives and takes work, and every reason against either."),
    Operation(name="server_info", about="The engine's settings and capacities.", by="engine", timeout_s=15.0),
    _engine("flush_cache", "Forget every cached prefix.", WithIdleEngine, timeout_s=30.0),
    _engine(
        "release_memory",
        "Give the GPU's memory free, and take no more work until it was resumed.",
        ReleaseMemory,
        timeout_s=120.0,
    ),
    _engine("resume_memory", "Take the released memory again.", ResumeMemory, timeout_s=120.0),
    _engine("update_weights", "Load other weights of the same shapes from a folder.", UpdateWeights, timeout_s=900.0),
    _engine("start_profile", "Record what the engine computes.", StartProfile, timeout_s=60.0),
    _engine("stop_profile", "End the recording, and say in which files it is.", timeout_s=300.0),
    _engine("start_expert_distribution", "Begin to count which experts the tokens go to.", timeout_s=30.0),
    _engine("stop_expert_distribution", "Stop counting; what was counted is kept.", timeout_s=30.0),
    _engine("dump_expert_distribution", "Write the counts to a file, and count from zero.", timeout_s=120.0),
)
BY_NAME: Final[Mapping[str, Operation]] = {operation.name: operation for operation in ALL}


def find(name: str) -> Operation:
    """Raises InvalidRequest, naming every operation that there is."""
    if name not in BY_NAME:
        raise InvalidRequest(f"operation: {name!r} is not one of {', '.join(BY_NAME)}", field="operation")
    return BY_NAME[name]


def parse(operation: Operation, given: Mapping[str, Any], *, as_text: bool = False) -> Arguments:
    """The arguments, checked. `as_text`: all values are text, and lists are parted by commas.

    Raises InvalidRequest naming the argument.
    """
    known = {field.name: field for field in msgspec.structs.fields(operation.arguments)}
    for name in given:
        if name not in known:
            takes = f"takes {', '.join(known)}" if known else "takes no arguments"
            raise InvalidRequest(f"{name}: {operation.name} {takes}", field=name)
    values = dict(given)
    if as_text:
        values = {name: _listed(value) if known[name].default == () else value for name, value in given.items()}
    for name, field in known.items():
        if field.required and name not in values:
            raise InvalidRequest(f"{name}: {operation.name} needs it", field=name)
        if name in values:
            _check(name, values[name], field.type, strict=not as_text)
    return msgspec.convert(values, operation.arguments, strict=not as_text)


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _check(name: str, value: Any, kind: Any, *, strict: bool) -> None:
    try:
        msgspec.convert(value, kind, strict=strict)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"{name}: {value!r} is not allowed: {error}{_choices(kind)}", field=name) from None


def _choices(kind: Any) -> str:
    """What a Literal, or a tuple of one, allows."""
    of = typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else kind
    return f"; there are {', '.join(typing.get_args(of))}" if typing.get_origin(of) is Literal else ""


def describe_arguments(operation: Operation) -> str:
    """The arguments as a person gives them: `model_path=... [wait_s=30.0]`."""
    parts = []
    for field in sorted(msgspec.structs.fields(operation.arguments), key=lambda field: not field.required):
        if field.required:
            parts.append(f"{field.name}=...")
        else:
            default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
            parts.append(f"[{field.name}{'' if default in (None, '') else f'={default}'}]")
    return " ".join(parts)
