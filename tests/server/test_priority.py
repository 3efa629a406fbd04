"""Priorities: whichever worker has a free slot takes the highest class that waits, over one pool of slots."""

import asyncio

import pytest

from pipeline.bus import Bus, Received
from pipeline.cancel import Cancellations
from pipeline.config import SimulatedSettings
from pipeline.engine.simulated import SimulatedEngine
from pipeline.lease import LeaseKeeper
from pipeline.responses import StreamLog
from pipeline.runner import Runner
from stages import decode as decode_stage
from subjects import names, streams
from subjects.codec import TokenIds, decode, encode
from subjects.messages import Frame, PreprocessedRequest, StopConditions
from subjects.streams import ConsumerSpec
from tests.server.conftest import DEADLINE_S, QUEUE, Log

MODEL = "m"
FIRST, SECOND, THIRD = (
    ConsumerSpec(name=f"of-{name}", stream=QUEUE.name, filter_subject=f"queue.{name}") for name in "xyz"
)


async def put(bus: Bus, name: str, *numbers: int) -> None:
    await asyncio.gather(*(bus.publish_durable(f"queue.{name}", b"%s%d" % (name.encode(), i)) for i in numbers))


def payloads(log: Log) -> list[str]:
    return [delivery.payload.decode() for delivery in log.items]


# --- the order ----------------------------------------------------------------------------------------


async def ask(bus: Bus, request_id: str, priority: int) -> None:
    request = PreprocessedRequest(
        request_id=request_id,
        client="c",
        model=MODEL,
        token_ids=TokenIds.of([5, 6]),
        stop=StopConditions(max_tokens=3),
        priority=priority,
    )
    subject = names.decode_tasks(priority).of(model=MODEL)
    await bus.publish_durable(subject, encode(request), msg_id=request_id)


async def test_a_high_one_overtakes_a_queue_of_low_ones(bus, nats_server, log):
    """50 low ones wait at an engine that runs one: a high one that comes then is the next to start."""
    await bus.provision(streams.STREAMS, streams.CONSUMERS, streams.BUCKETS)
    for number in range(50):
        await ask(bus, f"low{number}", priority=-1)

    def hear(received: Received) -> None:
        frame = decode(Frame, received.payload)
        if frame.index == 0 and frame.token_ids:
            log.add(frame.request_id)

    await bus.subscribe(names.RESPONSES.any(), hear)
    engine = SimulatedEngine(SimulatedSettings(max_running_requests=1, ttft_ms=20, itl_ms=1))
    await engine.start()
    leases, cancellations = LeaseKeeper(nats_server.url, "test"), Cancellations(bus)
    await leases.start()
    await cancellations.start()
    stage = decode_stage.decode.bind(engine=engine, responses=StreamLog(bus), worker="w")
    runner = Runner(bus, leases, cancellations, stage)
    await runner.pull(*streams.decode_consumers(MODEL), slots=1)
    await log.until(lambda items: len(items) == 5)
    await ask(bus, "high", priority=1)
    await ask(bus, "normal", priority=0)
    running = len(log.items)  # one of the low ones may start while these two are on their way
    started = await log.until(lambda items: len(items) == 52)
    assert started.index("high") <= running + 1 < 12
    assert started.index("normal") == started.index("high") + 1
    assert started[-1] == "low49"
    await runner.drain(timeout_s=0)
    await leases.close()
    await engine.close()


async def test_what_waits_comes_in_the_order_of_its_consumers(queue, log):
    for name in "zyx":
        await put(queue, name, *range(4))
    puller = await queue.pull([FIRST, SECOND, THIRD], log.add, credit=1)
    for count in range(1, 13):
        await log.until(lambda items, count=count: len(items) == count)
        if count < 12:
            puller.add_credit()
    assert "".join(payload[0] for payload in payloads(log)) == "xxxxyyyyzzzz"


# --- one pool of slots --------------------------------------------------------------------------------


