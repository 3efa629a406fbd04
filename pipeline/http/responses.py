"""/v1/responses: OpenAI's request as one for a chat, and frames as its body and its typed events. Pure.

An event's `sequence_number` follows from the tokens that are told up to it: 3 and the number of them for a delta, then
five more for the end. So any gateway that reads the log numbers the events as the first one did, and a reader who
names the last number it has goes on behind it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal

import msgspec

from pipeline.batches import check_metadata
from pipeline.completion import logprobs_body
from pipeline.errors import InvalidRequest, from_failure
from pipeline.progress import Progress
from pipeline.refusals import refusal
from subjects.messages import Failure, Frame, PositionLogprobs, StoredResponse, Usage

ID_PREFIX: Final = "resp_"
INPUT_ITEMS_MAX: Final = 4_096
LOGPROBS: Final = "message.output_text.logprobs"
PASSED: Final = frozenset(
    [
        "deadline",
        "ebnf",
        "frequency_penalty",
        "ignore_eos",
        "logit_bias",
        "min_p",
        "min_tokens",
        "no_stop_trim",
        "presence_penalty",
        "priority",
        "prompt_cache_key",
        "regex",
        "repetition_penalty",
        "request_id",
        "safety_identifier",
        "seed",
        "session",
        "skip_special_tokens",
        "stop",
        "stop_token_ids",
        "top_k",
        "user",
    ]
)
"""Fields of the pipeline's own request that go on as they are."""
ROLES: Final = ("user", "assistant", "system", "developer")
TEXT_TYPES: Final = ("input_text", "output_text", "text")
NOT_SERVED: Final = {
    "background": "responses are answered in the foreground only; their output can be retrieved in any case",
    "tools": "tool calling is not supported here yet",
    "reasoning": "reasoning control is not supported here yet",
}


class TextFormat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class TextOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    format: TextFormat | None = None


class ResponseStreamOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    include_obfuscation: Literal[False] | None = None


class ResponsesRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/responses, without the fields of `PASSED`. A field that is null counts as not given."""

    model: str
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    include: list[Literal["message.output_text.logprobs"]] | None = None
    text: TextOptions | None = None
    metadata: dict[str, str] | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    background: bool | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: dict[str, Any] | None = None
    truncation: Literal["disabled"] | None = None
    service_tier: Literal["auto", "default"] | None = None

    @property
    def kept(self) -> bool:
        """Whether it can be retrieved and gone on from."""
        return self.store is not False

    def settings(self, passed: Mapping[str, Any], sampling: Mapping[str, float]) -> dict[str, Any]:
        """The fields that the answer repeats; `passed` has some of them, `sampling` the model's own."""
        form = msgspec.to_builtins(self.text.format) if self.text and self.text.format else {"type": "text"}
        return {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": self.previous_response_id,
            "store": self.kept,
            "temperature": sampling.get("temperature", 1.0) if self.temperature is None else self.temperature,
            "text": {"format": form},
            "tool_choice": self.tool_choice or "auto",
            "tools": [],
            "top_logprobs": self.top_logprobs or 0,
            "top_p": sampling.get("top_p", 1.0) if self.top_p is None else self.top_p,
            "truncation": "disabled",
            "background": False,
            "frequency_penalty": passed.get("frequency_penalty") or 0.0,
            "max_tool_calls": None,
            "presence_penalty": passed.get("presence_penalty") or 0.0,
            "prompt_cache_key": passed.get("prompt_cache_key"),
            "reasoning": {"effort": None, "summary": None},
            "safety_identifier": passed.get("safety_identifier"),
            "service_tier": "default",
        }


def parse_request(fields: dict[str, Any]) -> tuple[ResponsesRequest, dict[str, Any]]:
    """What is asked for, and the fields that go on as they are. Raises InvalidRequest."""
    passed = {name: value for name, value in fields.items() if name in PASSED}
    try:
        asked = msgspec.convert({name: fields[name] for name in fields.keys() - PASSED}, ResponsesRequest)
    except msgspec.ValidationError as error:
        raise refusal(error) from None
    given = {"background": asked.background, "tools": asked.tools, "reasoning": _known(asked.reasoning)}
    for name, value in given.items():
        if value:
            raise InvalidRequest(f"{name}: this release does not take this field: {NOT_SERVED[name]}", field=name)
    check_metadata(asked.metadata)
    return asked, passed


def _known(options: dict[str, Any] | None) -> dict[str, Any]:
    """Without what is null, as clients send it for a default."""
    return {name: value for name, value in (options or {}).items() if value is not None}


