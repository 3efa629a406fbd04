"""KV events on a real broker: numbers without gaps, whole snapshots, losses that show; and from a worker's process."""

import asyncio
import threading
from pathlib import Path

import pytest
from kv_reading import Reader, hashes_of, snapshot

from pipeline import kv_publisher
from pipeline.bus import Bus
from pipeline.client import Client
from pipeline.config import BUILTIN_MODEL, GroupSettings, SimulatedSettings, TopologySettings
from pipeline.kv_publisher import KvPublisher, KvRank
from pipeline.local import running
from pipeline.nats_server import NatsServer
from subjects import names
from subjects.codec import BlockHashes, decode
from subjects.messages import BlocksCleared, BlocksRemoved, BlocksStored, KvSnapshot

DEADLINE_S = 30.0
MODEL, WORKER = "m", "w0"


def stored(*hashes: int, parent: int | None = None) -> BlocksStored:
    return BlocksStored(hashes=BlockHashes.of(hashes), parent=parent)


async def publisher(bus: Bus, dp_rank: int = 0) -> KvPublisher:
    rank = KvRank(model=MODEL, worker=WORKER, incarnation="i1", dp_rank=dp_rank, block_tokens=16)
    made = KvPublisher(bus, rank)
    await made.start()
    return made


async def test_messages_are_numbered_and_a_snapshot_is_what_they_come_to(bus: Bus):
    reader, rank = await Reader.of(bus, MODEL), await publisher(bus)
    rank.publish([BlocksCleared(), stored(1, 2, 3)])
    thread = threading.Thread(target=rank.publish, args=([BlocksRemoved(hashes=BlockHashes.of([3]))],))
    thread.start()  # an engine publishes from its own
    thread.join()
    await reader.until(lambda: len(reader.messages) == 2)
    first = reader.messages[0]
    assert (first.worker, first.incarnation, first.dp_rank, first.block_tokens) == (WORKER, "i1", 0, 16)
    assert first.events == (BlocksCleared(), stored(1, 2, 3)), "a step's events are one message"
    assert reader.seqs() == [1, 2]
    (whole,) = await snapshot(bus, WORKER)
    assert (whole.incarnation, whole.seq, whole.part, whole.parts) == ("i1", 2, 0, 1)
    assert whole.blocks == (stored(1, 2),)


async def test_a_rank_without_blocks_says_so(bus: Bus):
    await publisher(bus)
    (whole,) = await snapshot(bus, WORKER)
    assert (whole.seq, whole.blocks) == (0, ())


async def test_data_parallel_ranks_number_and_answer_for_themselves(bus: Bus):
    reader, ranks = await Reader.of(bus, MODEL), [await publisher(bus, dp_rank) for dp_rank in (0, 1)]
    for number, rank in enumerate(ranks):
        rank.publish([stored(number)])
    await reader.until(lambda: len(reader.messages) == 2)
    assert {(message.dp_rank, message.seq) for message in reader.messages} == {(0, 1), (1, 1)}
    answer = await bus.request(names.KV_SNAPSHOT.of(worker=WORKER, rank="1"))
    assert (decode(KvSnapshot, answer.payload).dp_rank, hashes_of([decode(KvSnapshot, answer.payload)])) == (1, {1})


async def test_who_asks_by_hand_is_answered_in_json(bus: Bus):
    (await publisher(bus)).publish([stored(-5)])
    answer = await bus.request(names.KV_SNAPSHOT.of(worker=WORKER, rank="0"))
    assert b'"hashes":[-5]' in answer.payload
    assert decode(KvSnapshot, answer.payload).blocks == (stored(-5),)


async def test_a_large_snapshot_comes_in_parts_and_serves_all_who_asked(bus: Bus):
    rank = await publisher(bus)
    rank.publish([stored(*range(100_000))])
    for parts in await asyncio.gather(*(snapshot(bus, WORKER) for _ in range(3))):
        assert len(parts) > 1
        assert [part.part for part in parts] == list(range(len(parts)))
        assert {part.seq for part in parts} == {rank.seq}
        assert hashes_of(parts) == set(range(100_000))


async def test_what_waits_is_bounded_and_what_is_dropped_shows_as_a_gap(bus: Bus, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kv_publisher, "QUEUED_BLOCKS_MAX", 10)
    reader, rank = await Reader.of(bus, MODEL), await publisher(bus)
    for block in range(20):  # the loop gets no turn in between
        rank.publish([stored(block)])
    await reader.until(lambda: reader.seqs() == [*range(1, 11), 21])
    assert reader.messages[-1].events == ()
    assert rank.dropped == 10
    assert hashes_of(await snapshot(bus, WORKER)) == set(range(20)), "the snapshot lacks nothing"


async def test_a_broker_that_was_away_is_told_of_it(
    bus: Bus, back: asyncio.Event, nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pipeline.bus.BUFFERED_BYTES_MAX", 1000)
    reader, rank = await Reader.of(bus, MODEL), await publisher(bus)
    rank.publish([stored(1)])
    await reader.until(lambda: len(reader.messages) == 1)
    nats_server.kill()
    for block in range(2, 2002):
        rank.publish([stored(block)])
    await asyncio.sleep(0)
    nats_server.start()
    async with asyncio.timeout(DEADLINE_S):
        await back.wait()
    await reader.until(lambda: reader.seqs()[-1] == rank.seq and reader.messages[-1].events == ())
    assert len(reader.seqs()) < rank.seq, "some were dropped, and the numbers show it"
    assert hashes_of(await snapshot(bus, WORKER)) == set(range(1, 2002))


SIMULATED = SimulatedSettings(ttft_ms=1, itl_ms=1, kv_block_tokens=8)
TOPOLOGY = TopologySettings(
    model=MODEL,
    model_path=BUILTIN_MODEL,
    workers=(
        GroupSettings(role="preprocess"),
        GroupSettings(role="decode", engine="simulated", simulated=SIMULATED),
    ),
)


async def ask(url: str, prompt: str) -> int:
    """How many of the prompt's tokens were cached."""
    async with Client.connect(url) as client:
        async for frame in client.generate(model=MODEL, prompt=prompt, max_tokens=8, ignore_eos=True):
            assert frame.error is None, frame.error
    return frame.usage.cached_tokens


async def test_a_worker_publishes_and_after_kill_9_begins_anew(tmp_path: Path):
    prompt = "A prompt of more than two blocks, so that there is something to store: one two three four."
    async with running(TOPOLOGY, tmp_path) as local:
        await local.start()
        bus = await Bus.connect(local.url, name="reader")
        reader = await Reader.of(bus, MODEL)
        await local.until_ready()
        assert await ask(local.url, prompt) == 0
        assert await ask(local.url, prompt) >= 16
        held = hashes_of(await snapshot(bus, "decode-0"))
        await reader.until(lambda: held == reader.held())
        before = reader.messages[-1]
        assert (before.worker, before.block_tokens, len(held) >= 2) == ("decode-0", 8, True)
        (worker,) = [child for child in local.children if child.name == "decode-0"]
        worker.process.kill()
        await reader.until(lambda: reader.messages[-1].incarnation != before.incarnation)
        after = reader.messages[-1]
        assert (after.worker, after.seq, after.events) == ("decode-0", 1, (BlocksCleared(),))
        assert await ask(local.url, prompt) == 0
        await bus.close()
