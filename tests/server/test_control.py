"""Operators and workers: pause, resume, what needs an idle engine, mistakes, two at once, and NATS micro services."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from pipeline.bus import Bus
from pipeline.client import Client
from pipeline.config import BUILTIN_MODEL, SimulatedSettings, WorkerSettings, load_topology
from pipeline.control import command
from pipeline.errors import BusUnavailable, Busy, ConfigError, NoResponders, NotSupported
from pipeline.local import running
from pipeline.operations import find, parse
from pipeline.presence import Presence
from pipeline.worker import Worker
from stages import decode, preprocess
from subjects import names
from subjects.messages import Frame

MODEL = "smollm2"
WAIT_S_MAX = 20.0
COMMAND_S_MAX = 60.0
LONG = {"model": MODEL, "prompt": (20, 11, 12), "max_tokens": 4_000, "ignore_eos": True}
SHORT = LONG | {"max_tokens": 3}


class Scene:
    """One preprocess and one decode worker in this process, an operator and a client."""

    def __init__(self, bus: Bus, client: Client, workers: dict[str, Worker]) -> None:
        self.bus, self.client, self.workers = bus, client, workers

    async def ask(self, operation: str, worker: str = "decode-0", **arguments: Any) -> dict[str, Any]:
        async with asyncio.timeout(WAIT_S_MAX):
            return (await command(self.bus, worker, operation, parse(find(operation), arguments))).result

    async def by_hand(self, subject: str, payload: bytes = b"") -> tuple[dict[str, Any], dict[str, str]]:
        received = await self.bus.request(subject, payload)
        return json.loads(received.payload), received.headers or {}

    async def answer(self, **fields: Any) -> Frame:
        async with asyncio.timeout(WAIT_S_MAX):
            return [frame async for frame in self.client.generate(**SHORT | fields)][-1]

    @contextlib.asynccontextmanager
    async def running_request(self) -> AsyncIterator[AsyncIterator[Frame]]:
        """A request that has begun; it is cancelled at the end."""
        async with contextlib.aclosing(self.client.generate(**LONG)) as frames:
            async with asyncio.timeout(WAIT_S_MAX):
                await anext(frames)
            yield frames


async def until(holds: Callable[[], bool]) -> None:
    """Wait for a fact that offers no event."""
    async with asyncio.timeout(WAIT_S_MAX):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


@pytest_asyncio.fixture
async def scene(nats_server, connect) -> AsyncIterator[Scene]:
    kinds = {"preprocess": preprocess.serve, "decode": decode.serve}
    workers, serving = {}, []
    for role, serve in kinds.items():
        settings = WorkerSettings(
            role=role,
            worker=f"{role}-0",
            nats=nats_server.url,
            model=MODEL if role == "decode" else None,
            model_path=BUILTIN_MODEL,
            models={MODEL: BUILTIN_MODEL},
            engine="simulated",
            simulated=SimulatedSettings(ttft_ms=1, itl_ms=5),
        )
        worker = workers[settings.worker] = Worker(settings)
        await worker.open()
        serving.append(asyncio.create_task(serve(worker)))
    await until(lambda: all(worker.ready for worker in workers.values()))
    async with Client.connect(nats_server.url) as client:
        yield Scene(await connect(nats_server.url), client, workers)
    for worker in workers.values():
        worker.drain()
    await asyncio.wait(serving, timeout=WAIT_S_MAX)
    for worker in workers.values():
        await worker.close()


async def test_a_paused_worker_finishes_what_it_has_and_takes_nothing_new_until_resumed(scene: Scene):
    async with scene.running_request() as frames:
        facts = await scene.ask("pause")
        assert (facts["paused"], facts["in_flight"], facts["draining"]) == (["operator"], 1, False)
        waiting = asyncio.create_task(scene.answer())
        for _ in range(10):
            assert (await anext(frames)).error is None
        assert not waiting.done()
        presence = Presence(scene.bus)
        await presence.start()
        await until(lambda: any(state.heartbeat and state.heartbeat.paused for state in presence.workers("decode")))
        assert not any(state.ready for state in presence.workers("decode"))
        assert (await scene.ask("resume"))["paused"] == []
        assert (await waiting).finish_reason == "length"
        await presence.close()


async def test_an_operation_that_needs_an_idle_engine_waits_or_does_nothing(scene: Scene):
    async with scene.running_request():
        with pytest.raises(Busy, match=r"1 requests still run on decode-0 after 0\.2 s, so nothing was done"):
            await scene.ask("flush_cache", wait_s=0.2)
        assert scene.workers["decode-0"].paused == ()
        flushing = asyncio.create_task(scene.ask("flush_cache", wait_s=10))
        await until(lambda: scene.workers["decode-0"].paused == ("operation",))
        with pytest.raises(Busy, match=r"decode-0 has been at work on flush_cache for .*; release_memory has to wait"):
            await scene.ask("release_memory")
        with pytest.raises(Busy, match="at work on flush_cache"):
            await scene.ask("resume")
        assert (await scene.ask("ping"))["operation"] == "flush_cache", "who only asks is not kept waiting"
    assert await flushing == {"flushed": True}
    assert scene.workers["decode-0"].paused == ()
    assert (await scene.answer()).finish_reason == "length"


async def test_a_worker_whose_memory_is_released_takes_no_work_until_it_is_back(scene: Scene):
    assert await scene.ask("release_memory") == {"released": ["kv_cache"]}
    assert scene.workers["decode-0"].paused == ("engine_suspended",)
    with pytest.raises(Busy, match="not paused by an operator; it is for: engine_suspended"):
        await scene.ask("resume")
    waiting = asyncio.create_task(scene.answer())
    with pytest.raises(Busy, match="memory is released"):
        await scene.ask("release_memory")
    assert not waiting.done()
    await scene.ask("resume_memory")
    assert (await waiting).finish_reason == "length"


async def test_a_pause_by_an_operator_outlasts_an_operation(scene: Scene):
    await scene.ask("pause")
    await scene.ask("flush_cache")
    assert scene.workers["decode-0"].paused == ("operator",)
    await scene.ask("pause")
    assert (await scene.ask("resume"))["paused"] == [], "two pauses are one"
    assert (await scene.ask("resume"))["paused"] == [], "and to resume twice is no error"


async def test_mistakes_are_named(scene: Scene):
    control = names.CONTROL
    cases = [
        ("dance", b"", "operation: 'dance' is not one of ping, drain, pause"),
        ("ping", b'{"arguments": {"loud": true}}', "loud: ping takes no arguments"),
        ("flush_cache", b'{"arguments": {"wait": 1}}', "wait: flush_cache takes wait_s"),
        ("flush_cache", b'{"arguments": {"wait_s": -1}}', "wait_s: -1 is not allowed"),
        ("update_weights", b"{}", "model_path: update_weights needs it"),
        ("log_level", b'{"arguments": {"level": "loud"}}', "there are debug, info, warning, error"),
        ("ping", b"{", "not a ControlRequest"),
    ]
    for operation, payload, said in cases:
        reply, headers = await scene.by_hand(control.of(worker="decode-0", operation=operation), payload)
        assert (reply["ok"], reply["error"]["code"]) == (False, "invalid_request"), reply
        assert said in reply["error"]["message"]
        assert headers["Nats-Service-Error-Code"] == "400"
        assert said in headers["Nats-Service-Error"]
    with pytest.raises(NotSupported, match="flush_cache: preprocess-0 is a preprocess worker, without an engine"):
        await scene.ask("flush_cache", "preprocess-0")
    with pytest.raises(NotSupported, match="the simulated engine cannot update_weights"):
        await scene.ask("update_weights", model_path="/other")
    with pytest.raises(ConfigError, match="no worker is called 'nobody'"):
        await scene.ask("ping", "nobody")


async def test_a_drain_breaks_no_answer_off(scene: Scene):
    """Who asked for an operation that waits for an idle engine is told, though the worker ends."""
    async with scene.running_request():
        flushing = asyncio.create_task(scene.ask("flush_cache", wait_s=15))
        await until(lambda: scene.workers["decode-0"].paused == ("operation",))
        assert (await scene.ask("drain"))["draining"]
        await scene.workers["decode-0"]._commands.close()
        with pytest.raises(Busy, match="flush_cache was broken off: the worker ends"):
            await flushing


async def test_every_worker_is_a_micro_service(scene: Scene, nats_server):
    """What `nats micro ls`, `info`, `stats` and `ping` ask; tests/interop asks with another client."""
    await scene.ask("ping")
    with pytest.raises(Busy):
        await scene.ask("resume_memory")
    incarnation = scene.workers["decode-0"].incarnation
    about = {
        "name": "sglang-decode",
        "id": incarnation,
        "version": "0.1.0",
        "metadata": {"worker": "decode-0", "role": "decode", "model": MODEL},
    }
    for suffix in ("", ".sglang-decode", f".sglang-decode.{incarnation}"):
        heard: list[dict[str, Any]] = []
        inbox = scene.bus.new_inbox()
        await scene.bus.subscribe(inbox, lambda received, heard=heard: heard.append(json.loads(received.payload)))
        await scene.bus.publish(f"$SRV.PING{suffix}", b"", reply=inbox)
        everyone = ["sglang-decode"] if suffix else ["sglang-decode", "sglang-generate", "sglang-preprocess"]
        await until(lambda heard=heard, everyone=everyone: len(heard) == len(everyone))
        assert sorted(each["name"] for each in heard) == everyone
        assert about | {"type": "io.nats.micro.v1.ping_response"} in heard
    info, _ = await scene.by_hand("$SRV.INFO.sglang-decode")
    assert info["description"] == "decode worker decode-0 of model smollm2"
    subjects = {endpoint["name"]: endpoint["subject"] for endpoint in info["endpoints"]}
    assert subjects["update_weights"] == "sglang.control.decode-0.update_weights"
    assert "update_weights" not in str(await scene.by_hand("$SRV.INFO.sglang-preprocess")), "it has no engine"
    stats, _ = await scene.by_hand(f"$SRV.STATS.sglang-decode.{incarnation}")
    counted = {endpoint["name"]: endpoint for endpoint in stats["endpoints"]}
    assert (counted["ping"]["num_requests"], counted["ping"]["num_errors"]) == (1, 0)
    assert (counted["resume_memory"]["num_requests"], counted["resume_memory"]["num_errors"]) == (1, 1)
    assert "memory is not released" in counted["resume_memory"]["last_error"]
    assert counted["ping"]["processing_time"] == counted["ping"]["average_processing_time"] > 0


async def test_after_a_broker_restart_the_service_is_found_again(scene: Scene, nats_server):
    back = asyncio.Event()

    async def note() -> None:
        back.set()

    scene.bus.on_reconnect(note)
    nats_server.kill()
    nats_server.start()
    async with asyncio.timeout(WAIT_S_MAX):
        await back.wait()
        await scene.workers["decode-0"].bus.until_connected()
    assert (await scene.by_hand("$SRV.PING.sglang-decode"))[0]["name"] == "sglang-decode"
    assert (await scene.ask("ping"))["worker"] == "decode-0"


async def run(url: str, *arguments: str) -> tuple[int, str, str]:
    """Run a command to its end: its exit code, what it printed, and what it said."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pipeline.cli", *arguments, "--nats", url),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(COMMAND_S_MAX):
        printed, said = await process.communicate()
    return process.returncode or 0, printed.decode(), said.decode()


