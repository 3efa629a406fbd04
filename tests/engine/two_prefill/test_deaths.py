"""kill -9 of real engines in the middle of a request: the client sees a pause, and nobody keeps rooms or pages."""

import asyncio
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from disaggregated_topology import (
    ANSWER_S_MAX,
    MODEL,
    READY_S_MAX,
    Disaggregated,
    kill,
    prompts,
    scheduler,
    until,
)

from pipeline.local import Child

pytestmark = [pytest.mark.engine, pytest.mark.timeout(2400), pytest.mark.asyncio(loop_scope="session")]

PROMPT_TOKENS = 200
MAX_TOKENS = 8
ADDED_S_MAX, ADDED_S_MAX_FULL = 30.0, 1.5
"""Seconds that one death may add in any run, far below the 300 s that SGLang waits, and ten at the median."""
SHARE_DONE = 0.3
"""How much of a prompt is computed when its worker is killed; that much is computed twice."""
FIRST_LENGTH = 400  # long enough to be struck in its midst by a late test
KILLS = 1
KILLS_FULL = 10
PREFILL_FREE_S_MAX = 30.0


@dataclass(frozen=True)
class Death:
    """One killed prefill worker. Times in seconds."""

    how: str
    after_s: float  # from the claim to the kill
    unclaimed_s: float  # from the kill until another worker has claimed the prompt
    ttft_s: float

    def row(self, usual_s: float) -> str:
        return (
            f"| {self.how:<13} | {self.after_s:.2f} | {self.unclaimed_s:.2f} | {self.ttft_s:.2f} "
            f"| {self.ttft_s - usual_s:+.2f} |"
        )


async def timed(running: Disaggregated, prompt: list[int]) -> tuple[float, int]:
    """Seconds to the first token, and how many tokens came."""
    began_s, first_s, count = time.monotonic(), 0.0, 0
    async with asyncio.timeout(ANSWER_S_MAX):
        async for frame in running.client.generate(
            model=MODEL, prompt=tuple(prompt), max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True
        ):
            assert frame.error is None, frame.error
            if frame.token_ids and not first_s:
                first_s = time.monotonic() - began_s
            count += len(frame.token_ids)
    return first_s, count


def forget_claims(running: Disaggregated) -> None:
    while not running.claims.empty():
        running.claims.get_nowait()


async def until_restarted(running: Disaggregated, child: Child, restarts: int) -> None:
    async def again() -> bool:
        return child.restarts > restarts

    await until(again, READY_S_MAX)
    await running.until_ready()


async def die_in_prefill(
    running: Disaggregated, prompt: list[int], usual_s: float, how: str, strike: Callable[[Child], None]
) -> Death:
    """Kill the worker that has claimed the prompt, in the middle of it; it is up again at the end."""
    forget_claims(running)
    answer = asyncio.create_task(timed(running, prompt))
    claimed_s, claim = await asyncio.wait_for(running.claims.get(), ANSWER_S_MAX)
    await asyncio.sleep(SHARE_DONE * usual_s)  # no wait for anything: into the forward pass
    (victim,) = [child for child in running.children("prefill") if child.name == claim.worker]
    restarts, struck_s = victim.restarts, time.monotonic()
    strike(victim)
    again = asyncio.create_task(running.claims.get())
    await asyncio.wait({again, answer}, return_when=asyncio.FIRST_COMPLETED)  # the answer has its deadline
    assert again.done(), f"answered with no second claim: killed {struck_s - claimed_s:.2f} s after the first, too late"
    again_s, second = again.result()
    assert second.room != claim.room and second.worker != claim.worker
    ttft_s, count = await answer
    assert count == MAX_TOKENS
    await until_restarted(running, victim, restarts)
    return Death(how, struck_s - claimed_s, again_s - struck_s, ttft_s)


