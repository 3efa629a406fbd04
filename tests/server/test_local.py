"""A topology on this machine: real processes, started, killed, restarted and ended."""

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from urllib.request import urlopen

import psutil
import pytest

from pipeline.client import Client
from pipeline.config import BUILTIN_MODEL, GroupSettings, SimulatedSettings, TopologySettings, WorkerSettings
from pipeline.errors import WorkerStartError
from pipeline.local import Child, running
from pipeline.tap import Tap

START_S_MAX = 60.0
MODEL = "smollm2"


def topology(*groups: GroupSettings) -> TopologySettings:
    return TopologySettings(model=MODEL, model_path=BUILTIN_MODEL, start_s_max=START_S_MAX, workers=groups)


PREPROCESS = GroupSettings(role="preprocess")
TELEMETRY = GroupSettings(role="telemetry")
DECODE = GroupSettings(role="decode", engine="simulated", simulated=SimulatedSettings(ttft_ms=1, itl_ms=1))


async def until(true: Callable[[], object], what: str, within_s: float = START_S_MAX) -> None:
    """Wait for what another process does; there is no event of it here to await."""
    deadline_s = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline_s, f"not within {within_s:g} s: {what}"
        await asyncio.sleep(0.02)


async def answer(url: str) -> int:
    """Ask for 8 tokens; how many came."""
    tokens = 0
    async with Client.connect(url) as client:
        async for frame in client.generate(model=MODEL, prompt="hi", max_tokens=8, ignore_eos=True):
            assert frame.error is None, frame.error
            tokens += len(frame.token_ids)
    return tokens


async def until_scraped(address: str, line: str) -> None:
    """Scrape until the line is on the page: metrics travel once a second."""
    page = ""
    deadline_s = time.monotonic() + START_S_MAX
    while line not in page:
        assert time.monotonic() < deadline_s, f"{line} not in {page}"
        page = await asyncio.to_thread(lambda: urlopen(address, timeout=5).read().decode())
        await asyncio.sleep(0.05)


def descendants() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


async def test_it_serves_restarts_a_killed_worker_and_leaves_nothing_behind(tmp_path: Path) -> None:
    before = set(descendants())
    async with running(topology(PREPROCESS, DECODE, TELEMETRY), tmp_path) as local:
        await local.start()
        await local.until_ready()
        started = set(descendants()) - before
        async with Tap.on(local.url) as tap:
            assert await answer(local.url) == 8
            await tap.settle()
        flows = {subject.flow for subject in tap.seen()}
        assert {"client -> preprocess", "preprocess -> decode", "decode, embed -> client"} <= flows
        (address,) = local.metrics_addresses()
        await until_scraped(
            address, 'sglang_nats_ttft_seconds_count{model="smollm2",role="decode",worker="decode-0"} 1.0'
        )
        await until_scraped(address, 'sglang_nats_consumer_pending{consumer="decode-smollm2",stream="WORK"} 0.0')

        watching = asyncio.create_task(local.until_failed())
        decode = next(child for child in local.children if child.settings.role == "decode")
        assert decode.process
        decode.process.kill()
        await until(lambda: decode.restarts == 1 and decode.state == "ready", "decode is ready again")
        assert [line.split()[0] for line in local.recent] == ["decode-0", "decode-0"]
        assert await answer(local.url) == 8
        watching.cancel()
    assert len(started) == 4  # nats-server and three workers
    assert not [process for process in set(descendants()) - before if process.status() != psutil.STATUS_ZOMBIE]


async def test_a_worker_that_cannot_start_is_named_with_its_reason(tmp_path: Path) -> None:
    before = set(descendants())
    bad = GroupSettings(role="no-such-role")
    with pytest.raises(WorkerStartError, match=r"no-such-role-0 ended with exit code \d"):
        async with running(topology(PREPROCESS, bad), tmp_path) as local:
            await local.start()
            await local.until_ready()
    assert not [process for process in set(descendants()) - before if process.status() != psutil.STATUS_ZOMBIE]


async def test_the_reason_is_the_sentence_of_the_worker(tmp_path: Path) -> None:
    missing = GroupSettings(role="preprocess", models={"m": "builtin:nothing"})
    with pytest.raises(WorkerStartError, match=r"^preprocess-0 ended with exit code 1: no built-in model"):
        async with running(topology(missing), tmp_path) as local:
            await local.start()
            await local.until_ready()


async def test_a_late_worker_is_named(tmp_path: Path) -> None:
    settings = TopologySettings(model=MODEL, model_path=BUILTIN_MODEL, start_s_max=0.01, workers=(PREPROCESS,))
    with pytest.raises(WorkerStartError, match=r"preprocess-0 did not become ready within 0\.01 s"):
        async with running(settings, tmp_path) as local:
            await local.start()
            await local.until_ready()


@contextlib.asynccontextmanager
async def up(folder: Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, list[psutil.Process]]]:
    """The command `up`, ready, and every process below it."""
    file = folder / "one.toml"
    file.write_text('[[workers]]\nrole = "telemetry"\n')
    command = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pipeline.cli", "up", str(file), "--folder", str(folder / "run")),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        assert command.stderr
        async with asyncio.timeout(START_S_MAX):
            while b"Everything is ready" not in await command.stderr.readline():
                assert not command.stderr.at_eof(), "it ended"
        children = psutil.Process(command.pid).children(recursive=True)
        assert len(children) == 2, "nats-server and one worker"
        yield command, children
    finally:
        with contextlib.suppress(ProcessLookupError):
            command.kill()
        await command.wait()


async def test_everything_dies_with_the_command(tmp_path: Path) -> None:
    """kill -9 of `up`: neither the broker nor a worker stays."""
    async with up(tmp_path) as (command, children):
        command.kill()
        _, alive = await asyncio.to_thread(psutil.wait_procs, children, START_S_MAX)
        assert not alive


async def test_up_ends_in_order_on_a_signal(tmp_path: Path) -> None:
    async with up(tmp_path) as (command, children):
        command.send_signal(signal.SIGTERM)
        async with asyncio.timeout(START_S_MAX):
            assert await command.wait() == 0
        assert not [process for process in children if process.is_running()]


def test_a_child_tells_what_it_does_and_why_it_ended(tmp_path: Path) -> None:
    child = Child(WorkerSettings(role="decode", worker="w"), {}, tmp_path / "w.log")
    assert (child.doing(), child.last_words()) == ("", "it wrote nothing to its log")
    child.log_path.write_text('{"event": "engine_started", "level": "info"}\n')
    assert child.doing() == "engine started"
    child.log_path.write_text('{"event": "worker_failed", "level": "error", "reason": "no disk"}\nbye\n')
    assert (child.doing(), child.last_words()) == ("bye", "no disk")
