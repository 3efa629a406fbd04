"""A paused model keeps its queue: the broker hands nothing out, whichever workers come and go."""

import asyncio
from datetime import timedelta

import pytest

from pipeline import look, pause
from pipeline.cancel import Cancellations
from pipeline.config import SimulatedSettings
from pipeline.engine.simulated import SimulatedEngine
from pipeline.errors import ConfigError
from pipeline.lease import LeaseKeeper
from pipeline.responses import StreamLog
from pipeline.runner import Runner
from stages import decode as decode_stage
from subjects import names, streams
from subjects.codec import TokenIds, decode, encode
from subjects.messages import Frame, PreprocessedRequest, StopConditions
from tests.server.conftest import DEADLINE_S

MODEL = "m"


class Serving:
    """A model with a simulated engine, and its workers one after another."""

    def __init__(self, bus, log, leases) -> None:
        self.bus, self.log, self.leases = bus, log, leases
        self.engine = SimulatedEngine(SimulatedSettings(max_running_requests=4, ttft_ms=1, itl_ms=1))

    async def start(self) -> None:
        await self.bus.provision(streams.STREAMS, streams.CONSUMERS, streams.BUCKETS)
        self.cancellations = Cancellations(self.bus)
        await self.cancellations.start()
        await self.bus.subscribe(names.RESPONSES.any(), self._hear)
        await self.engine.start()

    def _hear(self, received) -> None:
        frame = decode(Frame, received.payload)
        if frame.finish_reason:
            self.log.add(frame.request_id)

    async def worker(self) -> Runner:
        stage = decode_stage.decode.bind(engine=self.engine, responses=StreamLog(self.bus), worker="w")
        runner = Runner(self.bus, self.leases, self.cancellations, stage)
        await runner.pull(*streams.decode_consumers(MODEL), slots=4)
        return runner

    async def ask(self, request_id: str, priority: int = 0, tokens: int = 2) -> None:
        request = PreprocessedRequest(
            request_id=request_id,
            client="c",
            model=MODEL,
            token_ids=TokenIds.of([5, 6]),
            stop=StopConditions(max_tokens=tokens),
        )
        await self.bus.publish_durable(names.decode_tasks(priority).of(model=MODEL), encode(request), msg_id=request_id)

    async def waiting(self) -> list[int]:
        states = [await self.bus.consumer_state("WORK", each.name) for each in streams.decode_consumers(MODEL)]
        return [state.pending for state in states]

    async def until_pulls_are_open(self, bus) -> None:
        async with asyncio.timeout(DEADLINE_S):
            for consumer in streams.decode_consumers(MODEL):
                while not (await bus.consumer_state("WORK", consumer.name)).waiting:
                    await bus.flush()


@pytest.fixture
async def serving(bus, log, nats_server):
    leases = LeaseKeeper(nats_server.url, "test")
    await leases.start()
    made = Serving(bus, log, leases)
    await made.start()
    yield made
    await made.engine.close()
    await leases.close()


async def test_a_paused_model_keeps_its_queue_over_a_new_worker_and_goes_on(serving, nats_server, capsys):
    runner = await serving.worker()
    await serving.ask("runs", tokens=400)
    async with asyncio.timeout(DEADLINE_S):
        while not runner.in_flight:
            await serving.bus.flush()
    assert await pause.pause(nats_server.url, MODEL, timedelta(hours=1)) == 0
    assert "m is paused until 20" in capsys.readouterr().err
    for priority in (1, 0, -1):
        await serving.ask(f"waits{priority}", priority)
    assert await serving.log.until(lambda items: items) == ["runs"]
    assert await serving.waiting() == [1, 1, 1]

    await runner.drain(timeout_s=0)
    runner = await serving.worker()  # it makes sure of its consumers, and must not undo the pause
    await serving.until_pulls_are_open(serving.bus)
    assert (await serving.waiting(), serving.log.items) == ([1, 1, 1], ["runs"])

    assert await pause.unpause(nats_server.url, MODEL) == 0
    assert "m goes on" in capsys.readouterr().err
    await serving.log.until(lambda items: len(items) == 4)
    await runner.drain(timeout_s=0)


async def test_a_pause_ends_by_itself(serving, nats_server):
    runner = await serving.worker()
    await serving.until_pulls_are_open(serving.bus)
    await pause.pause(nats_server.url, MODEL, timedelta(seconds=1))
    assert await pause.paused_until(serving.bus, MODEL)
    await serving.ask("waits")
    assert serving.log.items == []
    await serving.log.until(lambda items: items)
    assert await pause.paused_until(serving.bus, MODEL) is None
    await runner.drain(timeout_s=0)


async def test_streams_say_that_it_is_paused(serving, nats_server):
    for consumer in streams.decode_consumers(MODEL):
        await serving.bus.ensure_consumer(consumer)
    await pause.pause(nats_server.url, MODEL, None)
    state = await look._consumer_row(serving.bus, streams.decode_low(MODEL))
    assert state[-1] == "paused until it is unpaused"
    assert await pause.unpause(nats_server.url, MODEL) == 0
    assert (await look._consumer_row(serving.bus, streams.decode_low(MODEL)))[-1] == "-"


async def test_a_misspelt_model_is_told(serving, nats_server):
    with pytest.raises(ConfigError, match="no model 'mm': no worker has registered one yet"):
        await pause.pause(nats_server.url, "mm", None)
    assert (await serving.bus.stream_state("WORK")).consumers == 0
