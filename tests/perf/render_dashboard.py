"""Draws infra/grafana's dashboard from a running Prometheus, one PNG a row. Needs matplotlib and nothing of ours.

    uv run --no-project --with matplotlib python tests/perf/render_dashboard.py http://127.0.0.1:9090 docs/images

The panels' own queries, filled in as Grafana does; for machines without Grafana. Prints the panels that had no data.
"""

import argparse
import datetime
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode
from urllib.request import urlopen

import matplotlib

matplotlib.use("Agg")
import matplotlib.dates
import matplotlib.pyplot as plt

DASHBOARD: Final = Path(__file__).parents[2] / "infra" / "grafana" / "dashboards" / "sglang-nats.json"
COLUMNS: Final = 24
INCHES_A_COLUMN: Final = 0.62
INCHES_A_LINE: Final = 0.36
TITLE_INCHES: Final = 0.65
STAT_LINES: Final = 4
LEGEND_LINES_MAX: Final = 10
STEP_S: Final = 2
UNITS: Final = {"s": "s", "percentunit": "share", "bytes": "MiB", "Bps": "MiB/s", "reqps": "1/s", "ops": "1/s"}
MIB: Final = 1024 * 1024


class Prometheus:
    """One server's HTTP API."""

    def __init__(self, url: str, end_s: float, seconds: int) -> None:
        self._url, self._end_s, self._seconds = url.rstrip("/"), end_s, seconds

    def series(self, expression: str) -> list[dict[str, Any]]:
        """The expression's series over the `seconds` before the end."""
        asked = {"query": expression, "start": self._end_s - self._seconds, "end": self._end_s, "step": STEP_S}
        with urlopen(f"{self._url}/api/v1/query_range?{urlencode(asked)}", timeout=10) as answer:
            return json.load(answer)["data"]["result"]

    def values(self, label: str, of: str) -> list[str]:
        """The values of a label among a series."""
        asked = urlencode({"match[]": of, "start": self._end_s - self._seconds, "end": self._end_s})
        with urlopen(f"{self._url}/api/v1/label/{label}/values?{asked}", timeout=10) as answer:
            return json.load(answer)["data"]


def rows(panels: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The dashboard's rows: title and panels."""
    title, found = "", []
    for panel in panels:
        if panel["type"] == "row":
            if found:
                yield title, found
            title, found = panel["title"], []
        else:
            found.append(panel)
    yield title, found


def legend(form: str, labels: dict[str, str]) -> str:
    for name, value in labels.items():
        form = form.replace("{{" + name + "}}", value)
    return form


def drawn(axes: Any, panel: dict[str, Any], prometheus: Prometheus, telemetry: str) -> bool:
    """Draw one panel; whether it had data."""
    unit = panel["fieldConfig"]["defaults"]["unit"]
    scale = MIB if unit in ("bytes", "Bps") else 1
    lines = 0
    last: list[tuple[str, float]] = []
    for target in panel["targets"]:
        expression = target["expr"].replace("$telemetry", telemetry).replace("$model", ".+")
        for series in prometheus.series(expression):
            points = [(float(at), float(value)) for at, value in series["values"] if value != "NaN"]
            if not points:
                continue
            label = legend(target["legendFormat"], series["metric"])
            last.append((label, points[-1][1]))
            if panel["type"] == "stat":
                continue
            times = matplotlib.dates.date2num([time_of(at) for at, _ in points])
            axes.plot(times, [value / scale for _, value in points], linewidth=1.1, label=label or None)
            lines += 1
    if panel["type"] == "stat":
        drawn_stat(axes, panel, last, unit)
        return bool(last)
    axes.set_title(panel["title"], fontsize=9, loc="left")
    axes.set_ylim(bottom=0)
    axes.set_ylabel(UNITS.get(unit, ""), fontsize=7)
    axes.tick_params(labelsize=6)
    axes.xaxis.set_major_formatter(matplotlib.dates.DateFormatter("%H:%M:%S"))
    axes.xaxis.set_major_locator(plt.MaxNLocator(4))
    axes.grid(alpha=0.25)
    if lines:
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(
            handles[:LEGEND_LINES_MAX], labels[:LEGEND_LINES_MAX], fontsize=5.5, loc="upper left", framealpha=0.7
        )
    else:
        axes.text(0.5, 0.5, "no data", ha="center", va="center", transform=axes.transAxes, color="gray", fontsize=8)
    return lines > 0


def time_of(unix_s: float) -> Any:
    return datetime.datetime.fromtimestamp(unix_s, datetime.UTC)


def drawn_stat(axes: Any, panel: dict[str, Any], last: list[tuple[str, float]], unit: str) -> None:
    axes.axis("off")
    axes.set_title(panel["title"], fontsize=9)
    text = "\n".join(f"{label} {shown(value, unit)}".strip() for label, value in last) or "no data"
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, fontsize=11, color="#2a6f3c")


def shown(value: float, unit: str) -> str:
    if unit == "s":
        return f"{value:.3g} s"
    if unit == "percentunit":
        return f"{value:.0%}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def draw_row(title: str, panels: list[dict[str, Any]], prometheus: Prometheus, telemetry: str, out: Path) -> list[str]:
    """Write one row's PNG; the titles of its panels without data."""
    top = min(panel["gridPos"]["y"] for panel in panels)
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels) - top
    inches = height * INCHES_A_LINE + TITLE_INCHES
    figure = plt.figure(figsize=(COLUMNS * INCHES_A_COLUMN, inches))
    figure.suptitle(f"sglang-nats: {title}", fontsize=11, x=0.01, y=1 - 0.1 / inches, ha="left", va="top")
    inside = {"left": 0.04, "right": 0.985, "top": 1 - TITLE_INCHES / inches, "bottom": 0.0}
    grid = figure.add_gridspec(height, COLUMNS, hspace=1.6, wspace=4.5, **inside)
    empty = []
    for panel in panels:
        at = panel["gridPos"]
        y, x = at["y"] - top, at["x"]
        axes = figure.add_subplot(grid[y : y + at["h"] - (1 if at["h"] > STAT_LINES else 0), x : x + at["w"]])
        if not drawn(axes, panel, prometheus, telemetry):
            empty.append(panel["title"])
    name = title.lower().replace(" and ", "-").replace(" ", "-")
    figure.savefig(out / f"dashboard-{name}.png", dpi=90)
    plt.close(figure)
    return empty


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prometheus", help="its URL")
    parser.add_argument("out", type=Path, help="folder of the PNGs")
    parser.add_argument("--seconds", type=int, default=300, help="how far back")
    parser.add_argument("--end", type=float, default=time.time(), help="seconds since the Unix epoch; default: now")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    prometheus = Prometheus(given.prometheus, given.end, given.seconds)
    telemetry = prometheus.values("instance", "sglang_nats_broker_up")[0]
    for title, panels in rows(json.loads(DASHBOARD.read_text())["panels"]):
        empty = draw_row(title, panels, prometheus, telemetry, given.out)
        print(
            f"{title}: {len(panels) - len(empty)} of {len(panels)} panels have data"
            + (f"; not: {', '.join(empty)}" if empty else "")
        )


if __name__ == "__main__":
    main()
