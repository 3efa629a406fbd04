"""The rules of the house that a machine can check. Each test lists every place that breaks its rule."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from pipeline.log import KEYS
from subjects import names
from subjects.catalogue import render

ROOT = Path(__file__).parents[2]
PACKAGES = ("subjects", "pipeline", "stages")
FUNCTION_LINES_MAX = 60
LOGGERS = {"log", "_log", "context"}
LOG_METHODS = {"debug", "info", "warning", "error", "exception", "critical", "bind", "bind_contextvars"}
WORDS_THAT_SAY_NOTHING = {"utils", "util", "helpers", "helper", "manager", "data", "common", "misc"}
# The first two tokens of every subject that is ours: what must not be spelled out elsewhere.
SUBJECT = re.compile(rf"\bsglang\.(?:{'|'.join({kind.template.split('.')[1] for kind in names.READABLE})})\b")


def sources(*folders: str) -> Iterator[tuple[str, ast.Module]]:
    """Every source file's path in the repository, and its tree."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text())


def imported(tree: ast.Module) -> Iterator[str]:
    """Every imported module's dotted name, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "." * node.level


def tops(tree: ast.Module) -> set[str]:
    return {module.split(".")[0] for module in imported(tree)}


def test_imports_point_left_only() -> None:
    wrong = []
    for path, tree in sources(*PACKAGES):
        package = path.split("/")[0]
        right = PACKAGES[PACKAGES.index(package) + 1 :]
        for top in tops(tree):
            not_light = package == "subjects" and top not in {"msgspec", "subjects", *sys.stdlib_module_names}
            if top in right or not_light or (package == "stages" and top in {"nats", "stages"}) or not top:
                wrong.append(f"{path} imports {top or 'relatively'}")
    assert not wrong


def test_one_file_knows_nats_py_and_one_package_sglang() -> None:
    assert [path for path, tree in sources(*PACKAGES) if "nats" in tops(tree)] == ["pipeline/bus.py"]
    knowing = [path for path, tree in sources(*PACKAGES) if "sglang" in tops(tree)]
    assert [path for path in knowing if not path.startswith("pipeline/engine/sglang/")] == []


def test_subjects_are_spelled_out_in_names_only() -> None:
    """Docstrings may speak of them: those are for people."""
    wrong = []
    for path, tree in sources(*PACKAGES):
        prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            spelled = isinstance(node, ast.Constant) and isinstance(node.value, str) and SUBJECT.search(node.value)
            if spelled and id(node) not in prose and path != "subjects/names.py":
                wrong.append(f"{path}:{node.lineno}: {node.value!r}")
    assert not wrong


def test_functions_fit_a_screen() -> None:
    wrong = []
    for path, tree in sources(*PACKAGES, "tests"):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > FUNCTION_LINES_MAX:
                    wrong.append(f"{path}:{node.lineno}: {node.name} has {lines} lines")
    assert not wrong


def test_log_events_use_the_closed_keys() -> None:
    wrong = []
    for path, tree in sources(*PACKAGES):
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr in LOG_METHODS and ast.unparse(node.func.value).split(".")[-1] in LOGGERS:
                unknown = {keyword.arg for keyword in node.keywords if keyword.arg} - KEYS - {"exc_info"}
                wrong += [f"{path}:{node.lineno}: {sorted(unknown)} not in pipeline.log.KEYS"] if unknown else []
    assert not wrong


def test_broad_excepts_log_or_raise() -> None:
    wrong = []
    for path, tree in sources(*PACKAGES):
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler) and (node.type is None or ast.unparse(node.type) == "Exception"):
                body = "\n".join(ast.unparse(line) for line in node.body)
                if not re.search(r"\blog(ger)?\.|\bcontext\.|\braise\b", body):
                    wrong.append(f"{path}:{node.lineno}: {body[:60]}")
    assert not wrong


def test_modules_say_what_they_are() -> None:
    wrong = [path for path, tree in sources(*PACKAGES) if tree.body and not ast.get_docstring(tree)]
    wrong += [path for path, _ in sources(*PACKAGES) if Path(path).stem in WORDS_THAT_SAY_NOTHING]
    assert not wrong


def test_page_of_subjects_is_what_the_code_declares() -> None:
    page = (ROOT / "docs" / "subjects.md").read_text()
    assert page == render(), "docs/subjects.md is stale: run `just subjects`"
