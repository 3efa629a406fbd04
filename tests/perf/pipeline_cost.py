"""What the pipeline itself costs: a simulated engine that takes no time, beside as many hops of bare nats-py.

    python tests/perf/pipeline_cost.py [--runs 5] [--requests 2000] [--levels 1,16,64,256]

Every run measures, one after the other: bare nats-py (a request through two work queues, in processes of their own, and
32 frames back), the pipeline over NATS, and through the gateway. Prompts have 128 words, answers 32 tokens. Prints a
table of medians with the range over the runs, and ratios to bare nats-py.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import msgspec
import nats
import uvloop
from nats.js.api import StreamConfig

from pipeline.bench.command import measured
from pipeline.bench.result import Settings
from pipeline.config import GatewaySettings, GroupSettings, SimulatedSettings, load_topology
from pipeline.local import running
from subjects.codec import TokenIds, encode
from subjects.messages import Frame

TOKENS = 32
PROMPT = b"x" * 700  # about 128 words
FRAME = encode(Frame(request_id="0" * 32, index=5, token_ids=TokenIds.of([7]), text=" word"))
START_S_MAX = 60.0
ANSWER_S_MAX = 30.0
FETCHED = 64
QUEUES = ("bare.requests", "bare.work")


async def serve_bare(url: str, queue: str) -> None:
    """One of the two processes between a request and its frames; the request's headers say where they go."""
    connection = await nats.connect(url)
    stream = connection.jetstream()
    pulling = await stream.pull_subscribe(queue, durable=queue.replace(".", "-"))
    while True:
        try:
            tasks = await pulling.fetch(FETCHED, timeout=5)
        except TimeoutError:
            continue
        for task in tasks:
            if queue == QUEUES[0]:
                await stream.publish_async(QUEUES[1], task.data, headers=task.headers)
            else:
                for _ in range(TOKENS):
                    await connection.publish(task.headers["To"], FRAME)
            await task.ack()


async def load_bare(url: str, level: int, requests: int) -> tuple[float, float]:
    """Requests a second, and TTFT in ms at the median, of a closed loop."""
    connection = await nats.connect(url)
    stream, left, firsts_s = connection.jetstream(), iter(range(requests)), []
    frames: dict[str, asyncio.Queue[float]] = {}

    async def hear(message) -> None:
        frames[message.subject].put_nowait(time.perf_counter())

    async def user(number: int) -> None:
        subject = f"bare.frames.{number}"
        frames[subject] = asyncio.Queue()
        for _ in left:
            sent_s = time.perf_counter()
            await stream.publish(QUEUES[0], PROMPT, headers={"To": subject})
            arrivals_s = [await asyncio.wait_for(frames[subject].get(), ANSWER_S_MAX) for _ in range(TOKENS)]
            firsts_s.append(arrivals_s[0] - sent_s)

    await connection.subscribe("bare.frames.*", cb=hear)
    await connection.flush()
    began_s = time.perf_counter()
    await asyncio.gather(*(user(number) for number in range(level)))
    took_s = time.perf_counter() - began_s
    await connection.close()
    return requests / took_s, 1e3 * statistics.median(firsts_s)


async def load_pipeline(url: str, level: int, requests: int, gateway: str | None) -> tuple[float, float]:
    settings = Settings(
        target="http" if gateway else "nats",
        url=gateway or "",
        concurrency=level,
        requests=requests,
        output_min=TOKENS,
        output_max=TOKENS,
        warmup=level,
    )
    done = await measured(settings, url, None, {}, None)
    for doubt in done.warnings:
        print(f"doubtful, {level} in flight, {settings.target}: {doubt}", file=sys.stderr)
    if done.summary.ok < requests or done.summary.ttft_ms is None:
        raise SystemExit(f"not all were answered: {done.summary.codes}")
    return done.summary.requests_per_s, done.summary.ttft_ms.p50


def topology():
    shipped = load_topology("simulated")
    fast = SimulatedSettings(ttft_ms=0, itl_ms=0, max_running_requests=512)
    groups = [
        msgspec.structs.replace(group, count=1, simulated=fast)
        for group in shipped.workers
        if group.role != "telemetry"
    ]
    groups.append(GroupSettings(role="gateway", gateway=GatewaySettings(port=0)))
    return msgspec.structs.replace(shipped, workers=tuple(groups))


async def measure(runs: int, requests: int, levels: list[int]) -> None:
    found: dict[tuple[int, str], list[tuple[float, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        async with running(topology(), Path(folder)) as local:
            await local.start()
            async with asyncio.timeout(START_S_MAX):
                await local.until_ready()
            gateway = local.gateway_addresses()[0]  # of its log's end: later it is too far back
            connection = await nats.connect(local.url)
            bare = StreamConfig(name="BARE", subjects=list(QUEUES), retention="workqueue")
            await connection.jetstream().add_stream(bare)
            await connection.close()
            command = (sys.executable, __file__, "--nats", local.url, "--queue")
            servers = [await asyncio.create_subprocess_exec(*command, queue) for queue in QUEUES]
            try:
                for number in range(runs):
                    for level in levels:
                        print(f"run {number + 1} of {runs}, {level} in flight", file=sys.stderr)
                        asked = min(requests, 100 * level)
                        found[level, "bare nats-py"].append(await load_bare(local.url, level, asked))
                        found[level, "NATS"].append(await load_pipeline(local.url, level, asked, None))
                        found[level, "gateway"].append(await load_pipeline(local.url, level, asked, gateway))
            finally:
                for server in servers:
                    if server.returncode is None:
                        server.kill()
                    await server.wait()
    show(found)


def show(found: dict[tuple[int, str], list[tuple[float, float]]]) -> None:
    print("| in flight | over | requests/s | / bare | TTFT p50, ms | / bare |\n|---|---|---|---|---|---|")
    for (level, way), values in found.items():
        bare = found[level, "bare nats-py"]
        cells = []
        for which in (0, 1):
            figures = [value[which] for value in values]
            median = statistics.median(figures)
            ratio = median / statistics.median(value[which] for value in bare)
            cells += [f"{median:,.2f} ({min(figures):,.2f} - {max(figures):,.2f})", f"{ratio:.2f}"]
        print(f"| {level} | {way} | {' | '.join(cells)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--requests", type=int, default=2_000)
    parser.add_argument("--levels", default="1,16,64,256")
    parser.add_argument("--nats", help=argparse.SUPPRESS)
    parser.add_argument("--queue", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.queue:
        uvloop.run(serve_bare(given.nats, given.queue))
    else:
        uvloop.run(measure(given.runs, given.requests, [int(level) for level in given.levels.split(",")]))
