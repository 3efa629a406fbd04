"""A whole topology of simulated engines under load and faults: nothing accepted is lost, doubled or mixed up.

The seed is printed; `SGLANG_NATS_CHAOS_SEED` repeats a run's faults and requests (not their timing).
"""

import os
import time
from pathlib import Path

import pytest
from chaos import run_chaos

SHORT_S = 45.0
LONG_S = 300.0
LONG_REQUESTS = 20_000


def seed() -> int:
    return int(os.environ.get("SGLANG_NATS_CHAOS_SEED") or time.time_ns() % 1_000_000)


async def strike(folder: Path, capsys: pytest.CaptureFixture[str], seconds: float, requests: int) -> None:
    drawn = seed()
    with capsys.disabled():
        print(f"\nchaos seed {drawn}", flush=True)
    outcome = await run_chaos(folder, seed=drawn, seconds=seconds, requests=requests)
    with capsys.disabled():
        print(outcome.report())
    assert not outcome.wrong
    assert not outcome.results.errors, "no fault here needs an error for an answer"
    assert outcome.results.whole >= requests


@pytest.mark.timeout(280)
async def test_nothing_is_lost_doubled_or_mixed_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    await strike(tmp_path, capsys, SHORT_S, 500)


@pytest.mark.full
@pytest.mark.timeout(1200)
async def test_nor_in_five_minutes_and_twenty_thousand_requests(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await strike(tmp_path, capsys, LONG_S, LONG_REQUESTS)
