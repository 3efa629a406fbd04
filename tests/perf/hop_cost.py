"""What one hop over NATS costs: bare nats-py and our bus side by side, against a local nats-server.

    python tests/perf/hop_cost.py [--rounds 5]

Prints a table of medians with the spread over the rounds: the figures of docs/adr/0001.
"""

import argparse
import asyncio
import functools
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import uvloop

from pipeline.bus import Bus, Delivery, Received
from pipeline.nats_server import NatsServer
from pipeline.tracing import TraceContext
from subjects import headers, limits
from subjects.codec import TokenIds, encode
from subjects.messages import Frame
from subjects.streams import ConsumerSpec, StreamSpec

SAMPLES = 2_000
STREAM = StreamSpec(
    name="HOPS",
    subjects=("hops.work", "hops.high", "hops.low", "hops.log.*"),
    about="measured",
    retention="limits",
    storage="file",
    discard="old",
    max_bytes=256 * 1024 * 1024,
)
CONSUMER = ConsumerSpec(name="hops", stream="HOPS", filter_subject="hops.work")
HIGH = ConsumerSpec(name="hops-high", stream="HOPS", filter_subject="hops.high")
LOW = ConsumerSpec(name="hops-low", stream="HOPS", filter_subject="hops.low")
PAYLOAD = bytes(1_000)
TRACED = {headers.TRACEPARENT: TraceContext.new().traceparent}
BATCH = 16
FRAME = encode(Frame(request_id="0" * 32, index=5, token_ids=TokenIds.of([7]), text=" word"))


def median_us(seconds: list[float]) -> float:
    return 1e6 * statistics.median(seconds)


async def acknowledged_publish(bus: Bus) -> float:
    """Publish to a file stream until its PubAck."""
    times = []
    for number in range(SAMPLES):
        started = time.perf_counter()
        await bus.publish_durable("hops.log.a", PAYLOAD, msg_id=f"a{number}.{started}")
        times.append(time.perf_counter() - started)
    return median_us(times)


async def work_queue_hop(bus: Bus) -> float:
    return await hop(bus, (CONSUMER,), slots=16)


async def hop_with_priorities(bus: Bus) -> float:
    return await hop(bus, (HIGH, CONSUMER, LOW), slots=16)


async def hop_into_one_slot(bus: Bus) -> float:
    return await hop(bus, (CONSUMER,), slots=1)


async def hop_into_one_slot_with_priorities(bus: Bus) -> float:
    return await hop(bus, (HIGH, CONSUMER, LOW), slots=1)


async def hop(bus: Bus, consumers: tuple[ConsumerSpec, ...], slots: int) -> float:
    """Publish a task until a worker that pulls from these consumers has it in hand."""
    arrived: asyncio.Queue[float] = asyncio.Queue()
    deliveries: list[Delivery] = []

    def take(delivery: Delivery) -> None:
        deliveries.append(delivery)
        arrived.put_nowait(time.perf_counter())

    puller = await bus.pull(consumers, take, credit=slots)
    times = []
    for number in range(SAMPLES):
        started = time.perf_counter()
        await bus.publish_durable("hops.work", PAYLOAD, msg_id=f"w{number}.{started}")
        times.append(await asyncio.wait_for(arrived.get(), 5) - started)
        await bus.ack(deliveries.pop())
        puller.add_credit()
    await puller.stop()
    return median_us(times)


async def queued_task(bus: Bus) -> float:
    return await from_a_queue(bus, (CONSUMER,))


async def queued_task_with_priorities(bus: Bus) -> float:
    return await from_a_queue(bus, (HIGH, CONSUMER, LOW))


async def from_a_queue(bus: Bus, consumers: tuple[ConsumerSpec, ...]) -> float:
    """Tasks wait; one slot comes free until the next task is in it."""
    arrived: asyncio.Queue[Delivery] = asyncio.Queue()
    await asyncio.gather(*(bus.publish_durable("hops.work", PAYLOAD) for _ in range(SAMPLES)))
    puller = await bus.pull(consumers, arrived.put_nowait, credit=1)
    times = []
    for _ in range(SAMPLES - 1):
        await bus.ack(await asyncio.wait_for(arrived.get(), 5))
        started = time.perf_counter()
        puller.add_credit()
        arrived.put_nowait(await asyncio.wait_for(arrived.get(), 5))
        times.append(time.perf_counter() - started)
    await puller.stop()
    await bus.ack(arrived.get_nowait())
    return median_us(times)


