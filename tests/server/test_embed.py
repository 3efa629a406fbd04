"""Embeddings over real processes with simulated engines: OpenAI's client, plain NATS, errors, and a killed worker."""

import asyncio
import base64
import json
import os
import signal
import time
from array import array
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio

from pipeline.bus import Bus, Received
from pipeline.client import Client
from pipeline.config import (
    BUILTIN_MODEL,
    GatewaySettings,
    GroupSettings,
    RoutingSettings,
    SimulatedSettings,
    TopologySettings,
)
from pipeline.engine.simulated import expected_vector
from pipeline.errors import DeadlineExceeded, PipelineError
from pipeline.local import LocalTopology, running
from stages.embed import BATCH_INPUTS_MAX
from subjects import headers, names, streams
from subjects.codec import TokenIds, Vector, decode
from subjects.limits import INPUTS_MAX
from subjects.messages import Frame

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]
MODEL, TALKS = "vectors", "talk"
DIMENSIONS, CONTEXT_TOKENS = 32, 256
BATCH_MS = 150.0
READY_S_MAX, ANSWER_S_MAX = 60.0, 30.0
IDS = [20, 11, 12]


class Serving:
    """A topology with two embedding workers, one that talks, and a gateway."""

    def __init__(self, local: LocalTopology, bus: Bus, client: Client) -> None:
        self.local, self.bus, self.client = local, bus, client
        self.url = local.gateway_addresses()[0]
        self.http = httpx.AsyncClient(timeout=ANSWER_S_MAX)

    async def post(self, path: str = "embeddings", **fields: Any) -> httpx.Response:
        return await self.http.post(f"{self.url}/v1/{path}", json={"model": MODEL} | fields)

    def openai(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=ANSWER_S_MAX)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def serving(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Serving]:
    simulated = SimulatedSettings(
        ttft_ms=BATCH_MS, embedding_dimensions=DIMENSIONS, context_len_tokens=CONTEXT_TOKENS, max_running_requests=4
    )
    models = {MODEL: BUILTIN_MODEL, TALKS: BUILTIN_MODEL, "late": BUILTIN_MODEL}  # the last never has a worker
    shared = {"model_path": BUILTIN_MODEL, "engine": "simulated", "simulated": simulated}
    topology = TopologySettings(
        workers=(
            GroupSettings(role="preprocess", models=models, routing=RoutingSettings(policy="any")),
            GroupSettings(role="embed", model=MODEL, count=2, **shared),
            GroupSettings(role="decode", model=TALKS, **shared),
            GroupSettings(role="gateway", gateway=GatewaySettings(port=0)),
        )
    )
    async with running(topology, tmp_path_factory.mktemp("embed")) as local:
        await local.start()
        async with asyncio.timeout(READY_S_MAX):
            await local.until_ready()
        bus = await Bus.connect(local.url, name="test")
        async with Client.connect(local.url) as client:
            serving = Serving(local, bus, client)
            yield serving
            await serving.http.aclose()
        await bus.close()


def wanted(tokens: list[int], dimensions: int = DIMENSIONS) -> Vector:
    return expected_vector(TokenIds.of(tokens), dimensions, DIMENSIONS)


async def test_the_openai_client_has_each_vector_in_both_encodings(serving: Serving):
    client, inputs = serving.openai(), [IDS, [5], [7, 8, 9, 10]]
    by_default = await client.embeddings.create(model=MODEL, input=inputs)  # the client asks for base64
    as_numbers = await client.embeddings.create(model=MODEL, input=inputs, encoding_format="float")
    for answer in (by_default, as_numbers):
        assert [one.index for one in answer.data] == [0, 1, 2]
        assert [Vector.of(one.embedding) for one in answer.data] == [wanted(tokens) for tokens in inputs]
        assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (8, 8)
        assert (answer.object, answer.model) == ("list", MODEL)
    text = (await serving.post(input=IDS, encoding_format="base64")).json()["data"][0]["embedding"]
    assert base64.b64decode(text) == wanted(IDS).raw
    assert MODEL in [model.id async for model in client.models.list()]


async def test_a_text_is_the_same_as_its_tokens_and_may_be_long(serving: Serving):
    texts = ["hello", "What is the capital of France?", "word " * 200]
    answer = await serving.client.embed(model=MODEL, input=[text for text in texts for _ in range(8)])
    lengths = [frame.usage.prompt_tokens for frame in answer._ends.values()]
    assert len(answer.vectors) == 24 and len(set(map(bytes, (one.raw for one in answer.vectors)))) == 3
    assert answer.prompt_tokens == sum(lengths) and max(lengths) > 200
    assert (await serving.client.embed(model=MODEL, input=texts[0])).vectors == answer.vectors[:1]


async def test_shorter_vectors_are_the_beginning_of_unit_length(serving: Serving):
    vector = (await serving.openai().embeddings.create(model=MODEL, input=IDS, dimensions=8)).data[0].embedding
    assert len(vector) == 8 and sum(number**2 for number in vector) == pytest.approx(1, abs=1e-5)
    assert Vector.of(vector) == wanted(IDS, 8)


async def test_a_request_by_hand_is_answered_in_json(serving: Serving):
    heard: asyncio.Queue[Received] = asyncio.Queue()
    await serving.bus.subscribe(names.RESPONSES.any(client="by-hand"), heard.put_nowait)
    payload = json.dumps({"input": [[5], IDS], "request_id": "one"}).encode()
    await serving.bus.publish(names.REQUESTS.of(model=MODEL), payload, headers={headers.CLIENT: "by-hand"})
    async with asyncio.timeout(ANSWER_S_MAX):
        frames = [json.loads((await heard.get()).payload) for _ in range(2)]
    assert {frame.get("choice", 0): array("f", frame["embedding"]) for frame in frames} == {
        0: array("f", wanted([5])),
        1: array("f", wanted(IDS)),
    }
    assert all(frame["finish_reason"] == "stop" and frame["usage"]["completion_tokens"] == 0 for frame in frames)


