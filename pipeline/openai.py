"""From an OpenAI-shaped payload to a PreprocessedRequest. Pure: bytes and facts in, messages or errors out.

`parse_request` finds every mistake that can be seen without the model, `resolve` those that need the prompt's
tokens. `identify` tells where an error about a payload goes, however malformed it is. Choices where users of
OpenAI and of SGLang could expect different things:

- No `max_tokens` means all that the context leaves, for completions too (OpenAI and SGLang: 16 there).
- A `max_tokens` of more than the context leaves is refused, as both do, and not cut.
- A field that is null counts as not given, as OpenAI's API has it.
- Sampling fields that are not given stay None: the engine takes the model's own defaults.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Final, Generic, TypeVar

import msgspec

from pipeline.chat_options import chat_options, check_chat
from pipeline.checks import check_count, check_range, check_token_ids, not_a_token, number_text, out_of_range, size_of
from pipeline.errors import DeadlineExceeded, InvalidRequest, PayloadTooLarge, PromptTooLong
from pipeline.json_schema import check_length, check_schema_text, schema_text
from pipeline.refusals import clipped, refusal
from pipeline.request_options import (
    Prompt,
    check_options,
    check_prompt_logprobs,
    choices_of,
    dp_rank,
    engine_options,
    is_model,
    prompts_of,
)
from subjects import headers, limits, names
from subjects.codec import Format, TokenIds, decode, format_of
from subjects.messages import (
    EmbeddingRequest,
    EngineOptions,
    FurtherPrompt,
    OutputOptions,
    PreprocessedRequest,
    Request,
    SamplingOptions,
    StopConditions,
)

R = TypeVar("R", Request, EmbeddingRequest)

JSON_OBJECT: Final = '{"type": "object"}'
"""The schema behind the response format "json_object", as SGLang has it."""

_CLAIM: Final = rb'"%s"\s*:\s*"([A-Za-z0-9_-]{1,64})"'
_CLAIMED_ID: Final = re.compile(_CLAIM % b"request_id")
_CLAIMED_CLIENT: Final = re.compile(_CLAIM % b"client")
_CLAIMED_CHOICES: Final = re.compile(rb'"n"\s*:\s*(\d{1,9})\b')
_TOKEN_ID_KEY: Final = re.compile(r"[0-9]{1,10}", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """Who asks, and how the answer travels: enough to answer a request that cannot be read."""

    request_id: str
    client: str
    choices: int
    reply_format: Format


@dataclass(frozen=True, kw_only=True, slots=True)
class IdentifiedRequest:
    """A request that is right as far as can be told without its model."""

    identity: Identity
    request: Request
    model: str  # the subject's
    sampling: SamplingOptions
    output: OutputOptions
    engine: EngineOptions
    deadline_unix_s: float
    accepted_unix_s: float
    reader: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Envelope(Generic[R]):
    """A request of either kind, and all of it that does not depend on the kind."""

    identity: Identity
    request: R
    model: str  # the subject's
    deadline_unix_s: float
    accepted_unix_s: float
    reader: str | None


_ABSENT: Final = msgspec.Raw(b"null")


class _Claims(msgspec.Struct, frozen=True):
    """What a payload with mistakes elsewhere says of its identity; any type, since it may be wrong too."""

    request_id: Any = None
    client: Any = None
    n: Any = None
    input: msgspec.Raw = _ABSENT
    messages: msgspec.Raw = _ABSENT
    prompt: msgspec.Raw = _ABSENT


# --- who asks ----------------------------------------------------------------------------------------


def identify(payload: bytes, message_headers: Mapping[str, str], stream_seq: int) -> Identity:
    """The identity of a request, right or wrong; raises nothing.

    The id is the payload's, else `Nats-Msg-Id`, else the stream sequence; the client is the payload's, else the
    header's, else "anonymous". One that cannot stand in a subject counts as not given. A request for a number
    of choices that is no number of choices ends in one terminal frame.
    """
    return _identity(_claims(payload), payload, message_headers, stream_seq)


def _identity(
    claims: _Claims | Request | EmbeddingRequest, payload: bytes, message_headers: Mapping[str, str], stream_seq: int
) -> Identity:
    return Identity(
        request_id=_first_token(claims.request_id, message_headers.get(headers.MSG_ID)) or str(stream_seq),
        client=_first_token(claims.client, message_headers.get(headers.CLIENT)) or names.ANONYMOUS_CLIENT,
        choices=_choices(claims, payload),
        reply_format=_reply_format(payload),
    )


def _choices(claims: _Claims | Request | EmbeddingRequest, payload: bytes) -> int:
    if isinstance(claims, EmbeddingRequest):
        return inputs_of(claims.input)
    if isinstance(claims, Request):
        return choices_of(claims.n, claims.prompt)
    if _embeds(claims):
        return inputs_of(_read(claims.input, payload))
    return choices_of(claims.n, _read(claims.prompt, payload))


def _read(field: msgspec.Raw, payload: bytes) -> Any:
    """A field's value; None where the payload does not have it."""
    if field is _ABSENT:
        return None
    return (msgspec.json if format_of(payload) is Format.JSON else msgspec.msgpack).decode(field)


