"""What telemetry asks the broker: queues, leases and pauses."""

import asyncio
import time
from datetime import UTC, datetime, timedelta

import pytest
import pytest_asyncio

from pipeline import queues as module
from pipeline.bus import Bus
from pipeline.queues import QueueReader
from subjects import names, streams
from tests.server.conftest import Log, freeze, thaw

DECODE = streams.decode_any("m")
KEY = (DECODE.stream, DECODE.name)


@pytest_asyncio.fixture
async def pipeline(bus: Bus) -> Bus:
    """A connection with all streams and the consumer of one model's decode workers."""
    await bus.provision(streams.STREAMS, (*streams.CONSUMERS, DECODE), ())
    return bus


async def publish(bus: Bus, count: int, first: int = 0) -> None:
    for number in range(first, first + count):
        await bus.publish_durable(names.DECODE_ANY.of(model="m"), b"%d" % number)


async def test_it_tells_what_waits_what_is_in_work_and_since_when(pipeline: Bus, log: Log) -> None:
    reader = QueueReader(pipeline)
    idle = await reader.read(["m"])
    assert (idle.consumers[KEY].pending, idle.oldest_s[KEY]) == (0, 0.0)
    assert idle.depths == {("requests", "m"): 0, ("decode", "m"): 0, ("prefill", "m"): 0, ("embed", "m"): 0}

    before_s = time.time()
    await publish(pipeline, 3)
    puller = await pipeline.pull(DECODE, log.add, credit=1)
    (first,) = await log.until(lambda taken: len(taken) == 1)
    busy = await reader.read(["m", "unknown"])
    assert (busy.consumers[KEY].pending, busy.consumers[KEY].ack_pending) == (2, 1)
    assert {queue: depth for queue, depth in busy.depths.items() if depth} == {("decode", "m"): 3}
    assert 0 < busy.oldest_s[KEY] <= time.time() - before_s
    assert busy.streams["WORK"].messages == 3
    assert busy.storage.file_bytes > 0
    assert busy.consumers[KEY].paused_until_unix_s is None

    await pipeline.ack(first)
    acked = await reader.read(["m"])  # the floor moved: the second task is the oldest now
    assert acked.depths["decode", "m"] == 2
    assert acked.storage.api_errors == idle.storage.api_errors, "a consumer that is not there was asked for"
    second = await pipeline.next_stored("WORK", names.DECODE_ANY.of(model="m"), 1)
    second_age_s = time.time() - second.stored_unix_s
    assert 0 < acked.oldest_s[KEY] <= second_age_s
    await puller.stop()


async def test_the_oldest_task_is_read_once_while_it_stays_the_oldest(pipeline: Bus, monkeypatch) -> None:
    """Each look-up carries a whole prompt."""
    looked_up = []
    next_stored = pipeline.next_stored

    async def counted(*args):
        looked_up.append(args)
        return await next_stored(*args)

    monkeypatch.setattr(pipeline, "next_stored", counted)
    reader = QueueReader(pipeline)
    await publish(pipeline, 1)
    ages_s = [(await reader.read(["m"])).oldest_s[KEY] for _ in range(3)]
    assert ages_s == sorted(ages_s) and ages_s[0] < ages_s[2]
    assert len(looked_up) == 1
    monkeypatch.setattr(module, "REREAD_S", 0.0)
    await reader.read(["m"])
    assert len(looked_up) == 2


async def test_a_paused_consumer_shows(pipeline: Bus) -> None:
    until = datetime.now(UTC) + timedelta(minutes=1)
    await pipeline.api(f"CONSUMER.PAUSE.{DECODE.stream}.{DECODE.name}", {"pause_until": until.isoformat()})
    paused = (await QueueReader(pipeline).read(["m"])).consumers[KEY]
    assert paused.paused_until_unix_s == pytest.approx(until.timestamp(), abs=1)
    await pipeline.api(f"CONSUMER.PAUSE.{DECODE.stream}.{DECODE.name}", {})
    assert (await QueueReader(pipeline).read(["m"])).consumers[KEY].paused_until_unix_s is None


async def test_a_broker_that_does_not_answer_is_none_in_time(pipeline: Bus, nats_server, monkeypatch) -> None:
    monkeypatch.setattr(module, "ASK_S_MAX", 0.5)
    freeze(nats_server)
    try:
        async with asyncio.timeout(2.0):
            assert await QueueReader(pipeline).read(["m"]) is None
    finally:
        thaw(nats_server)