@pytest.mark.parametrize(
    ("fields", "field", "said"),
    [
        ({}, "input", "is required"),
        ({"input": []}, "input", "at least 1"),
        ({"input": ""}, "input", "must not be empty"),
        ({"input": ["a", ""]}, "input.1", "must not be empty"),
        ({"input": ["a", 1]}, "input", "mixture"),
        ({"input": {"text": "a"}}, "input", "Expected"),
        ({"input": [[1], [2**33]]}, "input.1.0", "token id"),
        ({"input": [[1], [1, -1]]}, "input.1.1", "token id"),
        ({"input": [1, 49_152]}, "input.1", "below 49152"),
        ({"input": ["a"] * (INPUTS_MAX + 1)}, "input", f"{INPUTS_MAX + 1} inputs; at most {INPUTS_MAX}"),
        ({"input": [[1], []]}, "input.1", "must not be empty"),
        ({"input": ["a", "b " * CONTEXT_TOKENS]}, "input.1", f"at most {CONTEXT_TOKENS - 1}"),
        ({"input": "a", "dimensions": 0}, "dimensions", "at least 1"),
        ({"input": "a", "dimensions": DIMENSIONS + 1}, "dimensions", f"at most {DIMENSIONS}"),
        ({"input": "a", "dimensions": 2**70}, None, "64 bits"),
        ({"input": "a", "encoding_format": "text"}, "encoding_format", "Invalid enum"),
        ({"input": "a", "temperature": 1}, "temperature", "vectors"),
        ({"input": "a", "prompt": "b"}, "prompt", "/v1/completions"),
        ({"input": "a", "model": TALKS}, "model", "text alone"),
    ],
)
async def test_a_mistake_is_named(serving: Serving, fields: dict[str, Any], field: str | None, said: str):
    answer = await serving.post(**fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, field), error
    assert said in error["message"]


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
async def test_a_model_that_embeds_is_not_to_be_talked_to(serving: Serving, path: str):
    body = {"prompt": IDS} if path == "completions" else {"messages": [{"role": "user", "content": "hi"}]}
    answer = await serving.post(path, **body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")
    assert "/v1/embeddings" in answer.json()["error"]["message"]
    answer = await serving.post(path, input="hi")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input")


async def test_too_many_tokens_for_one_task_are_too_large(serving: Serving):
    ids = [40_000] * (CONTEXT_TOKENS - 1)
    with pytest.raises(PipelineError, match="several requests") as caught:
        await serving.client.embed(model=MODEL, input=["a b c d e f g h " * 15] * INPUTS_MAX)
    assert (caught.value.code, caught.value.field) == ("payload_too_large", "input")
    assert caught.value.size > caught.value.limit
    assert len((await serving.client.embed(model=MODEL, input=[ids])).vectors) == 1


async def test_each_input_has_one_end_though_its_worker_is_killed(serving: Serving):
    """Killed after the first batch, in the second: the next owner makes what is missing, and nothing twice."""
    inputs = [[number + 3, 4] for number in range(3 * BATCH_INPUTS_MAX)]
    heard: asyncio.Queue[Received] = asyncio.Queue()
    subject = names.RESPONSES.of(client=serving.client.name, request_id="struck")
    await serving.bus.subscribe(subject, heard.put_nowait)
    asking = asyncio.create_task(serving.client.embed(model=MODEL, input=inputs, request_id="struck"))
    async with asyncio.timeout(ANSWER_S_MAX):
        first = decode(Frame, (await heard.get()).payload)
        owner = next(child for child in serving.local.children if child.name == first.worker)
        os.kill(owner.process.pid, signal.SIGKILL)
        answer = await asking
    await serving.bus.flush()  # what the client has heard on its connection is heard on this one too
    later = [decode(Frame, heard.get_nowait().payload) for _ in range(heard.qsize())]
    ends = [frame for frame in [first, *later] if frame.finish_reason]
    assert Counter(frame.choice for frame in ends) == Counter(range(len(inputs)))
    assert {frame.attempt for frame in ends} == {1, 2}
    assert answer.vectors == [wanted(tokens) for tokens in inputs]


@pytest.mark.parametrize("over_http", [False, True])
async def test_a_request_that_nobody_waits_for_any_more_is_cancelled(serving: Serving, over_http: bool):
    client, request_id = ("http" if over_http else serving.client.name), f"left-{over_http}"
    fields = {"input": [[number] for number in range(INPUTS_MAX)], "request_id": request_id}
    heard: asyncio.Queue[Received] = asyncio.Queue()
    subject = names.RESPONSES.of(client=client, request_id=request_id)
    await serving.bus.subscribe(subject, heard.put_nowait)
    asking = asyncio.create_task(serving.post(**fields) if over_http else serving.client.embed(model=MODEL, **fields))
    async with asyncio.timeout(ANSWER_S_MAX):
        await heard.get()
        asking.cancel()
        while decode(Frame, (await heard.get()).payload).choice < INPUTS_MAX - 1:
            pass
    ends = [decode(Frame, stored.payload) async for stored in serving.bus.read(streams.RESPONSES.name, subject)]
    assert Counter(frame.choice for frame in ends) == Counter(range(INPUTS_MAX))
    assert Counter(frame.finish_reason for frame in ends)["abort"] > INPUTS_MAX / 2


async def test_a_deadline_ends_what_is_left(serving: Serving):
    with pytest.raises(DeadlineExceeded):
        await serving.client.embed(model=MODEL, input=[[3]] * 640, deadline=time.time() + 3 * BATCH_MS / 1e3)
