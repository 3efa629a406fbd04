"""SGLang's output chunks as steps of the pipeline. Pure: needs no SGLang.

A chunk is `{"text", "output_ids", "meta_info"}`, each piece new since the chunk before (SGLang's incremental
streaming); `meta_info["finish_reason"]` is a dictionary on the last one.
"""

import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final

from pipeline.engine.protocol import EngineOutput
from pipeline.engine.sglang.requests import refusal
from pipeline.engine.sglang.token_bytes import LOST, PieceOf, bytes_of
from pipeline.errors import EngineFailed, PrefillLost
from subjects.codec import NO_TOKENS, TokenIds, Vector
from subjects.messages import PositionLogprobs, TokenLogprob

_TRANSFER_FAILED: Final = "KVTransferError"
"""Stands in SGLang's word of a room that came to nothing."""


def step(
    chunk: Mapping[str, Any],
    *,
    logprobs: bool,
    top_logprobs: int,
    prompt_logprobs: bool = False,
    piece_of: PieceOf = lambda _: None,
) -> EngineOutput:
    """One chunk as a step; `prompt_logprobs`: with those of the prompt. `piece_of`: see `token_bytes`.

    Raises InvalidRequest, PrefillLost or EngineFailed where SGLang ended the request so.
    """
    meta = chunk["meta_info"]
    finish = meta["finish_reason"]
    if finish and finish["type"] == "abort":
        return _aborted(finish)
    token_ids = chunk["output_ids"]
    return EngineOutput(
        token_ids=TokenIds.of(token_ids),
        text=chunk["text"],
        logprobs=_logprobs(meta, len(token_ids), top_logprobs, piece_of) if logprobs else None,
        finish_reason=finish["type"] if finish else None,
        matched_stop=finish.get("matched") if finish else None,
        cached_tokens=meta["cached_tokens"] if finish else 0,
        prompt_logprobs=_prompt_logprobs(meta, top_logprobs, piece_of) if prompt_logprobs else None,
    )


def vector(chunk: Mapping[str, Any]) -> Vector:
    """An embedding's only chunk, `{"embedding", "meta_info"}`, as a vector: f32[dimensions].

    Raises InvalidRequest where SGLang refused the input, EngineFailed where it gave no vector.
    """
    finish = chunk["meta_info"].get("finish_reason")
    if finish and finish["type"] == "abort":
        _aborted(finish)
        raise EngineFailed("SGLang took the input back")
    numbers = chunk["embedding"]
    if not isinstance(numbers, list) or not math.isfinite(math.fsum(numbers)):
        raise EngineFailed("SGLang answered with what is no vector of finite numbers")
    return Vector.of(numbers)


def _aborted(finish: Mapping[str, Any]) -> EngineOutput:
    """The end of a request that was taken back. Its chunk repeats tokens that were already given: they are dropped."""
    status, message = finish.get("status_code"), finish.get("message") or "the engine gave up"
    if status == HTTPStatus.BAD_REQUEST:
        raise refusal(message)
    if _TRANSFER_FAILED in message:
        raise PrefillLost(message)
    if status is not None:
        raise EngineFailed(message)
    return EngineOutput(token_ids=NO_TOKENS, finish_reason="abort")


def _logprobs(meta: Mapping[str, Any], count: int, top_count: int, piece_of: PieceOf) -> tuple[PositionLogprobs, ...]:
    """The last `count` positions' log probabilities, each with `top_count` alternatives."""
    if count == 0:
        return ()
    chosen = meta["output_token_logprobs"][-count:]
    tops: Sequence[Any] = meta["output_top_logprobs"][-count:] if top_count else [()] * count
    return _positions(chosen, tops, piece_of)


def _prompt_logprobs(meta: Mapping[str, Any], top_count: int, piece_of: PieceOf) -> tuple[PositionLogprobs, ...]:
    """Of every prompt token; the first has no log probability and no alternatives."""
    chosen = meta["input_token_logprobs"]
    return _positions(chosen, meta["input_top_logprobs"] if top_count else [()] * len(chosen), piece_of)


def _positions(chosen: Sequence[Any], tops: Sequence[Any], piece_of: PieceOf) -> tuple[PositionLogprobs, ...]:
    def logprob(value: float | None, token_id: int, text: str | None) -> TokenLogprob:
        raw = bytes_of(piece_of(token_id)) if text and LOST in text else None
        return TokenLogprob(token_id=token_id, logprob=value, text=text, raw=raw)

    return tuple(
        PositionLogprobs(chosen=logprob(*one), top=tuple(logprob(*other) for other in top or ()))
        for one, top in zip(chosen, tops, strict=True)
    )
