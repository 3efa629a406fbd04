"""The gateway over real sockets: OpenAI's own client, its errors, its streams, and one that dies in mid-stream."""

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import openai
import pytest
import pytest_asyncio

from pipeline.client import Client
from pipeline.config import GatewaySettings, GroupSettings, SimulatedSettings, load_topology
from pipeline.engine.simulated import expected_tokens, text_of
from pipeline.local import LocalTopology, running
from subjects import names
from subjects.codec import TokenIds, decode
from subjects.limits import PAYLOAD_BYTES_MAX
from subjects.messages import Heartbeat, MetricsSnapshot

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]
MODEL = "smollm2"
PROMPT = [20, 11, 12]
READY_S_MAX = 60.0
ANSWER_S_MAX = 30.0
KEY = "sk-test-1"


class Serving:
    """A topology with three gateways: two that anyone may ask, one with keys and a limit."""

    def __init__(self, local: LocalTopology) -> None:
        self.local = local
        self.urls = local.gateway_addresses()
        self.http = httpx.AsyncClient(timeout=ANSWER_S_MAX)

    def openai(self, gateway: int = 1, key: str = "none") -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.urls[gateway]}/v1", api_key=key, max_retries=0, timeout=ANSWER_S_MAX)

    async def post(self, body: Any, gateway: int = 1, **options: Any) -> httpx.Response:
        fields = {"model": MODEL, "prompt": PROMPT, "max_tokens": 4, "ignore_eos": True} | body
        return await self.http.post(f"{self.urls[gateway]}/v1/completions", json=fields, **options)

    def stream(self, body: Any, gateway: int = 1, **options: Any):
        fields = {"model": MODEL, "prompt": PROMPT, "ignore_eos": True, "stream": True} | body
        return self.http.stream("POST", f"{self.urls[gateway]}/v1/completions", json=fields, **options)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def serving(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Serving]:
    folder = tmp_path_factory.mktemp("gateway")
    keys = folder / "keys.toml"
    keys.write_text(f'team = ["{KEY}", "sk-test-2"]\nother = "sk-test-3"\n')
    open_to_all = GatewaySettings(port=0)
    guarded = GatewaySettings(
        port=0, keys_file=str(keys), client_requests_max=1, keep_alive_s=0.1, cors_origins=("https://a.example",)
    )
    shipped = load_topology("simulated")
    groups = [msgspec.structs.replace(group, count=1) for group in shipped.workers if group.role != "telemetry"]
    models = {MODEL: "builtin:smollm2", "late": "builtin:smollm2"}  # the second never has a worker
    groups = [
        msgspec.structs.replace(group, models=models)
        if group.role == "preprocess"
        else msgspec.structs.replace(group, simulated=SimulatedSettings(ttft_ms=1, itl_ms=10))
        for group in groups
    ]
    groups += [
        GroupSettings(role="gateway", count=2, gateway=open_to_all),
        GroupSettings(role="gateway", gateway=guarded),
    ]
    async with running(msgspec.structs.replace(shipped, workers=tuple(groups)), folder) as local:
        await local.start()
        async with asyncio.timeout(READY_S_MAX):
            await local.until_ready()
        serving = Serving(local)
        yield serving
        await serving.http.aclose()


def wanted(count: int) -> str:
    return "".join(text_of(token) for token in expected_tokens(TokenIds.of(PROMPT), count).tolist())


def error_of(response: httpx.Response) -> dict[str, Any]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


async def test_a_chat_and_its_stream_say_the_same(serving: Serving):
    client = serving.openai()
    asked = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
    whole = await client.chat.completions.create(**asked)
    assert whole.object == "chat.completion" and whole.id.startswith("chatcmpl-")
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 8 and whole.usage.prompt_tokens > 8

    stream = await client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    *spoken, last = chunks
    assert len({chunk.id for chunk in chunks}) == len({chunk.created for chunk in chunks}) == 1
    assert spoken[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].delta.role for chunk in spoken[1:]] == [None] * (len(spoken) - 1)
    assert "".join(chunk.choices[0].delta.content for chunk in spoken) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in spoken][-2:] == [None, "length"]
    assert last.choices == [] and last.usage.completion_tokens == 8
    assert all(chunk.usage is None for chunk in spoken)


