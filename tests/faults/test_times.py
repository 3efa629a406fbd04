"""How long a reader waits when something dies in mid-answer, and that what comes after is right. Prints a table."""

import asyncio
import os
import signal
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio
from chaos import WORKER_SEEDS
from load import MODEL, misfit

from pipeline.bus import Bus, Received
from pipeline.client import Client
from pipeline.config import GroupSettings, TopologySettings, load_topology
from pipeline.local import Child, LocalTopology, running
from pipeline.nats_server import NatsServer
from subjects import names, streams
from subjects.codec import decode
from subjects.limits import LEASE_S
from subjects.messages import Claim, Frame

pytestmark = [pytest.mark.full, pytest.mark.timeout(900), pytest.mark.asyncio(loop_scope="module")]

TIMES, TIMES_FULL = 1, 10
TOKENS = 250
STRUCK_AT_TOKEN = 30
PROMPT = (11, 12, 13)
READY_S_MAX = 90.0
FREEZE_S = LEASE_S + 2.0
SLOW_PREFILL_MS = 1500.0


@dataclass
class Scene:
    """A topology with a slow prefill, its broker, a client, and every frame on the wire."""

    local: LocalTopology
    server: NatsServer
    client: Client
    bus: Bus
    frames: list[tuple[float, Frame]] = field(default_factory=list)
    claims: asyncio.Queue[Claim] = field(default_factory=asyncio.Queue)

    def child(self, name: str) -> Child:
        return next(child for child in self.local.children if child.name == name)

    async def until_ready(self) -> None:
        deadline_s = time.monotonic() + READY_S_MAX
        while not all(child.state == "ready" for child in self.local.children):
            assert time.monotonic() < deadline_s, [(child.name, child.state) for child in self.local.children]
            await asyncio.sleep(0.05)  # the topology tells it by its children's states only

    def of(self, request_id: str) -> list[tuple[float, Frame]]:
        return [(at_s, frame) for at_s, frame in self.frames if frame.request_id == request_id]


