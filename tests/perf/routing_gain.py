"""What routing by KV blocks brings: conversations that share system prompts, over the whole pipeline.

    python tests/perf/routing_gain.py                       # simulated engines, 8 workers
    python tests/perf/routing_gain.py --engine sglang       # two real engines on CPU
    python tests/perf/routing_gain.py --deaths              # and again, with a worker killed and another one added

Each policy gets a topology of its own with empty caches and the same conversations. `one cache` is a single worker that
sees everything: what no routing can exceed. Prints a table for docs/benchmarks.md; with --deaths, how long the killed
worker was in a prefix index that follows the topology from outside, and fails where that was over 5 s.
"""

import argparse
import asyncio
import math
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import psutil
import uvloop

from pipeline.client import Client
from pipeline.config import BUILTIN_MODEL, GroupSettings, RoutingSettings, SimulatedSettings, TopologySettings
from pipeline.kv_feed import KvIndexFeed
from pipeline.local import Child, LocalTopology, command, running
from pipeline.look import HEARD_S, looking
from pipeline.prefix_index import PrefixIndex
from pipeline.presence import Presence
from subjects import names

MODEL = "smollm2"
VOCAB_TOKENS = 30_000
SYSTEM_PROMPTS, SYSTEM_TOKENS = 5, 200
TURN_TOKENS = 80
REQUEST_S_MAX = 300.0
IN_INDEX_S_MAX = 10.0  # until the worker that is to be killed is in the index
DEAD_IN_INDEX_S_MAX = 5.0
FORGOTTEN_S_MAX = 30.0  # how long we look on
SIMULATED = SimulatedSettings(ttft_ms=5, itl_ms=5, prefill_us_per_token=200, max_running_requests=8)
SGLANG = {"max_total_tokens": 32_000, "max_running_requests": 16}
HEADS = (
    "Policy",
    "Workers",
    "Cached",
    "Of one cache",
    "TTFT p50, ms",
    "p95",
    "Run, s",
    "Preprocess CPU, ms a request",
    "Requests by worker",
    "Failed",
)


@dataclass(frozen=True)
class Load:
    """The conversations: how many, of how many turns, and how many go on at once."""

    talks: int = 40
    turns: int = 4
    at_once: int = 8
    answer_tokens: int = 16


@dataclass
class Seen:
    """What became of a load."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    ttft_s: list[float] = field(default_factory=list)
    workers: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    seconds: float = 0.0
    preprocess_cpu_s: float = 0.0
    dead_in_index_s: float = 0.0  # a killed worker; infinite: for as long as we looked on

    @property
    def cached_share(self) -> float:
        return self.cached_tokens / max(1, self.prompt_tokens)


def topology(engine: str, policy: str, workers: int) -> TopologySettings:
    decode: dict[str, Any] = {"role": "decode", "count": workers, "engine": engine, "kv_events": True}
    decode |= {"simulated": SIMULATED} if engine == "simulated" else {"sglang": SGLANG}
    return TopologySettings(
        model=MODEL,
        model_path=BUILTIN_MODEL,
        workers=(
            GroupSettings(role="preprocess", routing=RoutingSettings(policy=policy, seed=1)),  # type: ignore[arg-type]
            GroupSettings(**decode),
        ),
    )


def prompts(load: Load, seed: int = 1) -> Iterator[list[list[int]]]:
    """Of each conversation, what is new in each of its prompts: first a system prompt that others begin with too."""
    rng = random.Random(seed)
    systems = [rng.choices(range(100, VOCAB_TOKENS), k=SYSTEM_TOKENS) for _ in range(SYSTEM_PROMPTS)]
    for _ in range(load.talks):
        turns = [rng.choices(range(100, VOCAB_TOKENS), k=TURN_TOKENS) for _ in range(load.turns)]
        turns[0] = rng.choice(systems) + turns[0]
        yield turns


async def ask(client: Client, name: str, prompt: list[int], load: Load, seen: Seen) -> list[int]:
    """One turn; the answer's tokens."""
    began_s, first_s, tokens = time.perf_counter(), 0.0, list[int]()
    async for frame in client.generate(
        model=MODEL,
        prompt=tuple(prompt),
        max_tokens=load.answer_tokens,
        ignore_eos=True,
        request_id=name,
        deadline=time.time() + REQUEST_S_MAX,
    ):
        if frame.token_ids and not tokens:
            first_s = time.perf_counter() - began_s
        tokens += frame.token_ids.tolist()
        if frame.error is not None:
            seen.errors.append(f"{name}: {frame.error.code}: {frame.error.message}")
        elif frame.finish_reason and frame.usage:
            seen.prompt_tokens += frame.usage.prompt_tokens
            seen.cached_tokens += frame.usage.cached_tokens
            seen.workers[frame.worker or "?"] += 1
            seen.ttft_s.append(first_s)
    return tokens


