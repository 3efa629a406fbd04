"""The simulated engine: foretold tokens, stop conditions, pace, limits, cancellation."""

import asyncio
import doctest
from dataclasses import replace

import pytest
import uvloop

from pipeline.config import SimulatedSettings
from pipeline.engine import simulated
from pipeline.engine.protocol import EngineOutput, EngineRequest
from pipeline.engine.simulated import (
    EOS_TOKEN,
    History,
    SimulatedEngine,
    expected_token,
    expected_tokens,
    text_of,
)
from pipeline.errors import EngineDied, InvalidRequest
from subjects.codec import TokenIds
from subjects.messages import OutputOptions, SamplingOptions, StopConditions

PROMPT = TokenIds.of([5, 6, 7])
DEADLINE_S = 5.0


def fast(**changes: float) -> SimulatedEngine:
    return SimulatedEngine(SimulatedSettings(**({"ttft_ms": 1, "itl_ms": 0.5} | changes)))


def request(max_tokens: int = 20, rid: str = "r", **stop: object) -> EngineRequest:
    return EngineRequest(rid=rid, token_ids=PROMPT, stop=StopConditions(max_tokens=max_tokens, **stop))


async def run(engine: SimulatedEngine, wanted: EngineRequest) -> list[EngineOutput]:
    async with asyncio.timeout(DEADLINE_S):
        return [output async for output in engine.generate(wanted)]


