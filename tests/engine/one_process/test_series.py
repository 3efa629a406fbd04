"""SGLang's own figures outside its processes: its load moves, and its Prometheus series keep their names."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from pipeline.engine.protocol import EngineRequest
from subjects.codec import encode
from subjects.limits import HEARTBEAT_S, PAYLOAD_BYTES_MAX
from subjects.messages import Load, MetricsSnapshot, SamplingOptions, StopConditions

if TYPE_CHECKING:
    from tests.engine.one_process.conftest import StartedEngine

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]
DEADLINE_S = 60.0
SCHEDULER = "scheduler dp0 pp0 tp0"


@asynccontextmanager
async def under_load(sglang: StartedEngine, requests: int, max_tokens: int) -> AsyncIterator[None]:
    """More requests than the engine runs at once, cut off at the end of the block."""

    def wanted(number: int) -> EngineRequest:
        return EngineRequest(
            rid=f"series.{number}",
            token_ids=sglang.tokens(f"Request {number}: " + "a prompt of some length, " * 10),
            stop=StopConditions(max_tokens=max_tokens, ignore_eos=True),
            sampling=SamplingOptions(temperature=0.0),
        )

    running = [asyncio.create_task(sglang.run(wanted(number))) for number in range(requests)]
    try:
        yield
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def until(sglang: StartedEngine, holds: Callable[[Load], bool]) -> Load:
    async with asyncio.timeout(DEADLINE_S):
        while not holds(load := await sglang.engine.load()):  # noqa: ASYNC110
            await asyncio.sleep(0.05)  # SGLang writes its state at every step and offers no event
    return load


def value(sglang: StartedEngine, name: str, process: str = SCHEDULER, **labels: str) -> float | None:
    """The sum of a series' samples with these labels."""
    samples = [
        sample.value
        for family in sglang.engine.series().get(process, ())
        for sample in family.samples
        if sample.name == name and sample.labels.items() >= labels.items()
    ]
    return sum(samples) if samples else None


async def until_value(sglang: StartedEngine, name: str, holds: Callable[[float], bool], **labels: str) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while (now := value(sglang, name, **labels)) is None or not holds(now):  # noqa: ASYNC110
            await asyncio.sleep(HEARTBEAT_S / 4)


async def test_an_engine_at_work_says_so_and_says_when_it_is_idle_again(sglang: StartedEngine):
    slots = sglang.settings["max_running_requests"]
    await until(sglang, lambda load: not load.running)
    async with under_load(sglang, requests=slots + 4, max_tokens=400):
        load = await until(sglang, lambda load: load.running == slots and load.waiting > 0)
        assert 0 < load.waiting <= 4
        assert 0 < load.kv_tokens_used < load.kv_tokens == sglang.settings["max_total_tokens"]
        assert load.waiting_prefill_tokens > 0
        await until(sglang, lambda load: load.generated_tokens_per_s > 1)
        await until_value(sglang, "sglang:num_running_reqs", lambda running: running == slots)
        await until_value(sglang, "sglang:num_queue_reqs", lambda queued: 0 < queued <= 4)
        await until_value(sglang, "sglang:gen_throughput", lambda rate: rate > 1)
        await until_value(sglang, "sglang:token_usage", lambda share: 0 < share <= 1)
    load = await until(sglang, lambda load: not load.running and not load.waiting and not load.kv_tokens_used)
    assert load.waiting_prefill_tokens == 0
    await until(sglang, lambda load: load.generated_tokens_per_s == 0)
    await until_value(sglang, "sglang:num_running_reqs", lambda running: running == 0)
    await until_value(sglang, "sglang:num_queue_reqs", lambda queued: queued == 0)


async def test_cached_prompts_show(sglang: StartedEngine):
    prompt = sglang.tokens("A prompt that is sent twice for its cached tokens to be counted: " * 8)
    request = EngineRequest(rid="series.cached.1", token_ids=prompt, stop=StopConditions(max_tokens=2))
    again = EngineRequest(rid="series.cached.2", token_ids=prompt, stop=StopConditions(max_tokens=2))
    before = value(sglang, "sglang:cached_tokens_total", process="tokenizer") or 0.0
    cached = [(await sglang.run(one))[-1].cached_tokens for one in (request, again)][1]
    assert cached > 0
    assert (value(sglang, "sglang:cached_tokens_total", process="tokenizer") or 0.0) - before >= cached
    await until(sglang, lambda load: load.cached_share > 0.5)
    await until_value(sglang, "sglang:cache_hit_rate", lambda share: share > 0.5)


async def test_requests_are_timed_under_sglangs_own_names(sglang: StartedEngine):
    prompt = sglang.tokens("Once upon a time")
    request = EngineRequest(rid="series.timed", token_ids=prompt, stop=StopConditions(max_tokens=4, ignore_eos=True))
    names = [
        "sglang:time_to_first_token_seconds_count",
        "sglang:inter_token_latency_seconds_count",
        "sglang:e2e_request_latency_seconds_count",
    ]
    before = [value(sglang, name, process="tokenizer") or 0.0 for name in names]
    await sglang.run(request)
    after = [value(sglang, name, process="tokenizer") or 0.0 for name in names]
    grown = [end - start for start, end in zip(before, after, strict=True)]
    assert grown[0] == 1 and grown[2] == 1
    assert 0 < grown[1] <= 3


async def test_the_series_leave_without_a_file_and_fit_their_subject(sglang: StartedEngine):
    await until_value(sglang, "sglang:max_total_num_tokens", lambda tokens: tokens > 0)
    assert "PROMETHEUS_MULTIPROC_DIR" not in os.environ
    series = sglang.engine.series()
    assert set(series) == {SCHEDULER, "detokenizer", "tokenizer"}
    wanted = {"num_retracted_reqs", "spec_accept_length", "kv_evictable_tokens", "queue_time_seconds"}
    assert {f"sglang:{name}" for name in wanted} <= {family.name for family in series[SCHEDULER]}
    for process, families in series.items():
        payload = encode(MetricsSnapshot(worker="w", role="decode", process=process, families=families))
        assert len(payload) < PAYLOAD_BYTES_MAX / 2
