"""Prefill and decode engines apart: each proves by itself that it works, and a stopped prefill engine is noticed."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator

import msgspec
import pytest
import pytest_asyncio
from disaggregated_topology import Disaggregated, prompts, scheduler, started, topology, until

from pipeline.bus import Received
from pipeline.config import HealthSettings
from subjects import names
from subjects.codec import decode
from subjects.messages import MetricsSnapshot

pytestmark = [pytest.mark.full, pytest.mark.engine, pytest.mark.timeout(900), pytest.mark.asyncio(loop_scope="module")]

CANARIES = 3
WAIT_S = 60.0
NOTICED_S_MAX = 5.0


class Counts:
    """The canaries of every worker that has an engine, by outcome, as their metrics tell."""

    def __init__(self) -> None:
        self.by_worker: dict[str, dict[str, float]] = {}

    def hear(self, received: Received) -> None:
        snapshot = decode(MetricsSnapshot, received.payload)
        self.by_worker.setdefault(snapshot.worker, {}).update(
            (sample.labels["outcome"], sample.value)
            for family in snapshot.families
            for sample in family.samples
            if sample.name == "sglang_nats_canaries_total"
        )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def serving(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Disaggregated]:
    shipped = topology(1, 1)
    groups = tuple(msgspec.structs.replace(group, health=HealthSettings(canary_s=1.0)) for group in shipped.workers)
    async with started(msgspec.structs.replace(shipped, workers=groups), tmp_path_factory.mktemp("health")) as made:
        yield made


async def test_both_engines_answer_their_canaries_and_keep_nothing_of_them(serving: Disaggregated):
    counts = Counts()
    await serving.bus.subscribe(names.METRICS.any(), counts.hear)

    async def enough() -> bool:
        answered = (counts.by_worker.get(name, {}).get("answered", 0) for name in ("prefill-0", "decode-0"))
        return all(number >= CANARIES for number in answered)

    async def seen() -> object:
        return counts.by_worker

    await until(enough, WAIT_S, seen)
    assert all(set(outcomes) <= {"answered"} for outcomes in counts.by_worker.values())
    assert len(await serving.ask(prompts([40])[0])) == 8
    await serving.until_quiet()


async def test_a_stopped_prefill_engine_is_noticed_and_comes_back(serving: Disaggregated):
    stopped = scheduler(serving.children("prefill")[0]).pid

    def prefill_takes_work(yes: bool):
        async def holds() -> bool:
            return serving.beats["prefill-0"].ready is yes

        return holds

    os.kill(stopped, signal.SIGSTOP)
    try:
        began_s = time.monotonic()
        await until(prefill_takes_work(False), WAIT_S)
        assert time.monotonic() - began_s < NOTICED_S_MAX
        assert "engine_wedged" in serving.beats["prefill-0"].unhealthy
        asking = asyncio.create_task(serving.ask(prompts([50])[0]))
        await asyncio.wait({asking}, timeout=1.0)
        assert not asking.done()
    finally:
        os.kill(stopped, signal.SIGCONT)
    await until(prefill_takes_work(True), WAIT_S)
    assert len(await asking) == 8
    await serving.until_quiet()
