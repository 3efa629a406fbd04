"""NATS's own JavaScript client, which knows nothing of this project, publishes JSON and reads the whole answer."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pipeline.config import load_topology
from pipeline.engine.simulated import text_of
from pipeline.local import running

READY_S_MAX = 60.0


async def by_hand(
    node: Callable[..., str], url: str, request: dict[str, Any], choices: int = 1
) -> dict[str, list[Any]]:
    """What the script printed, by kind of line."""
    printed = await asyncio.to_thread(node, "by_hand.mjs", url, "smollm2", json.dumps(request), str(choices))
    lines: dict[str, list[Any]] = {"ack": [], "live": [], "stored": []}
    for line in printed.splitlines():
        value = json.loads(line)
        lines[value["kind"]].append(value)
    return lines


@pytest.mark.timeout(180)
async def test_an_independent_client_asks_by_hand_and_reads_the_whole_answer(node, tmp_path: Path):
    shipped = load_topology("simulated")
    single = tuple(
        msgspec.structs.replace(group, count=1) for group in shipped.workers if group.role in ("preprocess", "decode")
    )
    async with running(msgspec.structs.replace(shipped, workers=single), tmp_path) as local:
        await local.start()
        async with asyncio.timeout(READY_S_MAX):
            await local.until_ready()
        chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "ignore_eos": True}

        whole = await by_hand(node, local.url, chat)
        (ack,) = whole["ack"]
        (answer,) = whole["live"]
        assert ack["stream"] == "REQUESTS"
        assert answer["subject"] == f"sglang.responses.anonymous.{ack['seq']}"
        assert answer["frame"]["finish_reason"] == "length"
        assert answer["frame"]["text"] == "".join(text_of(token) for token in answer["frame"]["token_ids"])
        assert answer["frame"]["usage"]["completion_tokens"] == len(answer["frame"]["token_ids"]) == 5
        assert whole["stored"] == [{**answer, "kind": "stored"}]

        streamed = await by_hand(node, local.url, {**chat, "stream": True, "n": 2, "request_id": "mine"}, choices=2)
        assert streamed["live"] == [{**line, "kind": "live"} for line in streamed["stored"]]
        assert {line["subject"] for line in streamed["live"]} == {"sglang.responses.anonymous.mine"}
        for choice in (0, 1):
            frames = [line["frame"] for line in streamed["live"] if line["frame"].get("choice", 0) == choice]
            tokens = [token for frame in frames for token in frame.get("token_ids", ())]
            assert tokens == answer["frame"]["token_ids"]
            assert [bool(frame.get("finish_reason")) for frame in frames] == [False] * (len(frames) - 1) + [True]

        wrong = await by_hand(node, local.url, {"messages": [], "temperatur": 1})
        (refused,) = wrong["live"]
        assert refused["frame"]["error"]["code"] == "invalid_request"
        assert "temperatur" in refused["frame"]["error"]["message"]
