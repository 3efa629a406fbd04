"""A chaos run: a whole topology under load, struck every few seconds, and what must be true at its end.

`python tests/faults/chaos.py --seconds 300 --requests 20000 --seed 7` runs it outside pytest.
"""

import argparse
import asyncio
import contextlib
import itertools
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import msgspec
import uvloop
from injection import Faults
from load import MODEL, Load, Mixed, Results, misfit
from partition import Proxy

from pipeline.bus import Bus
from pipeline.client import Client
from pipeline.config import load_topology
from pipeline.local import LocalTopology, running
from pipeline.nats_server import NatsServer
from pipeline.peers import all_consumers
from pipeline.presence import Presence
from pipeline.progress import Progress
from subjects import names, streams
from subjects.messages import Frame

INTERVAL_S = (1.5, 4.0)
USERS = 96
QUIET_S_MAX = 60.0
LOOK_S = 0.5  # heartbeats tell of engines once a second
WORKER_SEEDS = (1, 2, 3, 4)
"""As in infra/topologies/chaos.toml."""


@dataclass
class Outcome:
    """A run, and everything that was not as promised."""

    seed: int
    seconds: float
    results: Results
    faults: Counter[str]
    history: list[str]
    wrong: list[str]

    def report(self) -> str:
        results = self.results
        ranked = sorted(results.seconds)
        times = f"p50 {statistics.median(ranked):.2f} p99 {ranked[int(len(ranked) * 0.99)]:.2f} max {ranked[-1]:.2f} s"
        lines = [
            f"seed {self.seed}: {results.whole} requests in {self.seconds:.0f} s, {sum(self.faults.values())} faults "
            f"{dict(self.faults)}",
            f"latency {times}; attempts {dict(sorted(results.attempts.items()))}; {results.resumed} choices went on at "
            f"another worker in mid-stream; errors {dict(results.errors) or 'none'}",
            f"heard live and lost by a killed broker before it was in the log: {len(results.mixed)}",
            f"not as promised: {len(self.wrong)}",
            *self.wrong[:20],
        ]
        return "\n".join(lines)


async def run_chaos(folder: Path, *, seed: int, seconds: float, requests: int = 0) -> Outcome:
    """Strike for `seconds`, and until so many requests are asked; then let everything end, and look."""
    server = NatsServer(folder / "nats")
    server.start()
    proxy = Proxy(server)
    topology = load_topology("chaos")
    nats = msgspec.structs.replace(topology.nats, url=await proxy.start())
    try:
        async with running(msgspec.structs.replace(topology, nats=nats), folder) as local:
            await local.start()
            await local.until_ready()
            faults = Faults(local, server, proxy, seed)
            return await _strike(local, server, faults, seed=seed, seconds=seconds, requests=requests)
    finally:
        await proxy.close()
        server.kill()


