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
    subjects=("hops.work", "hops.log.*"),
    about="measured",
    retention="limits",
    storage="file",
    discard="old",
    max_bytes=256 * 1024 * 1024,
)
CONSUMER = ConsumerSpec(name="hops", stream="HOPS", filter_subject="hops.work")
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
    """Publish a task until a pulling worker has it in hand."""
    arrived: asyncio.Queue[float] = asyncio.Queue()
    deliveries: list[Delivery] = []

    def take(delivery: Delivery) -> None:
        deliveries.append(delivery)
        arrived.put_nowait(time.perf_counter())

    puller = await bus.pull(CONSUMER, take, credit=16)
    times = []
    for number in range(SAMPLES):
        started = time.perf_counter()
        await bus.publish_durable("hops.work", PAYLOAD, msg_id=f"w{number}.{started}")
        times.append(await asyncio.wait_for(arrived.get(), 5) - started)
        await bus.ack(deliveries.pop())
        puller.add_credit()
    await puller.stop()
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
    ("token frame until a live subscriber has it", live_frame),
    ("request / reply", request_reply),
    ("CPU of a token frame, sent and heard", functools.partial(frame_cpu, about=None)),
    ("CPU of the same with a traceparent header", functools.partial(frame_cpu, about=TRACED)),
)


async def measure(rounds: int) -> None:
    found: dict[str, list[float]] = {name: [] for name, _ in HOPS}
    with tempfile.TemporaryDirectory() as folder:
        server = NatsServer(Path(folder))
        server.start()
        try:
            bus = await Bus.connect(server.url, name="hop-cost")
            await bus.provision([STREAM], [CONSUMER], [])
            for _ in range(rounds):
                for name, hop in HOPS:
                    found[name].append(await hop(bus))
            await bus.close()
        finally:
            server.stop()
    print(f"| hop | median us | min - max of {rounds} rounds of {SAMPLES} |\n|---|---|---|")
    for name, values in found.items():
        print(f"| {name} | {statistics.median(values):.0f} | {min(values):.0f} - {max(values):.0f} |")
    print(f"\nlargest payload {limits.PAYLOAD_BYTES_MAX} bytes; one process, uvloop, server and client on one machine")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    uvloop.run(measure(parser.parse_args().rounds))
