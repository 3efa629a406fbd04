"""Prefill and decode in engines of their own, over NATS and NIXL: equal tokens, no open port, nothing left behind."""

import asyncio
import random
from collections import defaultdict

import psutil
import pytest
from disaggregated_topology import (
    MODEL,
    Disaggregated,
    group,
    listening,
    prompts,
    reference,
)
from kv_reading import hashes_of, snapshot

from pipeline.block_hashes import block_hashes
from pipeline.bus import Received
from pipeline.engine.sglang.handshake import describe
from pipeline.engine.sglang.handshake.wire import PAIR
from pipeline.errors import NoResponders
from subjects import names
from subjects.codec import TokenIds, decode
from subjects.messages import Claim, Frame, PrefillTask

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800), pytest.mark.asyncio(loop_scope="session")]

MAX_TOKENS = 8
LENGTHS = (1, 2, 3, 5, 9, 16, 17, 31, 47, 64, 65, 90, 127, 150, 200, 600)
"""Of prompts, in tokens: around SGLang's own steps, and one longer than a chunk of prefill."""
AT_ONCE = 16
CANCELLED = 200
CANCELLED_AT_ONCE = 8
SEED = 20
END_S_MAX = 120.0
COMPUTING_S_MAX = 1.5  # of a prompt of this test
POINTS = ("accepted", "offered", "claimed", "computing", "paged", "written", "decoding")
"""Where requests are cancelled: before and after prefill has the task, in its queue or forward pass, when decode has
named its pages, when their KV is written, and between two tokens."""


async def test_greedy_tokens_are_the_aggregated_ones(two_prefill: Disaggregated) -> None:
    asked = prompts(LENGTHS)
    wanted = await reference(asked, MAX_TOKENS)
    assert [await two_prefill.ask(prompt, MAX_TOKENS) for prompt in asked] == wanted
    assert await two_prefill.ask_at_once(asked, MAX_TOKENS, AT_ONCE) == wanted
    await two_prefill.until_quiet()


async def test_every_choice_has_a_room_of_its_own(two_prefill: Disaggregated) -> None:
    (prompt,) = prompts([33])
    (wanted,) = await two_prefill.ask_at_once([prompt], MAX_TOKENS, 1)
    while not two_prefill.claims.empty():
        two_prefill.claims.get_nowait()
    choices: dict[int, list[int]] = defaultdict(list)
    async for frame in two_prefill.client.generate(
        model=MODEL, prompt=tuple(prompt), max_tokens=MAX_TOKENS, temperature=0.0, n=3
    ):
        assert frame.error is None, frame.error
        choices[frame.choice] += frame.token_ids.tolist()
    assert choices == {0: wanted, 1: wanted, 2: wanted}
    rooms = {two_prefill.claims.get_nowait()[1].room for _ in range(two_prefill.claims.qsize())}
    assert len(rooms) == 3


async def test_no_port_is_open_but_the_metrics(two_prefill: Disaggregated) -> None:
    """Asked while tokens flow, for every process of every worker."""
    flowing = asyncio.create_task(two_prefill.ask("Once upon a time", 48))
    await two_prefill.claims.get()
    open_ports = {child.name: listening(group(child)) for child in two_prefill.local.children}
    await flowing
    metrics = [int(address.split(":")[2].split("/")[0]) for address in two_prefill.local.metrics_addresses()]
    assert open_ports.pop("telemetry-0") == metrics
    assert not any(open_ports.values()), open_ports
    broker = int(two_prefill.local.url.rpartition(":")[2])
    brokers = [process for process in psutil.Process().children() if "nats-server" in process.name()]
    assert broker in listening(iter(brokers)), "the look itself sees ports"


async def test_the_handshake_can_be_read_on_the_bus(
    two_prefill: Disaggregated, capsys: pytest.CaptureFixture[str]
) -> None:
    await two_prefill.ask(prompts([70])[0], MAX_TOKENS)
    with capsys.disabled():
        print("", *two_prefill.handshake[-6:], sep="\n")
    registered = [line for line in two_prefill.handshake if line.operation == "register"]
    assert registered and all(line.room == PAIR for line in registered)
    assert registered[0].sender.startswith("decode-0.") and registered[0].to.startswith("prefill-")
    moved = [line for line in two_prefill.handshake if line.operation == "transfer" and line.pages == 70]
    (room,) = {line.room for line in moved}
    written = [line for line in two_prefill.handshake if line.room == room and line.operation == "status success"]
    assert [(line.pages, line.kv_bytes) for line in written] == [(70, moved[0].kv_bytes)]
    assert written[0].sender.startswith("prefill-") and written[0].microseconds > 0


async def test_prefill_tells_of_its_blocks_and_decode_has_none(two_prefill: Disaggregated) -> None:
    prompt = prompts([40])[0]
    await two_prefill.ask(prompt, MAX_TOKENS)
    held = [hashes_of(await snapshot(two_prefill.bus, child.name)) for child in two_prefill.children("prefill")]
    assert any(set(block_hashes(TokenIds.of(prompt), 1)) <= hashes for hashes in held)
    with pytest.raises(NoResponders):
        await two_prefill.bus.request(names.KV_SNAPSHOT.of(worker="decode-0", rank="0"))


