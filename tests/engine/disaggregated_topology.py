"""Prefill and decode as real processes with real engines, and what a test may ask them: tokens, rooms, load, ports."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import psutil
from tokenizers import Tokenizer

from pipeline.bus import Bus, Received
from pipeline.client import Client
from pipeline.config import BUILTIN_MODEL, TopologySettings, load_topology
from pipeline.engine.sglang.handshake import Address, BootstrapLine, describe
from pipeline.engine.sglang.handshake.wire import Operation
from pipeline.errors import BusUnavailable
from pipeline.local import Child, LocalTopology, running
from pipeline.models import prepare_model
from pipeline.peers import all_consumers
from subjects import names, streams
from subjects.codec import decode
from subjects.messages import Claim, Heartbeat

MODEL: Final = "smollm2"
FLOAT32: Final = {"dtype": "float32"}
"""In bfloat16 the size of a batch decides between two close tokens, in SGLang alone as in the pipeline."""
READY_S_MAX: Final = 300.0
ANSWER_S_MAX: Final = 180.0
QUIET_S_MAX: Final = 60.0
REFERENCE_S_MAX: Final = 400.0
STORY: Final = (
    "the river king had seven ships and no wind so every morning he asked his daughter for a story about salt "
    "she told him how bread was invented by a thief who stole the moon and hid it under steel in the garden where "
    "glass flowers sing of winter numbers and chess until someone remembers what sleep was for"
)


def topology(prefill: int, decode: int, **sglang: Any) -> TopologySettings:
    """The shipped topology with so many workers of each kind; `sglang` are settings of both kinds of engine."""
    shipped = load_topology("cpu-disaggregated")
    counts = {"prefill": prefill, "decode": decode}
    groups = (
        msgspec.structs.replace(group, count=counts[group.role], sglang=group.sglang | sglang)
        if group.role in counts
        else group
        for group in shipped.workers
    )
    return msgspec.structs.replace(shipped, workers=tuple(groups))


class Disaggregated:
    """A running topology with a client, and a connection that listens to heartbeats and to the handshake."""

    def __init__(self, local: LocalTopology, client: Client, bus: Bus) -> None:
        self.local, self.client, self.bus = local, client, bus
        self.beats: dict[str, Heartbeat] = {}
        self.handshake: list[BootstrapLine] = []
        self.claims: asyncio.Queue[tuple[float, Claim]] = asyncio.Queue()
        """Who claimed a room, and when on the monotonic clock."""

    async def listen(self) -> None:
        await self.bus.subscribe(names.HEARTBEAT.any(), self._hear_beat)
        await self.bus.subscribe(names.CLAIM.any(), self._hear_claim)
        await self.bus.subscribe(names.BOOTSTRAP.any(), self._hear_handshake)
        await self.bus.flush()

    async def ask(self, prompt: Sequence[int] | str, max_tokens: int = 8, **fields: Any) -> list[int]:
        """The greedy tokens of one choice. An error frame fails the test."""
        tokens: list[int] = []
        asked = {"temperature": 0.0} | fields
        prompt = prompt if isinstance(prompt, str) else tuple(prompt)
        async with asyncio.timeout(ANSWER_S_MAX):
            async for frame in self.client.generate(model=MODEL, prompt=prompt, max_tokens=max_tokens, **asked):
                assert frame.error is None, frame.error
                tokens += frame.token_ids.tolist()
        return tokens

    async def ask_at_once(self, prompts: Sequence[Sequence[int]], max_tokens: int, at_once: int) -> list[list[int]]:
        """The greedy tokens of each prompt, so many of them at any time."""
        gate = asyncio.Semaphore(at_once)

        async def ask(prompt: Sequence[int]) -> list[int]:
            async with gate:
                return await self.ask(prompt, max_tokens)

        return await asyncio.gather(*(ask(prompt) for prompt in prompts))

    def children(self, role: str) -> list[Child]:
        return [child for child in self.local.children if child.settings.role == role]

    async def rooms(self, worker: str) -> dict[str, list[int]] | None:
        """What the worker's scheduler holds by room; None where nobody answers."""
        beat = self.beats.get(worker)
        if beat is None:
            return None
        subject = Address(worker, beat.incarnation).subject(Operation.ROOMS, "all")
        try:
            answer = await self.bus.request(subject, b"", timeout_s=2.0)
        except BusUnavailable:
            return None
        return json.loads(answer.payload)

    async def held(self, child: Child) -> list[str]:
        """What a worker still has of any request, by its engine's own accounts, in words."""
        beat, rooms = self.beats[child.name], await self.rooms(child.name)
        found = []
        if beat.load.kv_tokens_used or beat.load.running or beat.load.waiting or beat.in_flight:
            found.append(f"{child.name}: {beat.load}, {beat.in_flight} tasks")
        if rooms is None or any(rooms.values()):
            found.append(f"{child.name} rooms: {rooms}")
        return found

    async def leftovers(self) -> list[str]:
        """Everything that a request can leave behind, in words: rooms, pages, queued tasks, leases."""
        found = []
        for child in (*self.children("prefill"), *self.children("decode")):
            found += await self.held(child)
        for stream in (streams.REQUESTS, streams.WORK):
            if messages := (await self.bus.stream_state(stream.name)).messages:
                found.append(f"{stream.name}: {messages} messages")
        for consumer in await all_consumers(self.bus, [MODEL]):
            state = await self.bus.consumer_state(consumer.stream, consumer.name)
            if state.ack_pending or state.pending:
                found.append(f"{consumer.name}: {state}")
        return found

    async def until_quiet(self, within_s: float = QUIET_S_MAX) -> None:
        """Wait until nothing is left of any request."""
        await until(self._quiet, within_s, self.leftovers)

    async def _quiet(self) -> bool:
        return not await self.leftovers()

    async def until_ready(self) -> None:
        """Wait until every worker takes work: also those that were started again."""

        async def ready() -> bool:
            return all(self._takes_work(child) for child in self.local.children)

        await until(ready, READY_S_MAX, self._states)

    async def _states(self) -> list[str]:
        return [f"{child.name}: {child.state}" for child in self.local.children]

    def _takes_work(self, child: Child) -> bool:
        beat = self.beats.get(child.name)
        return beat is not None and beat.ready and beat.sent_unix_s > child.started_unix_s

    def _hear_beat(self, received: Received) -> None:
        beat = decode(Heartbeat, received.payload)
        self.beats[beat.worker] = beat

    def _hear_claim(self, received: Received) -> None:
        self.claims.put_nowait((time.monotonic(), decode(Claim, received.payload)))

    def _hear_handshake(self, received: Received) -> None:
        if line := describe(received):
            self.handshake.append(line)


