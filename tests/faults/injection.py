"""Faults drawn from a seed: workers and the broker killed, frozen, drained, restarted and parted from each other."""

import asyncio
import os
import signal
from collections import Counter
from contextlib import suppress
from random import Random

from partition import Proxy

from pipeline.local import Child, LocalTopology
from pipeline.nats_server import NatsServer

FREEZE_S = (2.0, 12.0)
BROKER_DOWN_S = (0.0, 2.0)
WEIGHTS = {"kill": 5, "freeze": 5, "drain": 3, "part": 3, "broker_kill": 2, "broker_stop": 1, "broker_freeze": 1}


class Faults:
    """Strikes a topology over a broker that is not its own, which it reaches through a proxy."""

    def __init__(self, local: LocalTopology, server: NatsServer, proxy: Proxy, seed: int) -> None:
        self._local, self._server, self._proxy, self._random = local, server, proxy, Random(seed)
        self._struck: set[str] = set()  # frozen or parted now
        self._running: set[asyncio.Task[None]] = set()
        self._broker_busy = False
        self.counts: Counter[str] = Counter()
        self.history: list[str] = []

    async def strike(self, interval_s: tuple[float, float]) -> None:
        """Strike again and again until cancelled."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        while True:
            await asyncio.sleep(self._random.uniform(*interval_s))
            kind = self._random.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
            told = self._broker(kind) if kind.startswith("broker") else self._worker(kind)
            if told:
                self.counts[kind] += 1
                self.history.append(f"{loop.time() - began_s:6.1f} s {told}")

    async def heal(self) -> None:
        """Wait until what is frozen goes on and what is down is back."""
        await asyncio.gather(*self._running)

    def _spawn(self, work) -> None:
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    def _worker(self, kind: str) -> str | None:
        """Strike a worker that is ready; None where none is."""
        ready = [child for child in self._local.children if child.state == "ready" and child.name not in self._struck]
        seconds = self._random.uniform(*FREEZE_S)
        if not ready:
            return None
        child = self._random.choice(ready)
        assert child.process
        if kind == "freeze":
            self._spawn(self._freeze(child, seconds))
            return f"freeze {child.name} for {seconds:.1f} s"
        if kind == "part":
            self._spawn(self._part(child, seconds))
            return f"part {child.name} from the broker for {seconds:.1f} s"
        child.process.send_signal(signal.SIGKILL if kind == "kill" else signal.SIGTERM)
        return f"{kind} {child.name}"

    async def _freeze(self, child: Child, seconds: float) -> None:
        assert child.process
        pid = child.process.pid
        self._struck.add(child.name)
        os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
            self._struck.discard(child.name)

    async def _part(self, child: Child, seconds: float) -> None:
        self._struck.add(child.name)
        try:
            await self._proxy.part(child.name, seconds)
        finally:
            self._struck.discard(child.name)

    def _broker(self, kind: str) -> str | None:
        """Strike the broker; None while it is down."""
        freeze_s, down_s = self._random.uniform(*FREEZE_S), self._random.uniform(*BROKER_DOWN_S)
        if self._broker_busy:
            return None
        self._broker_busy = True
        if kind == "broker_freeze":
            self._spawn(self._freeze_broker(freeze_s))
            return f"freeze the broker for {freeze_s:.1f} s"
        self._spawn(self._restart_broker(kind == "broker_kill", down_s))
        return f"{'kill' if kind == 'broker_kill' else 'stop'} the broker for {down_s:.1f} s"

    async def _freeze_broker(self, seconds: float) -> None:
        assert self._server.pid
        os.kill(self._server.pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            os.kill(self._server.pid, signal.SIGCONT)
            self._broker_busy = False

    async def _restart_broker(self, kill: bool, down_s: float) -> None:
        try:
            await asyncio.to_thread(self._server.kill if kill else self._server.stop)
            await asyncio.sleep(down_s)
        finally:
            self._server.start()  # on this thread: the broker dies with the thread that started it
            self._broker_busy = False