async def _until_nobody_listens(operator: Bus, subject: str) -> None:
    """Ask until the broker has seen the end of a killed worker's connection: milliseconds."""
    async with asyncio.timeout(WAIT_S_MAX):
        while True:
            try:
                await operator.request(subject, timeout_s=0.1)
            except NoResponders:
                return
            except BusUnavailable:
                continue


@pytest.mark.timeout(120)
async def test_the_command_line_asks_one_worker_or_many(tmp_path: Path):
    shipped = load_topology("simulated")
    async with running(shipped, tmp_path) as local:
        await local.start()
        async with asyncio.timeout(COMMAND_S_MAX):
            await local.until_ready()
        code, printed, _ = await run(local.url, "control", "decode-1", "ping")
        assert code == 0
        assert [line.split() for line in printed.splitlines()][:2] == [["worker", "decode-1"], ["role", "decode"]]

        code, printed, _ = await run(local.url, "control", "flush_cache", "wait_s=1", "--all", "--json")
        assert [json.loads(line) for line in printed.splitlines()] == [
            {"worker": worker, "flushed": True} for worker in ("decode-0", "decode-1")
        ]
        code, printed, said = await run(local.url, "control", "pause", "--role", "telemetry")
        assert (code, printed) == (1, "")
        assert said == "telemetry-0: not_supported: a telemetry worker takes no tasks\n"
        code, printed, said = await run(local.url, "control", "pause", "--role", "decode")
        assert (code, printed.count("operator")) == (0, 2)
        _, printed, _ = await run(local.url, "workers")
        assert printed.count("paused") == 2

        (child,) = [child for child in local.children if child.name == "decode-0"]
        assert child.process is not None
        operator = await Bus.connect(local.url, name="operator")
        os.killpg(child.process.pid, signal.SIGKILL)
        await _until_nobody_listens(operator, names.CONTROL.of(worker="decode-0", operation="ping"))
        with pytest.raises(ConfigError, match="no worker is called 'decode-0'"):
            await command(operator, "decode-0", "ping")
        await operator.close()
        code, _, said = await run(local.url, "control", "decode-9", "ping")
        assert (code, "no worker is called 'decode-9'" in said) == (1, True)
        code, _, said = await run(local.url, "control", "decode-1", "log_level", "level=loud")
        assert (code, "there are debug, info, warning, error" in said) == (1, True)
        for level, logged in (("error", 0), ("info", 1)):
            code, printed, _ = await run(local.url, "control", "decode-1", "log_level", f"level={level}")
            assert (code, printed.splitlines()[0].split()) == (0, ["level", level])
            before = (tmp_path / "decode-1.log").read_text().count("operation_done")
            assert (await run(local.url, "control", "decode-1", "flush_cache"))[0] == 0
            assert (tmp_path / "decode-1.log").read_text().count("operation_done") - before == logged