async def deaths_in_prefill(
    running: Disaggregated, count: int, first_length: int, added_s_max: float, capsys: pytest.CaptureFixture[str]
) -> None:
    strikes = (("whole worker", kill), ("its scheduler", lambda child: scheduler(child).kill()))
    asked = prompts(range(first_length, first_length + count + 3))
    usual_s = statistics.median([(await timed(running, prompt))[0] for prompt in asked[:3]])
    added_s = []
    with capsys.disabled():
        print(f"\nprompts of {first_length} tokens, undisturbed TTFT {usual_s:.2f} s")
        print("| killed | s after claim | s until claimed again | TTFT s | added s |\n|---|---|---|---|---|")
        for number, prompt in enumerate(asked[3:]):
            death = await die_in_prefill(running, prompt, usual_s, *strikes[number % 2])
            added_s.append(death.ttft_s - usual_s)
            print(death.row(usual_s), flush=True)
        print(f"median added {statistics.median(added_s):.2f} s", flush=True)
    await running.until_quiet()
    assert statistics.median(added_s) < added_s_max


async def test_a_killed_prefill_worker_costs_a_pause(
    two_prefill: Disaggregated, capsys: pytest.CaptureFixture[str]
) -> None:
    await deaths_in_prefill(two_prefill, KILLS, FIRST_LENGTH, ADDED_S_MAX, capsys)


@pytest.mark.full
async def test_with_no_prefill_worker_up_a_request_waits_for_one(two_prefill: Disaggregated) -> None:
    """The one in mid-prefill, and one that was sent when nobody was there."""
    first, second = prompts([PROMPT_TOKENS + 50, 40])
    forget_claims(two_prefill)
    restarts = [(child, child.restarts) for child in two_prefill.children("prefill")]
    in_prefill = asyncio.create_task(timed(two_prefill, first))
    await asyncio.wait_for(two_prefill.claims.get(), ANSWER_S_MAX)
    for child, _ in restarts:
        kill(child)
    assert two_prefill.claims.empty()
    queued = asyncio.create_task(timed(two_prefill, second))
    assert [count for _, count in await asyncio.gather(in_prefill, queued)] == [MAX_TOKENS, MAX_TOKENS]
    assert any(child.restarts > before for child, before in restarts)
    for child, before in restarts:
        await until_restarted(two_prefill, child, before)
    await two_prefill.until_quiet()


async def decode_dies(running: Disaggregated) -> None:
    """kill -9 of decode with one request in its stream and one in prefill: both answers come whole."""
    streamed, computed = prompts([30, PROMPT_TOKENS + 60])
    wanted = [await running.ask(prompt, 24, ignore_eos=True) for prompt in (streamed, computed)]
    tokens: list[int] = []
    flowing = asyncio.Event()

    async def stream() -> None:
        asked = {"prompt": tuple(streamed), "max_tokens": 24, "temperature": 0.0, "ignore_eos": True}
        async for frame in running.client.generate(model=MODEL, **asked):
            assert frame.error is None, frame.error
            tokens.extend(frame.token_ids.tolist())
            owner.append(frame.worker) if frame.worker else None
            if len(tokens) >= 3:
                flowing.set()

    owner: list[str] = []
    streaming = asyncio.create_task(stream())
    await asyncio.wait_for(flowing.wait(), ANSWER_S_MAX)
    forget_claims(running)
    computing = asyncio.create_task(running.ask(computed, 24, ignore_eos=True))
    await asyncio.wait_for(running.claims.get(), ANSWER_S_MAX)
    (victim,) = [child for child in running.children("decode") if child.name == owner[0]]
    restarts = victim.restarts
    kill(victim)
    killed_s = time.monotonic()

    async def held_by_prefill() -> list[str]:
        return [line for child in running.children("prefill") for line in await running.held(child)]

    async def prefill_is_free() -> bool:
        return not await held_by_prefill()

    await asyncio.gather(streaming, computing)
    assert [tokens, computing.result()] == wanted
    await until_restarted(running, victim, restarts)
    await until(prefill_is_free, PREFILL_FREE_S_MAX, held_by_prefill)
    print(f"both answers were whole {time.monotonic() - killed_s:.1f} s after the kill")
    await running.until_quiet()


async def test_a_killed_decode_worker_leaves_nothing_in_prefill(two_prefill: Disaggregated) -> None:
    await decode_dies(two_prefill)


@pytest.mark.full
async def test_ten_killed_prefill_workers(two_prefill: Disaggregated, capsys: pytest.CaptureFixture[str]) -> None:
    await deaths_in_prefill(two_prefill, KILLS_FULL, PROMPT_TOKENS, ADDED_S_MAX_FULL, capsys)
