"""Prefill workers over real processes: prompts go where their prefix is cached, and none waits for a lost worker."""

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import pytest_asyncio

from pipeline.client import Client
from pipeline.config import BUILTIN_MODEL, GroupSettings, SimulatedSettings, TopologySettings
from pipeline.local import Child, LocalTopology, running
from subjects.limits import LEASE_S
from subjects.messages import Frame

MODEL = "smollm2"
READY_S_MAX = 60.0
PREFILL = SimulatedSettings(disaggregation="prefill", ttft_ms=5, prefill_us_per_token=100, max_running_requests=4)
DECODE = SimulatedSettings(disaggregation="decode", itl_ms=5, max_running_requests=16)

pytestmark = [pytest.mark.timeout(180), pytest.mark.asyncio(loop_scope="module")]


@dataclass
class Scene:
    local: LocalTopology
    client: Client

    def child(self, name: str) -> Child:
        return next(child for child in self.local.children if child.name == name)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def scene(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    settings = TopologySettings(
        model=MODEL,
        model_path=BUILTIN_MODEL,
        workers=(
            GroupSettings(role="preprocess"),
            GroupSettings(role="prefill", count=2, engine="simulated", simulated=PREFILL),
            GroupSettings(role="decode", engine="simulated", simulated=DECODE),
        ),
    )
    async with running(settings, tmp_path_factory.mktemp("prefill_routing")) as local:
        await local.start()
        async with asyncio.timeout(READY_S_MAX):
            await local.until_ready()
        async with Client.connect(local.url) as client:
            yield Scene(local, client)


async def ask(scene: Scene, prompt: list[int]) -> str:
    """Who prefilled it, once all is well."""
    last: Frame | None = None
    async for frame in scene.client.generate(model=MODEL, prompt=tuple(prompt), max_tokens=2, ignore_eos=True):
        assert frame.error is None, frame.error
        last = frame
    assert last is not None and last.finish_reason == "length" and last.timing and last.timing.prefill_worker
    return last.timing.prefill_worker


def prefix(number: int, tokens: int = 600) -> list[int]:
    return random.Random(number).choices(range(100, 30_000), k=tokens)


async def test_prompts_that_begin_alike_are_prefilled_where_their_prefix_is_cached(scene: Scene):
    where = {number: await ask(scene, prefix(number)) for number in range(1, 9)}
    assert set(where.values()) == {"prefill-0", "prefill-1"}
    for turn in range(3):
        # In an order of its own each time: idle workers that share a queue are served in turn.
        for number in random.Random(turn).sample(sorted(where), len(where)):
            assert await ask(scene, prefix(number) + [7] * 30 * (turn + 1)) == where[number]


async def test_a_busy_worker_s_prompts_are_prefilled_by_the_other(scene: Scene):
    """Twice as many prompts with one prefix as the worker that has it can take: more than one takes them."""
    worker = await ask(scene, prefix(20))
    async with asyncio.timeout(20):
        found = await asyncio.gather(*(ask(scene, [*prefix(20), number] * 2) for number in range(16)))
    assert {worker} < set(found)


async def test_a_frozen_worker_costs_a_lease_at_most(scene: Scene):
    worker = await ask(scene, prefix(30))
    process = scene.child(worker).process
    assert process
    os.kill(process.pid, signal.SIGSTOP)
    try:
        began_s = time.monotonic()
        assert await ask(scene, [*prefix(30), 7]) != worker
        print(f"a frozen prefill worker cost {time.monotonic() - began_s:.1f} s")
        assert time.monotonic() - began_s < LEASE_S + 4
    finally:
        os.kill(process.pid, signal.SIGCONT)


async def test_a_killed_worker_s_prompts_are_prefilled_by_the_other(scene: Scene):
    """Those that it has, and those that are still offered to it."""
    worker = await ask(scene, prefix(40))
    process = scene.child(worker).process
    assert process
    running_ones = [asyncio.create_task(ask(scene, [*prefix(40), number])) for number in range(8)]
    await asyncio.wait(running_ones, timeout=0.02)
    process.kill()
    began_s = time.monotonic()
    later = [asyncio.create_task(ask(scene, [*prefix(40), 100 + number])) for number in range(8)]
    async with asyncio.timeout(20):
        found = await asyncio.gather(*running_ones, *later)
    print(f"a killed prefill worker cost {time.monotonic() - began_s:.1f} s")
    assert worker not in found[len(running_ones) :]
