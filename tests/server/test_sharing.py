"""Whole topologies of real processes with the simulated engine: work is shared, and nothing is lost or doubled."""

import asyncio
import time
from collections import Counter
from pathlib import Path

import msgspec
import pytest

from pipeline.bus import Bus, Received
from pipeline.client import Client
from pipeline.config import BUILTIN_MODEL, SimulatedSettings, TopologySettings, load_topology
from pipeline.engine.simulated import expected_tokens
from pipeline.local import LocalTopology, running
from subjects import names, streams
from subjects.codec import TokenIds, decode
from subjects.messages import Frame, MetricsSnapshot

MODEL = "smollm2"
REQUESTS = 1_000
AT_ONCE = 64
TOKENS = 8
READY_S_MAX = 60.0


def topology(**simulated: float) -> TopologySettings:
    """Two preprocess, two decode, one telemetry."""
    shipped = load_topology("simulated")
    groups = tuple(
        msgspec.structs.replace(group, simulated=SimulatedSettings(**simulated)) if group.role == "decode" else group
        for group in shipped.workers
    )
    return msgspec.structs.replace(shipped, workers=groups)


class Seen:
    """Every frame on the wire, and what each preprocess worker says that it has done."""

    def __init__(self) -> None:
        self.ends: Counter[str] = Counter()
        self.decoded: Counter[str] = Counter()
        self.preprocessed: dict[str, float] = {}
        self._metrics = asyncio.Event()

    async def watch(self, bus: Bus) -> None:
        await bus.subscribe(names.RESPONSES.any(), self._hear_frame)
        await bus.subscribe(names.METRICS.any(role="preprocess"), self._hear_metrics)
        await bus.flush()

    def _hear_frame(self, received: Received) -> None:
        frame = decode(Frame, received.payload)
        if frame.finish_reason:
            self.ends[frame.request_id] += 1
            self.decoded[frame.worker or ""] += 1

    def _hear_metrics(self, received: Received) -> None:
        snapshot = decode(MetricsSnapshot, received.payload)
        self.preprocessed[snapshot.worker] = sum(
            sample.value
            for family in snapshot.families
            for sample in family.samples
            if sample.name == "sglang_nats_stage_seconds_count"
        )
        self._metrics.set()

    async def until_preprocessed(self, count: int, timeout_s: float = 20.0) -> None:
        async with asyncio.timeout(timeout_s):
            while sum(self.preprocessed.values()) < count:
                self._metrics.clear()
                await self._metrics.wait()


async def ask(client: Client, number: int, gate: asyncio.Semaphore) -> list[int]:
    prompt = TokenIds.of([number + 10, 11, 12])
    async with gate:
        tokens = []
        async for frame in client.generate(
            model=MODEL, prompt=tuple(prompt), max_tokens=TOKENS, ignore_eos=True, request_id=f"r{number}"
        ):
            assert frame.error is None, frame.error
            tokens += frame.token_ids.tolist()
        return tokens


async def until(holds, timeout_s: float = 20.0) -> None:
    """Wait for something that only asking the broker can tell."""
    async with asyncio.timeout(timeout_s):
        while not await holds():  # each question is a round trip to the broker
            pass


@pytest.mark.timeout(180)
async def test_two_by_two_processes_share_a_thousand_requests(tmp_path: Path, capsys):
    seen = Seen()
    async with running(topology(ttft_ms=1, itl_ms=1), tmp_path) as local:
        await local.start()
        async with asyncio.timeout(READY_S_MAX):
            await local.until_ready()
        async with Client.connect(local.url) as client:
            bus = await Bus.connect(local.url, name="test")
            await seen.watch(bus)
            gate = asyncio.Semaphore(AT_ONCE)
            outputs = await asyncio.gather(*(ask(client, number, gate) for number in range(REQUESTS)))

            async def queues_are_empty() -> bool:
                states = [await bus.stream_state(stream.name) for stream in (streams.REQUESTS, streams.WORK)]
                return not any(state.messages for state in states)

            await until(queues_are_empty)
            await seen.until_preprocessed(REQUESTS)
            await bus.close()

    for number, output in enumerate(outputs):
        assert output == expected_tokens(TokenIds.of([number + 10, 11, 12]), TOKENS).tolist()
    assert seen.ends == Counter({f"r{number}": 1 for number in range(REQUESTS)})
    assert sum(seen.preprocessed.values()) == REQUESTS
    with capsys.disabled():
        print(f"\nshares: preprocess {seen.preprocessed}, decode {dict(seen.decoded)}")
    assert all(share > REQUESTS / 20 for share in (*seen.preprocessed.values(), *seen.decoded.values()))
    assert len(seen.preprocessed) == len(seen.decoded) == 2


@pytest.mark.timeout(120)
async def test_a_request_sent_before_any_worker_is_up_waits_and_is_served(nats_server, tmp_path: Path):
    settings = msgspec.structs.replace(topology(), nats=msgspec.structs.replace(topology().nats, url=nats_server.url))
    bus = await Bus.connect(nats_server.url, name="test")
    await bus.provision(streams.STREAMS, streams.CONSUMERS, streams.BUCKETS)
    async with Client.connect(nats_server.url) as client:
        waiting = asyncio.create_task(ask(client, 1, asyncio.Semaphore()))

        async def is_queued() -> bool:
            return (await bus.stream_state(streams.REQUESTS.name)).messages == 1

        await until(is_queued)
        local = LocalTopology(settings, tmp_path)
        try:
            await local.start()
            async with asyncio.timeout(READY_S_MAX):
                assert await waiting == expected_tokens(TokenIds.of([11, 11, 12]), TOKENS).tolist()
        finally:
            await local.stop()
    await bus.close()


@pytest.mark.timeout(120)
async def test_a_deadline_without_a_worker_and_a_model_that_nobody_knows_are_clear_errors(tmp_path: Path):
    settings = topology()
    only_preprocess = tuple(group for group in settings.workers if group.role == "preprocess")
    only_preprocess = tuple(
        msgspec.structs.replace(group, models={MODEL: BUILTIN_MODEL}, count=1) for group in only_preprocess
    )
    async with running(msgspec.structs.replace(settings, workers=only_preprocess), tmp_path) as local:
        await local.start()
        await local.until_ready()
        loop = asyncio.get_running_loop()
        async with Client.connect(local.url) as client:
            began = loop.time()
            frames = [
                frame async for frame in client.generate(model=MODEL, prompt="hi", n=2, deadline=time.time() + 1.0)
            ]
            assert sorted(frame.choice for frame in frames) == [0, 1]
            assert {frame.error.code for frame in frames} == {"deadline_exceeded"}
            assert "no worker" in frames[0].error.message
            assert loop.time() - began < 5.0
            (frame,) = [frame async for frame in client.generate(model="nobody", prompt="hi")]
            assert (frame.error.code, frame.error.status, frame.error.field) == ("unknown_model", 404, "model")
            assert MODEL in frame.error.message
