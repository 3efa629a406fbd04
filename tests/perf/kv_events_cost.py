"""What KV events cost.

    python tests/perf/kv_events_cost.py             # the scheduler's thread, by page size; and a publisher on a broker
    python tests/perf/kv_events_cost.py --engine    # two real engines, events off and on, asked in turns

The first has no model: SGLang's own radix tree takes prompts in, with events off and on, in turns; then comes what we
do with the events on the same thread (translate, number, keep the set), and what the bus' loop does beside it (encode).
"""

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from pathlib import Path

from pipeline.engine.sglang import cpu_platform

cpu_platform.prepare()

import psutil  # noqa: E402
import torch  # noqa: E402
from sglang.srt.mem_cache.base_prefix_cache import InsertParams  # noqa: E402
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey  # noqa: E402

from pipeline.bus import Bus, Received  # noqa: E402
from pipeline.config import BUILTIN_MODEL  # noqa: E402
from pipeline.engine.protocol import EngineRequest  # noqa: E402
from pipeline.engine.sglang.engine import SglangEngine  # noqa: E402
from pipeline.engine.sglang.kv_event_publisher import translate  # noqa: E402
from pipeline.engine.sglang.kv_events import KvEventsSettings  # noqa: E402
from pipeline.kv_blocks import KvBlocks, batches, blocks_in  # noqa: E402
from pipeline.kv_publisher import KvPublisher, KvRank  # noqa: E402
from pipeline.nats_server import NatsServer  # noqa: E402
from subjects import names  # noqa: E402
from subjects.codec import BlockHashes, TokenIds, encode  # noqa: E402
from subjects.messages import BlocksStored, KvEvents, SamplingOptions, StopConditions  # noqa: E402

PROMPT_TOKENS = 4_096
ROUNDS = 15
PAGES = (1, 16, 64)
STEPS = 5_000
STEP_BLOCKS = (1, 64, 1_024)
ENGINE_PROMPTS = 12
ENGINE_PROMPT_TOKENS = 1_024
DEADLINE_S = 120.0


def insert_s(page: int, events: bool, first: int) -> tuple[float, list]:
    """Seconds to take one prompt of new tokens into an empty tree, and the events."""
    tree = RadixCache.create_simulated(page_size=page, enable_kv_cache_events=events)
    key = RadixKey(list(range(first, first + PROMPT_TOKENS)), extra_key=None)
    value = torch.arange(PROMPT_TOKENS, dtype=torch.int64)
    began_s = time.perf_counter()
    tree.insert(InsertParams(key=key, value=value))
    found = tree.take_events()
    return time.perf_counter() - began_s, found


def ours_s(page: int, found: list) -> tuple[float, float, int]:
    """Seconds on the scheduler's thread, seconds to encode, and bytes."""
    held = KvBlocks()
    began_s = time.perf_counter()
    events = translate(found, page)
    for event in events:
        held.apply(event)
    groups = list(batches(events))
    handed_s = time.perf_counter()
    payloads = [
        encode(KvEvents(worker="decode-0", incarnation="0123456789ab", seq=1, block_tokens=page, events=group))
        for group in groups
    ]
    assert blocks_in(events) == PROMPT_TOKENS // page
    return handed_s - began_s, time.perf_counter() - handed_s, sum(map(len, payloads))