async def _strike(
    local: LocalTopology, server: NatsServer, faults: Faults, *, seed: int, seconds: float, requests: int
) -> Outcome:
    watching = asyncio.create_task(local.until_failed())
    began_s = time.monotonic()
    async with Client.connect(server.url, client="chaos") as client:
        load = Load(client, seed, WORKER_SEEDS)
        asking = asyncio.create_task(load.run(USERS))
        striking = asyncio.create_task(faults.strike(INTERVAL_S))
        while time.monotonic() - began_s < seconds or load.asked < requests:
            await asyncio.wait({asking, striking, watching}, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
            for task in (asking, striking, watching):
                if task.done():
                    task.result()
        striking.cancel()
        load.stop()
        await faults.heal()
        wrong = await _ended(asking, load)
        took_s = time.monotonic() - began_s
        wrong += load.results.wrong + await _left_over(local, server.url) + await _log_is_whole(client, load.results)
    watching.cancel()
    return Outcome(seed, took_s, load.results, faults.counts, faults.history, wrong)


async def _ended(asking: asyncio.Task[None], load: Load) -> list[str]:
    """Wait for the last answers."""
    done, _ = await asyncio.wait({asking}, timeout=QUIET_S_MAX)
    if done:
        asking.result()
        return []
    answered = load.results.choices.keys()
    missing = [f"r{number}" for number in range(load.asked) if f"r{number}" not in answered]
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    return [f"no end within {QUIET_S_MAX:g} s after the last fault: {missing}"]


async def _left_over(local: LocalTopology, url: str) -> list[str]:
    """What is left in streams, leases, engines and rooms, once nothing moves any more."""
    bus = await Bus.connect(url, name="chaos.look")
    presence = Presence(bus)
    await presence.start()
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + QUIET_S_MAX
    try:
        left = ["nothing was looked at"]
        for at_s in itertools.count(loop.time(), LOOK_S):
            left = await _left_now(bus, presence, len(local.children))
            if not left or at_s > deadline_s:
                break
            await asyncio.sleep(LOOK_S)
        return left
    finally:
        await presence.close()
        await bus.close()


async def _left_now(bus: Bus, presence: Presence, workers: int) -> list[str]:
    left = []
    for stream in (streams.REQUESTS, streams.WORK):
        if messages := (await bus.stream_state(stream.name)).messages:
            subjects = await bus.subjects_state(stream.name, names.EVERYTHING)
            left.append(f"{messages} messages left in {stream.name}: {subjects}")
    for consumer in await all_consumers(bus, [MODEL]):
        if pending := (await bus.consumer_state(consumer.stream, consumer.name)).ack_pending:
            left.append(f"{pending} leases left on {consumer.name}")
    alive = [state.heartbeat for state in presence.workers() if state.heartbeat and not state.down]
    if len(alive) != workers:
        left.append(f"{len(alive)} of {workers} workers are heard of")
    for beat in alive:
        if beat.in_flight or beat.load.running or beat.load.waiting or beat.load.kv_tokens_used:
            left.append(f"{beat.worker}: {beat.in_flight} in flight, {beat.load}")
    return left


async def _log_is_whole(client: Client, results: Results) -> list[str]:
    """The log has exactly one terminal frame for each choice of each request, and what live readers heard."""
    ends: Counter[tuple[str, int]] = Counter()
    logged: dict[tuple[str, int], list[Frame]] = {key: [] for key in results.mixed}
    async for frame in client.stored():
        key = frame.request_id, frame.choice
        ends[key] += frame.finish_reason is not None
        if key in logged:
            logged[key].append(frame)
    expected = Counter({(rid, choice): 1 for rid, count in results.choices.items() for choice in range(count)})
    wrong = [f"{key}: {ends[key]} terminal frames in the log" for key in expected if ends[key] != 1]
    return wrong + [line for key, mixed in results.mixed.items() if (line := _unlike_log(key, mixed, logged[key]))]


def _unlike_log(key: tuple[str, int], mixed: Mixed, frames: list[Frame]) -> str | None:
    """None for the one mixture that is no fault: the reader heard tokens live that the broker had not stored when it
    was killed, and that their worker, which died too, could not send again. The log goes on without them."""
    progress = Progress()
    for frame in frames:
        progress.add(frame)
    logged = progress.token_ids.tolist()
    if len(logged) == len(mixed.tokens) and misfit(mixed.prompt, logged, WORKER_SEEDS) is None:
        return None
    told = [(frame.attempt, frame.index, len(frame.token_ids), frame.finish_reason, frame.worker) for frame in frames]
    return f"{key}: {mixed.how}; the log: {told}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--requests", type=int, default=0)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    parser.add_argument("--folder", type=Path, help="keep settings, logs and streams here")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        run = run_chaos(folder, seed=options.seed, seconds=options.seconds, requests=options.requests)
        outcome = uvloop.run(run)
    print("\n".join(outcome.history))
    print(outcome.report())
    return 1 if outcome.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
