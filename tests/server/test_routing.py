"""Routing over real processes: prompts go where their prefix is cached, and no death of a worker holds one back."""

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from pipeline.client import Client
from pipeline.config import BUILTIN_MODEL, GroupSettings, RoutingSettings, SimulatedSettings, TopologySettings
from pipeline.local import LocalTopology, command, running
from pipeline.presence import Presence
from subjects.messages import Frame

MODEL = "smollm2"
READY_S_MAX = 60.0
SIMULATED = SimulatedSettings(ttft_ms=5, itl_ms=5, prefill_us_per_token=100, max_running_requests=4)

pytestmark = [pytest.mark.timeout(180), pytest.mark.asyncio(loop_scope="module")]


@dataclass
class Scene:
    local: LocalTopology
    client: Client
    folder: Path
    presence: Presence


def settings() -> TopologySettings:
    return TopologySettings(
        model=MODEL,
        model_path=BUILTIN_MODEL,
        workers=(
            GroupSettings(role="preprocess", routing=RoutingSettings(policy="kv", seed=1)),
            GroupSettings(role="decode", count=2, engine="simulated", simulated=SIMULATED),
        ),
    )


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def scene(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    folder = tmp_path_factory.mktemp("routing")
    async with running(settings(), folder) as local:
        await local.start()
        async with asyncio.timeout(READY_S_MAX):
            await local.until_ready()
        async with Client.connect(local.url) as client:
            presence = Presence(client._bus)
            await presence.start()
            yield Scene(local, client, folder, presence)
            await presence.close()


async def ask(scene: Scene, prompt: list[int], tokens: int = 4) -> Frame:
    """The last frame, once all is well."""
    last = None
    async for frame in scene.client.generate(model=MODEL, prompt=tuple(prompt), max_tokens=tokens, ignore_eos=True):
        assert frame.error is None, frame.error
        last = frame
    return last


def prefix(number: int, tokens: int = 600) -> list[int]:
    return random.Random(number).choices(range(100, 30_000), k=tokens)


async def until_ready(scene: Scene, worker: str) -> None:
    async with asyncio.timeout(READY_S_MAX):
        while not any(state.worker == worker and state.ready for state in scene.presence.workers("decode", MODEL)):
            await asyncio.wait_for(scene.presence._changed.wait(), READY_S_MAX)


async def test_prompts_that_begin_alike_go_where_their_prefix_is_cached(scene: Scene):
    where = {number: (await ask(scene, prefix(number))).worker for number in range(1, 9)}
    assert set(where.values()) == {"decode-0", "decode-1"}
    for turn in range(3):
        for number, worker in where.items():
            frame = await ask(scene, prefix(number) + [7] * 30 * (turn + 1))
            assert frame.worker == worker
            assert frame.usage.cached_tokens >= 590


async def test_a_killed_worker_s_prompts_are_answered_by_the_other(scene: Scene):
    """Those it had, from its checkpoint; those still addressed to it, at once; and those that come later."""
    worker = (await ask(scene, prefix(20))).worker
    victim = next(child for child in scene.local.children if child.name == worker)
    running_ones = [asyncio.create_task(ask(scene, [*prefix(20), i], tokens=60)) for i in range(8)]
    await asyncio.wait(running_ones, timeout=0.1)
    victim.process.kill()
    later = [asyncio.create_task(ask(scene, [*prefix(20), 100 + i])) for i in range(8)]
    async with asyncio.timeout(20):
        frames = await asyncio.gather(*running_ones, *later)
    others = [frame.worker for frame in frames if frame.worker != worker]
    assert others, frames
    assert all(frame.finish_reason == "length" for frame in frames)


async def test_a_worker_that_is_added_gets_work(scene: Scene):
    like = next(child for child in scene.local.children if child.settings.role == "decode").settings
    path = scene.folder / "added.json"
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(like, worker="added")))
    added = msgspec.structs.replace(like, worker="added")
    with (scene.folder / "added.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(*command(added, path), stdout=log, stderr=log)
    try:
        await until_ready(scene, "added")
        async with asyncio.timeout(READY_S_MAX):
            workers: set[str] = set()
            number = 30
            while "added" not in workers:
                frames = await asyncio.gather(*(ask(scene, prefix(number + i, 200)) for i in range(8)))
                workers, number = {frame.worker for frame in frames}, number + 8
        first = next(i for i, frame in enumerate(frames) if frame.worker == "added")
        assert (await ask(scene, prefix(number - 8 + first, 200) + [7] * 30)).worker == "added"
    finally:
        process.terminate()
        await process.wait()
