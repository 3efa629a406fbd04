"""What the gateway does without a network: events and their cursors, bodies, API keys."""

import json
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import structlog
from starlette.requests import Request
from starlette.responses import Response

from pipeline import metrics
from pipeline.config import GatewaySettings
from pipeline.errors import (
    BusUnavailable,
    ConfigError,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    PipelineError,
)
from pipeline.http import visits
from pipeline.http.accounts import load_keys
from pipeline.http.app import make_app
from pipeline.http.asked import parse_body
from pipeline.http.chunks import DONE, Chunks, Cursor
from subjects.codec import TokenIds
from subjects.messages import Frame, Usage

CURSOR = Cursor(include_usage=True, created_unix_s=7, model="meta/a b-1", seen=((0, False), (0, False)))
FRAMES = [
    Frame(request_id="r", choice=0, token_ids=TokenIds.of([1, 2]), text="ab"),
    Frame(request_id="r", choice=1, token_ids=TokenIds.of([1]), text=""),
    Frame(request_id="r", choice=0, index=2, attempt=2),  # a later owner's first word
    Frame(request_id="r", choice=1, index=1, token_ids=TokenIds.of([2]), text="xy"),
    Frame(
        request_id="r",
        choice=0,
        index=2,
        text="c",
        finish_reason="stop",
        usage=Usage(prompt_tokens=3, completion_tokens=2),
    ),
    Frame(
        request_id="r",
        choice=1,
        index=2,
        token_ids=TokenIds.of([3]),
        text="z",
        finish_reason="length",
        usage=Usage(prompt_tokens=3, completion_tokens=3),
    ),
]

ROUTES = ("chat", "complete", "embed", "models", "model", "stream", "live", "ready", "openapi")
"""The gateway's handlers."""


def told(cursor: Cursor) -> list[bytes]:
    chunks = Chunks("r", cursor)
    return [event for event in map(chunks.event, FRAMES) if event] + [chunks.end()]


def test_each_event_id_is_where_another_gateway_goes_on():
    events = told(CURSOR)
    assert len(events) == 6 and events[-1].endswith(DONE)
    for number, event in enumerate(events[:-1], start=1):
        last_id = event.split(b"\n")[0].removeprefix(b"id: ").decode()
        assert told(Cursor.parse(last_id)) == events[number:]


def test_an_event_is_openais_chunk():
    first, *_, end = told(CURSOR)
    chunk = json.loads(first.split(b"data: ")[1])
    assert chunk == {
        "id": "chatcmpl-r",
        "object": "chat.completion.chunk",
        "created": 7,
        "model": "meta/a b-1",
        "choices": [
            {"index": 0, "delta": {"role": "assistant", "content": "ab"}, "logprobs": None, "finish_reason": None}
        ],
        "usage": None,
    }
    assert json.loads(end.split(b"data: ")[1])["usage"]["total_tokens"] == 8


@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (BusUnavailable("the broker is away"), 503, "1"),
        (Overloaded("the queue is full", retry_after_s=2.2), 429, "3"),
        (DeadlineExceeded("too late"), 504, None),
        (RuntimeError("a bug"), 500, None),
    ],
)
async def test_an_error_has_its_status(error: Exception, status: int, retry_after: str | None):
    async def fail(_: Request) -> Response:
        raise error

    app = make_app(SimpleNamespace(**dict.fromkeys(ROUTES, fail)), ())
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        answer = await client.get("/v1/models")
    assert (answer.status_code, answer.headers.get("retry-after")) == (status, retry_after)
    assert answer.json()["error"]["code"] == (error.code if isinstance(error, PipelineError) else "internal")


async def test_a_request_is_counted_and_logged_once():
    async def told(request: Request) -> Response:
        await request.body()
        visit = visits.current()
        visit.client, visit.model, visit.request_id = "team", request.path_params.get("model", "m"), "r1"
        visit.first_token()
        return Response(b"12345")

    app = visits.Visits(make_app(SimpleNamespace(**dict.fromkeys(ROUTES, told)), ()), lambda name: name == "m")
    before = {name: _count(name) for name in ("m", "other", "")}
    with structlog.testing.capture_logs() as lines:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
            await client.post("/v1/completions", content=b"123")
            await client.get("/v1/models/never-served")
            await client.get("/nothing/here")
    assert app.in_progress == 0
    (first, _, last) = lines
    assert first.pop("duration_ms") >= first.pop("ttft_ms") >= 0
    assert first == {
        "event": "request_answered",
        "log_level": "info",
        "client": "team",
        "route": "/v1/completions",
        "status": 200,
        "request_id": "r1",
        "model": "m",
    }
    assert (last["route"], last["status"]) == ("other", 404)
    assert {name: _count(name) - count for name, count in before.items()} == {"m": 1, "other": 1, "": 1}
    sent = metrics.REGISTRY.get_sample_value("sglang_nats_http_sent_bytes_total", {"route": "/v1/completions"})
    received = metrics.REGISTRY.get_sample_value("sglang_nats_http_received_bytes_total", {"route": "/v1/completions"})
    assert (sent, received) == (5, 3)


def _count(model: str) -> float:
    return sum(
        sample.value
        for family in metrics.HTTP_REQUESTS.collect()
        for sample in family.samples
        if sample.name.endswith("_total") and sample.labels["model"] == model
    )


@pytest.mark.parametrize("text", ["", "12", "chat/1/1", "chat/1/1x/m", "voice/1/1/m", "chat/1/" + "1." * 64 + "1/m"])
def test_what_is_no_cursor_is_refused(text: str):
    with pytest.raises(InvalidRequest, match="Last-Event-ID"):
        Cursor.parse(text)


def test_a_body_goes_on_as_it_came():
    body = b'{"model":"m","messages":[{"role":"user","content":"hi"}],"tools":[],"n":3,"stream":true}'
    asked = parse_body(body, chat=True, client="c", request_s=5.0)
    sent = json.loads(asked.payload)
    assert (asked.choices, asked.stream, asked.include_usage) == (3, True, False)
    assert sent.pop("request_id") == asked.request_id and sent.pop("deadline") == asked.deadline_unix_s
    assert sent == json.loads(body)


def test_keys_come_from_a_file_and_from_the_environment(tmp_path: Path):
    file = tmp_path / "keys.toml"
    file.write_text('a = "k1"\nb = ["k2", "k3"]\n')
    assert load_keys(GatewaySettings()) is None
    settings = GatewaySettings(keys_file=str(file), keys_variable="KEYS")
    assert sorted(load_keys(settings, {"KEYS": '{"c": "k4"}'}).values()) == ["a", "b", "b", "c"]
    for wrong in ("", "[]", "{}", '{"c d": "k"}', '{"c": "k", "d": "k"}', '{"c": ""}', '{"c": 1}'):
        with pytest.raises(ConfigError) as raised:
            load_keys(GatewaySettings(keys_variable="KEYS"), {"KEYS": wrong})
        assert '"k"' not in str(raised.value)