async def test_two_choices_whole_and_streamed(serving: Serving):
    client = serving.openai()
    asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": 6, "n": 2, "logprobs": 2}
    asked["extra_body"] = {"ignore_eos": True}
    whole = await client.completions.create(**asked)
    assert [(choice.index, choice.text, choice.finish_reason) for choice in whole.choices] == [
        (0, wanted(6), "length"),
        (1, wanted(6), "length"),
    ]
    assert whole.usage.completion_tokens == 12
    assert len(whole.choices[1].logprobs.tokens) == 6

    texts, logprobs = ["", ""], [0, 0]
    async for chunk in await client.completions.create(**asked, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        logprobs[choice.index] += len(choice.logprobs.tokens)
        assert chunk.usage is None
    assert texts == [wanted(6), wanted(6)]
    assert logprobs == [6, 6]


async def test_models(serving: Serving):
    client = serving.openai()
    (model,) = (await client.models.list()).data
    assert (model.id, model.object, model.owned_by) == (MODEL, "model", "sglang-nats")
    assert time.time() - 600 < model.created <= time.time()
    assert await client.models.retrieve(MODEL) == model
    with pytest.raises(openai.NotFoundError) as raised:
        await client.models.retrieve("none/such")
    assert raised.value.body["code"] == "unknown_model"


async def test_health_needs_no_key(serving: Serving):
    for path in ("/health", "/ready"):
        answer = await serving.http.get(serving.urls[2] + path)
        assert (answer.status_code, answer.json()["ready"]) == (200, True)
    assert answer.json()["models"] == [MODEL]


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({"functions": []}, 400, "invalid_request", "functions"),
        ({"temprature": 1}, 400, "invalid_request", "temprature"),
        ({"n": 1000}, 400, "invalid_request", "n"),
        ({"stream": "yes"}, 400, "invalid_request", "stream"),
        ({"messages": [{"role": "user", "content": "hi"}]}, 400, "invalid_request", "messages"),
        ({"client": "someone-else"}, 400, "invalid_request", "client"),
        ({"request_id": "a.b"}, 400, "invalid_request", "request_id"),
        ({"model": ""}, 400, "invalid_request", "model"),
        ({"prompt": "word " * 9000, "stream": True}, 400, "prompt_too_long", "prompt"),
        ({"model": "none"}, 404, "unknown_model", "model"),
        ({"model": "none", "stream": True}, 404, "unknown_model", "model"),
        ({"prompt": "x" * (PAYLOAD_BYTES_MAX + 1)}, 413, "payload_too_large", None),
        ({"deadline": 1.0}, 504, "deadline_exceeded", "deadline"),
    ],
)
async def test_a_refusal_names_the_field(serving: Serving, body, status, code, param):
    answer = await serving.post(body)
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param), error["message"]
    assert error["type"] == ("server_error" if status == 504 else "invalid_request_error")


async def test_what_is_no_request_is_told_so(serving: Serving):
    url = serving.urls[1]
    for content in (b"{", b"[]", b"\xff", b"[" * 100_000):
        answer = await serving.http.post(f"{url}/v1/chat/completions", content=content)
        assert (answer.status_code, error_of(answer)["code"]) == (400, "invalid_request")
    assert error_of(await serving.http.get(f"{url}/v1/nothing"))["code"] == "not_found"
    answer = await serving.http.get(f"{url}/v1/completions")
    assert (answer.status_code, error_of(answer)["code"]) == (405, "method_not_allowed")
    answer = await serving.http.get(f"{url}/v1/streams/never")
    assert (answer.status_code, error_of(answer)["code"]) == (410, "output_gone")
    answer = await serving.http.get(f"{url}/v1/streams/never", headers={"Last-Event-ID": "12"})
    assert (answer.status_code, error_of(answer)["param"]) == (400, "Last-Event-ID")


