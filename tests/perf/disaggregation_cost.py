"""What prefill and decode in engines of their own cost the first token, against one engine that does both.

    python tests/perf/disaggregation_cost.py [--rounds 5] [--lengths 16,128,512]

Starts the two shipped CPU topologies one after the other, on an otherwise idle machine, and prints the tables of
docs/benchmarks.md: medians with the range over the rounds. The parts of a disaggregated first token are read off
the bus, where every step of the handshake is a message.
"""

import argparse
import asyncio
import os
import platform
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import uvloop

from pipeline.bus import Bus, Received
from pipeline.client import Client
from pipeline.config import load_topology
from pipeline.engine.sglang.handshake import describe
from pipeline.local import running
from subjects import headers, names
from subjects.codec import decode
from subjects.messages import PrefillTask

MODEL = "smollm2"
START_S_MAX = 300.0
ANSWER_S_MAX = 60.0
VOCABULARY = range(1_000, 40_000)
PARTS = ("offer and claim", "handshake", "forward pass", "KV write", "first token to client")


class Steps:
    """Hears when a request's room was offered, named, received and written, in seconds since the Unix epoch."""

    def __init__(self) -> None:
        self._requests: dict[str, str] = {}  # by room
        self._times: defaultdict[str, dict[str, float]] = defaultdict(dict)  # by request
        self._written: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)

    async def listen(self, bus: Bus) -> None:
        await bus.subscribe(names.PREFILL_TASKS, self._hear_task)
        await bus.subscribe(names.BOOTSTRAP.any(), self._hear_handshake)
        await bus.flush()

    async def parts(self, request_id: str, asked_s: float, first_s: float) -> dict[str, float]:
        """Where the time between the question and the first token went, in seconds."""
        async with asyncio.timeout(ANSWER_S_MAX):
            await self._written[request_id].wait()
        at = self._times[request_id]
        waited_s = at["since transfer"] - at["write"]  # prefill's, from the transfer message to the last KV
        return dict(
            zip(
                PARTS,
                (at["sent"] - asked_s, at["handshake"], waited_s, at["write"], first_s - at["written"]),
                strict=True,
            )
        )

    def _hear_task(self, received: Received) -> None:
        task = decode(PrefillTask, received.payload)
        self._requests[str(task.room)] = task.request_id

    def _hear_handshake(self, received: Received) -> None:
        line = describe(received)
        request_id = self._requests.get(line.room) if line else None
        if line is None or request_id is None:
            return
        at, said = self._times[request_id], received.headers or {}
        if line.operation == "transfer":
            at["sent"] = int(said[headers.HANDSHAKE_SENT]) / 1e6
        elif line.operation == "receipt":
            at.setdefault("handshake", line.microseconds / 1e6)
        elif line.operation == "status success":
            at["written"] = time.time()
            at["since transfer"] = line.microseconds / 1e6
            at["write"] = int(said[headers.HANDSHAKE_WRITE_US]) / 1e6
            self._written[request_id].set()


async def first_token(client: Client, request_id: str, prompt: Sequence[int]) -> tuple[float, float]:
    """When the request was sent and when its first token came, in seconds since the Unix epoch."""
    asked_s = time.time()
    async for frame in client.generate(
        model=MODEL, prompt=tuple(prompt), max_tokens=1, ignore_eos=True, temperature=0.0, request_id=request_id
    ):
        assert frame.error is None, frame.error
        return asked_s, time.time()
    raise AssertionError("an answer without a frame")


async def measure(name: str, lengths: Sequence[int], rounds: int) -> tuple[dict, dict]:
    """TTFTs by length, and their parts by length and name, of one shipped topology. Seconds."""
    draw = random.Random(7)
    ttft_s, parts_s = defaultdict(list), defaultdict(lambda: defaultdict(list))
    with tempfile.TemporaryDirectory() as folder:
        async with running(load_topology(name), Path(folder)) as local:
            await local.start()
            await asyncio.wait_for(local.until_ready(), START_S_MAX)
            bus, steps = await Bus.connect(local.url, name="disaggregation-cost"), Steps()
            await steps.listen(bus)
            async with Client.connect(local.url) as client:
                for number in range(-1, rounds):  # the first of each length is for warmth
                    for length in lengths:
                        prompt = draw.choices(VOCABULARY, k=length)  # nothing of it is in a cache
                        request_id = f"{length}-{number + 1}"
                        asked_s, first_s = await first_token(client, request_id, prompt)
                        if number < 0:
                            continue
                        ttft_s[length].append(first_s - asked_s)
                        if name.endswith("disaggregated"):
                            for part, seconds in (await steps.parts(request_id, asked_s, first_s)).items():
                                parts_s[length][part].append(seconds)
            await bus.close()
    return ttft_s, parts_s


def ms(seconds: Sequence[float], digits: int = 0) -> str:
    low, middle, high = (1e3 * value for value in (min(seconds), statistics.median(seconds), max(seconds)))
    return f"{middle:.{digits}f} ({low:.{digits}f} - {high:.{digits}f})"


async def main(lengths: Sequence[int], rounds: int) -> None:
    load_before = os.getloadavg()[0]
    aggregated, _ = await measure("cpu-aggregated", lengths, rounds)
    apart, parts = await measure("cpu-disaggregated", lengths, rounds)
    print(f"{os.cpu_count()} cores, {platform.machine()}, load before {load_before:.1f}; ", end="")
    print(", ".join(f"{name} {version(name)}" for name in ("sglang", "torch", "nixl", "nats-py")))
    print(f"TTFT in ms: median (min - max) of {rounds}\n")
    print("| prompt tokens | aggregated | disaggregated | added |\n|---|---|---|---|")
    for length in lengths:
        added_ms = 1e3 * (statistics.median(apart[length]) - statistics.median(aggregated[length]))
        print(f"| {length} | {ms(aggregated[length])} | {ms(apart[length])} | {added_ms:+.0f} |")
    print(f"\n| prompt tokens | {' | '.join(PARTS)} |\n|---|{'---|' * len(PARTS)}")
    for length in lengths:
        print(f"| {length} | {' | '.join(ms(parts[length][part], 1) for part in PARTS)} |")
    handshakes = [seconds for length in lengths for seconds in parts[length]["handshake"]]
    print(f"\nhandshake, decode sends until prefill has it, over all {len(handshakes)}: {ms(handshakes, 2)} ms")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lengths", default="16,128,512")
    given = parser.parse_args()
    uvloop.run(main([int(length) for length in given.lengths.split(",")], given.rounds))
