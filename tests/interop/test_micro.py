"""NATS's own JavaScript client finds the workers as micro services, and reads an operation's error as theirs."""

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pipeline.config import load_topology
from pipeline.local import running

READY_S_MAX = 60.0


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
        printed = await asyncio.to_thread(node, "micro.mjs", local.url, "decode-0")
    heard: dict[str, list[Any]] = {}
    for line in printed.splitlines():
        said = json.loads(line)
        heard.setdefault(said["kind"], []).append(said["value"])

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
