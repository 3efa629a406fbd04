"""Aggregated serving by real processes with two real engines, and what a test may do with them: ask, wait, strike."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec
from disaggregated_topology import FLOAT32
from partition import Proxy

from pipeline.client import Client
from pipeline.config import GroupSettings, TopologySettings, load_topology
from pipeline.local import Child, LocalTopology, running
from pipeline.nats_server import NatsServer
from subjects.messages import Frame

MODEL: Final = "smollm2"
READY_S_MAX: Final = 300.0
ANSWER_S_MAX: Final = 180.0


@dataclass
class Answer:
    """What a client read."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    ends: list[str] = field(default_factory=list)
    completion_tokens: int = 0
    workers: list[str] = field(default_factory=list)

    def add(self, frame: Frame) -> None:
        assert frame.error is None, frame.error
        self.tokens += frame.token_ids.tolist()
        self.text += frame.text
        if frame.worker and frame.worker not in self.workers:
            self.workers.append(frame.worker)
        if frame.finish_reason and frame.usage:
            self.ends.append(frame.finish_reason)
            self.completion_tokens = frame.usage.completion_tokens


OnFrame = Callable[[Answer], None]


@dataclass
class Aggregated:
    """A running topology behind a proxy, its broker and a client."""

    local: LocalTopology
    server: NatsServer
    proxy: Proxy
    client: Client

    def child(self, worker: str) -> Child:
        return next(child for child in self.local.children if child.name == worker)

    async def until_ready(self) -> None:
        deadline_s = time.monotonic() + READY_S_MAX
        while not all(child.state == "ready" for child in self.local.children):
            assert time.monotonic() < deadline_s, [(child.name, child.state) for child in self.local.children]
            await asyncio.sleep(0.05)  # the topology tells it by its children's states only

    async def ask(
        self, prompt: str | Sequence[int], max_tokens: int, on_frame: OnFrame = lambda _: None, **fields: Any
    ) -> Answer:
        """The greedy answer; `on_frame` is called with what has come so far."""
        answer = Answer()
        prompt = prompt if isinstance(prompt, str) else tuple(prompt)
        async with asyncio.timeout(ANSWER_S_MAX):
            async for frame in self.client.generate(
                model=MODEL, prompt=prompt, max_tokens=max_tokens, temperature=0.0, **fields
            ):
                answer.add(frame)
                on_frame(answer)
        return answer

    async def ends_in_log(self, name: str) -> dict[str, int]:
        """Terminal frames by request."""
        ends: dict[str, int] = {}
        async for frame in self.client.stored():
            if frame.request_id.startswith(name) and frame.finish_reason:
                ends[frame.request_id] = ends.get(frame.request_id, 0) + 1
        return ends


def topology(url: str) -> TopologySettings:
    """Two engines in float32: in bfloat16 the size of a batch decides between two close tokens, in SGLang alone too."""
    shipped = load_topology("cpu-aggregated")

    def doubled(group: GroupSettings) -> GroupSettings:
        if group.role != "decode":
            return group
        return msgspec.structs.replace(group, count=2, sglang=group.sglang | FLOAT32)

    nats = msgspec.structs.replace(shipped.nats, url=url)
    return msgspec.structs.replace(shipped, nats=nats, workers=tuple(doubled(group) for group in shipped.workers))


@contextlib.asynccontextmanager
async def started(folder: Path) -> AsyncIterator[Aggregated]:
    """The topology, when every worker takes work."""
    server = NatsServer(folder / "nats")
    server.start()
    proxy = Proxy(server)
    settings = topology(await proxy.start())
    try:
        async with running(settings, folder) as local, Client.connect(server.url, client="real") as client:
            await local.start()
            await asyncio.wait_for(local.until_ready(), READY_S_MAX)
            watching = asyncio.create_task(local.until_failed())
            yield Aggregated(local, server, proxy, client)
            watching.cancel()
    finally:
        await proxy.close()
        server.kill()
