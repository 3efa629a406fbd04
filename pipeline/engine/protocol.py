"""What a stage may ask of an engine. The SGLang adapter and the simulated engine both answer to it."""

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

from pipeline.operations import Arguments
from subjects.codec import TokenIds, Vector
from subjects.messages import (
    Embedding,
    EngineOptions,
    FinishReason,
    Load,
    MetricFamily,
    OutputOptions,
    PositionLogprobs,
    PreprocessedRequest,
    SamplingOptions,
    StopConditions,
    ToolCallDelta,
)

CANARY: Final = "canary-"
"""How the rid of a canary begins."""


@dataclass(frozen=True, kw_only=True)
class Room:
    """Where two engines meet for one prompt's KV: decode waits in it, prefill brings the KV."""

    number: int  # in [0, 2**63)
    prefill_worker: str
    prefill_incarnation: str

    @property
    def loopback(self) -> bool:
        """No prefill worker is named: an engine alone, for its canary; the KV comes from nobody and goes to nobody."""
        return not self.prefill_worker


@dataclass(frozen=True, kw_only=True)
class Prefilled:
    """Who computed a prompt's KV in a room, and when, in seconds since the Unix epoch."""

    worker: str
    claimed_unix_s: float
    kv_landed_unix_s: float | None = None  # None: not told


@dataclass(frozen=True, kw_only=True)
class EngineRequest:
    """One choice of one request, as an engine takes it."""

    rid: str  # unique in the engine, e.g. "<request_id>.<choice>.<attempt>"
    token_ids: TokenIds  # u32[num_prompt_tokens]
    stop: StopConditions
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    output: OutputOptions = field(default_factory=OutputOptions)
    request_id: str = ""  # the request that the choice belongs to, for those who prefill it elsewhere
    deadline_unix_s: float | None = None
    priority: int = 0  # larger is sooner, where the engine has priorities
    room: Room | None = None  # with disaggregation, on both sides
    dp_rank: int | None = None  # the data-parallel rank that is to run it; None: any
    options: EngineOptions = field(default_factory=EngineOptions)


