"""The OpenAPI document: valid, whole, and true of what the gateway's checks take and its answers look like."""

import functools
import json
import time
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, Mock

import httpx
import jsonschema
import msgspec
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator
from starlette.applications import Starlette
from starlette.routing import Mount, Route
from strict_document import strict

from pipeline.batches import BatchRequest
from pipeline.errors import InvalidRequest
from pipeline.files import File
from pipeline.http.app import Gateway, make_app
from pipeline.http.batches import BatchRoutes
from pipeline.http.chunks import Chunks, Cursor
from pipeline.http.console import Console
from pipeline.http.files import FileRoutes
from pipeline.http.openapi import bodies
from pipeline.http.openapi.answers import RESPONSE_EVENTS
from pipeline.http.openapi.document import document
from pipeline.http.openapi.operations import Undocumented
from pipeline.http.response_routes import ResponseRoutes
from pipeline.http.responses import ResponseEvents, chat_fields, input_messages, parse_request
from pipeline.openai import parse_request as parse_payload
from subjects import names
from subjects.codec import TokenIds
from subjects.messages import Frame, PositionLogprobs, StoredResponse, TokenLogprob, ToolCallDelta, Usage

FILE = File(file_id="f", filename="a.jsonl", purpose="batch", size=2, created_unix_s=1.0, expires_unix_s=2.0)


def make(*, keyed: bool) -> Starlette:
    """The gateway's application with every route that it can have, and nothing behind them but a client's name."""
    nothing: Any = AsyncMock()
    nothing.of.return_value = SimpleNamespace(client=SimpleNamespace(name="team"))
    nothing.get.return_value = None
    nothing.put.return_value = FILE
    gateway = Gateway(nothing, nothing, SimpleNamespace(open=not keyed), nothing, nothing, nothing)  # type: ignore[arg-type]
    more = [
        *FileRoutes(nothing, nothing).routes(),
        *BatchRoutes(nothing, nothing, nothing).routes(),
        *ResponseRoutes(gateway, nothing, nothing, nothing, nothing).routes(),
        *Console(nothing, nothing, (), nothing).routes(),
    ]
    return make_app(gateway, (), more)


def client(app: Starlette) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway")


APP = make(keyed=True)
DOCUMENT = document(APP.routes, keyed=True)


def operations() -> dict[tuple[str, str], Any]:
    return {
        (path, method): told
        for path, item in DOCUMENT["paths"].items()
        for method, told in item.items()
        if method != "parameters"
    }


@functools.cache
def validator(name: str) -> jsonschema.Draft202012Validator:
    schema = {"$ref": f"#/components/schemas/{name}", "components": strict(DOCUMENT)["components"]}
    return jsonschema.Draft202012Validator(schema)


async def test_it_is_served_and_valid():
    for keyed in (False, True):
        async with client(make(keyed=keyed)) as http:
            answer = await http.get("/openapi.json")
        assert answer.headers["content-type"] == "application/json"
        OpenAPIV31SpecValidator(answer.json()).validate()
        assert ("securitySchemes" in answer.json()["components"]) == keyed


def test_every_route_is_in_it_and_nothing_else():
    routes: set[tuple[str, str]] = set()
    for route in APP.routes:
        if isinstance(route, Mount):
            routes.add((route.path + "/{path}", "get"))
        elif not isinstance(route, Undocumented):
            assert isinstance(route, Route)
            path = route.path.replace(":path", "")
            routes |= {(path, method.lower()) for method in (route.methods or set()) - {"HEAD"}}
    assert set(operations()) == routes
    with pytest.raises(TypeError, match="/more"):
        document([*APP.routes, Route("/more", Mock())], keyed=False)


async def test_a_path_says_with_what_it_may_be_asked():
    async with client(APP) as http:
        for path, item in DOCUMENT["paths"].items():
            answer = await http.request("PATCH", path.replace("{", "").replace("}", ""))
            methods = {method.upper() for method in item if method != "parameters"}
            allowed = set(answer.headers["allow"].split(", "))
            assert (answer.status_code, allowed - {"HEAD"}) == (405, methods), path


def test_it_says_where_a_key_is_needed():
    for (path, _), told in operations().items():
        open_to_all = path in ("/health", "/ready", "/openapi.json", "/console", "/console/{path}")
        assert ("security" in told) == ("401" in told["responses"]) == (not open_to_all), path
    assert not any(
        "security" in told for item in document(APP.routes, keyed=False)["paths"].values() for told in item.values()
    )


# --- what is taken ------------------------------------------------------------------------------------

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "m", "prompt": "hi"}


def is_taken(fields: dict[str, Any]) -> bool:
    payload = json.dumps(fields).encode()
    now_unix_s = time.time()
    subject = names.REQUESTS.of(model="m")
    try:
        parse_payload(payload, {}, subject, 1, accepted_unix_s=now_unix_s, now_unix_s=now_unix_s)
    except InvalidRequest:
        return False
    return True