async def talk_all(client: Client, load: Load, run: str) -> Seen:
    """All conversations, so many at once, each turn after the answer to the one before."""
    seen, gate, began_s = Seen(), asyncio.Semaphore(load.at_once), time.perf_counter()

    async def talk(number: int, turns: list[list[int]]) -> None:
        said: list[int] = []
        async with gate:
            for turn, new in enumerate(turns):
                said += new
                said += await ask(client, f"{run}-{number}-{turn}", said, load, seen)

    await asyncio.gather(*(talk(number, turns) for number, turns in enumerate(prompts(load))))
    seen.seconds = time.perf_counter() - began_s
    return seen


@asynccontextmanager
async def serving(settings: TopologySettings, folder: Path) -> AsyncIterator[tuple[LocalTopology, Client]]:
    """A topology that is ready and warm: each worker has answered something."""
    async with running(settings, folder) as local:
        await local.start()
        await local.until_ready()
        async with Client.connect(local.url) as client:
            warm, load = Seen(), Load(answer_tokens=2)
            decodes = sum(child.settings.role == "decode" for child in local.children)
            await asyncio.gather(*(ask(client, f"warm-{i}", [i + 10] * 8, load, warm) for i in range(4 * decodes)))
            yield local, client


async def measure(engine: str, policy: str, workers: int, load: Load, *, deaths: bool = False) -> Seen:
    with tempfile.TemporaryDirectory() as folder:
        async with serving(topology(engine, policy, workers), Path(folder)) as (local, client):
            preprocess = next(child.process for child in local.children if child.settings.role == "preprocess")
            assert preprocess is not None
            times_before = psutil.Process(preprocess.pid).cpu_times()
            watching = asyncio.create_task(local.until_failed())
            talking = talk_all(client, load, policy)
            seen = await (struck(local, talking, Path(folder)) if deaths else talking)
            watching.cancel()
            times = psutil.Process(preprocess.pid).cpu_times()
            seen.preprocess_cpu_s = times.user + times.system - times_before.user - times_before.system
            return seen


async def struck(local: LocalTopology, talks: Coroutine[Any, Any, Seen], folder: Path) -> Seen:
    """A run a second into which a decode worker is killed, and one is added; the topology starts the killed one again.

    Raises TimeoutError where the victim never comes into the index that is watched from outside.
    """
    victim = next(child for child in local.children if child.settings.role == "decode")
    assert victim.process is not None
    async with followed(local.url) as (presence, index):
        talking = asyncio.create_task(talks)
        await asyncio.wait({talking}, timeout=1.0)
        await in_index(index, victim.settings.worker)
        assert not talking.done(), "the run is too short to strike"
        watching = asyncio.create_task(forgotten_s(presence, index, victim.settings.worker))
        await asyncio.sleep(0)  # it looks on before the kill
        victim.process.kill()
        await added(local, victim, folder)
        seen = await talking
        seen.dead_in_index_s = await watching
    return seen


@asynccontextmanager
async def followed(url: str) -> AsyncIterator[tuple[Presence, PrefixIndex]]:
    """A prefix index kept up to date as a router keeps its own, of workers that have all been heard."""
    async with looking(url, "routing-gain") as (bus, presence):
        feed = KvIndexFeed(bus, presence, names.token(MODEL), RoutingSettings().blocks_max)
        await feed.start()
        try:
            await asyncio.sleep(HEARD_S)
            yield presence, feed.index
        finally:
            await feed.close()


def held(index: PrefixIndex, worker: str) -> bool:
    return any(rank.worker == worker for rank in index.ranks())


