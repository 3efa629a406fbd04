"""infra/prometheus, infra/grafana and docs/metrics.md name only series that telemetry serves.

`python tests/unit/test_monitoring.py` writes docs/metrics.md anew.
"""

import ast
import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import promql_parser
import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric

from pipeline import metrics
from stages.telemetry import Telemetry

ROOT: Final = Path(__file__).parents[2]
PROMETHEUS: Final = ROOT / "infra" / "prometheus"
DASHBOARD: Final = ROOT / "infra" / "grafana" / "dashboards" / "sglang-nats.json"
PAGE: Final = ROOT / "docs" / "metrics.md"
SUFFIXES: Final = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
OF_WORKER: Final = ("role", "worker", "model")
OF_SCRAPE: Final = ("instance", "job")
VARIABLES: Final = {"$telemetry": "t", "$model": ".*", "${datasource}": "d"}


@dataclass(frozen=True)
class Series:
    """One family as telemetry serves it."""

    name: str
    type: str
    labels: tuple[str, ...]
    about: str
    source: str


def of_registry(registry: CollectorRegistry, source: str) -> Iterator[Series]:
    for collector in registry._collector_to_names:  # the registry has no public list of what nobody counted yet
        labels = vars(collector).get("_labelnames", ())
        for family in collector.collect():
            all_labels = tuple(dict.fromkeys((*labels, *OF_WORKER)))
            yield Series(family.name, family.type, all_labels, family.documentation, source)


def of_telemetry() -> Iterator[Series]:
    for family in Telemetry().collect():
        yield Series(family.name, family.type, labels_of(family), family.documentation, "telemetry")


def labels_of(family: Metric) -> tuple[str, ...]:
    return tuple(vars(family).get("_labelnames", ()))


def of_sglang() -> dict[str, str]:
    """SGLang's series by name, with what it says of them, read from its source without importing it."""
    (folder,) = importlib.util.find_spec("sglang").submodule_search_locations
    found = {}
    for path in sorted((Path(folder) / "srt" / "observability").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                given = {word.arg: word.value.value for word in node.keywords if isinstance(word.value, ast.Constant)}
                if str(given.get("name", "")).startswith("sglang:"):
                    found[given["name"]] = str(given.get("documentation", ""))
    return found


def ours() -> list[Series]:
    found = [
        *of_registry(metrics.REGISTRY, "worker"),
        *of_registry(metrics.ENGINE, "engine"),
        *of_telemetry(),
        Series(metrics.LEFT_OUT, "gauge", OF_WORKER, metrics.LEFT_OUT_ABOUT, "worker"),
    ]
    return sorted(found, key=lambda series: series.name)


def label_names() -> dict[str, set[str]]:
    """The labels of each of our series that can be asked for, by the name under which it is scraped."""
    names = {
        series.name + suffix: {*series.labels, *OF_SCRAPE, *(("le",) if suffix == "_bucket" else ())}
        for series in ours()
        for suffix in SUFFIXES[series.type]
    }
    return names | {"up": set(OF_SCRAPE), "ALERTS": {"alertname", "alertstate"}}


def expressions() -> Iterator[tuple[str, str]]:
    """Every expression that is asked of Prometheus, and where it stands."""
    for group in yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], filled(target["expr"])


def filled(expression: str) -> str:
    for variable, value in VARIABLES.items():
        expression = expression.replace(variable, value)
    return expression


def selectors(node: Any) -> Iterator[promql_parser.VectorSelector]:
    """The selectors inside a parsed expression."""
    match node:
        case promql_parser.VectorSelector():
            yield node
        case promql_parser.MatrixSelector():
            yield node.vector_selector
        case promql_parser.BinaryExpr():
            yield from selectors(node.lhs)
            yield from selectors(node.rhs)
        case promql_parser.Call():
            for argument in node.args:
                yield from selectors(argument)
        case promql_parser.AggregateExpr() | promql_parser.ParenExpr() | promql_parser.UnaryExpr():
            yield from selectors(node.expr)
        case promql_parser.SubqueryExpr():
            yield from selectors(node.expr)


def asked() -> Iterator[tuple[str, promql_parser.VectorSelector]]:
    for where, expression in expressions():
        for selector in selectors(promql_parser.parse(expression)):
            yield where, selector