def at_the_limits(words: dict[str, Any]) -> list[tuple[Any, bool]]:
    """Values just within each of a field's limits and just beyond."""
    found: list[tuple[Any, bool]] = []
    for word, inside, outside in (
        ("minimum", lambda limit: limit, lambda limit: limit - 1),
        ("maximum", lambda limit: limit, lambda limit: limit + 1),
        ("exclusiveMinimum", lambda limit: limit + 1e-3, lambda limit: limit),
        ("minLength", "x".__mul__, lambda limit: "x" * (limit - 1)),
        ("maxLength", "x".__mul__, lambda limit: "x" * (limit + 1)),
        ("maxItems", [7].__mul__, lambda limit: [7] * (limit + 1)),
    ):
        if word in words:
            found += [(inside(words[word]), True), (outside(words[word]), False)]
    return found


CASES = [
    (field, value, taken)
    for field, words in bodies.LIMITS.items()
    for value, taken in at_the_limits(words)
    if field not in ("model", "json_schema", "best_of", "stop")
]


@pytest.mark.parametrize(("field", "value", "taken"), CASES, ids=lambda value: str(value)[:24])
def test_a_limit_is_where_the_check_is(field: str, value: Any, taken: bool):
    more = {"logprobs": True} if field == "top_logprobs" else {}
    asked = CHAT | more | {field: value}
    assert validator("ChatCompletionRequest").is_valid(asked) == taken
    assert is_taken(asked) == taken


@pytest.mark.parametrize(
    ("fields", "taken"),
    [
        ({"n": 3, "best_of": 3}, True),
        ({"n": 65, "best_of": 65}, False),
        ({"stop": "x" * 512}, True),
        ({"stop": "x" * 513}, False),
        ({"stop": ""}, False),
        ({"stop": ["x"] * 32}, True),
        ({"stop": ["x"] * 33}, False),
        ({"stop": [""]}, False),
        ({"logit_bias": {"12": 100}}, True),
        ({"logit_bias": {"12": 101}}, False),
        ({"logit_bias": {"x": 1}}, False),
        ({"logit_bias": {str(key): 1 for key in range(1025)}}, False),
        ({"metadata": {str(key): "" for key in range(16)}}, True),
        ({"metadata": {str(key): "" for key in range(17)}}, False),
        ({"top_k": 0}, False),
        ({"top_k": -1}, True),
        ({"store": True}, False),
        ({"store": False}, True),
        ({"logprobs": 3}, True),
        ({"logprobs": 21}, False),
        ({"logprobs": True}, False),
        ({"max_tokens": 0, "echo": True}, True),
        ({"max_tokens": -1, "echo": True}, False),
        ({"prompt": ""}, False),
        ({"prompt": [[1], [2]]}, True),
        ({"n": None, "stream": None, "priority": None}, True),
        ({"temprature": 1}, False),
        ({"tools": []}, False),
        ({"session": "a.b"}, False),
        ({"request_id": "a" * 65}, False),
    ],
)
def test_a_completion_is_taken_where_the_document_says_so(fields: dict[str, Any], taken: bool):
    assert validator("CompletionRequest").is_valid(TEXT | fields) == taken
    assert is_taken(TEXT | fields) == taken


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("message", "taken"),
    [
        ({"role": "user", "content": [{"type": "text", "text": "hi"}], "tool_calls": None}, True),
        ({"role": "user"}, False),
        ({"role": "user", "content": None}, False),
        ({"role": "user", "content": "hi", "tool_calls": [CALL]}, False),
        ({"role": "system", "content": "hi", "tool_call_id": "c"}, False),
        ({"role": "assistant", "content": None, "tool_calls": [CALL]}, True),
        ({"role": "assistant", "tool_calls": []}, False),
        ({"role": "assistant", "content": "hi", "reasoning_content": "hm"}, True),
        ({"role": "tool", "content": "1", "tool_call_id": "c"}, True),
        ({"role": "tool", "content": "1"}, False),
        ({"role": "oracle", "content": "hi"}, False),
    ],
)
def test_a_message_is_taken_where_the_document_says_so(message: dict[str, Any], taken: bool):
    asked = CHAT | {"messages": [CHAT["messages"][0], message]}
    assert validator("ChatCompletionRequest").is_valid(asked) == taken
    assert is_taken(asked) == taken


@pytest.mark.parametrize(
    ("fields", "taken"),
    [
        ({}, True),
        ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {}}}}, True),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, False),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, False),
        ({"input": []}, False),
        ({"input": [{"role": "user", "content": "hi"}]}, True),
        ({"input": [{"role": "assistant", "content": [{"type": "output_text", "text": "hi"}]}]}, True),
        ({"input": [{"role": "tool", "content": "hi"}]}, False),
        ({"input": [{"role": "user", "content": []}]}, False),
        ({"input": [{"role": "user", "content": "hi", "more": 1}]}, False),
        ({"background": True}, False),
        ({"background": False}, True),
        ({"tools": [{}]}, False),
        ({"tools": []}, True),
        ({"reasoning": {"effort": "low"}}, False),
        ({"reasoning": {"effort": None}}, True),
        ({"metadata": {"k" * 64: "v" * 512}}, True),
        ({"metadata": {"k" * 65: ""}}, False),
        ({"metadata": {"k": "v" * 513}}, False),
        ({"messages": []}, False),
        ({"top_k": 5, "stop": ["."], "seed": None}, True),
        ({"max_output_tokens": 0}, False),
    ],
)
def test_a_response_is_taken_where_the_document_says_so(fields: dict[str, Any], taken: bool):
    asked = {"model": "m", "input": "hi"} | fields
    assert validator("ResponsesRequest").is_valid(asked) == taken
    try:
        wanted, passed = parse_request(asked)
        answer = is_taken(chat_fields(wanted, passed, input_messages(wanted)))
    except InvalidRequest:
        answer = False
    assert answer == taken