async def in_index(index: PrefixIndex, worker: str) -> None:
    """Wait until the index has blocks of the worker. Raises TimeoutError."""
    async with asyncio.timeout(IN_INDEX_S_MAX):
        while not held(index, worker):  # noqa: ASYNC110  the index has no event for it
            await asyncio.sleep(0.01)


async def forgotten_s(presence: Presence, index: PrefixIndex, worker: str) -> float:
    """Seconds until the index has nothing of the worker's present life; infinite where that does not come.

    Looked at when presence has told the index, and us after it: the worker's next life may be in the index soon after.
    """
    began_s, gone = time.monotonic(), asyncio.Event()

    def look(who: str, _incarnation: str) -> None:
        if who == worker and not held(index, worker):
            gone.set()

    presence.on_down(look)
    try:
        await asyncio.wait_for(gone.wait(), FORGOTTEN_S_MAX)
    except TimeoutError:
        return math.inf
    return time.monotonic() - began_s


async def added(local: LocalTopology, like: Child, folder: Path) -> asyncio.subprocess.Process:
    """One more worker like another, called `added`; it ends with the topology's broker, or this process."""
    settings = msgspec.structs.replace(like.settings, worker="added")
    path = folder / "added.json"
    path.write_bytes(msgspec.json.encode(settings))
    with (folder / "added.log").open("wb") as log:
        return await asyncio.create_subprocess_exec(*command(settings, path), stdout=log, stderr=log)


def row(name: str, workers: int, seen: Seen, whole: Seen | None) -> str:
    of_whole = f"{seen.cached_share / whole.cached_share:.0%}" if whole else "100%"
    ttft = sorted(seen.ttft_s)
    figures = f"{1e3 * statistics.median(ttft):.0f} | {1e3 * ttft[int(0.95 * len(ttft))]:.0f}"
    spread = ", ".join(str(count) for count in sorted(seen.workers.values(), reverse=True))
    return (
        f"| {name} | {workers} | {seen.cached_share:.1%} | {of_whole} | {figures} | {seen.seconds:.1f} | "
        f"{1e3 * seen.preprocess_cpu_s / len(ttft):.2f} | "
        f"{spread} | {len(seen.errors)} |"
    )


async def compare(engine: str, workers: int, load: Load, policies: list[str], deaths: bool) -> str | None:
    """Print the table; what is not as promised, as a sentence."""
    requests = load.talks * load.turns
    print(f"{engine}: {requests} requests in {load.talks} conversations, {load.at_once} at once\n")
    print(f"| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}", flush=True)
    whole = await measure(engine, "any", 1, load)
    print(row("one cache", 1, whole, None), flush=True)
    for policy in policies:
        seen = await measure(engine, policy, workers, load)
        print(row(policy, workers, seen, whole), flush=True)
    if not deaths:
        return None
    seen = await measure(engine, "kv", workers, load, deaths=True)
    print(row("kv, one killed, one added", workers + 1, seen, whole), *seen.errors[:5], sep="\n", flush=True)
    return dead_told(seen.dead_in_index_s)


def dead_told(seconds: float) -> str | None:
    """Print how long the killed worker was in the index; a complaint where that was too long."""
    if seconds > DEAD_IN_INDEX_S_MAX:
        how_long = f"{seconds:.1f} s" if math.isfinite(seconds) else f"at least {FORGOTTEN_S_MAX:g} s"
        return f"the killed worker was in the prefix index for {how_long} more, not {DEAD_IN_INDEX_S_MAX:g} s at most"
    print(f"\n{seconds:.1f} s after the kill the prefix index had nothing of the killed worker any more.", flush=True)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=["simulated", "sglang"], default="simulated")
    parser.add_argument("--workers", type=int, default=0, help="8 simulated ones, or 2 real ones")
    parser.add_argument("--policies", nargs="+", default=["kv", "any", "random"])
    parser.add_argument("--talks", type=int, default=40)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--deaths", action="store_true")
    given = parser.parse_args()
    workers = given.workers or (8 if given.engine == "simulated" else 2)
    load = Load(talks=given.talks, at_once=given.at_once)
    sys.exit(uvloop.run(compare(given.engine, workers, load, given.policies, given.deaths)))


if __name__ == "__main__":
    main()