async def test_a_key_says_who_asks_and_a_client_has_its_limit(serving: Serving):
    for key in ("sk-wrong", "none"):
        with pytest.raises(openai.AuthenticationError):
            await serving.openai(2, key).models.list()
    assert (await serving.http.get(f"{serving.urls[2]}/v1/models")).headers["www-authenticate"] == "Bearer"

    mine, theirs = ({"Authorization": f"Bearer {key}"} for key in (KEY, "sk-test-3"))
    async with serving.stream({"max_tokens": 500, "request_id": "mine"}, 2, headers=mine) as stream:
        lines = stream.aiter_lines()
        await anext(lines)
        full = await serving.post({}, 2, headers={"Authorization": "Bearer sk-test-2"})
        assert (full.status_code, full.headers["retry-after"]) == (429, "1")
        assert error_of(full)["type"] == "rate_limit_error"
        assert (await serving.post({}, 2, headers=theirs)).status_code == 200
        answer = await serving.http.get(f"{serving.urls[2]}/v1/streams/mine", headers=theirs)
        assert answer.status_code == 410, "it is somebody else's"
    async with asyncio.timeout(ANSWER_S_MAX):
        while (await serving.post({}, 2, headers=mine)).status_code == 429:  # until its end is noticed
            pass


async def test_a_gateway_says_what_it_does(serving: Serving):
    """Its heartbeat while a stream runs, its series after it; telemetry shows the series of whoever publishes them."""
    async with Client.connect(serving.local.url) as client:
        beats: asyncio.Queue[Heartbeat] = asyncio.Queue()
        series: asyncio.Queue[MetricsSnapshot] = asyncio.Queue()
        await client._bus.subscribe(
            names.HEARTBEAT.of(role="gateway", worker="gateway-1"),
            lambda heard: beats.put_nowait(decode(Heartbeat, heard.payload)),
        )
        await client._bus.subscribe(
            names.METRICS.of(role="gateway", worker="gateway-1"),
            lambda heard: series.put_nowait(decode(MetricsSnapshot, heard.payload)),
        )
        async with asyncio.timeout(ANSWER_S_MAX), serving.stream({"max_tokens": 300, "request_id": "seen"}) as stream:
            lines = stream.aiter_lines()
            await anext(lines)
            while (beat := await beats.get()).in_flight != 1:
                pass
            assert beat.slots == 0, "nothing limits it"
            async for _ in lines:
                pass
            route = {"route": "/v1/completions"}
            while _counted(families := await series.get(), "http_sent_bytes_total", **route) < 300 * 100:
                pass
    assert _counted(families, "http_requests_total", **route, status="200", model=MODEL) >= 1
    assert _counted(families, "http_ttft_seconds_count", model=MODEL) >= 1


def _counted(snapshot: MetricsSnapshot, name: str, **labels: str) -> float:
    samples = (sample for family in snapshot.families for sample in family.samples)
    return sum(sample.value for sample in samples if sample.name.endswith(name) and sample.labels == labels)


async def test_cors_only_where_origins_are_set(serving: Serving):
    asks = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    allowed = await serving.http.options(f"{serving.urls[2]}/v1/completions", headers=asks)
    assert allowed.headers["access-control-allow-origin"] == "https://a.example"
    refused = await serving.http.options(f"{serving.urls[1]}/v1/completions", headers=asks)
    assert "access-control-allow-origin" not in refused.headers


async def test_silence_is_filled_with_comments_and_an_error_ends_the_stream(serving: Serving):
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"model": "late", "max_tokens": 4, "deadline": time.time() + 1.5}
    async with serving.stream(body, 2, headers=headers) as stream:
        assert stream.status_code == 200
        events = (await stream.aread()).decode().split("\n\n")
    assert events.count(": keep-alive") >= 5
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "deadline_exceeded"