@pytest.mark.parametrize("window", ["24h", "90m", "5s", "0h", "24d", "h", "24h "])
def test_a_batch_window(window: str):
    asked = {"input_file_id": "f", "endpoint": "/v1/completions", "completion_window": window}
    try:
        msgspec.convert(asked, BatchRequest).check()
        taken = True
    except InvalidRequest:
        taken = False
    assert validator("BatchRequest").is_valid(asked) == taken


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("stream=true&starting_after=3", 404),  # that it is not there comes after that it is asked for rightly
        ("stream=false", 404),
        ("stream=yes", 400),
        ("starting_after=", 400),
        ("starting_after=-2", 400),
    ],
)
async def test_how_a_response_is_asked_for(query: str, status: int):
    async with client(APP) as http:
        assert (await http.get(f"/v1/responses/resp_1?{query}")).status_code == status


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ([("purpose", "batch")], 200),
        ([("purpose", "assistants")], 400),
        ([("purpose", "batch"), ("porpoise", "batch")], 400),
        ([("purpose", "batch"), ("purpose", "user_data")], 400),
        ([("purpose", "batch"), ("expires_after[anchor]", "created_at"), ("expires_after[seconds]", "3600")], 200),
        ([("purpose", "batch"), ("expires_after[anchor]", "created_at"), ("expires_after[seconds]", "3599")], 400),
        ([("purpose", "batch"), ("expires_after[seconds]", "3600")], 400),
    ],
)
async def test_an_upload_is_taken_where_the_document_says_so(fields: list[tuple[str, str]], status: int):
    parts = [("file", ("a.jsonl", b"{}")), *((name, (None, value.encode())) for name, value in fields)]
    async with client(APP) as http:
        answer = await http.post("/v1/files", files=parts)
    assert answer.status_code == status, answer.text
    asked = {name: int(value) if value.isdecimal() else value for name, value in fields} | {"file": "{}"}
    if len(asked) == len(parts):
        assert validator("FileUpload").is_valid(asked) == (status == 200)


# --- what is answered ---------------------------------------------------------------------------------

POSITION = PositionLogprobs(chosen=TokenLogprob(token_id=1, logprob=-0.5, text="a"))
USAGE = Usage(prompt_tokens=1, completion_tokens=2)


@pytest.mark.parametrize("chat", [True, False])
def test_every_event_of_a_stream_is_as_the_document_has_it(chat: bool):
    said: dict[str, Any] = {"reasoning": "hm"} if chat else {}
    calls = (ToolCallDelta(index=0, id="c", name="f", arguments="{"), ToolCallDelta(index=0, arguments="}"))
    frames = [
        Frame(request_id="r", token_ids=TokenIds.of([1]), text="a", logprobs=(POSITION,), **said),
        Frame(request_id="r", index=1, token_ids=TokenIds.of([2]), tool_calls=calls if chat else (), text="b"),
        Frame(request_id="r", index=2, finish_reason="stop", usage=USAGE),
    ]
    chunks = Chunks("r", Cursor(chat=chat, include_usage=True, model="m"))
    told = b"".join([*map(chunks.event, frames), chunks.end()]).decode()
    events = [line.removeprefix("data: ") for line in told.splitlines() if line.startswith("data: {")]
    assert len(events) == 4
    for event in events:
        validator("ChatCompletionChunk" if chat else "TextCompletionChunk").validate(json.loads(event))


@pytest.mark.parametrize("failed", [False, True])
def test_every_event_of_a_response_is_as_the_document_has_it(failed: bool):
    asked, passed = parse_request({"model": "m", "input": "hi"})
    settings = asked.settings(passed, {})
    stored = StoredResponse(request_id="r", model="m", created_unix_s=1.0, deadline_unix_s=2.0, settings=settings)
    events = ResponseEvents(stored)
    told = events.event(Frame(request_id="r", token_ids=TokenIds.of([1]), text="a", logprobs=(POSITION,)))
    if failed:
        told += events.failed(InvalidRequest("no").failure())
    else:
        told += events.event(Frame(request_id="r", index=1, finish_reason="length", usage=USAGE))
    kinds = set()
    for line in told.decode().splitlines():
        if line.startswith("data: "):
            event = json.loads(line.removeprefix("data: "))
            assert [kind.__name__ for kind in RESPONSE_EVENTS if validator(kind.__name__).is_valid(event)] != [], event
            kinds.add(event["type"])
    assert len(kinds) == (6 if failed else 9)
