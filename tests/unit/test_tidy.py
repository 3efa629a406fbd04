"""The rules of the house that a machine can check."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.log import KEYS
from subjects import names
from subjects.catalogue import render

ROOT = Path(__file__).parents[2]
PACKAGES = ("subjects", "pipeline", "stages")
FUNCTION_LINES_MAX = 60
LOG_METHODS = {"debug", "info", "warning", "error", "exception", "critical", "bind", "bind_contextvars"}
# The first two tokens of every subject that is ours: what must not be spelled out elsewhere.
SUBJECT = re.compile(rf"\bsglang\.(?:{'|'.join({kind.template.split('.')[1] for kind in names.ALL})})\b")


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path) -> Iterator[str]:
    """Every imported module's dotted name, inside functions too."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: relative import"
            yield node.module or ""


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=name_of)
def test_imports_point_left_only(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    for module in imports(path):
        top = module.split(".")[0]
        if top in PACKAGES:
            assert PACKAGES.index(top) <= PACKAGES.index(package), f"{package} imports {module}"
        if package == "subjects":
            assert top in {"msgspec", "subjects", *sys.stdlib_module_names}, f"subjects imports {module}"
        if package == "stages":
            assert top not in {"nats", "stages"}, f"a stage imports {module}"


def test_one_file_knows_nats_py() -> None:
    assert {name_of(path) for path in sources(*PACKAGES) if "nats" in _tops(path)} == {"pipeline/bus.py"}


def test_one_package_knows_sglang() -> None:
    knowing = [path for path in sources(*PACKAGES) if "sglang" in _tops(path)]
    assert [name_of(path) for path in knowing if not name_of(path).startswith("pipeline/engine/sglang/")] == []


def _tops(path: Path) -> set[str]:
    return {module.split(".")[0] for module in imports(path)}


@pytest.mark.parametrize("path", [p for p in sources(*PACKAGES) if p.name != "names.py"], ids=name_of)
def test_subjects_are_spelled_out_in_names_only(path: Path) -> None:
    """Docstrings may speak of them: those are for people."""
    tree = parsed(path)
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            assert not SUBJECT.search(node.value), f"{name_of(path)}:{node.lineno}: {node.value!r}"


@pytest.mark.parametrize("path", sources(*PACKAGES, "tests"), ids=name_of)
def test_functions_fit_a_screen(path: Path) -> None:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= FUNCTION_LINES_MAX, f"{name_of(path)}:{node.lineno}: {node.name} has {lines} lines"


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=name_of)
def test_log_events_use_the_closed_keys(path: Path) -> None:
    for node in ast.walk(parsed(path)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if node.func.attr in LOG_METHODS and ast.unparse(node.func.value).split(".")[-1] in {"log", "context", "_log"}:
            used = {keyword.arg for keyword in node.keywords if keyword.arg} - {"exc_info"}
            assert used <= KEYS, f"{name_of(path)}:{node.lineno}: {sorted(used - KEYS)} not in pipeline.log.KEYS"


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=name_of)
def test_broad_excepts_log_or_raise(path: Path) -> None:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ExceptHandler) and (node.type is None or ast.unparse(node.type) == "Exception"):
            body = "\n".join(ast.unparse(line) for line in node.body)
            assert re.search(r"\blog(ger)?\.|\bcontext\.|\braise\b", body), f"{name_of(path)}:{node.lineno}: swallowed"


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=name_of)
def test_modules_say_what_they_are(path: Path) -> None:
    assert path.stem not in {"utils", "util", "helpers", "data", "common", "misc"}
    tree = parsed(path)
    assert not tree.body or ast.get_docstring(tree), f"{name_of(path)} has no docstring"


def test_page_of_subjects_is_what_the_code_declares() -> None:
    page = (ROOT / "docs" / "subjects.md").read_text()
    assert page == render(), "docs/subjects.md is stale: run `just subjects`"
