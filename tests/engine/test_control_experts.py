"""Where the tokens of a mixture of experts go, asked of a worker over NATS: a second engine, so only with -m full."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tiny_moe

from pipeline.bus import Bus
from pipeline.client import Client
from pipeline.config import BUILTIN_MODEL, HealthSettings, load_topology
from pipeline.control import command
from pipeline.errors import Busy
from pipeline.local import running
from pipeline.models import prepare_model
from pipeline.operations import find, parse
from subjects.messages import Frame

pytestmark = [pytest.mark.engine, pytest.mark.full, pytest.mark.timeout(600)]
START_S_MAX = 400.0
PROMPT = tuple(range(1000, 1020))
NEW_TOKENS = 4


async def last(frames: AsyncIterator[Frame]) -> Frame:
    async with asyncio.timeout(START_S_MAX):
        return [frame async for frame in frames][-1]


async def test_the_tokens_of_a_request_are_counted_by_layer_and_expert(tmp_path: Path):
    import torch

    tiny_moe.make(tmp_path / "moe", prepare_model(BUILTIN_MODEL))
    shipped = load_topology("cpu-aggregated")
    workers = tuple(
        msgspec.structs.replace(
            group,
            environment=group.environment | {"SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR": str(tmp_path / "dumps")},
            health=HealthSettings(canary_s=0),  # a canary's token would be counted too
            sglang=group.sglang | ({"expert_distribution_recorder_mode": "stat"} if group.role == "decode" else {}),
        )
        for group in shipped.workers
        if group.role in ("preprocess", "decode")
    )
    settings = msgspec.structs.replace(shipped, workers=workers, model="moe", model_path=str(tmp_path / "moe"))
    async with running(settings, tmp_path / "run") as local:
        await local.start()
        async with asyncio.timeout(START_S_MAX):
            await local.until_ready()
        bus = await Bus.connect(local.url, name="operator")

        async def ask(operation: str) -> dict[str, Any]:
            return (await command(bus, "decode-0", operation, parse(find(operation), {}))).result

        with pytest.raises(Busy, match="it is not being recorded"):
            await ask("stop_expert_distribution")
        assert await ask("start_expert_distribution") == {"recording": True, "mode": "stat"}
        with pytest.raises(Busy, match="it is being recorded"):
            await ask("start_expert_distribution")
        async with Client.connect(local.url) as client:
            frame = await last(client.generate(model="moe", prompt=PROMPT, max_tokens=NEW_TOKENS, ignore_eos=True))
            assert frame.error is None
        assert (await ask("stop_expert_distribution"))["recording"] is False
        (file,) = (await ask("dump_expert_distribution"))["files"]
        counts = torch.load(file, weights_only=True)["logical_count"].sum(dim=0)
        await bus.close()
    forwarded = len(PROMPT) + NEW_TOKENS - 1  # the last token is not fed back
    assert counts.shape == (tiny_moe.LAYERS, tiny_moe.EXPERTS)
    assert counts.sum(dim=1).tolist() == [forwarded * tiny_moe.EXPERTS_A_TOKEN] * tiny_moe.LAYERS
