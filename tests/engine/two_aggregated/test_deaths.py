"""The faults of the chaos run once each on real engines: every answer is the one that nobody's death interrupted."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable

import pytest
import pytest_asyncio
from aggregated_topology import Aggregated, Answer

from subjects.limits import LEASE_S

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200), pytest.mark.asyncio(loop_scope="session")]

PROMPTS = (
    "The capital of France is",
    "Once upon a time",
    "def fibonacci(n):",
    "Water boils at",
    "The seven days of the week are",
    "In the beginning",
)
TOKENS = 40
STRUCK_AT_TOKEN = 8
AWAY_S = LEASE_S + 2.0

Strike = Callable[[Aggregated, str], Awaitable[None]]


async def ask_all(running: Aggregated, name: str, strike: Strike | None) -> list[Answer]:
    """Ask every prompt at once; strike the first one's owner in mid-answer."""
    striking: list[asyncio.Task[None]] = []

    def strike_once(answer: Answer) -> None:
        if strike and not striking and len(answer.tokens) >= STRUCK_AT_TOKEN:
            striking.append(asyncio.create_task(strike(running, answer.workers[0])))

    async with asyncio.TaskGroup() as group:
        asking = [
            group.create_task(
                running.ask(
                    prompt,
                    TOKENS,
                    strike_once if number == 0 else lambda _: None,
                    ignore_eos=True,
                    request_id=f"{name}-{number}",
                )
            )
            for number, prompt in enumerate(PROMPTS)
        ]
    await asyncio.gather(*striking)
    assert len(striking) == (strike is not None)
    return [task.result() for task in asking]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def undisturbed(two_engines: Aggregated) -> list[Answer]:
    return await ask_all(two_engines, "undisturbed", None)


def process_group(running: Aggregated, worker: str) -> int:
    process = running.child(worker).process
    assert process
    return process.pid  # each child leads a group of its own, its engine's processes among it


async def kill(running: Aggregated, worker: str) -> None:
    os.killpg(process_group(running, worker), signal.SIGKILL)


async def freeze(running: Aggregated, worker: str) -> None:
    group = process_group(running, worker)
    os.killpg(group, signal.SIGSTOP)
    await asyncio.sleep(AWAY_S)
    os.killpg(group, signal.SIGCONT)


async def drain(running: Aggregated, worker: str) -> None:
    os.kill(process_group(running, worker), signal.SIGTERM)


async def part(running: Aggregated, worker: str) -> None:
    await running.proxy.part(worker, AWAY_S)


async def restart_broker(running: Aggregated, worker: str) -> None:
    running.server.kill()
    running.server.start()  # on this thread: the broker dies with the thread that started it


CASES = [
    pytest.param(kill, True, id="killed"),
    pytest.param(freeze, True, id="frozen", marks=pytest.mark.full),
    pytest.param(part, True, id="parted", marks=pytest.mark.full),
    pytest.param(drain, False, id="drained", marks=pytest.mark.full),
    pytest.param(restart_broker, False, id="broker restarted"),
]


@pytest.mark.parametrize(("strike", "moves"), CASES)
async def test_the_answers_are_as_if_nothing_had_happened(
    two_engines: Aggregated,
    undisturbed: list[Answer],
    strike: Strike,
    moves: bool,
) -> None:
    """`moves`: the struck owner's answer is another worker's at its end."""
    await two_engines.until_ready()
    answers = await ask_all(two_engines, strike.__name__, strike)
    for answer, expected in zip(answers, undisturbed, strict=True):
        assert answer.tokens == expected.tokens
        assert answer.text == expected.text
        assert answer.ends == ["length"]
        assert answer.completion_tokens == TOKENS
    assert (len(answers[0].workers) > 1) == moves
    assert await two_engines.ends_in_log(strike.__name__) == {
        f"{strike.__name__}-{number}": 1 for number in range(len(PROMPTS))
    }