def of_sglang_asked() -> list[str]:
    """SGLang's series that the alerts and the dashboard ask for, under the names SGLang declares them by."""
    declared = of_sglang()
    asked_for = {selector.name for _, selector in asked() if selector.name.startswith("sglang:")}
    without_suffix = {name: re.sub("_(bucket|sum|count)$", "", name) for name in asked_for}
    return sorted({name if name in declared else without_suffix[name] for name in asked_for})


def test_every_expression_asks_for_series_that_are_served() -> None:
    known, sglang = label_names(), of_sglang()
    wrong = []
    for where, selector in asked():
        name = selector.name
        if name.startswith("sglang:"):
            if name not in sglang and re.sub("_(bucket|sum|count)$", "", name) not in sglang:
                wrong.append(f"{where}: SGLang has no series {name}")
        elif name not in known:
            wrong.append(f"{where}: telemetry serves no {name}")
        else:
            lacking = {matcher.name for matcher in selector.matchers.matchers} - known[name]
            wrong += [f"{where}: {name} has no label {', '.join(sorted(lacking))}"] if lacking else []
    assert not wrong


def test_the_dashboard_and_the_alerts_ask_enough() -> None:
    """What the selectors above do not see would pass unchecked."""
    found = list(asked())
    assert len(list(expressions())) > 80
    assert len(found) > 90
    assert all(selector.name for _, selector in found), "a selector without a name matches series of anyone"


def test_each_alert_says_what_is_wrong_and_what_to_do() -> None:
    for group in yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]:
        for rule in group["rules"]:
            assert set(rule["annotations"]) == {"summary", "action"}, rule["alert"]
            assert rule["labels"]["severity"] in ("critical", "warning", "info"), rule["alert"]


def test_panels_do_not_overlap() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        at = panel["gridPos"]
        for x in range(at["x"], at["x"] + at["w"]):
            for y in range(at["y"], at["y"] + at["h"]):
                assert x < 24
                assert (x, y) not in taken, f"{panel['title']} lies over {taken[x, y]}"
                taken[x, y] = panel["title"]


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not here; Debian's package prometheus has it")
@pytest.mark.parametrize("arguments", ["check config prometheus.yml", "test rules alerts.test.yml"])
def test_promtool_agrees(arguments: str) -> None:
    done = subprocess.run(["promtool", *arguments.split()], cwd=PROMETHEUS, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stdout + done.stderr


# --- docs/metrics.md ---------------------------------------------------------------------------------

INTRODUCTION: Final = """# Metrics

Every series of telemetry's `/metrics`. Written by `python tests/unit/test_monitoring.py` and checked by CI.
How to look at them: [operations.md](operations.md#metrics).

Series of a worker and of its engine carry the labels `role`, `worker` and, where it serves one, `model`. On the page a
counter's name ends in `_total`, a histogram's in `_bucket`, `_sum` and `_count`.

## Ours

"worker": counted by each worker's process. "engine": counted inside SGLang's schedulers. "telemetry": put together from
heartbeats, KV events and the broker's own answers.
"""
SGLANG: Final = """
## SGLang's

All series that SGLang's schedulers and its tokenizer count pass through under their own names and labels, as they would
stand on the `/metrics` of SGLang's own server. A family is there from its first figure on. Those that the dashboard and
the alerts look at, in SGLang's words:
"""


def page() -> str:
    """docs/metrics.md."""
    rows = ["| Series | Type | Labels | From | Meaning |", "|---|---|---|---|---|"]
    for series in ours():
        labels = ", ".join(f"`{label}`" for label in series.labels)
        rows.append(f"| `{series.name}` | {series.type} | {labels} | {series.source} | {series.about} |")
    declared = of_sglang()
    theirs = ["| Series | Meaning |", "|---|---|"]
    theirs += [f"| `{name}` | {declared[name]} |" for name in of_sglang_asked()]
    return "\n".join((INTRODUCTION, *rows, SGLANG, *theirs, ""))


def test_the_page_of_metrics_is_what_the_code_declares() -> None:
    assert PAGE.read_text() == page(), "docs/metrics.md is stale: run python tests/unit/test_monitoring.py"


if __name__ == "__main__":
    PAGE.write_text(page())
