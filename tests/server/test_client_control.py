"""`cancel` and `drain` from the command line, and a cancellation that nobody was up to hear."""

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from pipeline.bus import Bus
from pipeline.client import Client
from pipeline.config import SimulatedSettings, load_topology
from pipeline.local import LocalTopology, running
from pipeline.reader import ABSENCES_MAX, ASK_S
from subjects import names, streams
from subjects.messages import Frame

MODEL = "smollm2"
READY_S_MAX = 60.0
COMMAND_S_MAX = 60.0
GONE_S_MAX = ASK_S * (ABSENCES_MAX + 1)
LONG = {"model": MODEL, "prompt": (20, 11, 12), "max_tokens": 4_000, "ignore_eos": True}


@contextlib.asynccontextmanager
async def serving(folder: Path, url: str | None = None, itl_ms: float = 5) -> AsyncIterator[LocalTopology]:
    """One preprocess and one decode worker, not awaited."""
    shipped = load_topology("simulated")
    groups = tuple(
        msgspec.structs.replace(group, count=1, simulated=SimulatedSettings(ttft_ms=1, itl_ms=itl_ms))
        for group in shipped.workers
        if group.role in ("preprocess", "decode")
    )
    nats = msgspec.structs.replace(shipped.nats, url=url)
    async with running(msgspec.structs.replace(shipped, workers=groups, nats=nats), folder) as local:
        await local.start()
        yield local


async def command(url: str, *arguments: str) -> tuple[int, str]:
    """Run a command to its end: its exit code, and what it said."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pipeline.cli", *arguments, "--nats", url), stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(COMMAND_S_MAX):
        _, said = await process.communicate()
    return process.returncode or 0, said.decode()


async def last(frames: AsyncIterator[Frame]) -> Frame:
    async with asyncio.timeout(READY_S_MAX):
        return [frame async for frame in frames][-1]


@pytest.mark.timeout(120)
async def test_a_running_request_is_cancelled_with_a_reason(tmp_path: Path):
    async with serving(tmp_path) as local, Client.connect(local.url) as client:
        frames = client.generate(request_id="r", **LONG)
        async with asyncio.timeout(READY_S_MAX):
            await anext(frames)
        assert await command(local.url, "cancel", "r", "--reason", "no more") == (0, "request r has ended: abort\n")
        end = await last(frames)
        assert end.finish_reason == "abort"
        assert end.error and (end.error.code, end.error.message) == ("cancelled", "no more")
        assert await command(local.url, "cancel", "r") == (1, "request r has ended already\n")


@pytest.mark.timeout(120)
async def test_a_cancellation_that_nobody_heard_is_kept_for_the_worker_that_takes_the_request(
    nats_server, bus: Bus, tmp_path: Path
):
    await bus.provision(streams.STREAMS, streams.CONSUMERS, streams.BUCKETS)
    async with Client.connect(nats_server.url, client="me") as client:
        await client.submit(request_id="r", **LONG)
        code, said = await command(nats_server.url, "cancel", "r")
        assert (code, "no worker holds request r; one that takes it within 600 s ends it" in said) == (0, True), said
        async with serving(tmp_path, nats_server.url):
            end = await last(client.resume("r"))
            assert end.error and end.error.code == "cancelled"
            assert not end.token_ids
            assert (await last(client.generate(request_id="another", **LONG | {"max_tokens": 3}))).error is None


@pytest.mark.timeout(120)
async def test_a_drained_worker_finishes_what_it_has_and_ends(tmp_path: Path):
    async with serving(tmp_path, itl_ms=10) as local, Client.connect(local.url) as client:
        async with asyncio.timeout(READY_S_MAX):
            await local.until_ready()
        frames = client.generate(**LONG | {"max_tokens": 100})
        await anext(frames)
        assert await command(local.url, "drain", "decode-0") == (0, "decode-0 has finished and ended\n")
        end = await last(frames)
        assert end.usage and end.usage.completion_tokens == 100
        assert end.attempt == 1, "it was not handed over"
        said = (tmp_path / "decode-0.log").read_text()
        assert '"event": "worker_stopped"' in said
        code, said = await command(local.url, "drain", "nobody")
        assert (code, "no worker is called 'nobody'" in said) == (1, True)


@pytest.mark.timeout(120)
async def test_a_paused_model_keeps_its_requests_and_answers_those_that_expire(tmp_path: Path):
    async with serving(tmp_path) as local, Client.connect(local.url) as client:
        async with asyncio.timeout(READY_S_MAX):
            await local.until_ready()
        code, said = await command(local.url, "pause", MODEL, "--for", "1h")
        assert (code, "0 requests wait, running ones go on" in said) == (0, True), said
        kept = asyncio.create_task(last(client.generate(request_id="kept", **LONG | {"max_tokens": 3})))
        deadline_unix_s = time.time() + 3
        end = await last(client.generate(request_id="late", deadline=deadline_unix_s, **LONG))
        assert end.error and end.error.code == "deadline_exceeded"
        assert time.time() - deadline_unix_s < 5
        assert await command(local.url, "unpause", MODEL) == (0, f"{MODEL} goes on\n")
        assert (await kept).finish_reason == "length"


@pytest.mark.timeout(120)
async def test_a_worker_answers_by_hand_in_json_and_refuses_what_it_does_not_know(tmp_path: Path):
    async with serving(tmp_path) as local:
        async with asyncio.timeout(READY_S_MAX):
            await local.until_ready()
        asking = await Bus.connect(local.url, name="test")
        ping = await asking.request(names.CONTROL.of(worker="preprocess-0", operation="ping"))
        assert json.loads(ping.payload)["result"]["in_flight"] == 0
        refused = json.loads((await asking.request(names.CONTROL.of(worker="decode-0", operation="dance"))).payload)
        assert (refused["ok"], refused["error"]["code"]) == (False, "invalid_request")
        await asking.close()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("cancel_if_gone", [True, False])
async def test_a_request_whose_reader_dies_is_cancelled_if_it_was_to_be(tmp_path: Path, cancel_if_gone: bool):
    """A request that its reader does not end with goes on."""
    async with serving(tmp_path) as local, Client.connect(local.url, client="me") as survivor:
        async with Client.connect(local.url, client="me") as reader:
            asked = LONG | {"max_tokens": 3_000}  # 15 s: longer than it takes to notice
            frames = reader.generate(request_id="r", cancel_if_gone=cancel_if_gone, **asked)
            async with asyncio.timeout(READY_S_MAX):
                await anext(frames)
            await asyncio.sleep(GONE_S_MAX)  # no wait for anything: a reader that lives is not gone
            following = asyncio.create_task(last(survivor.resume("r")))
            await asyncio.sleep(0)
            assert not following.done()
        end = await following
        assert end.finish_reason == ("abort" if cancel_if_gone else "length")
        if cancel_if_gone:
            assert end.error and end.error.message == "its reader is gone"
