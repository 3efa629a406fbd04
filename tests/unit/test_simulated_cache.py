"""The simulated engine's prefix cache: what stays, what goes, what it says, and what it saves."""

import asyncio

from pipeline.config import SimulatedSettings
from pipeline.engine.protocol import EngineOutput, EngineRequest
from pipeline.engine.simulated import SimulatedEngine, expected_tokens
from pipeline.engine.simulated_cache import PrefixCache
from subjects.codec import BlockHashes, TokenIds
from subjects.messages import BlocksCleared, BlocksRemoved, BlocksStored, OutputOptions, StopConditions

DEADLINE_S = 10.0


def stored(*hashes: int, parent: int | None = None) -> BlocksStored:
    return BlocksStored(hashes=BlockHashes.of(hashes), parent=parent)


def test_only_new_blocks_are_announced_with_their_parent():
    cache = PrefixCache(10)
    assert cache.keep([1, 2]) == [stored(1, 2)]
    assert cache.keep([1, 2, 3]) == [stored(3, parent=2)]
    assert cache.keep([1, 2, 3]) == []
    assert (cache.held([1, 2, 9]), cache.held([9, 1])) == (2, 0)


def test_the_least_recently_used_goes_and_children_before_parents():
    cache = PrefixCache(4)
    cache.keep([1, 2])
    cache.keep([11, 12])
    cache.keep([1, 2])
    assert cache.keep([21]) == [BlocksRemoved(hashes=BlockHashes.of([12])), stored(21)]
    assert cache.keep([1, 2, 3, 4]) == [BlocksRemoved(hashes=BlockHashes.of([11, 21])), stored(3, 4, parent=2)]


def test_a_sequence_longer_than_the_cache_keeps_its_beginning():
    cache = PrefixCache(2)
    assert cache.keep([1, 2, 3]) == [stored(1, 2)]


def test_a_cleared_cache_holds_nothing():
    cache = PrefixCache(2)
    cache.keep([1, 2])
    assert cache.clear() == [BlocksCleared()]
    assert cache.held([1]) == 0


async def last_output(engine: SimulatedEngine, prompt: TokenIds, rid: str, stream: bool = True) -> EngineOutput:
    request = EngineRequest(
        rid=rid, token_ids=prompt, stop=StopConditions(max_tokens=20), output=OutputOptions(stream=stream)
    )
    async with asyncio.timeout(DEADLINE_S):
        return [output async for output in engine.generate(request)][-1]


async def test_a_prompt_finds_the_blocks_of_an_earlier_one_and_of_its_output():
    engine = SimulatedEngine(SimulatedSettings(ttft_ms=0, itl_ms=0, kv_block_tokens=8))
    prompt = TokenIds.of(range(100, 136))
    assert (await last_output(engine, prompt, "a")).cached_tokens == 0
    assert (await last_output(engine, prompt, "b", stream=False)).cached_tokens == 32
    # These 32 tokens are four blocks, but the last token has to be computed.
    assert (await last_output(engine, prompt[:32], "c")).cached_tokens == 24
    turn = prompt + expected_tokens(prompt, 20) + TokenIds.of([7, 8, 9])
    assert (
        await last_output(engine, turn, "c")
    ).cached_tokens == 48  # 51 of 52: the last token's KV was never computed


async def test_what_is_cached_need_not_be_prefilled_and_prompts_are_prefilled_in_turn():
    engine = SimulatedEngine(SimulatedSettings(ttft_ms=0, itl_ms=0, kv_block_tokens=8, prefill_us_per_token=1000))
    loop, first, other = asyncio.get_running_loop(), TokenIds.of(range(100, 181)), TokenIds.of(range(300, 381))
    before_s = loop.time()
    await asyncio.gather(last_output(engine, first, "a"), last_output(engine, other, "b"))
    cold_s = loop.time() - before_s
    assert cold_s >= 0.162
    before_s = loop.time()
    assert (await last_output(engine, first, "c")).cached_tokens == 80
    assert loop.time() - before_s < cold_s / 2