@dataclass(frozen=True, kw_only=True)
class EngineOutput:
    """A step of one choice: only what is new since the step before."""

    token_ids: TokenIds  # u32[num_new_tokens]
    text: str = ""  # new text; lags behind the tokens while a character is incomplete
    logprobs: tuple[PositionLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None  # set on the last step only
    matched_stop: int | str | None = None
    cached_tokens: int = 0  # on the last step: prompt tokens found in the KV cache
    prefilled: Prefilled | None = None  # on the last step, with disaggregation
    prompt_logprobs: tuple[PositionLogprobs, ...] | None = None  # on the first step, where asked for


@dataclass(frozen=True, kw_only=True)
class EmbeddingBatch:
    """Inputs of one embedding request, as an engine takes them."""

    rid: str  # unique in the engine, e.g. "<request_id>.<attempt>.<number>"
    inputs: tuple[TokenIds, ...]  # each u32[num_tokens], none empty
    dimensions: int | None = None  # of each vector; None: all that the model has


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """What a piece of a chat's output turned out to be."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()


class Parser(Protocol):
    """Reads one choice's output: reasoning, tool calls, and the content that is left."""

    def feed(self, text: str) -> Parsed:
        """What more is known with these characters. The sum over an output does not depend on how it is cut."""
        ...

    def end(self) -> Parsed:
        """What was held back, now that nothing comes any more."""
        ...


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a request's output is to be generated and read."""

    request: PreprocessedRequest  # with what its parser asks of the engine
    parser: Callable[[int], Parser] | None = None  # a new one for a choice; None: all of the output is content


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """Facts about a started engine, for its model card."""

    name: str  # "sglang 0.5.21" or "simulated"
    model_path: str
    context_len_tokens: int
    max_running_requests: int
    max_prefill_tokens: int
    kv_blocks: int
    kv_block_tokens: int
    disaggregation: Literal["aggregated", "prefill", "decode"] = "aggregated"
    dp_size: int = 1
    tp_size: int = 1
    reasoning_parser: str | None = None
    tool_call_parser: str | None = None
    sampling: Mapping[str, float] = field(
        default_factory=dict
    )  # the model's own temperature and top_p, where it has any
    embedding: Embedding | None = None  # of an engine that embeds, and then generates nothing
    tokenizer_path: str | None = None  # the folder or hub name that its tokenizer is of; None: the settings' model path
    tokenizer_revision: str | None = None  # at the hub


@dataclass(frozen=True, kw_only=True)
class Vitals:
    """What can be seen of an engine without asking it anything. Canaries do not count."""

    outputs: int  # steps of any request that have come out of it since its start
    running: int  # requests that it was given and has not ended
    stopped: tuple[str, ...] = ()  # its processes that a signal or a debugger has stopped
    cpu_s: tuple[
        float, ...
    ] = ()  # f[dp_size] each rank's time on the CPU, of which a change counts; () where it is not known


class Engine(Protocol):
    """An engine that has one event loop and lives as long as its process."""

    async def start(self) -> EngineInfo:
        """Load the model and be ready to generate. Raises EngineStartError with a sentence."""
        ...

    def generate(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        """Stream one choice. The last output has a finish_reason.

        Closing the iterator, or cancelling the task that reads it, aborts the request in the engine and
        frees its KV.

        Raises:
            InvalidRequest: the engine refuses the request.
            EngineFailed: the engine gave up on this request.
            EngineDied: the engine ended, or is not started.
            EngineSuspended: see `suspended`.
            PrefillLost: with a room, its KV could not be moved.
        """
        ...

    async def embed(self, batch: EmbeddingBatch) -> tuple[Vector, ...]:
        """The inputs' vectors, in their order: f32[dimensions] each, as the model normalizes them.

        Cancelling it takes the batch back out of the engine.

        Raises:
            InvalidRequest: the engine refuses an input, or the dimensions.
            NotSupported: the engine generates.
            EngineFailed, EngineDied, EngineSuspended: as `generate`.
        """
        ...

    def reading(self, request: PreprocessedRequest) -> Reading:
        """How this engine's model says what a chat asks for, tool calls and reasoning. Never waits.

        Raises InvalidRequest for a tool that must be called where the engine has no grammar for it.
        """
        ...

    async def warm_up(self) -> None:
        """Compute once what the first request would otherwise wait for."""
        ...

    async def died(self) -> str:
        """Wait until nothing can be generated any more; the reason."""
        ...

    async def load(self) -> Load:
        """What the engine is doing now."""
        ...

    def series(self) -> Mapping[str, tuple[MetricFamily, ...]]:
        """The Prometheus series that the engine itself counts, by its process; empty where it counts none."""
        ...

    @property
    def suspended(self) -> str | None:
        """Why nothing can be generated until an operator ends that, e.g. released memory; None where it can."""
        ...

    async def control(self, operation: str, arguments: Arguments) -> dict[str, Any]:
        """Carry out an operation of `pipeline.operations`, one at a time; its result, of plain types.

        Where its arguments are `WithIdleEngine`, nothing is being generated and nothing will be meanwhile. It cannot
        be broken off.

        Raises:
            NotSupported: the engine cannot do that, or was started without what it needs.
            InvalidRequest: an argument does not fit this engine.
            Busy: not now.
            EngineFailed: the engine tried and failed.
            EngineDied: the engine ended.
        """
        ...

    def canary(self, dp_rank: int) -> EngineRequest:
        """The smallest request that makes a rank generate, for `generate`; greedy, its rid a new `CANARY`.

        An engine that embeds takes this one request there, and embeds its prompt.
        """
        ...

    def vitals(self) -> Vitals:
        """Signs of life; never waits. Raises EngineDied."""
        ...

    async def close(self) -> None:
        """End the engine and every process it started. Idempotent."""
        ...
