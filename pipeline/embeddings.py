"""Embedding requests: from an OpenAI-shaped payload to an EmbeddingTask, and from the frames back to OpenAI's answer.

Pure, as `pipeline.openai` is: `parse` finds every mistake that can be seen without the model, `resolve` those that need
the inputs' tokens. An input that is too long is refused and not cut, as OpenAI and SGLang do.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from pipeline.checks import check_count, check_token_ids, out_of_range
from pipeline.errors import DeadlineExceeded, InvalidRequest, PayloadTooLarge, PromptTooLong
from pipeline.openai import Envelope, open_envelope
from subjects import limits
from subjects.codec import TokenIds, Vector
from subjects.messages import Embedding, EmbeddingRequest, EmbeddingTask, Failure, Frame

Inputs = tuple[str, ...] | tuple[tuple[int, ...], ...]
"""Texts, or lists of token ids."""
_LEAST: Final = 1


def parse(
    payload: bytes,
    message_headers: Mapping[str, str],
    subject: str,
    stream_seq: int,
    *,
    accepted_unix_s: float,
    now_unix_s: float,
) -> Envelope[EmbeddingRequest]:
    """A request, checked against every limit that does not depend on its model.

    Raises InvalidRequest, PayloadTooLarge or DeadlineExceeded; `pipeline.openai.identify` then says whom to answer.
    """
    envelope = open_envelope(
        EmbeddingRequest,
        payload,
        message_headers,
        subject,
        stream_seq,
        accepted_unix_s=accepted_unix_s,
        now_unix_s=now_unix_s,
    )
    for index, one in enumerate(inputs_in(envelope.request)):
        where = _field(envelope.request, index)
        if not one:
            raise InvalidRequest(f"{where}: must not be empty", field=where, size=0, limit=_LEAST)
        if not isinstance(one, str):
            check_token_ids(where, one, vocab_size=2**32)
    if (dimensions := envelope.request.dimensions) is not None and dimensions < _LEAST:
        raise out_of_range("dimensions", dimensions, f"at least {_LEAST}", _LEAST)
    return envelope


def inputs_in(request: EmbeddingRequest) -> Inputs:
    """What is to be embedded, one or many. Raises InvalidRequest for too many, none, or a mixture."""
    given: Sequence[Any] = (request.input,) if isinstance(request.input, str) else request.input
    kinds = {type(one) for one in given}
    if kinds == {int}:  # one input, as token ids
        return (tuple(given),)
    check_count("input", len(given), limits.INPUTS_MAX, least=_LEAST, of="inputs")
    if len(kinds) > 1:
        raise InvalidRequest("input: is a mixture; give texts alone or token ids alone", field="input")
    return tuple(given)


def _field(request: EmbeddingRequest, index: int) -> str:
    """An input's name in an error."""
    single = isinstance(request.input, str) or isinstance(request.input[0], int)
    return "input" if single else f"input.{index}"


def resolve(
    envelope: Envelope[EmbeddingRequest],
    inputs: tuple[TokenIds, ...],
    *,
    context_len_tokens: int,
    vocab_size: int,
    embedding: Embedding | None,
    now_unix_s: float,
) -> EmbeddingTask:
    """The request with its inputs' token ids, each u32[num_tokens].

    Raises PromptTooLong, InvalidRequest for a token outside the vocabulary or for dimensions that the model does not
    have, and DeadlineExceeded.
    """
    request, identity = envelope.request, envelope.identity
    if envelope.deadline_unix_s <= now_unix_s:
        raise DeadlineExceeded("deadline: passed while the inputs were tokenized", field="deadline")
    texts = isinstance(inputs_in(request)[0], str)
    for index, tokens in enumerate(inputs):
        where = _field(request, index)
        if not texts:
            check_token_ids(where, tokens.tolist(), vocab_size)
        _check_length(where, len(tokens), context_len_tokens)
    _check_dimensions(request.dimensions, embedding)
    return EmbeddingTask(
        request_id=identity.request_id,
        client=identity.client,
        model=envelope.model,
        inputs=inputs,
        dimensions=request.dimensions,
        choices=len(inputs),
        deadline_unix_s=envelope.deadline_unix_s,
        reply_format=identity.reply_format,
        accepted_unix_s=envelope.accepted_unix_s,
        reader=envelope.reader,
    )


