"""Options of a request beside its prompt and its sampling: what an engine is told of it, and what OpenAI's clients
send that changes nothing here. Pure."""

from collections.abc import Sequence
from typing import Any, Final, cast

from pipeline.checks import check_count, out_of_range
from pipeline.errors import InvalidRequest
from pipeline.refusals import clipped
from subjects import limits, names
from subjects.messages import EngineOptions, OutputOptions, Request

_ADAPTER_SIGN: Final = ":"
"""Stands between a model and an adapter in SGLang's short form."""


Prompt = str | tuple[int, ...]
"""A text, or token ids."""


def prompts_of(request: Request) -> tuple[Prompt, ...]:
    """A completion's prompts, in order; none of a chat. Raises InvalidRequest for a list of several kinds."""
    given = request.prompt
    if given is None or isinstance(given, str):
        return () if given is None else (given,)
    kind = type(given[0]) if given else int
    if (odd := next((index for index, one in enumerate(given) if type(one) is not kind), None)) is not None:
        raise InvalidRequest(f"prompt.{odd}: is of another kind than prompt.0", field=f"prompt.{odd}")
    return cast("tuple[Prompt, ...]", (given,) if kind is int else given)


def choices_of(n: Any, prompt: Any = None) -> int:
    """How many choices end a request that says `n` and `prompt`: of a number that is refused, one."""
    n = 1 if n is None else n
    several = isinstance(prompt, list | tuple) and bool(prompt) and isinstance(prompt[0], str | list | tuple)
    choices = n * (len(prompt) if several else 1) if type(n) is int and n >= 1 else 1
    return choices if choices <= limits.CHOICES_MAX else 1


def is_model(asked: str, model: str) -> bool:
    """Whether a request that names `asked` is one for the subject's `model`, with an adapter or without."""
    return bool(asked) and model in (names.token(asked), names.token(base_model(asked)))


def base_model(asked: str) -> str:
    """The model of `<model>:<adapter>`.

    >>> base_model("smollm2:poet"), base_model("smollm2")
    ('smollm2', 'smollm2')
    """
    return asked.partition(_ADAPTER_SIGN)[0].strip() or asked


def check_options(request: Request) -> None:
    """Raises InvalidRequest for an option that does not fit the others, or that is wrong whatever the model."""
    if request.echo and request.prompt is None:
        raise InvalidRequest("echo: is a field of completions, which give `prompt`", field="echo")
    if request.best_of is not None and request.best_of != request.n:
        raise InvalidRequest(
            f"best_of: {request.best_of} is not n, which is {request.n}: every output that is made is given back",
            field="best_of",
        )
    if request.store:
        raise InvalidRequest("store: nothing is stored beyond the answer", field="store")
    check_count("metadata", len(request.metadata or ()), limits.METADATA_ENTRIES_MAX)
    if request.cache_salt is not None:
        check_count("cache_salt", len(request.cache_salt), limits.CACHE_SALT_CHARS_MAX, least=1, of="characters")
    if request.max_thinking_tokens is not None and request.max_thinking_tokens < 0:
        raise out_of_range("max_thinking_tokens", request.max_thinking_tokens, "at least 0", 0)
    dp_rank(request)


def dp_rank(request: Request) -> int | None:
    """The data-parallel rank that is asked for; how many there are, the worker knows."""
    older, newer = request.data_parallel_rank, request.routed_dp_rank
    if older is not None and newer is not None and older != newer:
        raise InvalidRequest(
            "routed_dp_rank: differs from data_parallel_rank, its older name; give one", field="routed_dp_rank"
        )
    field, rank = ("data_parallel_rank", older) if newer is None else ("routed_dp_rank", newer)
    if rank is not None and not 0 <= rank < 2**31:
        raise out_of_range(field, rank, "the number of one of the worker's ranks", 0)
    return rank


def session_of(request: Request) -> str | None:
    """What keeps requests together; OpenAI's clients call it prompt_cache_key."""
    return request.session or request.prompt_cache_key or None


def engine_options(request: Request, model: str) -> EngineOptions:
    """Raises InvalidRequest where two adapters are named."""
    return EngineOptions(
        lora_path=_adapter(request, model),
        cache_salt=request.cache_salt,
        max_thinking_tokens=request.max_thinking_tokens,
    )


def _adapter(request: Request, model: str) -> str | None:
    asked, short = request.model or "", None
    if names.token(asked or model) != model:  # otherwise the sign is a part of the model's name
        short = asked.partition(_ADAPTER_SIGN)[2].strip() or None
    given = request.lora_path or None
    if short and given and short != given:
        raise InvalidRequest(
            f"lora_path: {clipped(given)!r} is not {clipped(short)!r}, the adapter that `model` names",
            field="lora_path",
        )
    adapter = short or given
    check_count("lora_path", len(adapter or ""), limits.LORA_NAME_CHARS_MAX, of="characters")
    return adapter


def check_prompt_logprobs(output: OutputOptions, prompts: Sequence[int]) -> None:
    """`prompts`: the tokens of each. Raises InvalidRequest where theirs are more than an answer's frame carries."""
    count = max(prompts, default=0) * (1 + output.top_logprobs)
    if output.prompt_logprobs and count > limits.PROMPT_LOGPROBS_MAX:
        raise InvalidRequest(
            f"echo: with logprobs, a prompt of {max(prompts)} tokens with {output.top_logprobs} alternatives each has "
            f"{count} log probabilities; an answer carries at most {limits.PROMPT_LOGPROBS_MAX}",
            field="echo",
            size=count,
            limit=limits.PROMPT_LOGPROBS_MAX,
        )