async def test_consumers_share_the_slots(queue, log):
    """However the messages lie, there are as many deliveries as slots, and one more for each that comes free."""
    for name in "xyz":
        await put(queue, name, *range(20))
    puller = await queue.pull([FIRST, SECOND, THIRD], log.add, credit=25)
    await log.until(lambda items: len(items) == 25)
    await queue.flush()
    assert sorted(payload[0] for payload in payloads(log)) == ["x"] * 20 + ["y"] * 5
    assert puller.credit == 0
    puller.add_credit(10)
    await log.until(lambda items: len(items) == 35)
    await queue.flush()
    assert len(log.items) == 35


@pytest.mark.parametrize("slots", [1, 2, 16])
async def test_a_burst_over_all_consumers_into_a_listening_worker_fills_its_slots_and_no_more(queue, log, slots):
    """What comes beyond the slots goes back at once and is delivered again, here as slots come free."""
    puller = await queue.pull([FIRST, SECOND, THIRD], log.add, credit=slots)
    await until_all_are_listened_to(queue)
    await asyncio.gather(*(put(queue, name, *range(20)) for name in "xyz"))
    for taken in range(slots, 61):
        await log.until(lambda items, taken=taken: len(items) == taken)
        assert puller.credit == 0 and len(log.items) == taken
        await queue.ack(log.items[taken - slots])
        if taken < 60:
            puller.add_credit()
    assert sorted(payloads(log)) == sorted(f"{name}{i}" for name in "xyz" for i in range(20))
    again = [delivery for delivery in log.items if delivery.attempt > 1]
    assert len(again) <= 2, again


async def test_a_busy_worker_leaves_everything_to_others(queue, connect, nats_server, log):
    """No slot is free: nothing is asked for, of any consumer."""
    busy = await queue.pull([FIRST, SECOND, THIRD], log.add, credit=1)
    await until_all_are_listened_to(queue)
    await put(queue, "y", 1)
    await log.until(lambda items: items)
    await until_nothing_is_asked_for(queue)
    other = await connect(nats_server.url, name="other")
    heard = Log()
    await other.pull([FIRST, SECOND, THIRD], heard.add, credit=3)
    await put(queue, "x", 2)
    await put(queue, "z", 3)
    await heard.until(lambda items: len(items) == 2)
    assert (busy.credit, len(log.items)) == (0, 1)
    assert [delivery.attempt for delivery in heard.items] == [1, 1]


async def test_a_paused_one_takes_nothing_of_any_consumer_until_it_goes_on(queue, log):
    puller = await queue.pull([FIRST, SECOND, THIRD], log.add, credit=5)
    await until_all_are_listened_to(queue)
    await puller.pause()
    await until_nothing_is_asked_for(queue)
    for name in "xyz":
        await put(queue, name, 1)
    puller.add_credit()
    await queue.flush()
    assert log.items == []
    puller.unpause()
    await log.until(lambda items: len(items) == 3)
    assert [delivery.attempt for delivery in log.items] == [1, 1, 1]


async def test_all_goes_on_after_an_outage(queue, nats_server, log, back):
    puller = await queue.pull([FIRST, SECOND, THIRD], log.add, credit=10)
    await until_all_are_listened_to(queue)
    nats_server.kill()
    nats_server.start()
    await asyncio.wait_for(back.wait(), DEADLINE_S)
    for name in "xyz":
        await put(queue, name, 1)
    await log.until(lambda items: len(items) == 3)
    assert puller.credit == 7


async def until_all_are_listened_to(bus: Bus) -> None:
    await until(bus, lambda waiting: waiting > 0)


async def until_nothing_is_asked_for(bus: Bus) -> None:
    await until(bus, lambda waiting: waiting == 0)


async def until(bus: Bus, holds) -> None:
    """Wait until it holds for the number of open pull requests of each consumer."""
    async with asyncio.timeout(DEADLINE_S):
        for consumer in (FIRST, SECOND, THIRD):
            while not holds((await bus.consumer_state(QUEUE.name, consumer.name)).waiting):
                await bus.flush()
