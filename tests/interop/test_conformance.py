"""Published conformance suites, unmodified: what passed before passes, and what does not has a reason."""

import asyncio
import json
from pathlib import Path

import pytest
from conformance import BEGIN, END, SUITES, Check, known, not_passed, run_all, table, write

COMPLY, _, CANARY = SUITES


@pytest.mark.engine
@pytest.mark.full
@pytest.mark.timeout(900)
def test_what_fails_is_known():
    checks = asyncio.run(run_all())
    assert len(checks) >= 29
    assert not_passed(checks) == known().keys(), [check for check in checks if check.verdict == "failed"]


def test_every_reason_is_of_a_suite_that_is_run():
    assert {suite for suite, _ in known()} <= {suite.name for suite in SUITES}


def test_a_report_becomes_a_table_between_the_marks(tmp_path: Path):
    comply = [
        {"id": "a", "status": "passed"},
        {"id": "b", "status": "failed", "errors": ["x|y", "x|y", "z"]},
        {"id": "c", "status": "skipped", "errors": ["no such model"]},
    ]
    canary = [{"id": "d", "status": "pass", "summary": "well"}, {"id": "e", "status": "warn", "summary": "odd"}]
    checks = [
        *COMPLY.read("one", json.dumps({"results": comply})),
        *CANARY.read("two", json.dumps({"results": canary})),
    ]
    assert not_passed(checks) == {("one", "b"), ("one", "c"), ("two", "e")}
    assert checks[1] == Check(suite="one", name="b", verdict="failed", why=("x|y", "z"))
    page = tmp_path / "page.md"
    page.write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n")
    write(page, table(checks, {("one", "b"): "it is so"}))
    lines = page.read_text().splitlines()
    assert (lines[:2], lines[-2:]) == (["above", BEGIN], [END, "below"])
    assert lines[4:6] == ["| one | 1 | 1 | 1 |", "| two | 1 | 1 | 0 |"]
    assert lines[9:-2] == [
        "| one | `b` | x\\|y<br>z | it is so |",
        "| one | `c` | no such model | **not explained** |",
        "| two | `e` | odd | **not explained** |",
    ]
