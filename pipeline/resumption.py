"""How the next owner of a choice goes on from what its log already holds. Pure.

An engine that is given prompt + emitted tokens goes on as the first one would have, as long as nothing but the
tokens decides what comes next. Three things are more than tokens, and an engine counts them from where it starts:

- a grammar (JSON schema, regex, EBNF), a thinking budget, and the presence and repetition penalties. Such a choice is
  generated once more from its prompt and what the client has is dropped: exact where the tokens are drawn without
  chance (temperature 0, or a seed on an engine that honours it). Otherwise it ends in an error rather than in an answer
  that breaks its grammar or forgets its penalties.
- the frequency penalty, which is linear: what the emitted tokens have earned goes into the logit bias.
- stop strings, which may lie across the seam: `SeamStops` looks there.
"""

from collections import Counter
from dataclasses import dataclass, replace

import msgspec

from pipeline.engine.protocol import EngineOutput
from pipeline.errors import EngineFailed
from pipeline.progress import Progress
from subjects.codec import TokenIds
from subjects.messages import PreprocessedRequest, SamplingOptions, StopConditions


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the engine is asked for, and how many of its tokens the client already has."""

    token_ids: TokenIds  # u32[num_prompt_tokens, and the emitted ones where it goes on]
    stop: StopConditions
    sampling: SamplingOptions
    repeated_tokens: int = 0


def plan(request: PreprocessedRequest, so_far: Progress) -> Plan:
    """How to go on from `so_far`. Raises EngineFailed where no continuation would be right."""
    done = len(so_far.token_ids)
    if not done:
        return Plan(token_ids=request.token_ids, stop=request.stop, sampling=request.sampling)
    if _more_than_tokens(request.sampling) or request.engine.max_thinking_tokens is not None:
        if not _foreseeable(request.sampling):
            raise EngineFailed(
                "the worker was lost in mid-answer, and a sampled answer under a grammar, a thinking budget, a "
                "presence or a repetition penalty cannot be continued by another one; ask again, with temperature 0 "
                "or a seed to be safe"
            )
        return Plan(token_ids=request.token_ids, stop=request.stop, sampling=request.sampling, repeated_tokens=done)
    stop = msgspec.structs.replace(
        request.stop,
        max_tokens=request.stop.max_tokens - done,
        min_tokens=max(0, request.stop.min_tokens - done),
    )
    sampling = _with_earned_penalty(request.sampling, so_far.token_ids)
    return Plan(token_ids=request.token_ids + so_far.token_ids, stop=stop, sampling=sampling)


def _more_than_tokens(sampling: SamplingOptions) -> bool:
    return bool(
        sampling.json_schema
        or sampling.regex
        or sampling.ebnf
        or sampling.structural_tag
        or sampling.presence_penalty
        or (sampling.repetition_penalty or 1.0) != 1.0
    )


def _foreseeable(sampling: SamplingOptions) -> bool:
    """Whether a second run draws the same tokens."""
    return sampling.temperature == 0 or sampling.top_k == 1 or sampling.seed is not None


def _with_earned_penalty(sampling: SamplingOptions, emitted: TokenIds) -> SamplingOptions:
    """The frequency penalty of the emitted tokens as logit bias; the engine adds that of the tokens to come."""
    if not sampling.frequency_penalty:
        return sampling
    bias = dict(sampling.logit_bias or {})
    for token, count in Counter(emitted).items():
        bias[str(token)] = bias.get(str(token), 0.0) - sampling.frequency_penalty * count
    return msgspec.structs.replace(sampling, logit_bias=bias)


class Seam:
    """Makes the outputs of a continuation those of an answer that was never interrupted."""

    def __init__(self, request: PreprocessedRequest, so_far: Progress, how: Plan) -> None:
        self._repeated_tokens, self._repeated_chars = how.repeated_tokens, 0
        if how.repeated_tokens:
            self._repeated_chars = len(so_far.raw)
        self._stops = request.stop.stop if len(so_far.token_ids) and not how.repeated_tokens else ()
        reach = max(map(len, self._stops), default=1) - 1
        self._before = so_far.raw[-reach:] if reach else ""
        self._since = ""
        self._keep_stop = request.output.no_stop_trim

    def output(self, output: EngineOutput) -> EngineOutput | None:
        """The part of an output that is new, perhaps the last; None where nothing is."""
        if self._repeated_tokens or self._repeated_chars:
            return self._without_repeats(output)
        return self._ended_by_stop(output) if self._before else output

    def _without_repeats(self, output: EngineOutput) -> EngineOutput | None:
        tokens = min(self._repeated_tokens, len(output.token_ids))
        chars = min(self._repeated_chars, len(output.text))
        self._repeated_tokens -= tokens
        self._repeated_chars -= chars
        if tokens == len(output.token_ids) and chars == len(output.text) and output.finish_reason is None:
            return None
        return replace(
            output,
            token_ids=output.token_ids[tokens:],
            text=output.text[chars:],
            logprobs=output.logprobs[tokens:] if output.logprobs is not None else None,
        )

    def _ended_by_stop(self, output: EngineOutput) -> EngineOutput:
        """Look for a stop string that began before the seam; what was emitted of it cannot be taken back."""
        emitted = len(self._before) + len(self._since)
        window = self._before + self._since + output.text
        starts = [(window.find(stop), stop) for stop in self._stops]
        crossing = [(start, stop) for start, stop in starts if 0 <= start < len(self._before)]
        if crossing:
            start, stop = min(crossing)
            text = window[emitted : start + len(stop)] if self._keep_stop else ""
            return replace(output, text=text, finish_reason="stop", matched_stop=stop)
        self._since += output.text
        if len(self._since) >= max(map(len, self._stops)) - 1:
            self._before = ""  # no stop string reaches from here over the seam
        return output