def slow_prefill() -> TopologySettings:
    shipped = load_topology("chaos")

    def slower(group: GroupSettings) -> GroupSettings:
        if group.role != "prefill":
            return group
        return msgspec.structs.replace(
            group, simulated=msgspec.structs.replace(group.simulated, ttft_ms=SLOW_PREFILL_MS)
        )

    return msgspec.structs.replace(shipped, workers=tuple(slower(group) for group in shipped.workers))


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def scene(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    folder: Path = tmp_path_factory.mktemp("times")
    server = NatsServer(folder / "nats")
    server.start()
    settings = slow_prefill()
    settings = msgspec.structs.replace(settings, nats=msgspec.structs.replace(settings.nats, url=server.url))
    async with running(settings, folder) as local, Client.connect(server.url, client="times") as client:
        await local.start()
        await local.until_ready()
        watching = asyncio.create_task(local.until_failed())
        bus = await Bus.connect(server.url, name="times.look")
        made = Scene(local, server, client, bus)

        def hear(received: Received) -> None:
            made.frames.append((time.monotonic(), decode(Frame, received.payload)))

        await bus.subscribe(names.RESPONSES.any(client="times"), hear)
        await bus.subscribe(names.CLAIM.any(), lambda received: made.claims.put_nowait(decode(Claim, received.payload)))
        await bus.flush()
        yield made
        watching.cancel()
        await bus.close()
    server.kill()


def kill(scene: Scene, worker: str) -> None:
    process = scene.child(worker).process
    assert process
    process.kill()


def drain(scene: Scene, worker: str) -> None:
    process = scene.child(worker).process
    assert process
    process.terminate()


def freeze(scene: Scene, worker: str) -> None:
    process = scene.child(worker).process
    assert process
    os.kill(process.pid, signal.SIGSTOP)
    asyncio.get_running_loop().call_later(FREEZE_S, os.kill, process.pid, signal.SIGCONT)


def restart_broker(scene: Scene, worker: str) -> None:
    scene.server.kill()
    scene.server.start()


async def strike(scene: Scene, request_id: str, how: Callable[[Scene, str], None]) -> float:
    """Strike the owner in mid-answer; the longest wait between two tokens from then on, in seconds."""
    owner, tokens, waits_s, struck = "", [], [], False
    last_s = time.monotonic()
    frames = scene.client.generate(
        model=MODEL, prompt=PROMPT, max_tokens=TOKENS, ignore_eos=True, request_id=request_id
    )
    async for frame in frames:
        assert frame.error is None, frame.error
        owner = frame.worker or owner
        tokens += frame.token_ids.tolist()
        if struck and frame.token_ids:
            waits_s.append(time.monotonic() - last_s)
        last_s = time.monotonic()
        if not struck and len(tokens) >= STRUCK_AT_TOKEN:
            struck = True
            how(scene, owner)
            last_s = time.monotonic()
    assert len(tokens) == TOKENS
    assert misfit(PROMPT, tokens, WORKER_SEEDS) is None
    return max(waits_s)


async def strike_prefill(scene: Scene, request_id: str, how: Callable[[Scene, str], None]) -> float:
    """Strike whoever prefills, in mid-prompt; what that adds to the time to the first token, in seconds."""
    began_s = time.monotonic()
    first_s, tokens = 0.0, []

    async def strike_soon() -> None:
        claim = await scene.claims.get()
        await asyncio.sleep(SLOW_PREFILL_MS / 2000)  # the middle of a simulated prefill
        how(scene, claim.worker)

    while not scene.claims.empty():
        scene.claims.get_nowait()
    striking = asyncio.create_task(strike_soon())
    async for frame in scene.client.generate(
        model=MODEL, prompt=PROMPT, max_tokens=8, ignore_eos=True, request_id=request_id
    ):
        assert frame.error is None, frame.error
        first_s = first_s or (time.monotonic() if frame.token_ids else 0.0)
        tokens += frame.token_ids.tolist()
    await striking
    assert len(tokens) == 8 and misfit(PROMPT, tokens, WORKER_SEEDS) is None
    return first_s - began_s - SLOW_PREFILL_MS / 1000


CASES: dict[str, tuple[Callable[..., Awaitable[float]], Callable[[Scene, str], None], float]] = {
    "decode killed": (strike, kill, LEASE_S + 4),
    "decode frozen": (strike, freeze, LEASE_S + 4),
    "decode drained": (strike, drain, 40.0),
    "broker killed and restarted": (strike, restart_broker, LEASE_S + 4),
    "prefill killed": (strike_prefill, kill, 6.0),
    "prefill frozen": (strike_prefill, freeze, 10.0),
}
"""Whom to strike and how, and the most that it may cost (s): a lease, and room for a loaded machine."""


async def table(scene: Scene, times: int) -> list[str]:
    lines = ["| what happens | the reader waits, median | least | most |", "|---|---|---|---|"]
    for case, (run, how, limit_s) in CASES.items():
        waits_s = []
        for number in range(times):
            waits_s.append(await run(scene, f"{names.token(case)}-{number}-of-{times}", how))
            if how is freeze:
                await asyncio.sleep(FREEZE_S)  # until it goes on: nothing else tells
            await scene.until_ready()
        assert max(waits_s) < limit_s, f"{case}: {waits_s}"
        median_s = statistics.median(waits_s)
        lines.append(f"| {case} | {median_s:.2f} s | {min(waits_s):.2f} s | {max(waits_s):.2f} s |")
    return lines


async def test_deaths_cost_a_lease_at_most(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    lines = await table(scene, TIMES)
    with capsys.disabled():
        print("\n" + "\n".join(lines))


@pytest.mark.full
async def test_the_table(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    lines = await table(scene, TIMES_FULL)
    with capsys.disabled():
        print("\n" + "\n".join(lines))


async def test_a_frozen_worker_that_wakes_up_says_and_acks_nothing(scene: Scene) -> None:
    await strike(scene, "woken", freeze)
    frames = scene.of("woken")
    taken_over_s = next(at_s for at_s, frame in frames if frame.attempt > 1)
    await asyncio.sleep(FREEZE_S)  # it is awake now, and has had the time to say something
    assert not [frame for at_s, frame in scene.of("woken") if at_s > taken_over_s and frame.attempt == 1]
    assert len([frame for _, frame in scene.of("woken") if frame.finish_reason]) == 1
    assert (await scene.bus.stream_state(streams.WORK.name)).messages == 0
