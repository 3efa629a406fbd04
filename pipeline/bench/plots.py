"""Results as PNG: how latencies are spread, and a run over its time. With matplotlib, which is not always there."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pipeline.bench.measure import e2e_ms, outcome, tpot_ms, ttft_ms
from pipeline.bench.result import Result, Seen
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MEASURES: Final[tuple[tuple[str, Callable[[Seen], float | None]], ...]] = (
    ("TTFT, ms", ttft_ms),
    ("TPOT, ms", tpot_ms),
    ("E2E, ms", e2e_ms),
)
DPI: Final = 120
BINS: Final = 60


def draw(results: Sequence[Result], folder: Path) -> list[Path]:
    """The pictures' files. Raises ConfigError without matplotlib, or where they cannot be written."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("plots need matplotlib: pip install 'sglang-nats[bench]'", field="plots") from None
    written = [folder / "latencies.png", *(folder / f"{_file_name(each.label)}.png" for each in results)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        figure = Figure(figsize=(12, 4), layout="constrained")
        for axes, (name, of) in zip(figure.subplots(1, len(MEASURES)), MEASURES, strict=True):
            _distributions(axes, results, name, of)
        figure.savefig(written[0], dpi=DPI)
        for each, path in zip(results, written[1:], strict=True):
            figure = Figure(figsize=(10, 6), layout="constrained")
            _timeline(figure.subplots(2, 1, sharex=True), each)
            figure.savefig(path, dpi=DPI)
    except OSError as error:
        raise ConfigError(f"cannot write plots to {folder}: {error.strerror}", field="plots") from None
    return written


def _distributions(axes: "Axes", results: Sequence[Result], name: str, of: Callable[[Seen], float | None]) -> None:
    """Each run's cumulative distribution."""
    for each in results:
        values = sorted(ms for seen in each.requests if outcome(seen) == "ok" and (ms := of(seen)) is not None)
        axes.plot(values, [(index + 1) / len(values) for index in range(len(values))], label=each.label)
    axes.set(xlabel=name, ylabel="share of requests", xlim=(0, None), ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()


def _timeline(both: Any, result: Result) -> None:
    """TTFT by sending time, and requests that ended in each bin of time."""
    above, below = both
    ok = [seen for seen in result.requests if outcome(seen) == "ok" and seen.first_s is not None]
    above.plot([seen.sent_s for seen in ok], [ttft_ms(seen) for seen in ok], ".", markersize=3)
    above.set(ylabel="TTFT, ms", ylim=(0, None), title=result.label)
    ends = [[seen.end_s for seen in result.requests if outcome(seen) == what] for what in ("ok", "rejected", "failed")]
    below.hist(ends, bins=BINS, stacked=True, label=("ok", "rejected", "failed"), color=("C2", "C1", "C3"))
    below.set(xlabel="seconds since the run began", ylabel="requests ended")
    below.legend()


def _file_name(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", label)