def input_messages(asked: ResponsesRequest) -> list[dict[str, Any]]:
    """The input as messages of a chat. Raises InvalidRequest for any other item than a message of text."""
    if isinstance(asked.input, str):
        return [{"role": "user", "content": asked.input}]
    if not 1 <= len(asked.input) <= INPUT_ITEMS_MAX:
        raise InvalidRequest(f"input: has {len(asked.input)} items; 1 to {INPUT_ITEMS_MAX} are taken", field="input")
    return [_message(item, f"input.{index}") for index, item in enumerate(asked.input)]


def _message(item: dict[str, Any], place: str) -> dict[str, Any]:
    if item.get("type", "message") != "message":
        raise InvalidRequest(f"{place}.type: only messages are taken here yet", field=f"{place}.type")
    if item.get("role") not in ROLES:
        raise InvalidRequest(f"{place}.role: must be one of {', '.join(ROLES)}", field=f"{place}.role")
    if unknown := sorted(item.keys() - {"type", "role", "content", "id", "status", "phase"}):
        raise InvalidRequest(f"{place}.{unknown[0]}: unknown field", field=f"{place}.{unknown[0]}")
    content = item.get("content")
    if isinstance(content, str):
        return {"role": item["role"], "content": content}
    if not isinstance(content, list) or not content:
        raise InvalidRequest(f"{place}.content: must be a text or a list of parts", field=f"{place}.content")
    texts = [_text(part, f"{place}.content.{index}") for index, part in enumerate(content)]
    if len(texts) == 1:  # templates that know nothing of parts take it too
        return {"role": item["role"], "content": texts[0]}
    return {"role": item["role"], "content": [{"type": "text", "text": text} for text in texts]}


def _text(part: Any, place: str) -> str:
    if not isinstance(part, dict) or part.get("type") not in TEXT_TYPES:
        raise InvalidRequest(f"{place}.type: only text is supported here yet", field=f"{place}.type")
    if not isinstance(part.get("text"), str):
        raise InvalidRequest(f"{place}.text: must be a text", field=f"{place}.text")
    return part["text"]