def tokens_of(outputs: list[EngineOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def text(outputs: list[EngineOutput]) -> str:
    return "".join(output.text for output in outputs)


async def test_tokens_are_foretold_and_only_the_last_output_finishes():
    outputs = await run(fast(seed=3), request(20))
    assert tokens_of(outputs) == expected_tokens(PROMPT, 20, seed=3).tolist()
    assert [output.finish_reason for output in outputs] == [None] * (len(outputs) - 1) + ["length"]
    assert text(outputs) == "".join(text_of(token) for token in tokens_of(outputs))


async def test_another_seed_or_prompt_gives_other_tokens():
    base = expected_tokens(PROMPT, 8)
    assert base != expected_tokens(PROMPT, 8, seed=1)
    assert base != expected_tokens(TokenIds.of([5, 6, 8]), 8)
    seeded = replace(request(8), sampling=SamplingOptions(seed=9))
    assert tokens_of(await run(fast(), seeded)) == expected_tokens(PROMPT, 8, seed=9).tolist()


@pytest.mark.parametrize("emitted", [0, 1, 7, 19])
async def test_a_resumed_request_goes_on_identically(emitted: int):
    whole = tokens_of(await run(fast(eos_after_tokens=10, seed=4), request(20)))
    emitted = min(emitted, len(whole) - 1)
    resumed = replace(request(20 - emitted), token_ids=PROMPT + TokenIds.of(whole[:emitted]))
    assert tokens_of(await run(fast(eos_after_tokens=10, seed=4), resumed)) == whole[emitted:]


async def test_the_next_token_follows_from_the_history_alone():
    tokens = expected_tokens(PROMPT, 5)
    assert [expected_token(PROMPT + tokens[:i]) for i in range(5)] == tokens.tolist()


async def test_without_streaming_there_is_one_output():
    wanted = replace(request(20), output=OutputOptions(stream=False, logprobs=True, top_logprobs=2))
    (only,) = await run(fast(), wanted)
    assert only.token_ids == expected_tokens(PROMPT, 20)
    assert only.finish_reason == "length"
    assert [position.chosen.token_id for position in only.logprobs] == only.token_ids.tolist()
    assert {len(position.top) for position in only.logprobs} == {2}


def prompt_with_early_end(after: int) -> TokenIds:
    """A prompt whose output ends by itself within `after` tokens."""
    for first in range(10_000):
        prompt = TokenIds.of([first])
        history = History(prompt, 0, 5)
        for _ in range(after):
            if (token := history.next()) == EOS_TOKEN:
                return prompt
            history.append(token)
    raise AssertionError("no such prompt")


async def test_the_end_token_ends_the_output_unless_ignored_or_too_early():
    prompt = prompt_with_early_end(4)
    wanted = replace(request(20), token_ids=prompt)
    outputs = await run(fast(eos_after_tokens=5), wanted)
    assert (outputs[-1].finish_reason, outputs[-1].matched_stop) == ("stop", EOS_TOKEN)
    assert tokens_of(outputs)[-1] == EOS_TOKEN and len(tokens_of(outputs)) <= 4
    ignoring = replace(wanted, stop=StopConditions(max_tokens=20, ignore_eos=True))
    assert len(tokens_of(await run(fast(eos_after_tokens=5), ignoring))) == 20
    late = replace(wanted, stop=StopConditions(max_tokens=20, min_tokens=20))
    assert len(tokens_of(await run(fast(eos_after_tokens=5), late))) == 20


async def test_a_stop_token_ends_the_output():
    third = expected_tokens(PROMPT, 3).tolist()[2]
    outputs = await run(fast(), request(20, stop_token_ids=(third,)))
    assert tokens_of(outputs) == expected_tokens(PROMPT, 3).tolist()
    assert (outputs[-1].finish_reason, outputs[-1].matched_stop) == ("stop", third)
    assert not text(outputs).endswith(text_of(third))


@pytest.mark.parametrize("kept", [False, True])
async def test_a_stop_string_across_tokens_is_cut_off(kept: bool):
    a, b, c = (text_of(token) for token in expected_tokens(PROMPT, 3))
    stop = b[-2:] + c[:2]
    wanted = replace(request(20, stop=("never", stop)), output=OutputOptions(no_stop_trim=kept))
    outputs = await run(fast(), wanted)
    assert text(outputs) == a + b[:-2] + (stop if kept else "")
    assert (outputs[-1].finish_reason, outputs[-1].matched_stop) == ("stop", stop)
    assert len(tokens_of(outputs)) == 3


async def test_places_are_limited_and_waiting_is_counted():
    engine = fast(max_running_requests=2, itl_ms=1000)
    streams = [engine.generate(request(rid=f"r{i}")) for i in range(2)]
    for stream in streams:
        await asyncio.wait_for(anext(stream), DEADLINE_S)
    third = asyncio.ensure_future(anext(engine.generate(request(rid="r2"))))
    await asyncio.sleep(0)
    load = await engine.load()
    assert (load.running, load.waiting) == (2, 1)
    assert load.kv_tokens_used == 2 * (len(PROMPT) + 1)
    await streams[0].aclose()
    assert (await asyncio.wait_for(third, DEADLINE_S)).token_ids == expected_tokens(PROMPT, 1)
    await engine.close()


async def test_cancelling_the_reader_frees_its_place():
    engine = fast(max_running_requests=1, itl_ms=1000)
    first = asyncio.Event()

    async def read() -> None:
        async for _ in engine.generate(request()):
            first.set()

    reader = asyncio.create_task(read())
    await asyncio.wait_for(first.wait(), DEADLINE_S)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    load = await engine.load()
    assert (load.running, load.waiting, load.kv_tokens_used) == (0, 0, 0)


async def test_closing_fails_what_runs_and_what_comes():
    engine = fast(itl_ms=1000)
    stream = engine.generate(request())
    await asyncio.wait_for(anext(stream), DEADLINE_S)
    await engine.close()
    await engine.close()
    with pytest.raises(EngineDied):
        await asyncio.wait_for(anext(stream), DEADLINE_S)
    with pytest.raises(EngineDied):
        await run(engine, request(rid="later"))


async def test_what_cannot_be_done_is_refused_by_name():
    engine = fast(context_len_tokens=16)
    with pytest.raises(InvalidRequest) as refused:
        await run(engine, request(14))
    assert (refused.value.field, refused.value.size, refused.value.limit) == ("max_tokens", 17, 16)
    with pytest.raises(InvalidRequest) as refused:
        await run(engine, replace(request(4), sampling=SamplingOptions(regex="a+")))
    assert refused.value.field == "regex"


async def test_the_pace_is_kept():
    engine = SimulatedEngine(SimulatedSettings(ttft_ms=50, itl_ms=10))
    loop = asyncio.get_running_loop()
    start = loop.time()
    arrivals = [(loop.time() - start, len(output.token_ids)) async for output in engine.generate(request(11))]
    assert arrivals[0][0] >= 0.050
    # No upper bound: a busy machine may be late. Never early: token i is due at 50 + 10 i ms.
    count = 0
    for at_s, tokens in arrivals:
        count += tokens
        assert at_s >= 0.050 + (count - 1) * 0.010 - 1e-6


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_many_requests_at_once_are_all_whole(loop):
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(many_requests_at_once())


async def many_requests_at_once() -> None:
    engine = fast(max_running_requests=50)
    wanted = [replace(request(30, rid=f"r{i}"), token_ids=TokenIds.of([i])) for i in range(200)]
    results = await asyncio.gather(*(run(engine, one) for one in wanted))
    for one, outputs in zip(wanted, results, strict=True):
        assert tokens_of(outputs) == expected_tokens(one.token_ids, 30).tolist()
    load = await engine.load()
    assert (load.running, load.waiting, load.kv_tokens_used) == (0, 0, 0)


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(simulated).failed == 0
