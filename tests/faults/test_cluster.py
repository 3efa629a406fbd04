"""Three nodes with replicated streams: their leader is killed under load, and comes back."""

import asyncio
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from load import MODEL, misfit
from test_broker import ANSWER_S_MAX, TOPOLOGY

from pipeline.bus import Bus
from pipeline.client import Client
from pipeline.config import NatsSettings, TopologySettings
from pipeline.errors import BusUnavailable, PipelineError
from pipeline.local import running
from pipeline.nats_server import find_binary
from subjects import streams

pytestmark = pytest.mark.timeout(280)

CONFIG = Path(__file__).parents[2] / "infra" / "nats" / "cluster" / "node.conf"
NODES = ("n1", "n2", "n3")
USERS, REQUESTS, TOKENS = 8, 160, 40
KILL_AFTER = (20, 80)  # requests
UP_S_MAX = 30.0
SEEDS = (0,)


def free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in held]
    for each in held:
        each.close()
    return ports


class Cluster:
    """Three nats-servers on loopback, by the configuration that is shipped."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        ports = free_ports(2 * len(NODES))
        self._listen = dict(zip(NODES, ports, strict=False))
        self._routes = dict(zip(NODES, ports[len(NODES) :], strict=True))
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def url(self) -> str:
        return ",".join(f"nats://127.0.0.1:{port}" for port in self._listen.values())

    def start(self, node: str) -> None:
        routes = ", ".join(f'"nats://127.0.0.1:{port}"' for port in self._routes.values())
        environment = {
            "NATS_NODE": f'"{node}"',
            "NATS_LISTEN": f'"127.0.0.1:{self._listen[node]}"',
            "NATS_CLUSTER_LISTEN": f'"127.0.0.1:{self._routes[node]}"',
            "NATS_STORE": f'"{self._folder / node}"',
            "NATS_ROUTES": f"[{routes}]",
        }
        with (self._folder / f"{node}.log").open("ab") as log:
            self._processes[node] = subprocess.Popen(
                [find_binary(), "--config", str(CONFIG)], env=os.environ | environment, stdout=log, stderr=log
            )

    def kill(self, node: str) -> None:
        self._processes[node].kill()
        self._processes[node].wait()

    async def leader(self, stream: str) -> str:
        bus = await Bus.connect(self.url, name="who-leads")
        try:
            return (await bus.api(f"STREAM.INFO.{stream}"))["cluster"]["leader"]
        finally:
            await bus.close()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    for node in NODES:
        made.start(node)
    yield made
    for node in NODES:
        made.kill(node)


def topology(url: str) -> TopologySettings:
    return msgspec.structs.replace(TOPOLOGY, nats=NatsSettings(url=url, replicas=len(NODES)))


async def until_elected(cluster: Cluster) -> None:
    """Streams can be made once the nodes have found each other."""
    deadline_s = time.monotonic() + UP_S_MAX
    while True:
        try:
            bus = await Bus.connect(cluster.url, name="elect")
            try:
                await bus.provision([streams.REQUESTS], [], [], replicas=len(NODES))
                return
            finally:
                await bus.close()
        except PipelineError:
            assert time.monotonic() < deadline_s, "no leader"
            await asyncio.sleep(0.2)


class Load:
    """Requests one after the other for each user; the longest wait for an answer."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.answered = 0
        self.longest_s = 0.0
        self.grew = asyncio.Event()

    async def user(self) -> None:
        while self.answered < REQUESTS:
            began_s = time.monotonic()
            prompt = (100 + self.answered, 7, 8)
            tokens = await self._answer(prompt)
            assert len(tokens) == TOKENS and misfit(prompt, tokens, SEEDS) is None
            self.answered += 1
            self.longest_s = max(self.longest_s, time.monotonic() - began_s)
            self.grew.set()

    async def _answer(self, prompt: tuple[int, ...]) -> list[int]:
        tokens: list[int] = []
        async with asyncio.timeout(ANSWER_S_MAX):
            while True:
                frames = self._client.generate(model=MODEL, prompt=prompt, max_tokens=TOKENS, ignore_eos=True)
                try:
                    async for frame in frames:
                        assert frame.error is None, frame.error
                        tokens += frame.token_ids.tolist()
                    return tokens
                except BusUnavailable:
                    assert not tokens, "it was accepted"

    async def until(self, answered: int) -> None:
        while self.answered < answered:
            self.grew.clear()
            await self.grew.wait()


async def test_a_killed_leader_costs_a_pause(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await until_elected(cluster)
    async with running(topology(cluster.url), tmp_path) as local:
        await local.start()
        await local.until_ready()
        async with Client.connect(cluster.url, client="cluster") as client, asyncio.TaskGroup() as group:
            load = Load(client)
            for _ in range(USERS):
                group.create_task(load.user())
            for stream, after in zip((streams.WORK.name, streams.RESPONSES.name), KILL_AFTER, strict=True):
                await load.until(after)
                leader = await cluster.leader(stream)
                cluster.kill(leader)
                await load.until(after + KILL_AFTER[0])
                cluster.start(leader)
        async with Client.connect(cluster.url, client="cluster") as client:
            ends = [frame.request_id async for frame in client.stored() if frame.finish_reason]
        assert len(ends) == len(set(ends)) == load.answered
    with capsys.disabled():
        print(f"\n{load.answered} requests, two leaders killed; the longest answer took {load.longest_s:.1f} s")