def chat_fields(asked: ResponsesRequest, passed: dict[str, Any], messages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The same as a request for a chat, with the conversation's `messages`. Raises InvalidRequest."""
    instructions = [{"role": "system", "content": asked.instructions}] if asked.instructions else []
    logprobs = LOGPROBS in (asked.include or ())
    if asked.top_logprobs and not logprobs:
        raise InvalidRequest(f"top_logprobs: needs {LOGPROBS} in include", field="top_logprobs")
    fields = {
        "model": asked.model,
        "messages": [*instructions, *messages],
        "stream": asked.stream,
        "max_completion_tokens": asked.max_output_tokens,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "logprobs": logprobs or None,
        "top_logprobs": asked.top_logprobs or None,
        "response_format": _response_format(asked.text.format) if asked.text and asked.text.format else None,
    }
    return passed | {name: value for name, value in fields.items() if value is not None}


def _response_format(form: TextFormat) -> dict[str, Any]:
    if form.type != "json_schema":
        return {"type": form.type}
    if form.schema is None or not form.name:
        missing = "schema" if form.schema is None else "name"
        raise InvalidRequest(f"text.format.{missing}: is required with json_schema", field=f"text.format.{missing}")
    schema = {"name": form.name, "schema": form.schema, "description": form.description, "strict": form.strict}
    return {"type": "json_schema", "json_schema": {name: value for name, value in schema.items() if value is not None}}


class Answer:
    """A response as far as its frames have come."""

    def __init__(self, stored: StoredResponse) -> None:
        self.stored = stored
        self.tokens = 0
        self.failure: Failure | None = None
        self._progress = Progress()
        self._positions: list[PositionLogprobs] = []

    def add(self, frame: Frame) -> Frame | None:
        """Take a frame in; None where it brings nothing new."""
        if frame.choice or (new := self._progress.add(frame)) is None:
            return None
        self._positions.extend(frame.logprobs or ())
        self.tokens = len(self._progress.token_ids)
        self.failure = frame.error
        return new

    @property
    def ended(self) -> bool:
        return self._progress.end is not None

    @property
    def status(self) -> str:
        """OpenAI's word."""
        end = self._progress.end
        if self.failure is not None:
            return "cancelled" if self.failure.code == "cancelled" else "failed"
        if end is None:
            return "in_progress"
        return {"length": "incomplete", "abort": "cancelled"}.get(end.finish_reason or "", "completed")

    @property
    def text(self) -> str:
        return self._progress.text

    def part(self) -> dict[str, Any]:
        """The output's one content part, as far as it has come."""
        return text_part(self.text, _logprobs(self._positions))

    def item(self) -> dict[str, Any]:
        """The output's one item, as far as it has come."""
        status = {"in_progress": "in_progress", "completed": "completed"}.get(self.status, "incomplete")
        return message_item(self.stored.request_id, status, [self.part()])

    def body(self) -> dict[str, Any]:
        """The response as far as it has come."""
        end = self._progress.end
        usage = end.usage if end else None
        return response_body(
            self.stored,
            self.status,
            [self.item()] if self.text or usage else [],
            usage=usage,
            failure=self.failure,
            ended_unix_s=end.timing.ended_unix_s if end and end.timing else None,
        )


def response_body(
    stored: StoredResponse,
    status: str,
    output: list[dict[str, Any]],
    *,
    usage: Usage | None = None,
    failure: Failure | None = None,
    ended_unix_s: float | None = None,
) -> dict[str, Any]:
    """A response as OpenAI's API gives it."""
    error = {"code": "server_error", "message": failure.message} if failure and status == "failed" else None
    return {
        "id": f"{ID_PREFIX}{stored.request_id}",
        "object": "response",
        "created_at": int(stored.created_unix_s),
        "completed_at": int(ended_unix_s) if ended_unix_s and status == "completed" else None,
        "status": status,
        "error": error,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "model": stored.model,
        "output": output,
        "usage": usage_body(usage) if usage else None,
        **stored.settings,
    }


def usage_body(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.total_tokens,
    }


def message_item(request_id: str, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": item_id(request_id), "type": "message", "status": status, "role": "assistant", "content": content}


def text_part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def item_id(request_id: str) -> str:
    return f"msg_{request_id}"


def _logprobs(positions: Sequence[PositionLogprobs]) -> list[dict[str, Any]]:
    body = logprobs_body(positions, chat=True)
    return body["content"] if body else []


class ResponseEvents:
    """Turns a response's frames into its events, those behind number `after` only."""

    def __init__(self, stored: StoredResponse, after: int = -1, on_end: Callable[[Answer], None] | None = None) -> None:
        """`on_end` is called once, with the whole answer."""
        self.answer, self._after, self._on_end = Answer(stored), after, on_end
        self._begun = False
        self._untold: tuple[str, list[PositionLogprobs]] = ("", [])  # text whose last token is still to come

    def event(self, frame: Frame) -> bytes:
        """A frame's events; empty where it brings its reader nothing new. Raises a failed request's error."""
        if (new := self.answer.add(frame)) is None:
            return b""
        if new.error is not None:
            self._tell_end()
            raise from_failure(new.error)
        parts = [] if self._begun else list(self._beginning())
        self._begun = True
        ended = new.finish_reason is not None
        text, positions = self._untold[0] + new.text, [*self._untold[1], *(new.logprobs or ())]
        if (text and new.token_ids) or (text and ended):
            parts.append(self._delta(3 + self.answer.tokens + ended, text, positions))
            self._untold = ("", [])
        else:
            self._untold = (text, positions)
        if ended:
            parts.extend(self._ending())
            self._tell_end()
        return b"".join(parts)

    def end(self) -> bytes:
        """The last frame has said it."""
        return b""

    def failed(self, failure: Failure) -> bytes:
        """The event that ends a stream in an error."""
        self.answer.failure = failure
        return self._event("response.failed", 4 + self.answer.tokens, response=self.answer.body())

    def _tell_end(self) -> None:
        if self._on_end is not None:
            self._on_end(self.answer)

    def _beginning(self) -> Iterator[bytes]:
        stored = self.answer.stored
        yield self._event("response.created", 0, response=response_body(stored, "in_progress", []))
        yield self._event("response.in_progress", 1, response=response_body(stored, "in_progress", []))
        item = message_item(stored.request_id, "in_progress", [])
        yield self._event("response.output_item.added", 2, output_index=0, item=item)
        yield self._event("response.content_part.added", 3, **self._place(), part=text_part("", []))

    def _delta(self, number: int, text: str, positions: list[PositionLogprobs]) -> bytes:
        kind = "response.output_text.delta"
        return self._event(kind, number, **self._place(), delta=text, logprobs=_logprobs(positions))

    def _ending(self) -> Iterator[bytes]:
        answer, number = self.answer, 5 + self.answer.tokens
        part = answer.part()
        told = {"text": answer.text, "logprobs": part["logprobs"]}
        yield self._event("response.output_text.done", number, **self._place(), **told)
        yield self._event("response.content_part.done", number + 1, **self._place(), part=part)
        yield self._event("response.output_item.done", number + 2, output_index=0, item=answer.item())
        kind = answer.status if answer.status in ("completed", "incomplete") else "failed"
        yield self._event(f"response.{kind}", number + 3, response=answer.body())

    def _place(self) -> dict[str, Any]:
        return {"item_id": item_id(self.answer.stored.request_id), "output_index": 0, "content_index": 0}

    def _event(self, kind: str, number: int, **fields: Any) -> bytes:
        if number <= self._after:
            return b""
        body = {"type": kind, "sequence_number": number, **fields}
        return b"event: %s\ndata: %s\n\n" % (kind.encode(), msgspec.json.encode(body))