def scheduler() -> None:
    print(f"a prompt of {PROMPT_TOKENS} new tokens; medians of {ROUNDS}, in ms")
    print("page   SGLang off   SGLang on   ours   encode   bytes   us/block")
    for page in PAGES:
        off, on, mine, coding, size = [], [], [], [], 0
        for turn in range(ROUNDS):
            off.append(insert_s(page, False, turn * PROMPT_TOKENS)[0])
            took_s, found = insert_s(page, True, turn * PROMPT_TOKENS)
            handed_s, encoded_s, size = ours_s(page, found)
            on.append(took_s)
            mine.append(handed_s)
            coding.append(encoded_s)
        a, b, c, d = (1e3 * statistics.median(times) for times in (off, on, mine, coding))
        per_block_us = 1e3 * (b - a + c) / (PROMPT_TOKENS // page)
        print(f"{page:>4} {a:>12.2f} {b:>11.2f} {c:>6.2f} {d:>8.3f} {size:>7} {per_block_us:>10.2f}")


async def published(server: NatsServer) -> None:
    """Steps of an engine, as fast as they go, through a publisher to a reader of another connection."""
    print(f"{STEPS} steps through a publisher to a reader on one loop\nblocks a step   messages/s   blocks/s")
    for blocks in STEP_BLOCKS:
        ours, readers = await Bus.connect(server.url, name="rank"), await Bus.connect(server.url, name="reader")
        heard, all_heard = 0, asyncio.Event()

        def hear(received: Received, all_heard: asyncio.Event = all_heard) -> None:
            nonlocal heard
            heard += 1
            if heard == STEPS:
                all_heard.set()

        await readers.subscribe(names.KV_EVENTS.any(), hear)
        await readers.flush()
        rank = KvPublisher(ours, KvRank(model="m", worker="w", incarnation="i", block_tokens=1))
        await rank.start()
        began_s = time.perf_counter()
        for step in range(STEPS):
            first = (step * blocks) % 200_000
            rank.publish([BlocksStored(hashes=BlockHashes.of(range(first, first + blocks)))])
            if step % 16 == 0:
                await asyncio.sleep(0)
        async with asyncio.timeout(DEADLINE_S):
            await all_heard.wait()
        took_s = time.perf_counter() - began_s
        print(f"{blocks:>13} {STEPS / took_s:>12.0f} {blocks * STEPS / took_s:>10.0f}")
        await ours.close()
        await readers.close()


async def engines(server: NatsServer) -> None:
    """CPU seconds of each engine's processes for the same prompts, asked in turns."""
    place = KvEventsSettings(url=server.url, model="m", worker="w", incarnation="i")
    both = (SglangEngine(BUILTIN_MODEL, {}), SglangEngine(BUILTIN_MODEL, {}, kv_events=place))
    spent: tuple[list[float], list[float]] = ([], [])
    draw = random.Random(1)
    try:
        for engine in both:
            await engine.start()
            await engine.warm_up()
        for number in range(ENGINE_PROMPTS):
            prompt = TokenIds.of(draw.randrange(100, 40_000) for _ in range(ENGINE_PROMPT_TOKENS))
            for which in (0, 1) if number % 2 else (1, 0):
                before_s = cpu_s(both[which])
                stop = StopConditions(max_tokens=16, ignore_eos=True)
                request = EngineRequest(
                    rid=f"r{number}", token_ids=prompt, stop=stop, sampling=SamplingOptions(temperature=0.0)
                )
                async for _ in both[which].generate(request):
                    pass
                spent[which].append(cpu_s(both[which]) - before_s)
    finally:
        for engine in both:
            await engine.close()
    print(f"CPU s of an engine's processes for {ENGINE_PROMPT_TOKENS} new tokens and 16 more, {ENGINE_PROMPTS} times")
    for name, times in zip(("off", "on"), spent, strict=True):
        print(f"{name:>4}  median {statistics.median(times):.3f}  min {min(times):.3f}  max {max(times):.3f}")


def cpu_s(engine: SglangEngine) -> float:
    times = [psutil.Process(pid).cpu_times() for pid in engine._launched.result().get_all_child_pids()]
    return sum(one.user + one.system for one in times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", action="store_true", help="with real engines")
    with_engines = parser.parse_args().engine
    if not with_engines:
        scheduler()
    with tempfile.TemporaryDirectory() as folder:
        server = NatsServer(Path(folder))
        server.start()
        try:
            asyncio.run(engines(server) if with_engines else published(server))
        finally:
            server.kill()


if __name__ == "__main__":
    main()
