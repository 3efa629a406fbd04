"""A worker's health over HTTP and NATS, and what it does about an engine that stands still."""

import asyncio
import contextlib
import dataclasses
import json
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pipeline import checkup, health, metrics, worker
from pipeline.bus import Bus
from pipeline.client import Client
from pipeline.config import HealthSettings, SimulatedSettings, WorkerSettings, load_topology
from pipeline.engine.protocol import EngineOutput, EngineRequest, Vitals
from pipeline.engine.simulated import SimulatedEngine, expected_tokens
from pipeline.local import running
from pipeline.nats_server import NatsServer
from pipeline.worker import Worker
from stages.decode import serve
from subjects import names, streams
from subjects.codec import TokenIds, decode, encode
from subjects.messages import ControlReply, Frame, PreprocessedRequest, StopConditions

MODEL = "m"
WAIT_S = 15.0
PROMPT = TokenIds.of([5, 6, 7])


class FreezingEngine(SimulatedEngine):
    """A simulated engine that stands still while `frozen` is set, as one whose scheduler is stopped."""

    def __init__(self) -> None:
        super().__init__(SimulatedSettings(ttft_ms=1, itl_ms=20))
        self.frozen = False

    def vitals(self) -> Vitals:
        return dataclasses.replace(super().vitals(), stopped=("scheduler",) if self.frozen else ())

    async def generate(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        async with contextlib.aclosing(super().generate(request)) as outputs:
            async for output in outputs:
                while self.frozen:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                yield output


class Serving:
    """A decode worker in this process, with its engine."""

    def __init__(self, made: Worker, engine: FreezingEngine, task: asyncio.Task[None]) -> None:
        self.worker, self.engine, self.task = made, engine, task

    async def get(self, path: str) -> tuple[int, dict[str, Any]]:
        assert self.worker._probes is not None
        return await asyncio.to_thread(get, self.worker._probes.url + path)

    async def until(self, holds: Callable[[health.Health], bool], within_s: float = WAIT_S) -> health.Health:
        async with asyncio.timeout(within_s):
            while not holds(self.worker.health()):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        return self.worker.health()


def get(url: str) -> tuple[int, dict[str, Any]]:
    try:
        with urllib.request.urlopen(url, timeout=WAIT_S) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as refused:
        return refused.code, json.load(refused)


def codes(of: dict[str, Any]) -> list[str]:
    return [reason["code"] for reason in of["reasons"]]


@pytest.fixture
async def start(nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch):
    """Starts decode workers; they are drained and closed at the end."""
    made: list[Serving] = []
    engines: dict[str, FreezingEngine] = {}
    monkeypatch.setattr(worker, "build_engine", lambda settings, _: engines[settings.worker])

    async def start_one(name: str, **settings: Any) -> Serving:
        engines[name] = FreezingEngine()
        one = Worker(
            WorkerSettings(
                role="decode",
                worker=name,
                nats=nats_server.url,
                model=MODEL,
                engine="simulated",
                health=HealthSettings(port=0, **settings),
            )
        )
        await one.open()
        serving = Serving(one, engines[name], asyncio.create_task(serve(one)))
        made.append(serving)
        await serving.until(lambda now: now.ready)
        return serving

    yield start_one
    for each in made:
        each.engine.frozen = False
        each.worker.drain()
        await asyncio.wait({each.task}, timeout=WAIT_S)
        await each.worker.close()


@pytest.fixture
async def ask(nats_server: NatsServer):
    """Publishes a task for decode, and gives its frames' queue."""
    bus = await Bus.connect(nats_server.url, name="asking")

    async def ask_one(request_id: str, max_tokens: int) -> asyncio.Queue[Frame]:
        frames: asyncio.Queue[Frame] = asyncio.Queue()
        subject = names.RESPONSES.any(request_id=request_id)
        await bus.subscribe(subject, lambda received: frames.put_nowait(decode(Frame, received.payload)))
        await bus.flush()
        request = PreprocessedRequest(
            request_id=request_id, client="c", model=MODEL, token_ids=PROMPT, stop=StopConditions(max_tokens=max_tokens)
        )
        await bus.publish_durable(names.DECODE_ANY.of(model=MODEL), encode(request), msg_id=request_id)
        return frames

    yield ask_one
    await bus.close()


async def whole(frames: asyncio.Queue[Frame], first: Frame | None = None) -> tuple[list[int], set[str]]:
    """The tokens of an answer, taken as a reader takes them, and the workers that gave them."""
    tokens: list[int] = []
    workers: set[str] = set()
    async with asyncio.timeout(WAIT_S):
        while True:
            frame, first = first or await frames.get(), None
            tokens[frame.index : frame.index + len(frame.token_ids)] = frame.token_ids.tolist()
            workers |= {frame.worker} if frame.worker else set()
            if frame.finish_reason:
                assert frame.error is None
                return tokens, workers


async def test_a_frozen_engine_gives_its_work_away_and_takes_none_until_it_generates_again(start, ask):
    first = await start("w1")
    frames = await ask("r1", 100)
    before = await asyncio.wait_for(frames.get(), WAIT_S)
    began_s = time.monotonic()
    first.engine.frozen = True
    now = await first.until(lambda now: not now.ready)
    noticed_s = time.monotonic() - began_s
    assert noticed_s < 5
    assert [reason.code for reason in now.reasons] == ["engine_wedged"]
    status, said = await first.get("/ready")
    assert (status, codes(said), said["live"]) == (503, ["engine_wedged"], True)
    second = await start("w2")
    tokens, workers = await whole(frames, before)
    assert tokens == expected_tokens(PROMPT, 100).tolist()
    assert "w2" in workers
    second.worker.drain()
    await asyncio.wait_for(second.task, WAIT_S)
    waiting = await ask("r2", 3)
    first.engine.frozen = False
    assert (await first.until(lambda now: now.ready)).healthy
    assert await whole(waiting) == (expected_tokens(PROMPT, 3).tolist(), {"w1"})


async def test_a_worker_whose_engine_stays_frozen_ends(start):
    one = await start("w1", wedged_s_max=0.5)
    one.engine.frozen = True
    await asyncio.wait_for(one.task, WAIT_S)
    assert one.worker.failure is not None
    status, said = await one.get("/live")
    assert (status, codes(said)[0]) == (503, "engine_died")


async def test_an_idle_engine_is_given_canaries(start):
    answered = metrics.CANARIES.labels("answered")
    before = answered._value.get()
    one = await start("w1", canary_s=0.1)
    async with asyncio.timeout(WAIT_S):
        while answered._value.get() == before:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert one.engine.vitals() == Vitals(outputs=0, running=0)
    assert one.worker.health().healthy


async def test_health_is_told_over_nats_and_by_the_command(start, nats_server, capsys):
    one = await start("w1")
    bus = await Bus.connect(nats_server.url, name="operator")
    answer = await bus.request(names.CONTROL.of(worker="w1", operation="health"), b"")
    await bus.close()
    reply = decode(ControlReply, answer.payload)
    assert (reply.ok, reply.result["live"], reply.result["ready"], reply.result["reasons"]) == (True, True, True, [])
    assert await checkup.check(nats_server.url, None, canary=False) == 0
    one.engine.frozen = True
    await one.until(lambda now: not now.ready)
    assert await checkup.check(nats_server.url, "w1", canary=False) == 1
    assert "w1: engine_wedged: the process scheduler is stopped" in capsys.readouterr().out


async def test_a_lost_broker_is_told_over_http(start, nats_server):
    one = await start("w1")
    assert await one.get("/ready") == (200, {"worker": "w1", "live": True, "ready": True, "reasons": []})
    nats_server.kill()
    await one.until(lambda now: not now.ready)
    status, said = await one.get("/ready")
    assert (status, codes(said), said["live"]) == (503, ["broker_lost"], True)
    assert (await one.get("/live"))[0] == 200
    assert (await asyncio.to_thread(urllib_status, one.worker._probes.url + "/")) == 404
    nats_server.start()
    await one.until(lambda now: now.ready)


def urllib_status(url: str) -> int:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(url, timeout=WAIT_S)
    return refused.value.code


async def test_a_blocked_event_loop_is_told_over_http(start, monkeypatch):
    monkeypatch.setattr(health, "LOOP_S_MAX", 0.2)
    one = await start("w1")
    asked = asyncio.get_running_loop().run_in_executor(None, get_late, one.worker._probes.url + "/ready")
    await asyncio.sleep(0)
    time.sleep(2.0)  # noqa: ASYNC251
    status, said = await asked
    assert (status, codes(said)) == (503, ["event_loop_blocked"])
    await one.until(lambda now: now.ready)


def get_late(url: str) -> tuple[int, dict[str, Any]]:
    time.sleep(1.5)
    return get(url)


async def test_a_full_queue_is_told_and_the_worker_stays_ready(nats_server, monkeypatch):
    small = dataclasses.replace(streams.REQUESTS, max_msgs_per_subject=2)
    others = tuple(stream for stream in streams.STREAMS if stream is not streams.REQUESTS)
    monkeypatch.setattr(streams, "STREAMS", (small, *others))
    monkeypatch.setattr(streams, "REQUESTS", small)
    monkeypatch.setattr(health, "QUEUES_S", 0.05)
    one = Worker(WorkerSettings(role="preprocess", worker="p1", nats=nats_server.url))
    await one.open()
    try:
        one.ready = True
        for number in range(2):
            await one.bus.publish_durable(names.REQUESTS.of(model=MODEL), b"{}", msg_id=f"{number}")
        async with asyncio.timeout(WAIT_S):
            while one.health().healthy:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        now = one.health()
        assert (now.ready, now.reasons[0].code) == (True, "queue_full")
        assert now.reasons[0].message.startswith("2 of at most 2 wait on ")
        assert one._heartbeat().unhealthy == ("queue_full",)
    finally:
        await one.close()


@pytest.mark.timeout(120)
async def test_the_command_sends_a_real_request_to_each_model(tmp_path: Path, capsys):
    shipped = load_topology("simulated")
    groups = tuple(
        msgspec.structs.replace(group, count=1) for group in shipped.workers if group.role in ("preprocess", "decode")
    )
    async with running(msgspec.structs.replace(shipped, workers=groups), tmp_path) as local:
        await local.start()
        await local.until_ready()
        async with Client.connect(local.url, client="warm") as client:  # the tokenizer is loaded
            async for _ in client.generate(model="smollm2", prompt="a", max_tokens=1):
                pass
        assert await checkup.check(local.url, None, canary=True) == 0
    assert "smollm2: a canary came back after " in capsys.readouterr().out
