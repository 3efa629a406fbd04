"""A POST's body as a request for the pipeline.

Preprocess checks what it says; here is checked only what decides where the request goes and its answer comes.
"""

import time
import uuid
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from pipeline.client import check_token
from pipeline.errors import InvalidRequest
from pipeline.http.chunks import Cursor
from pipeline.request_options import choices_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request, encoded, and what its answer looks like."""

    request_id: str
    model: str
    chat: bool
    choices: int
    prompts: int
    stream: bool
    include_usage: bool
    deadline_unix_s: float
    payload: bytes

    def cursor(self) -> Cursor:
        """Before the first token."""
        return Cursor(
            chat=self.chat,
            include_usage=self.include_usage,
            created_unix_s=int(time.time()),
            model=self.model,
            prompts=self.prompts,
            seen=((0, False),) * self.choices,
        )


def parse_body(body: bytes, *, chat: bool, client: str, request_s: float) -> Asked:
    """A body of /v1/chat/completions or /v1/completions, asked by `client`. Raises InvalidRequest.

    `request_s`: how long it may take if it does not say. It gets an id if it has none; all else stays as it came.
    """
    fields = decoded(body)
    _check_fields(fields, chat, client)
    request_id, deadline = fields.get("request_id") or uuid.uuid4().hex, fields.get("deadline")
    default_unix_s = time.time() + request_s
    known = isinstance(deadline, int | float) and not isinstance(deadline, bool)
    own = {"request_id": request_id, "deadline": default_unix_s if deadline is None else deadline}
    options = fields.get("stream_options")
    return Asked(
        request_id=request_id,
        model=fields["model"],
        chat=chat,
        choices=choices_of(fields.get("n"), fields.get("prompt")),
        prompts=choices_of(1, fields.get("prompt")),
        stream=fields.get("stream") is True,
        include_usage=isinstance(options, dict) and options.get("include_usage") is True,
        deadline_unix_s=deadline if known else default_unix_s,
        payload=msgspec.json.encode(fields | own),
    )


def decoded(body: bytes) -> dict[str, Any]:
    """A body's fields. Raises InvalidRequest."""
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}", size=len(body)) from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deep", size=len(body)) from None
    if not isinstance(fields, dict):
        raise InvalidRequest("the body is not a JSON object", size=len(body))
    return fields


def _check_fields(fields: dict[str, Any], chat: bool, client: str) -> None:
    """Raises InvalidRequest."""
    refuse_fields_of(fields, *(("prompt", "input") if chat else ("messages", "input")))
    check_names(fields, client)


_ROUTES: Final = {"prompt": "/v1/completions", "messages": "/v1/chat/completions", "input": "/v1/embeddings"}


def refuse_fields_of(fields: dict[str, Any], *others: str) -> None:
    """Raises InvalidRequest for a field by which another route's requests are told."""
    for wrong in others:
        if fields.get(wrong) is not None:
            raise InvalidRequest(f"{wrong}: is a field of {_ROUTES[wrong]}", field=wrong)


def check_names(fields: dict[str, Any], client: str) -> None:
    """What decides where a request goes and its answer comes. Raises InvalidRequest."""
    model, request_id = fields.get("model"), fields.get("request_id")
    if not isinstance(model, str) or not model or not model.isprintable():
        raise InvalidRequest("model: name one of /v1/models", field="model")
    if request_id is not None:
        if not isinstance(request_id, str):
            raise InvalidRequest("request_id: must be a string", field="request_id")
        check_token("request_id", request_id)
    if fields.get("client") not in (None, client):
        raise InvalidRequest(f"client: is {client!r} here; the API key says it", field="client")
