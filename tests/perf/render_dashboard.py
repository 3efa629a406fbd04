"""Draws infra/grafana's dashboard from a running Prometheus, one PNG a row. Needs matplotlib and nothing of ours.

    uv run --no-project --with matplotlib python tests/perf/render_dashboard.py http://127.0.0.1:9090 docs/images

The panels' own queries, filled in as Grafana does; for machines without Grafana. Prints the panels that had no data.
"""

import argparse
import datetime
import json
import math
import re
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
import matplotlib.ticker

DASHBOARD: Final = Path(__file__).parents[2] / "infra" / "grafana" / "dashboards" / "sglang-nats.json"
COLUMNS: Final = 24
INCHES_A_COLUMN: Final = 0.62
INCHES_A_LINE: Final = 0.4
TITLE_INCHES: Final = 0.65
STAT_LINES: Final = 4
LEGEND_LINES: Final = 3  # of the grid, below each panel
LEGEND_ROWS_MAX: Final = 5
LEGEND_COLUMNS_MAX: Final = 6
LEGEND_POINTS: Final = 5.5
LEGEND_INCHES: Final = 0.4, 0.043  # of an entry without its label, and of a character
COLORS: Final = matplotlib.colormaps["tab10"].colors + matplotlib.colormaps["tab20b"].colors
STEP_S: Final = 2
GAP_S: Final = 3 * STEP_S
UNITS: Final = {"percentunit": " (share)", "bytes": " (MiB)", "Bps": " (MiB/s)", "ops": " (1/s)"}
MIB: Final = 1024 * 1024


class Prometheus:
    """One server's HTTP API."""

    def __init__(self, url: str, end_s: float, seconds: int) -> None:
        self._url, self.begin_s, self.end_s = url.rstrip("/"), end_s - seconds, end_s

    def series(self, expression: str) -> list[dict[str, Any]]:
        """The expression's series from `begin_s` to `end_s`."""
        asked = {"query": expression, "start": self.begin_s, "end": self.end_s, "step": STEP_S}
        with urlopen(f"{self._url}/api/v1/query_range?{urlencode(asked)}", timeout=10) as answer:
            return json.load(answer)["data"]["result"]

    def values(self, label: str, of: str) -> list[str]:
        """The values of a label among a series."""
        asked = urlencode({"match[]": of, "start": self.begin_s, "end": self.end_s})
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
    """The form filled in; a label that the series lacks is empty, as in Grafana."""
    return re.sub(r"\{\{(\w+)\}\}", lambda found: labels.get(found[1], ""), form).strip()


def drawn(axes: Any, panel: dict[str, Any], prometheus: Prometheus, telemetry: str) -> bool:
    """Draw one panel; whether it had data."""
    lines = list(asked(panel, prometheus, telemetry))
    unit = panel["fieldConfig"]["defaults"]["unit"]
    if panel["type"] == "stat":
        drawn_stat(axes, panel, [(label, points[-1][1]) for label, points in lines], unit)
        return bool(lines)
    axes.set_title(panel["title"] + UNITS.get(unit, ""), fontsize=9, loc="left")
    axes.tick_params(labelsize=6)
    if not lines:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "no data", ha="center", va="center", transform=axes.transAxes, color="gray", fontsize=8)
        return False
    axes.set_prop_cycle(color=COLORS)
    scale = MIB if unit in ("bytes", "Bps") else 1
    for label, points in lines:
        times, values = zip(*broken_at_gaps(points), strict=True)
        scaled = [value / scale for value in values]
        axes.plot(
            [time_of(at) for at in times], scaled, linewidth=1.1, label=label or panel["title"], clip_on=False, zorder=3
        )
    if unit == "s":
        axes.yaxis.set_major_formatter(matplotlib.ticker.EngFormatter("s"))
    drawn_scales(axes, prometheus, max(value for _, points in lines for _, value in points) / scale)
    drawn_legend(axes, panel)
    return True


Points = list[tuple[float, float]]
"""Seconds since the Unix epoch and a value, in order."""


def asked(panel: dict[str, Any], prometheus: Prometheus, telemetry: str) -> Iterator[tuple[str, Points]]:
    """The panel's series that have values, with their labels."""
    for target in panel["targets"]:
        expression = target["expr"].replace("$telemetry", telemetry).replace("$model", ".+")
        for series in prometheus.series(expression):
            if points := [(float(at), float(value)) for at, value in series["values"] if value != "NaN"]:
                yield legend(target["legendFormat"], series["metric"]), points


def broken_at_gaps(points: Points) -> Points:
    """With a point that is not drawn wherever the series was not there for a while, as Grafana shows it."""
    broken = points[:1]
    for point in points[1:]:
        if point[0] - broken[-1][0] > GAP_S:
            broken.append((broken[-1][0] + STEP_S, math.nan))
        broken.append(point)
    return broken


def drawn_scales(axes: Any, prometheus: Prometheus, highest: float) -> None:
    """From 0 on, and the same time in every panel."""
    axes.set_ylim(0, 1.08 * highest if highest > 0 else 1)
    axes.set_xlim(time_of(prometheus.begin_s), time_of(prometheus.end_s))
    locator = matplotlib.dates.AutoDateLocator(minticks=3, maxticks=6)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(matplotlib.dates.DateFormatter("%H:%M:%S"))
    axes.grid(alpha=0.25)


def drawn_legend(axes: Any, panel: dict[str, Any]) -> None:
    """Below the panel, where it hides nothing; of many series the first."""
    handles, labels = axes.get_legend_handles_labels()
    around, character = LEGEND_INCHES
    fitting = panel["gridPos"]["w"] * INCHES_A_COLUMN / (around + character * max(map(len, labels)))
    columns = min(max(1, int(fitting)), LEGEND_COLUMNS_MAX)
    room = columns * LEGEND_ROWS_MAX
    if len(labels) > room:
        labels = [*labels[: room - 1], f"... and {len(labels) - room + 1} more"]
    below = -0.16 / axes.get_window_extent().transformed(axes.figure.dpi_scale_trans.inverted()).height
    axes.legend(
        handles[: len(labels)],
        labels,
        fontsize=LEGEND_POINTS,
        ncols=columns,
        loc="upper left",
        bbox_to_anchor=(-0.02, below),
        frameon=False,
    )


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
        axes = figure.add_subplot(
            grid[y : y + at["h"] - (LEGEND_LINES if at["h"] > STAT_LINES else 0), x : x + at["w"]]
        )
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
    parser.add_argument("--rows", nargs="+", help="titles of the rows to draw; default: all")
    parser.add_argument("--end", type=float, default=time.time(), help="seconds since the Unix epoch; default: now")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    prometheus = Prometheus(given.prometheus, given.end, given.seconds)
    telemetry = prometheus.values("instance", "sglang_nats_broker_up")[0]
    for title, panels in rows(json.loads(DASHBOARD.read_text())["panels"]):
        if given.rows and title not in given.rows:
            continue
        empty = draw_row(title, panels, prometheus, telemetry, given.out)
        print(
            f"{title}: {len(panels) - len(empty)} of {len(panels)} panels have data"
            + (f"; not: {', '.join(empty)}" if empty else "")
        )


if __name__ == "__main__":
    main()