def _check_length(where: str, tokens: int, context_len_tokens: int) -> None:
    """SGLang keeps one place of the context free, as for the first token of an answer."""
    if tokens < _LEAST:
        raise InvalidRequest(f"{where}: no token is left of it after tokenizing", field=where, size=0, limit=_LEAST)
    if tokens >= context_len_tokens:
        raise PromptTooLong(
            f"{where}: {tokens} tokens; this model takes at most {context_len_tokens - 1} of one input",
            field=where,
            size=tokens,
            limit=context_len_tokens - 1,
        )


def _check_dimensions(wanted: int | None, embedding: Embedding | None) -> None:
    """By SGLang's rule: shorter vectors only of a model that says it was trained for them."""
    if wanted is None or embedding is None:
        return
    if not embedding.matryoshka:
        raise InvalidRequest(
            f"dimensions: this model has {embedding.dimensions}, and no others: it says nothing of Matryoshka "
            "representations (is_matryoshka or matryoshka_dimensions in its config.json)",
            field="dimensions",
            size=wanted,
            limit=embedding.dimensions,
        )
    if wanted > embedding.dimensions:
        raise out_of_range("dimensions", wanted, f"at most {embedding.dimensions}", embedding.dimensions)
    if embedding.matryoshka_dimensions and wanted not in embedding.matryoshka_dimensions:
        allowed = ", ".join(map(str, embedding.matryoshka_dimensions))
        raise InvalidRequest(
            f"dimensions: {wanted} is none of this model's: {allowed}", field="dimensions", size=wanted
        )


def check_task_size(payload: bytes, inputs: int) -> None:
    """Raises PayloadTooLarge for a task that no subject carries."""
    if len(payload) > limits.PAYLOAD_BYTES_MAX:
        raise PayloadTooLarge(
            f"input: the tokens of its {inputs} inputs make a task of {len(payload)} bytes; a subject carries at most "
            f"{limits.PAYLOAD_BYTES_MAX}: send them as several requests",
            field="input",
            size=len(payload),
            limit=limits.PAYLOAD_BYTES_MAX,
        )


@dataclass
class Embeddings:
    """Collects an answer's frames, in any order of its inputs."""

    request_id: str
    model: str
    inputs: int
    _ends: dict[int, Frame] = field(default_factory=dict)

    def add(self, frame: Frame) -> None:
        """Take a frame in."""
        if frame.finish_reason:
            self._ends.setdefault(frame.choice, frame)

    @property
    def failure(self) -> Failure | None:
        """Why the first input that failed did so; None where none has so far."""
        return next((end.error for _, end in sorted(self._ends.items()) if end.error), None)

    @property
    def vectors(self) -> list[Vector]:
        """One for each input, f32[dimensions]. Needs every input's end, and none that failed."""
        found = [self._ends[index].embedding for index in range(self.inputs)]
        assert None not in found, "asked for in spite of a failure"
        return found  # type: ignore[return-value]

    @property
    def prompt_tokens(self) -> int:
        """Of all inputs."""
        return sum(end.usage.prompt_tokens for end in self._ends.values() if end.usage)

    def body(self, encoding_format: str) -> dict[str, Any]:
        """The answer as OpenAI's API gives it: numbers, or base64 of the little-endian f32."""
        as_text = encoding_format == "base64"
        tokens = self.prompt_tokens
        return {
            "object": "list",
            "data": [
                {
                    "object": "embedding",
                    "index": index,
                    "embedding": base64.b64encode(vector.raw).decode() if as_text else vector.tolist(),
                }
                for index, vector in enumerate(self.vectors)
            ],
            "model": self.model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
