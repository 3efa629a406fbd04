"""Fifty prompts through every ratio of prefill to decode workers: the tokens are those of SGLang alone."""

from pathlib import Path

import pytest
import pytest_asyncio
from disaggregated_topology import FLOAT32, prompts, reference, started, topology

pytestmark = [
    pytest.mark.full,
    pytest.mark.engine,
    pytest.mark.timeout(1800),
    pytest.mark.asyncio(loop_scope="module"),
]

MAX_TOKENS = 8
AT_ONCE = 16
LENGTHS = (1, 2, 3, 5, 9, 16, 17, 19, 21, 31, 47, 65, 90, 127, 150, 200, 600, 1000, 1500, *range(4, 132, 4))
"""Of prompts, in tokens: around SGLang's own steps, and some of several chunks of prefill."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def expected() -> list[list[int]]:
    return await reference(prompts(sorted(set(LENGTHS))), MAX_TOKENS)


@pytest.mark.parametrize(("prefill", "decode"), [(1, 1), (2, 1), (1, 2)])
async def test_fifty_prompts_in_every_ratio(
    expected: list[list[int]], prefill: int, decode: int, tmp_path: Path
) -> None:
    asked = prompts(sorted(set(LENGTHS)))
    assert len(asked) == len(expected) == 50
    async with started(topology(prefill, decode, **FLOAT32), tmp_path) as running:
        assert [await running.ask(prompt, MAX_TOKENS) for prompt in asked] == expected
        assert await running.ask_at_once(asked, MAX_TOKENS, AT_ONCE) == expected
        await running.until_quiet()
