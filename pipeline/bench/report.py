"""Results as tables: one run, or several side by side, the first being what the others are compared with. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from pipeline.bench.result import Distribution, ProcessCpu, Result, Settings

NOTHING: Final = "-"
PERCENTILES: Final = ("p50", "p90", "p99")
NOT_COMPARED: Final = frozenset({"url", "warmup"})


@dataclass(frozen=True)
class Row:
    """One figure of every run. None: not measured."""

    name: str
    values: tuple[float | None, ...]
    compared: bool = True  # a ratio says something

    def cells(self) -> Iterator[str]:
        """The name, the first run's figure, and of each other one its figure and its ratio to the first."""
        first, *others = self.values
        yield self.name
        yield number(first)
        for value in others:
            yield number(value)
            yield f"{value / first:.2f}" if self.compared and first and value is not None else NOTHING


def number(value: float | None) -> str:
    """With three digits that mean something.

    >>> number(1234.5), number(12.345), number(0.01234), number(None)
    ('1,234', '12.3', '0.0123', '-')
    """
    if value is None:
        return NOTHING
    if float(value).is_integer() or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def rows(results: Sequence[Result]) -> list[Row]:
    """Every figure that at least one of the runs has."""
    found = [
        Row(name, tuple(values), compared)
        for name, compared, values in (
            ("requests that ended well", False, [each.summary.ok for each in results]),
            ("rejected", False, [each.summary.rejected for each in results]),
            ("failed", False, [each.summary.failed for each in results]),
            ("requests/s", True, [each.summary.requests_per_s for each in results]),
            ("output tokens/s", True, [each.summary.output_tokens_per_s for each in results]),
            ("prompt tokens/s", True, [each.summary.prompt_tokens_per_s for each in results]),
            ("cached share of prompt tokens", True, [each.summary.cached_share for each in results]),
            ("tokens a piece", True, [each.summary.tokens_per_chunk for each in results]),
        )
    ]
    summaries = [each.summary for each in results]
    found += _percentiles("TTFT, ms", [each.ttft_ms for each in summaries])
    found += _percentiles("ITL, ms", [each.itl_ms for each in summaries])
    found += _percentiles("TPOT, ms", [each.tpot_ms for each in summaries])
    found += _percentiles("E2E, ms", [each.e2e_ms for each in summaries])
    found += _goodput(results)
    found += _percentiles("KV handshake, ms", [each.transfers and each.transfers.handshake_ms for each in results])
    found += _percentiles("KV write, ms", [each.transfers and each.transfers.write_ms for each in results])
    found.append(Row("KV written, MB", tuple(t and t.kv_bytes / 1e6 for t in (each.transfers for each in results))))
    found += _cpu(results)
    found.append(Row("load generator, share of a core", tuple(each.generator.cpu_share for each in results), False))
    return [row for row in found if any(value is not None for value in row.values)]


def _percentiles(name: str, measured: Sequence[Distribution | None]) -> list[Row]:
    def of(which: str, one: Distribution) -> float:
        return {"p50": one.p50, "p90": one.p90, "p99": one.p99}[which]

    return [
        Row(f"{name}, {which}", tuple(None if one is None else of(which, one) for one in measured))
        for which in PERCENTILES
    ]


def _goodput(results: Sequence[Result]) -> list[Row]:
    good = [each.summary.goodput for each in results]
    return [
        Row("goodput, share of requests", tuple(one and one.share for one in good)),
        Row("goodput, requests/s", tuple(one and one.requests_per_s for one in good)),
    ]


def _cpu(results: Sequence[Result]) -> list[Row]:
    """CPU per request that ended well, by role: workers of one role are added up."""
    spent = [_cpu_ms_by_role(each) for each in results]
    roles = dict.fromkeys(role for one in spent for role in one)
    return [Row(f"CPU a request, ms: {role}", tuple(one.get(role) for one in spent)) for role in roles]


def _cpu_ms_by_role(result: Result) -> dict[str, float]:
    found: dict[str, float] = {}
    if not result.summary.ok:
        return found
    for process in result.processes:
        role = process.role or process.name
        found[role] = found.get(role, 0.0) + _all_cpu_s(process) * 1e3 / result.summary.ok
    return found


def _all_cpu_s(process: ProcessCpu) -> float:
    return process.cpu_s + process.descendants_cpu_s


def heads(results: Sequence[Result]) -> list[str]:
    """Of the table's columns."""
    first, *others = results
    found = ["", first.label]
    for other in others:
        found += [other.label, f"{other.label} / {first.label}"]
    return found


def markdown(results: Sequence[Result]) -> str:
    """The table of a comparison, what differs in the settings, and what makes figures doubtful."""
    lines = [_line(heads(results)), _line(["---"] * len(heads(results)))]
    lines += [_line(list(row.cells())) for row in rows(results)]
    differing = differences([each.settings for each in results])
    if differing:
        lines += ["", "Not asked alike:", *(f"- {name}: {' | '.join(values)}" for name, values in differing.items())]
    doubtful = [f"- {each.label}: {doubt}" for each in results for doubt in each.warnings]
    return "\n".join([*lines, *(["", "Doubtful:", *doubtful] if doubtful else [])])


def differences(settings: Sequence[Settings]) -> dict[str, list[str]]:
    """The settings that are not the same in all runs, and each run's."""
    asked = [{name: str(value) for name, value in _plain(each).items()} for each in settings]
    return {
        name: [one[name] for one in asked]
        for name in asked[0]
        if name not in NOT_COMPARED and len({one[name] for one in asked}) > 1
    }


def _plain(settings: Settings) -> dict[str, object]:
    return msgspec.to_builtins(settings)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
