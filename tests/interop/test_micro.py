"""NATS's own JavaScript client finds the workers as micro services, reads an operation's error as theirs, and asks a
model through the front door. OpenAI's Node client asks the gateway of the same pipeline."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from pipeline.config import GatewaySettings, GroupSettings, load_topology
from pipeline.engine.simulated import expected_tokens
from pipeline.local import LocalTopology, running
from subjects.codec import TokenIds

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]
READY_S_MAX = 60.0
WANTED = expected_tokens(TokenIds.of([20, 11, 12]), 4).tolist()


def _by_kind(printed: str) -> dict[str, list[Any]]:
    """What a script printed, by kind of line."""
    heard: dict[str, list[Any]] = {}
    for line in printed.splitlines():
        said = json.loads(line)
        heard.setdefault(said["kind"], []).append(said["value"])
    return heard


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def local(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalTopology]:
    """One worker of each kind, and a gateway."""
    shipped = load_topology("simulated")
    groups = [
        msgspec.structs.replace(group, count=1) for group in shipped.workers if group.role in ("preprocess", "decode")
    ]
    groups.append(GroupSettings(role="gateway", gateway=GatewaySettings(port=0)))
    folder = tmp_path_factory.mktemp("interop")
    async with running(msgspec.structs.replace(shipped, workers=tuple(groups)), folder) as local:
        await local.start()
        async with asyncio.timeout(READY_S_MAX):
            await local.until_ready()
        yield local


async def test_openais_own_node_client(node, local: LocalTopology):
    (url,) = local.gateway_addresses()
    heard = _by_kind(await asyncio.to_thread(node, "openai.mjs", url))
    (model,) = heard["model"]
    assert (model["id"], heard["retrieved"]) == ("smollm2", [model])
    (whole,) = heard["whole"]
    assert whole["usage"]["completion_tokens"] == 6
    text = whole["choices"][0]["message"]["content"]
    *spoken, last = heard["chunk"]
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in spoken) == text
    assert last["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
    assert heard["helped"] == [text]
    assert heard["completed"][0]["usage"]["completion_tokens"] == 3
    assert [(error["class"], error["status"], error["code"], error["param"]) for error in heard["error"]] == [
        ("NotFoundError", 404, "unknown_model", "model"),
        ("BadRequestError", 400, "invalid_request", "temperature"),
        ("BadRequestError", 400, "invalid_request", "max_tokens"),
    ]
    assert heard["left"] == ["chatcmpl-left-by-node"] and heard["cancelled"] == [True]


async def test_an_independent_client_finds_and_asks_the_workers(node, local: LocalTopology):
    heard = _by_kind(await asyncio.to_thread(node, "micro.mjs", local.url, "decode-0"))
    asked = {"prompt": [20, 11, 12], "max_tokens": 4, "ignore_eos": True, "stream": True}
    answered = _by_kind(await asyncio.to_thread(node, "generate.mjs", local.url, json.dumps(asked)))

    assert [token for frame in answered["frame"] for token in frame.get("token_ids", ())] == WANTED
    assert [bool(frame.get("finish_reason")) for frame in answered["frame"]] == [False] * 3 + [True]
    assert answered["first"] == [{**answered["frame"][0], "request_id": answered["first"][0]["request_id"]}]
    (refused,) = answered["refused"]
    assert (refused["code"], refused["frame"]["error"]["code"]) == (404, "unknown_model")
    (door,) = answered["info"]
    (endpoint,) = door["endpoints"]
    assert (endpoint["subject"], endpoint["queue_group"]) == ("sglang.generate.smollm2", "generate")
    (counted,) = answered["stats"][0]["endpoints"]
    assert (counted["num_requests"], counted["num_errors"]) == (2, 0)

    assert {answer["name"] for answer in heard["ping"]} >= {"sglang-decode", "sglang-preprocess"}
    for verb in ("info", "stats"):
        assert {answer["type"] for answer in heard[verb]} == {f"io.nats.micro.v1.{verb}_response"}
        names = {answer["name"]: {endpoint["name"] for endpoint in answer["endpoints"]} for answer in heard[verb]}
        assert "update_weights" in names["sglang-decode"] - names["sglang-preprocess"]
        assert "pause" in names["sglang-decode"] & names["sglang-preprocess"]
    (one,) = heard["one"]
    assert one["metadata"]["worker"] == "decode-0"
    (done,) = heard["done"]
    assert done["reply"]["result"]["worker"] == "decode-0"
    (refused,) = heard["dance"]
    assert (refused["code"], refused["reply"]["error"]["code"]) == (400, "invalid_request")
    assert "'dance' is not one of ping, drain" in refused["message"]
