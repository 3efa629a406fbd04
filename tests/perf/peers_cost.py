"""What it costs that idle decode workers keep requests open at each other's consumers, and one hop to a worker.

    python tests/perf/peers_cost.py [--workers 32] [--seconds 20]

All workers are pullers of one process over connections of their own; CPU is the broker's, in percent of one core.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path

import psutil
import uvloop

from pipeline.bus import Bus, Delivery, Puller
from pipeline.nats_server import NatsServer
from pipeline.peers import Peers
from pipeline.presence import Presence
from subjects import names, streams

MODEL = "m"
SLOTS = 64
HOPS = 500
SETTLED_S = 5.0


class Taker:
    """One worker's puller, which settles what it gets and notes when and where it came."""

    def __init__(self, bus: Bus, name: str, arrived: asyncio.Queue[tuple[str, float]]) -> None:
        self.bus, self.name, self._arrived = bus, name, arrived
        self.puller: Puller

    async def begin(self, presence: Presence, *, helping: bool) -> None:
        others = Peers(self.bus, presence, MODEL, self.name) if helping else None
        takes = streams.decode_takes(MODEL, self.name)
        self.puller = await self.bus.pull(takes, self._take, credit=SLOTS, others=others)

    def _take(self, delivery: Delivery) -> None:
        self._arrived.put_nowait((self.name, time.perf_counter()))
        self.bus.spawn(self._settle(delivery))

    async def _settle(self, delivery: Delivery) -> None:
        await self.bus.ack(delivery)
        self.puller.add_credit()


async def hop_us(bus: Bus, subject: str, arrived: asyncio.Queue[tuple[str, float]]) -> tuple[float, set[str]]:
    """The median time from publishing to a worker's hands, and whose hands they were."""
    times, whose = [], set()
    for _ in range(HOPS):
        began_s = time.perf_counter()
        await bus.publish_durable(subject, b"x" * 500)
        worker, at_s = await arrived.get()
        times.append(at_s - began_s)
        whose.add(worker)
    return 1e6 * statistics.median(times), whose


async def measure(workers: int, seconds: float, *, helping: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        server = NatsServer(Path(folder))
        server.start()
        buses = [await Bus.connect(server.url, name=f"w{number}") for number in range(workers)]
        await buses[0].provision(streams.STREAMS, streams.CONSUMERS, streams.BUCKETS)
        arrived: asyncio.Queue[tuple[str, float]] = asyncio.Queue()
        takers = [Taker(bus, bus.name, arrived) for bus in buses]
        presence = Presence(buses[0])
        await presence.start()
        for taker in takers:
            await taker.begin(presence, helping=helping)
        await asyncio.sleep(SETTLED_S)
        process = psutil.Process(server.pid)
        process.cpu_percent()
        await asyncio.sleep(seconds)
        cpu = process.cpu_percent()
        own_us, whose = await hop_us(buses[0], names.DECODE_WORKER.of(model=MODEL, worker="w1"), arrived)
        any_us, _ = await hop_us(buses[0], names.DECODE_ANY.of(model=MODEL), arrived)
        print(
            f"{workers} workers, {'helping' if helping else 'each alone'}: broker idle {cpu:.1f} % of a core; "
            f"hop to a worker {own_us:.0f} us (got by {len(whose)}), to any {any_us:.0f} us",
            flush=True,
        )
        for taker in takers:
            await taker.puller.stop()
        await presence.close()
        for bus in buses:
            await bus.close()
        server.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=20.0)
    given = parser.parse_args()
    for helping in (False, True):
        uvloop.run(measure(given.workers, given.seconds, helping=helping))


if __name__ == "__main__":
    main()
