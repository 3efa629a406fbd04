"""What is asked, and when: the whole load of a run, made before its clock starts. Pure but for reading a trace."""

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from pipeline.bench import traces
from pipeline.bench.prompts import Prompt, Synthetic
from pipeline.bench.result import Settings
from pipeline.errors import ConfigError

PROMPT_UNITS_MAX: Final = 50_000_000
"""Of all prompts together: they are held in memory."""
OUTPUT_TOKENS_MAX: Final = 10_000_000
"""Of all answers together: the time of each piece is held in memory."""


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """One request that is to be sent."""

    index: int
    prompt: Prompt
    output_tokens: int
    due_s: float | None = None  # since the run's start; None: as soon as another one has ended


def due_times(settings: Settings) -> Iterator[float]:
    """When requests are due in an open loop, in seconds since its start, without end; the same for the same seed.

    Poisson: gaps are drawn from an exponential distribution. The first request is due after the first gap.
    """
    assert settings.rate_per_s is not None
    if settings.arrivals == "fixed":
        yield from (number / settings.rate_per_s for number in itertools.count())
    drawn, at_s = random.Random(f"{settings.seed}/arrivals"), 0.0
    while True:
        at_s += drawn.expovariate(settings.rate_per_s)
        yield at_s


def plan(settings: Settings, trace: Path | None = None) -> list[Work]:
    """Every request of a run. Raises ConfigError where they are too much to hold, or the trace is wrong."""
    if settings.arrivals == "trace":
        assert trace is not None
        return _of_trace(settings, trace)
    made = Synthetic(settings, "run")
    lengths = [made.lengths(index) for index in range(settings.requests)]
    _check_size(lengths)
    dues: Iterator[float | None] = itertools.repeat(None) if settings.arrivals == "closed" else due_times(settings)
    timed = itertools.takewhile(lambda due_s: due_s is None or due_s <= settings.issue_s_max, dues)
    return [
        Work(index=index, prompt=made.prompt(index, length), output_tokens=output, due_s=due_s)
        for index, ((length, output), due_s) in enumerate(zip(lengths, timed, strict=False))
    ]


def warmup(settings: Settings) -> list[Work]:
    """Requests of the same lengths that share no prefix with the measured ones."""
    made = Synthetic(settings, "warmup")
    lengths = [made.lengths(index) for index in range(settings.warmup)]
    return [
        Work(index=index, prompt=made.prompt(index, length), output_tokens=output)
        for index, (length, output) in enumerate(lengths)
    ]


def _of_trace(settings: Settings, path: Path) -> list[Work]:
    traced = traces.read(path, settings.requests)
    timed = [(one, one.timestamp / 1e3 / settings.speedup) for one in traced]
    timed = [(one, due_s) for one, due_s in timed if due_s <= settings.issue_s_max]
    _check_size([(one.input_length, one.output_length) for one, _ in timed])
    return [
        Work(
            index=index,
            prompt=traces.prompt(
                one, index, block_tokens=settings.block_tokens, unit=settings.unit, seed=settings.seed
            ),
            output_tokens=one.output_length,
            due_s=due_s,
        )
        for index, (one, due_s) in enumerate(timed)
    ]


def _check_size(lengths: list[tuple[int, int]]) -> None:
    """Raises ConfigError."""
    for which, size, limit in (
        ("prompts", sum(length for length, _ in lengths), PROMPT_UNITS_MAX),
        ("answers", sum(output for _, output in lengths), OUTPUT_TOKENS_MAX),
    ):
        if size > limit:
            raise ConfigError(
                f"the {which} of {len(lengths):,} requests have {size:,} tokens; ask for fewer requests: "
                f"a run may have {limit:,}",
                field="requests",
                size=size,
                limit=limit,
            )