@pytest.mark.parametrize("stream", [True, False])
async def test_who_leaves_cancels(serving: Serving, stream: bool):
    request_id = f"left-{stream}"
    body = {"max_tokens": 3000, "request_id": request_id}
    if stream:
        async with serving.stream(body) as answer:
            await anext(answer.aiter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            await serving.post(body, timeout=0.5)
    async with Client.connect(serving.local.url, client="http") as client, asyncio.timeout(ANSWER_S_MAX):
        frames = [frame async for frame in client.resume(request_id)]
    assert (frames[-1].finish_reason, frames[-1].error.code) == ("abort", "cancelled")


class Reader:
    """What a reader of server-sent events keeps."""

    def __init__(self) -> None:
        self.last_id, self.done, self.usage = "", False, None
        self.texts: dict[int, str] = {}
        self.chunks: list[dict[str, Any]] = []

    async def read(self, lines: AsyncIterator[str], events_max: int = 1 << 30) -> None:
        async for line in lines:
            name, _, value = line.partition(": ")
            if name == "id":
                last_id = value
            elif value == "[DONE]":
                self.done = True
            elif name == "data":
                self._take(json.loads(value))
                self.last_id = last_id
                if len(self.chunks) >= events_max:
                    return

    def _take(self, chunk: dict[str, Any]) -> None:
        self.chunks.append(chunk)
        self.usage = chunk["usage"] or self.usage
        for choice in chunk["choices"]:
            self.texts[choice["index"]] = self.texts.get(choice["index"], "") + choice["text"]


async def test_any_gateway_goes_on_with_the_stream_of_a_killed_one(serving: Serving):
    reader = Reader()
    body = {"max_tokens": 200, "n": 2, "request_id": "killed", "stream_options": {"include_usage": True}}
    (killed,) = (child for child in serving.local.children if child.name == "gateway-0")
    with pytest.raises(httpx.HTTPError):
        async with serving.stream(body, gateway=0) as answer:
            lines = answer.aiter_lines()
            await reader.read(lines, 40)
            os.kill(killed.process.pid, signal.SIGKILL)
            await reader.read(lines)
    assert not reader.done and len(reader.texts[0]) < len(wanted(200))

    url = f"{serving.urls[1]}/v1/streams/killed"
    async with serving.http.stream("GET", url, headers={"Last-Event-ID": reader.last_id}) as answer:
        await reader.read(answer.aiter_lines())
    assert reader.done
    assert reader.texts == {0: wanted(200), 1: wanted(200)}
    assert reader.usage["completion_tokens"] == 400
    assert len({(chunk["id"], chunk["model"], chunk["created"], chunk["object"]) for chunk in reader.chunks}) == 1

    after = Reader()  # the end is told again to who has all but it
    async with serving.http.stream("GET", url, params={"last_event_id": reader.last_id}) as answer:
        await after.read(answer.aiter_lines())
    assert (after.done, after.texts, after.usage) == (True, {}, reader.usage)


async def test_several_prompts_are_echoed_each_with_its_choices(serving: Serving):
    other = [30, 31]
    asked = {"model": MODEL, "prompt": [PROMPT, other], "n": 2, "max_tokens": 4, "extra_body": {"ignore_eos": True}}
    whole = await serving.openai().completions.create(**asked, echo=True, logprobs=1)
    outputs = ["".join(text_of(t) for t in expected_tokens(TokenIds.of(p), 4).tolist()) for p in (PROMPT, other)]
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    for choice, output, prompt in zip(
        whole.choices, outputs[:1] * 2 + outputs[1:] * 2, [PROMPT] * 2 + [other] * 2, strict=True
    ):
        assert choice.text.endswith(output) and len(choice.text) > len(output)
        assert choice.logprobs.token_logprobs[0] is None
        assert len(choice.logprobs.tokens) == len(prompt) + 4
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(PROMPT) + len(other), 16)

    options = {"stream": True, "stream_options": {"include_usage": True}}
    stream = await serving.openai().completions.create(**asked, echo=True, logprobs=1, **options)
    texts, last = dict.fromkeys(range(4), ""), None
    async for chunk in stream:
        last = chunk
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert [texts[index] for index in range(4)] == [choice.text for choice in whole.choices]
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens


async def test_an_adapter_that_no_worker_has_is_refused_by_name(serving: Serving):
    for body in ({"model": f"{MODEL}:poet"}, {"lora_path": "poet"}):
        response = await serving.post(body)
        assert (response.status_code, error_of(response)["param"]) == (400, "lora_path")
