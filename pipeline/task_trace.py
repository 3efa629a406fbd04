"""One delivery of a task in its request's trace: the time that it waited, and a span around its stage."""

import time
from collections.abc import Iterable, Iterator
from typing import Any, Final

import structlog

from pipeline import spans, tracing
from pipeline.bus import Delivery
from pipeline.spans import Attribute
from pipeline.tracing import TraceContext
from subjects.messages import EmbeddingTask, Frame, PrefillTask, PreprocessedRequest, SamplingOptions

WELL: Final = ("done", "handed_over")
"""Outcomes of a delivery that are no error."""


class TaskTrace:
    """To be made when the delivery comes, and ended with its outcome."""

    def __init__(self, stage: str, delivery: Delivery) -> None:
        origin = f"{delivery.stream}.{delivery.stream_seq}.{delivery.stored_unix_s}"
        came = TraceContext.of(delivery.headers, origin)
        now_unix_s = time.time()
        about = {
            "messaging.system": "nats",
            "messaging.destination.name": delivery.subject,
            "sglang_nats.attempt": delivery.attempt,
        }
        spans.record("queue", came, delivery.stored_unix_s, now_unix_s, about)
        self._span = spans.begin(stage, came, about, start_unix_s=now_unix_s, kind="consumer")
        self._taken_unix_s = now_unix_s
        self._ends: list[Frame] = []
        self._begun = False

    def enter(self) -> None:
        """From now on this asyncio task, and all that it starts, publishes and logs for this delivery."""
        tracing.current.set(self._span.context)
        structlog.contextvars.bind_contextvars(trace_id=self._span.context.trace_id)

    def note(self, frame: Frame | None) -> None:
        """A frame is out."""
        if frame is None:
            return
        if not self._begun and (frame.token_ids or frame.text):
            self._begun = True
            self._span.set({"gen_ai.response.time_to_first_chunk": time.time() - self._taken_unix_s})
            self._span.event("first token")
        if frame.finish_reason:
            self._ends.append(frame)

    def end(self, outcome: str, payload: Any) -> None:
        """`payload`: the task's, None where it could not be read."""
        self._span.set({"sglang_nats.outcome": outcome} | dict(_asked(payload)) | dict(_answered(self._ends)))
        self._span.end(error=None if outcome in WELL else outcome)


def _asked(payload: Any) -> Iterator[tuple[str, Attribute]]:
    """What a task says of its request, in the words of the conventions. What is None is left out."""
    if isinstance(payload, EmbeddingTask):
        yield "gen_ai.operation.name", "embeddings"
        yield "gen_ai.provider.name", "sglang"
        yield "gen_ai.request.model", payload.model
        yield "gen_ai.usage.input_tokens", sum(map(len, payload.inputs))
        yield "sglang_nats.inputs", payload.choices
        return
    if not isinstance(payload, PreprocessedRequest | PrefillTask):
        return
    yield "gen_ai.operation.name", "text_completion"  # tokens to tokens: a chat's template is applied before
    yield "gen_ai.provider.name", "sglang"
    yield "gen_ai.request.model", payload.model
    yield "gen_ai.response.id", payload.request_id
    yield "gen_ai.usage.input_tokens", len(payload.token_ids)
    if isinstance(payload, PrefillTask):
        yield "sglang_nats.owner", payload.owner
        return
    yield "gen_ai.request.max_tokens", payload.stop.max_tokens
    yield "gen_ai.request.choice.count", payload.choices
    yield "gen_ai.request.stream", payload.output.stream
    yield from _sampled(payload.sampling)


def _sampled(sampling: SamplingOptions) -> Iterator[tuple[str, Attribute]]:
    given = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "frequency_penalty": sampling.frequency_penalty,
        "presence_penalty": sampling.presence_penalty,
        "seed": sampling.seed,
    }
    for name, value in given.items():
        if value is not None:
            yield f"gen_ai.request.{name}", value


def _answered(ends: Iterable[Frame]) -> Iterator[tuple[str, Attribute]]:
    """What the terminal frames say."""
    finished = [end.finish_reason for end in ends if end.finish_reason]
    if not finished:
        return
    yield "gen_ai.response.finish_reasons", finished
    usages = [end.usage for end in ends if end.usage]
    yield "gen_ai.usage.output_tokens", sum(usage.completion_tokens for usage in usages)
    yield "gen_ai.usage.cache_read.input_tokens", max((usage.cached_tokens for usage in usages), default=0)