class Moments:
    """Hears how far each request has come."""

    def __init__(self, topology: Disaggregated) -> None:
        self._bus = topology.bus
        self._requests: dict[str, str] = {}  # by room
        self._reached: defaultdict[tuple[str, str], asyncio.Event] = defaultdict(asyncio.Event)

    async def listen(self) -> None:
        await self._bus.subscribe(names.PREFILL_TASKS, self._hear_task)
        await self._bus.subscribe(names.CLAIM.any(), self._hear_claim)
        await self._bus.subscribe(names.BOOTSTRAP.any(), self._hear_handshake)
        await self._bus.flush()

    def at(self, request_id: str, point: str) -> asyncio.Event:
        return self._reached[request_id, point]

    def _note(self, room: str, point: str) -> None:
        if request_id := self._requests.get(room):
            self.at(request_id, point).set()

    def _hear_task(self, received: Received) -> None:
        task = decode(PrefillTask, received.payload)
        self._requests[str(task.room)] = task.request_id
        self._note(str(task.room), "offered")

    def _hear_claim(self, received: Received) -> None:
        room = str(decode(Claim, received.payload).room)
        self._note(room, "claimed")
        self._note(room, "computing")

    def _hear_handshake(self, received: Received) -> None:
        if line := describe(received):
            self._note(line.room, {"transfer": "paged", "status success": "written"}.get(line.operation, ""))


class Cancelling:
    """Requests that are cancelled at points drawn from a seed."""

    def __init__(self, topology: Disaggregated, moments: Moments, seed: int) -> None:
        self._topology, self._moments, self._draw = topology, moments, random.Random(seed)
        self.ends: defaultdict[str, list[str]] = defaultdict(list)  # finish reasons by point

    async def run(self, count: int) -> None:
        gate = asyncio.Semaphore(CANCELLED_AT_ONCE)
        lengths = [self._draw.randint(2, 180) for _ in range(count)]
        jobs = [
            self._one(gate, f"cancel-{number}", POINTS[number % len(POINTS)], prompt)
            for number, prompt in enumerate(prompts(lengths))
        ]
        await asyncio.gather(*jobs)

    async def _one(self, gate: asyncio.Semaphore, request_id: str, point: str, prompt: list[int]) -> None:
        wait_s = self._draw.uniform(0, COMPUTING_S_MAX) if point == "computing" else self._draw.uniform(0, 0.02)
        tokens = self._draw.randint(1, 20)
        async with gate:
            cancelling = asyncio.create_task(self._cancel(request_id, point, wait_s))
            try:
                async with asyncio.timeout(END_S_MAX):
                    self.ends[point].append(await self._end(request_id, prompt, tokens))
            except TimeoutError:
                left = await self._topology.leftovers()
                pytest.fail(f"{request_id}, cancelled when {point}, has no end after {END_S_MAX:g} s; left: {left}")
            cancelling.cancel()
            await asyncio.wait({cancelling})

    async def _end(self, request_id: str, prompt: list[int], tokens: int) -> str:
        """Read an answer to its end; after `tokens` tokens it is decoding."""
        last, seen = Frame(request_id=request_id), 0
        async for frame in self._topology.client.generate(
            model=MODEL, prompt=tuple(prompt), max_tokens=24, ignore_eos=True, request_id=request_id
        ):
            last, seen = frame, seen + len(frame.token_ids)
            if seen >= tokens:
                self._moments.at(request_id, "decoding").set()
        return last.finish_reason or "none"

    async def _cancel(self, request_id: str, point: str, wait_s: float) -> None:
        if point != "accepted":
            await self._moments.at(request_id, point).wait()
        await asyncio.sleep(wait_s)  # no wait for anything: the point itself
        await self._topology.client.cancel(request_id)


async def test_cancelled_requests_leave_nothing(two_prefill: Disaggregated, capsys: pytest.CaptureFixture[str]) -> None:
    moments = Moments(two_prefill)
    await moments.listen()
    cancelling = Cancelling(two_prefill, moments, SEED)
    await cancelling.run(CANCELLED)
    with capsys.disabled():
        print(f"\n{CANCELLED} requests, seed {SEED}; aborted of all by point:")
        for point in POINTS:
            ends = cancelling.ends[point]
            print(f"  {point:<10} {ends.count('abort'):>3} of {len(ends)}")
    ends = [end for point in POINTS for end in cancelling.ends[point]]
    assert len(ends) == CANCELLED and set(ends) <= {"abort", "length"}
    assert ends.count("abort") > 0.7 * CANCELLED, "a cancel comes too late only now and then"
    await two_prefill.until_quiet()
    assert len(await two_prefill.ask("The capital of France is", MAX_TOKENS, ignore_eos=True)) == MAX_TOKENS
