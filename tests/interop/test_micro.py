"""NATS's own JavaScript client finds the workers as micro services, reads an operation's error as theirs, and asks a
model through the front door."""

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pipeline.config import load_topology
from pipeline.engine.simulated import expected_tokens
from pipeline.local import running
from subjects.codec import TokenIds

READY_S_MAX = 60.0
WANTED = expected_tokens(TokenIds.of([20, 11, 12]), 4).tolist()


def _by_kind(printed: str) -> dict[str, list[Any]]:
    """What a script printed, by kind of line."""
    heard: dict[str, list[Any]] = {}
    for line in printed.splitlines():
        said = json.loads(line)
        heard.setdefault(said["kind"], []).append(said["value"])
    return heard


@pytest.mark.timeout(180)
async def test_an_independent_client_finds_and_asks_the_workers(node, tmp_path: Path):
    shipped = load_topology("simulated")
    single = tuple(
        msgspec.structs.replace(group, count=1) for group in shipped.workers if group.role in ("preprocess", "decode")
    )
    async with running(msgspec.structs.replace(shipped, workers=single), tmp_path) as local:
        await local.start()
        async with asyncio.timeout(READY_S_MAX):
            await local.until_ready()
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