@contextlib.asynccontextmanager
async def started(settings: TopologySettings, folder: Path) -> AsyncIterator[Disaggregated]:
    """The topology, when every worker takes work; its handshakes are heard from the first one on."""
    async with contextlib.AsyncExitStack() as stack:
        local = await stack.enter_async_context(running(settings, folder))
        await local.start()
        client = await stack.enter_async_context(Client.connect(local.url))
        bus = await Bus.connect(local.url, name="test")
        stack.push_async_callback(bus.close)
        topology = Disaggregated(local, client, bus)
        await topology.listen()
        await asyncio.wait_for(local.until_ready(), READY_S_MAX)
        stack.push_async_callback(_ended, asyncio.create_task(local.until_failed()))
        await topology.until_ready()
        yield topology


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})


async def until(
    holds: Callable[[], Awaitable[bool]], within_s: float, state: Callable[[], Awaitable[object]] | None = None
) -> None:
    """Wait for what only asking other processes can tell."""
    deadline_s = time.monotonic() + within_s
    while not await holds():
        assert time.monotonic() < deadline_s, f"not within {within_s:g} s: {await state() if state else holds}"
        await asyncio.sleep(0.05)


def prompts(lengths: Sequence[int]) -> list[list[int]]:
    """A prompt of each length in tokens; no two begin alike for long, so that no cache makes one of another."""
    encode = Tokenizer.from_file(str(prepare_model(BUILTIN_MODEL) / "tokenizer.json")).encode
    story, found = STORY.split(), []
    for number, length in enumerate(lengths):
        step = 2 * number + 1
        words = [story[(number + step * at) % len(story)] for at in range(2 * length + 1)]
        found.append(encode(" ".join(words)).ids[:length])
    assert [len(prompt) for prompt in found] == list(lengths)
    return found


async def reference(asked: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
    """What SGLang's own `Engine.generate` answers greedily, aggregated, in a process of its own."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(Path(__file__).with_name("reference.py"))),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    question = {"prompts": asked, "max_new_tokens": max_tokens, "server_args": FLOAT32, "model_path": BUILTIN_MODEL}
    async with asyncio.timeout(REFERENCE_S_MAX):
        printed, _ = await process.communicate(json.dumps(question).encode())
    assert process.returncode == 0
    return json.loads(printed.splitlines()[-1])


def group(child: Child) -> Iterator[psutil.Process]:
    """Every process of a worker: itself and its engine's."""
    assert child.process
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(process.pid) == child.process.pid:
                yield process


def scheduler(child: Child) -> psutil.Process:
    """The worker's SGLang scheduler, which computes and holds the KV."""
    (found,) = [process for process in group(child) if "scheduler" in " ".join(process.cmdline())]
    return found


def kill(child: Child) -> None:
    """End a worker and all of its engine as a power cut would."""
    assert child.process
    os.killpg(child.process.pid, signal.SIGKILL)


def listening(processes: Iterator[psutil.Process]) -> list[int]:
    """The TCP ports on which any of the processes listens, from the kernel's tables."""
    sockets = set()
    for process in processes:
        with contextlib.suppress(FileNotFoundError):
            for fd in Path(f"/proc/{process.pid}/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):
                    sockets.add(str(fd.readlink()))
    tables = [Path(f"/proc/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table]
    return [int(row[1].split(":")[1], 16) for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets]