def _embeds(claims: _Claims) -> bool:
    """Whether a payload asks for vectors: it has an `input`, and neither `messages` nor `prompt`."""
    given = [bytes(raw) not in (b"null", b"\xc0") for raw in (claims.input, claims.messages, claims.prompt)]
    return given == [True, False, False]


def is_embedding(payload: bytes) -> bool:
    """Whether a payload asks for vectors and not for text; False for one that cannot be read."""
    try:
        return _embeds(decode(_Claims, payload))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False


def inputs_of(given: Any) -> int:
    """How many inputs, and so choices, a request with this `input` has: of one that is refused, one."""
    many = isinstance(given, list | tuple) and bool(given) and not isinstance(given[0], int)
    return len(given) if many and len(given) <= limits.INPUTS_MAX else 1


def _first_token(*candidates: Any) -> str | None:
    return next((name for name in candidates if isinstance(name, str) and names.is_token(name)), None)


def _claims(payload: bytes) -> _Claims:
    try:
        return decode(_Claims, payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _claims_in_broken_json(payload)


def _claims_in_broken_json(payload: bytes) -> _Claims:
    """A comma too many must not cost a client the error that says so."""
    request_id, client = _CLAIMED_ID.search(payload), _CLAIMED_CLIENT.search(payload)
    choices = _CLAIMED_CHOICES.search(payload)
    return _Claims(
        request_id=request_id and request_id[1].decode(),
        client=client and client[1].decode(),
        n=choices and int(choices[1]),
    )


def _is_msgpack_map(payload: bytes) -> bool:
    return payload[:1] in (b"\xde", b"\xdf") or 0x80 <= payload[0] <= 0x8F if payload else False


def _reply_format(payload: bytes) -> Format:
    """Answered in kind; what is neither JSON nor a MessagePack map was typed by hand and is answered in JSON."""
    return Format.MSGPACK if _is_msgpack_map(payload) else Format.JSON


# --- what is asked -----------------------------------------------------------------------------------


def parse_request(
    payload: bytes,
    message_headers: Mapping[str, str],
    subject: str,
    stream_seq: int,
    *,
    accepted_unix_s: float,
    now_unix_s: float,
) -> IdentifiedRequest:
    """A request, checked against every limit that does not depend on its model.

    Raises InvalidRequest, PayloadTooLarge or DeadlineExceeded; `identify` then says whom to answer.
    """
    envelope = open_envelope(
        Request,
        payload,
        message_headers,
        subject,
        stream_seq,
        accepted_unix_s=accepted_unix_s,
        now_unix_s=now_unix_s,
    )
    request = envelope.request
    _check_prompt(request)
    check_chat(request)
    _check_output(request)
    check_options(request)
    return IdentifiedRequest(
        identity=envelope.identity,
        request=request,
        model=envelope.model,
        sampling=_sampling(request),
        output=_output(request),
        engine=engine_options(request, envelope.model),
        deadline_unix_s=envelope.deadline_unix_s,
        accepted_unix_s=accepted_unix_s,
        reader=envelope.reader,
    )


def open_envelope(
    kind: type[R],
    payload: bytes,
    message_headers: Mapping[str, str],
    subject: str,
    stream_seq: int,
    *,
    accepted_unix_s: float,
    now_unix_s: float,
) -> Envelope[R]:
    """A request of a kind, read, and checked in all that the kinds have in common. Raises as `parse_request`."""
    if len(payload) > limits.PAYLOAD_BYTES_MAX:
        raise PayloadTooLarge(
            f"payload: {len(payload)} bytes; a request has at most {limits.PAYLOAD_BYTES_MAX}",
            field="payload",
            size=len(payload),
            limit=limits.PAYLOAD_BYTES_MAX,
        )
    request = _decode(kind, payload)
    model = _model(request, subject)
    _check_names(request, message_headers)
    return Envelope(
        identity=_identity(request, payload, message_headers, stream_seq),
        request=request,
        model=model,
        deadline_unix_s=_deadline(request, message_headers, accepted_unix_s, now_unix_s),
        accepted_unix_s=accepted_unix_s,
        reader=_reader(message_headers),
    )


def _decode(kind: type[R], payload: bytes) -> R:
    form = format_of(payload)
    if form is Format.MSGPACK and not _is_msgpack_map(payload):
        raise InvalidRequest(
            f"payload: {len(payload)} bytes that are neither a JSON object nor a MessagePack map",
            field="payload",
            size=len(payload),
        )
    try:
        return decode(kind, payload)
    except msgspec.ValidationError as error:
        if (request := _without_nulls(kind, payload, form)) is None:
            raise refusal(error, kind) from None
        return request
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        language = "JSON" if form is Format.JSON else "MessagePack"
        raise InvalidRequest(f"payload: not {language}: {error}", field="payload", size=len(payload)) from None
    except RecursionError:
        raise InvalidRequest("payload: nested too deep", field="payload", size=len(payload)) from None


def _without_nulls(kind: type[R], payload: bytes, form: Format) -> R | None:
    """The request without its null fields; None where it has none. Raises InvalidRequest if it is wrong even so."""
    read = msgspec.json.decode if form is Format.JSON else msgspec.msgpack.decode
    try:
        fields = read(payload)
        if not isinstance(fields, dict) or None not in fields.values():
            return None
        return msgspec.convert({name: value for name, value in fields.items() if value is not None}, kind)
    except msgspec.ValidationError as error:
        raise refusal(error, kind) from None
    except (msgspec.DecodeError, ValueError, TypeError, RecursionError):
        return None  # the first complaint stands


def _model(request: Request | EmbeddingRequest, subject: str) -> str:
    """The subject's model. Raises InvalidRequest where the payload names another one."""
    parts = names.REQUESTS.parse(subject)
    assert parts is not None, f"the preprocess consumer has a subject that it does not filter: {subject}"
    if request.model is not None and not is_model(request.model, parts["model"]):
        raise InvalidRequest(
            f"model: {clipped(request.model)!r} is not the model of the subject, {parts['model']!r}", field="model"
        )
    return parts["model"]


def _check_names(request: Request | EmbeddingRequest, message_headers: Mapping[str, str]) -> None:
    """Names that become part of a subject are refused, not bent: the client listens to what it wrote."""
    request_id_field, request_id = "request_id", request.request_id
    if request_id is None:
        request_id_field, request_id = headers.MSG_ID, message_headers.get(headers.MSG_ID)
    client_field, client = "client", request.client
    if client is None:
        client_field, client = headers.CLIENT, message_headers.get(headers.CLIENT)
    for field, name in ((request_id_field, request_id), (client_field, client)):
        if name is not None and not names.is_token(name):
            raise InvalidRequest(
                f"{field}: {clipped(name)!r} is not 1 to {names.TOKEN_CHARS_MAX} characters of A-Z, a-z, 0-9, _ and -",
                field=field,
                size=len(name),
                limit=names.TOKEN_CHARS_MAX,
            )


def _reader(message_headers: Mapping[str, str]) -> str | None:
    """The inbox of the request's reader, if it is to end with it."""
    reader = message_headers.get(headers.READER)
    if reader is not None and not names.is_inbox(reader):
        raise InvalidRequest(
            f"{headers.READER}: {clipped(reader)!r} is no inbox: _INBOX... of up to {names.INBOX_CHARS_MAX} characters",
            field=headers.READER,
            size=len(reader),
            limit=names.INBOX_CHARS_MAX,
        )
    return reader


def _deadline(
    request: Request | EmbeddingRequest, message_headers: Mapping[str, str], accepted_unix_s: float, now_unix_s: float
) -> float:
    """When the answer must be whole: the payload's word, else the header's, else the default."""
    field, deadline_unix_s = "deadline", request.deadline
    if deadline_unix_s is None and (text := message_headers.get(headers.DEADLINE)) is not None:
        field = headers.DEADLINE
        try:
            deadline_unix_s = float(text)
        except ValueError:
            raise InvalidRequest(
                f"{field}: {clipped(text)!r} is not a number of seconds since the Unix epoch", field=field
            ) from None
    if deadline_unix_s is None:
        deadline_unix_s = accepted_unix_s + limits.REQUEST_S_DEFAULT
    if math.isnan(deadline_unix_s) or deadline_unix_s - accepted_unix_s > limits.REQUEST_S_MAX:
        raise out_of_range(field, deadline_unix_s, "at most a day from now", accepted_unix_s + limits.REQUEST_S_MAX)
    if deadline_unix_s <= now_unix_s:
        raise DeadlineExceeded(
            f"{field}: passed {now_unix_s - deadline_unix_s:.3f} s ago",
            field=field,
            size=size_of(deadline_unix_s),
            limit=now_unix_s,
        )
    return deadline_unix_s


def _check_prompt(request: Request) -> None:
    if request.messages is None and request.prompt is None:
        raise InvalidRequest("messages: give `messages` or `prompt`", field="messages")
    if request.messages is not None and request.prompt is not None:
        raise InvalidRequest("prompt: give `messages` or `prompt`, not both", field="prompt")
    if request.messages is not None:
        check_count("messages", len(request.messages), limits.MESSAGES_MAX, least=1)
    else:
        _check_prompts(request)


def _check_prompts(request: Request) -> None:
    prompts = prompts_of(request)
    for field, prompt in _named(prompts):
        if not prompt:
            raise InvalidRequest(f"{field}: must not be empty", field=field, size=0, limit=1)
        if not isinstance(prompt, str):
            check_token_ids(field, prompt, vocab_size=2**32)
    choices = len(prompts) * max(1, request.n)
    if len(prompts) > 1 and choices > limits.CHOICES_MAX:
        raise InvalidRequest(
            f"prompt: {len(prompts)} prompts with n = {request.n} have {choices} choices; "
            f"at most {limits.CHOICES_MAX} are allowed",
            field="prompt",
            size=choices,
            limit=limits.CHOICES_MAX,
        )


def _named(prompts: Sequence[Prompt]) -> Iterator[tuple[str, Prompt]]:
    """Each with its field's dotted path."""
    if len(prompts) == 1:
        yield "prompt", prompts[0]
    else:
        yield from ((f"prompt.{index}", prompt) for index, prompt in enumerate(prompts))


def _check_output(request: Request) -> None:
    """The number and the length of the choices, what ends them, and how soon they are wanted."""
    check_range("n", request.n, 1, limits.CHOICES_MAX)
    check_range("priority", request.priority, -limits.PRIORITY_MAX, limits.PRIORITY_MAX)
    if request.session is not None and not names.is_token(request.session):
        raise InvalidRequest("session: must be 1 to 64 of the characters A-Z a-z 0-9 _ -", field="session")
    for field, tokens in (
        ("max_tokens", request.max_tokens),
        ("max_completion_tokens", request.max_completion_tokens),
    ):
        least = 0 if request.echo else 1  # the prompt alone, perhaps with its logprobs
        if tokens is not None and tokens < least:
            raise out_of_range(field, tokens, f"at least {least}", least)
    if request.min_tokens < 0:
        raise out_of_range("min_tokens", request.min_tokens, "at least 0", 0)
    both = request.max_tokens is not None and request.max_completion_tokens is not None
    if both and request.max_tokens != request.max_completion_tokens:
        raise InvalidRequest(
            "max_completion_tokens: differs from max_tokens, its older name; give one", field="max_completion_tokens"
        )
    _check_stop(request)


def _check_stop(request: Request) -> None:
    stop = _stop_strings(request)
    check_count("stop", len(stop), limits.STOP_STRINGS_MAX)
    for index, text in enumerate(stop):
        field = "stop" if isinstance(request.stop, str) else f"stop.{index}"
        check_count(field, len(text), limits.STOP_STRING_CHARS_MAX, least=1, of="characters")
    check_count("stop_token_ids", len(request.stop_token_ids or ()), limits.STOP_TOKEN_IDS_MAX)


def _stop_strings(request: Request) -> tuple[str, ...]:
    return (request.stop,) if isinstance(request.stop, str) else request.stop or ()


def _sampling(request: Request) -> SamplingOptions:
    """Every sampling field within the limits of SGLang 0.5.21 (srt/sampling/sampling_params.py)."""
    penalty = limits.PENALTY_MAX
    check_range("temperature", request.temperature, 0, limits.TEMPERATURE_MAX)
    check_range("top_p", request.top_p, 0, 1, above_low=True)
    check_range("min_p", request.min_p, 0, 1)
    check_range("frequency_penalty", request.frequency_penalty, -penalty, penalty)
    check_range("presence_penalty", request.presence_penalty, -penalty, penalty)
    check_range("repetition_penalty", request.repetition_penalty, 0, penalty, above_low=True)
    check_range("seed", request.seed, limits.SEED_MIN, limits.SEED_MAX)
    if request.top_k != -1:  # SGLang's word for all tokens
        check_range("top_k", request.top_k, 1, limits.TOP_K_MAX)
    json_schema, regex, ebnf = _grammar(request)
    return SamplingOptions(
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        min_p=request.min_p,
        frequency_penalty=request.frequency_penalty,
        presence_penalty=request.presence_penalty,
        repetition_penalty=request.repetition_penalty,
        seed=request.seed,
        logit_bias=_logit_bias(request),
        json_schema=json_schema,
        regex=regex,
        ebnf=ebnf,
    )


def _logit_bias(request: Request) -> dict[str, float] | None:
    """Token ids to biases; keys in the one form in which they are compared with the vocabulary."""
    if not request.logit_bias:
        return None
    check_count("logit_bias", len(request.logit_bias), limits.LOGIT_BIAS_ENTRIES_MAX)
    biases = {}
    for key, bias in request.logit_bias.items():
        field = f"logit_bias.{clipped(key)}"
        if not _TOKEN_ID_KEY.fullmatch(key):
            raise InvalidRequest(f"{field}: the key is not a token id", field=field)
        check_range(field, bias, -limits.LOGIT_BIAS_MAX, limits.LOGIT_BIAS_MAX)
        biases[str(int(key))] = bias
    return biases


def _grammar(request: Request) -> tuple[str | None, str | None, str | None]:
    """JSON schema, regex and EBNF: at most one is not None. An empty text counts as not given, as in SGLang."""
    found = {
        "response_format": _response_schema(request),
        "json_schema": check_schema_text(request.json_schema, "json_schema") if request.json_schema else None,
        "regex": check_length(request.regex, "regex") if request.regex else None,
        "ebnf": check_length(request.ebnf, "ebnf") if request.ebnf else None,
    }
    given = [field for field, grammar in found.items() if grammar is not None]
    if len(given) > 1:
        raise InvalidRequest(f"{given[1]}: not together with {given[0]}: an output has one grammar", field=given[1])
    return found["response_format"] or found["json_schema"], found["regex"], found["ebnf"]


def _response_schema(request: Request) -> str | None:
    form = request.response_format
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return JSON_OBJECT
    if form.json_schema is None:
        raise InvalidRequest(
            'response_format.json_schema: required with type "json_schema"', field="response_format.json_schema"
        )
    return schema_text(form.json_schema.schema, "response_format.json_schema.schema")


def _output(request: Request) -> OutputOptions:
    """What the frames carry. A chat asks with `logprobs` and `top_logprobs`, a completion with a number."""
    most = limits.TOP_LOGPROBS_MAX
    if request.prompt is not None:
        if isinstance(request.logprobs, bool) or request.top_logprobs is not None:
            field = "logprobs" if isinstance(request.logprobs, bool) else "top_logprobs"
            raise InvalidRequest(f"{field}: with `prompt`, logprobs is the number of alternatives", field=field)
        check_range("logprobs", request.logprobs, 0, most)
        logprobs, top_logprobs = request.logprobs is not None, request.logprobs or 0
    else:
        if request.logprobs is not None and not isinstance(request.logprobs, bool):
            raise InvalidRequest("logprobs: with `messages`, it is true or false", field="logprobs")
        check_range("top_logprobs", request.top_logprobs, 0, most)
        logprobs, top_logprobs = bool(request.logprobs), request.top_logprobs or 0
        if top_logprobs and not logprobs:
            raise InvalidRequest("top_logprobs: needs logprobs to be true", field="top_logprobs")
    return OutputOptions(
        stream=request.stream,
        logprobs=logprobs,
        top_logprobs=top_logprobs,
        skip_special_tokens=request.skip_special_tokens,
        no_stop_trim=request.no_stop_trim,
        prompt_logprobs=request.echo and logprobs,
    )


# --- what the model makes of it ----------------------------------------------------------------------


def resolve(
    identified: IdentifiedRequest,
    token_ids: TokenIds,
    *further: TokenIds,
    context_len_tokens: int,
    vocab_size: int,
    echo: Sequence[str] = (),
) -> PreprocessedRequest:
    """The request with its prompts' token ids, u32[num_prompt_tokens], every default resolved.

    `echo`: each prompt's text, where they are to be sent back.

    Raises PromptTooLong where no token of output is left, and InvalidRequest for a token outside the vocabulary
    or for more output than the context leaves.
    """
    request, identity = identified.request, identified.identity
    for field, prompt in _named(prompts_of(request)):
        if not isinstance(prompt, str):
            check_token_ids(field, prompt, vocab_size)
    check_prompt_logprobs(identified.output, [len(token_ids), *map(len, further)])
    first, *others = [
        FurtherPrompt(token_ids=ids, max_tokens=_max_tokens(request, len(ids), context_len_tokens), echo=text)
        for ids, text in zip_longest((token_ids, *further), echo)
    ]
    check_token_ids("stop_token_ids", request.stop_token_ids or (), vocab_size)
    for key in identified.sampling.logit_bias or ():
        if int(key) >= vocab_size:
            raise not_a_token(f"logit_bias.{key}", int(key), vocab_size)
    return PreprocessedRequest(
        request_id=identity.request_id,
        client=identity.client,
        model=identified.model,
        token_ids=token_ids,
        stop=StopConditions(
            max_tokens=first.max_tokens,
            min_tokens=request.min_tokens,
            stop=_stop_strings(request),
            stop_token_ids=request.stop_token_ids or (),
            ignore_eos=request.ignore_eos,
        ),
        sampling=identified.sampling,
        output=identified.output,
        choices=identity.choices,
        deadline_unix_s=identified.deadline_unix_s,
        reply_format=identity.reply_format,
        accepted_unix_s=identified.accepted_unix_s,
        reader=identified.reader,
        priority=request.priority,
        echo=first.echo,
        further=tuple(others),
        engine=identified.engine,
        dp_rank=dp_rank(request),
        chat=chat_options(request),
    )


def _max_tokens(request: Request, prompt_tokens: int, context_len_tokens: int) -> int:
    """How many tokens a choice may have; by default all that the context leaves."""
    left = context_len_tokens - prompt_tokens
    field = "prompt" if request.messages is None else "messages"
    if prompt_tokens < 1:
        raise InvalidRequest(f"{field}: no token is left of it after tokenizing", field=field, size=0, limit=1)
    if left < 1:
        raise PromptTooLong(
            f"{field}: {prompt_tokens} tokens; the context of {context_len_tokens} must leave one for the output",
            field=field,
            size=prompt_tokens,
            limit=context_len_tokens - 1,
        )
    field = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
    wanted = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    if wanted is not None and wanted > left:
        raise InvalidRequest(
            f"{field}: {number_text(wanted)} tokens after a prompt of {prompt_tokens} exceed the context of "
            f"{context_len_tokens}; at most {left} are left",
            field=field,
            size=size_of(wanted),
            limit=left,
        )
    max_tokens = left if wanted is None else wanted
    if request.min_tokens > max_tokens:
        raise out_of_range("min_tokens", request.min_tokens, f"at most the {max_tokens} of the output", max_tokens)
    return max_tokens