async def live_frame(bus: Bus) -> float:
    """Publish a token frame to a captured subject until a live subscriber has it."""
    arrived: asyncio.Queue[float] = asyncio.Queue()

    def hear(_: Received) -> None:
        arrived.put_nowait(time.perf_counter())

    subscription = await bus.subscribe("hops.log.frames", hear)
    await bus.flush(timeout_s=5)
    times = []
    for _ in range(SAMPLES):
        started = time.perf_counter()
        await bus.publish("hops.log.frames", FRAME)
        times.append(await asyncio.wait_for(arrived.get(), 5) - started)
    await subscription.unsubscribe()
    return median_us(times)


async def request_reply(bus: Bus) -> float:
    """A core request until its reply: the handshake's unit."""
    answer = await bus.subscribe("hops.echo", lambda received: replies.add(asyncio.ensure_future(reply(received))))
    replies: set[asyncio.Future[None]] = set()

    async def reply(received: Received) -> None:
        await bus.respond(received, b"yes")

    await bus.flush(timeout_s=5)
    times = []
    for _ in range(SAMPLES):
        started = time.perf_counter()
        await bus.request("hops.echo", b"?", timeout_s=5)
        times.append(time.perf_counter() - started)
    await answer.unsubscribe()
    return median_us(times)


async def frame_cpu(bus: Bus, about: dict[str, str] | None) -> float:
    """This process's CPU time for a token frame, sent and heard: batches as they leave when many requests stream."""
    heard = 0
    every = asyncio.Event()

    def hear(_: Received) -> None:
        nonlocal heard
        heard += 1
        if heard == SAMPLES * BATCH:
            every.set()

    subscription = await bus.subscribe("hops.log.frames", hear)
    await bus.flush(timeout_s=5)
    began = time.process_time()
    for _ in range(SAMPLES):
        for _ in range(BATCH):
            await bus.publish("hops.log.frames", FRAME, headers=about)
        await asyncio.sleep(0)
    await asyncio.wait_for(every.wait(), 60)
    spent = time.process_time() - began
    await subscription.unsubscribe()
    return 1e6 * spent / (SAMPLES * BATCH)


HOPS: tuple[tuple[str, Callable[[Bus], Awaitable[float]]], ...] = (
    ("acknowledged publish to a file stream, 1 kB", acknowledged_publish),
    ("task published until pulled by a worker, 1 kB", work_queue_hop),
    ("the same, by a worker that takes three priorities", hop_with_priorities),
    ("task published until pulled into a worker's only slot", hop_into_one_slot),
    ("the same, with three priorities", hop_into_one_slot_with_priorities),
    ("slot of a full worker free until the next queued task is in it", queued_task),
    ("the same, with three priorities", queued_task_with_priorities),
    ("token frame until a live subscriber has it", live_frame),
    ("request / reply", request_reply),
    ("CPU of a token frame, sent and heard", functools.partial(frame_cpu, about=None)),
    ("CPU of the same with a traceparent header", functools.partial(frame_cpu, about=TRACED)),
)


async def measure(rounds: int) -> None:
    found: list[list[float]] = [[] for _ in HOPS]
    with tempfile.TemporaryDirectory() as folder:
        server = NatsServer(Path(folder))
        server.start()
        try:
            bus = await Bus.connect(server.url, name="hop-cost")
            await bus.provision([STREAM], [CONSUMER], [])
            for _ in range(rounds):
                for values, (_, measured) in zip(found, HOPS, strict=True):
                    values.append(await measured(bus))
            await bus.close()
        finally:
            server.stop()
    print(f"| hop | median us | min - max of {rounds} rounds of {SAMPLES} |\n|---|---|---|")
    for (name, _), values in zip(HOPS, found, strict=True):
        print(f"| {name} | {statistics.median(values):.0f} | {min(values):.0f} - {max(values):.0f} |")
    print(f"\nlargest payload {limits.PAYLOAD_BYTES_MAX} bytes; one process, uvloop, server and client on one machine")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    uvloop.run(measure(parser.parse_args().rounds))
