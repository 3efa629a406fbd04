"""The command line: complete help, light imports, and sentences for mistakes."""

import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = (
    "up",
    "demo",
    "request",
    "resume",
    "batch",
    "bench",
    "cancel",
    "drain",
    "pause",
    "unpause",
    "dead",
    "workers",
    "health",
    "streams",
    "route",
    "subjects",
    "preprocess",
    "decode",
    "telemetry",
    "gateway",
)
HEAVY = {"nats", "aiohttp", "uvloop", "torch", "transformers", "tokenizers", "sglang", "prometheus_client", "structlog"}
DEADLINE_S = 60


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env={"PATH": "/usr/bin:/bin", "COLUMNS": "120"} | environment,
    )


def test_help_names_every_command() -> None:
    said = run("--help")
    assert said.returncode == 0
    for command in COMMANDS:
        assert f" {command} " in said.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_for_each_option(command: str) -> None:
    said = run(command, "--help")
    assert said.returncode == 0
    lines = [line.strip("│ ") for line in said.stdout.splitlines()]
    for line in lines:
        if line.startswith("--"):
            assert len(line.split()) > 3, f"no help: {line}"


def test_the_command_line_is_light() -> None:
    code = f"import pipeline.cli, sys; print(sorted({HEAVY!r} & set(sys.modules)))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=DEADLINE_S)
    assert said.stdout.strip() == "[]", said.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("up", "nowhere"), "there is no topology 'nowhere': give a TOML file or one of "),
        (("request", "--json", "/nowhere.json"), "cannot read /nowhere.json: No such file or directory"),
        (("request",), "give a prompt, or a request with --json FILE"),
        (("request", "hi", "--nats", "nats://127.0.0.1:1"), "nats://127.0.0.1:1"),
        (("batch", "/nowhere.jsonl"), "cannot read /nowhere.jsonl: No such file or directory"),
        (("resume", "a.b", "--client", "me", "--nats", "nats://127.0.0.1:1"), "nats://127.0.0.1:1"),
        (("pause", "m", "--for", "soon"), "--for takes a time like 90s, 30m, 1h or 2d, not 'soon'"),
        (("decode", "--engine", "vllm"), "Invalid enum value 'vllm'"),
        (("decode", "--simulated", "ttft_ms"), "--simulated takes NAME=VALUE, not 'ttft_ms'"),
        (("decode", "--simulated", "itl=1"), "there is no setting 'itl'"),
        (("decode", "--config", "/nowhere.toml"), "cannot read /nowhere.toml"),
        (("decode", "--", "stray"), "'stray' after -- belongs to no flag of SGLang"),
        (("subjects", "--check", "--out", "/nowhere.md"), "/nowhere.md is not what the code declares"),
    ],
)
def test_a_mistake_is_a_sentence_and_exit_code_1(arguments: tuple[str, ...], says: str) -> None:
    said = run(*arguments)
    assert said.returncode == 1
    assert says in said.stderr
    assert "Traceback" not in said.stderr
    assert len(said.stderr.strip().splitlines()) == 1


def test_a_wrong_command_line_is_exit_code_2() -> None:
    assert run("request", "--no-such-option").returncode == 2
    assert run("no-such-command").returncode == 2


def test_subjects_writes_the_page(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "subjects.md"
    assert run("subjects", "--out", str(page)).returncode == 0
    assert page.read_text().startswith("# Subjects")
    assert run("subjects", "--check", "--out", str(page)).returncode == 0
