"""An index fed over a real broker by ranks that are made of a few lines: late starts, losses, restarts, deaths."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio

from pipeline import kv_feed
from pipeline.block_hashes import block_hashes
from pipeline.bus import Bus, Received
from pipeline.chat import ChatTokenizer
from pipeline.config import BUILTIN_MODEL, RoutingSettings
from pipeline.kv_feed import KvIndexFeed
from pipeline.models import prepare_model
from pipeline.prefix_index import RankId
from pipeline.presence import Announcer, Presence
from pipeline.route import explain
from subjects import names, streams
from subjects.codec import BlockHashes, encode
from subjects.messages import BlocksCleared, BlocksStored, Heartbeat, KvEvent, KvEvents, KvSnapshot, ModelCard

MODEL = "m"
BLOCK_TOKENS = 64
DEADLINE_S = 5.0
DEAD_S_MAX = 5.0
BLOCKS_MAX = 10_000


class FakeWorker:
    """A decode worker whose ranks hold the blocks that a test gives them."""

    def __init__(self, bus: Bus, name: str = "w", incarnation: str = "i1", dp_size: int = 1) -> None:
        self.bus, self.name, self.incarnation, self.dp_size = bus, name, incarnation, dp_size
        self.seqs, self.held = [0] * dp_size, [dict[int, None]() for _ in range(dp_size)]
        self.asked: list[float] = []
        self.answering = asyncio.Event()
        self.answering.set()
        self.announcer = Announcer(bus, "decode", name, MODEL, incarnation, self._state)

    def _state(self) -> Heartbeat:
        return Heartbeat(worker=self.name, role="decode", incarnation=self.incarnation, model=MODEL, ready=True)

    def _card(self) -> ModelCard:
        return ModelCard(
            worker=self.name,
            role="decode",
            model=MODEL,
            incarnation=self.incarnation,
            model_path=BUILTIN_MODEL,
            engine="simulated",
            context_len_tokens=2048,
            max_running_requests=1,
            max_prefill_tokens=8,
            kv_blocks=1,
            kv_block_tokens=BLOCK_TOKENS,
            dp_size=self.dp_size,
        )

    async def begin(self) -> "FakeWorker":
        await self.announcer.start()
        await self.announcer.publish_card(self._card())
        self.serving = await self.bus.subscribe(names.KV_SNAPSHOT.any(worker=self.name), self._hear)
        await self.bus.flush()
        return self

    async def die(self) -> None:
        """End without a word."""
        for task in self.announcer._tasks:
            task.cancel()
        await self.serving.unsubscribe()

    async def publish(self, event: KvEvent, dp_rank: int = 0, *, lost: bool = False) -> None:
        match event:
            case BlocksStored():
                self.held[dp_rank].update(dict.fromkeys(event.hashes))
            case BlocksCleared():
                self.held[dp_rank].clear()
        self.seqs[dp_rank] += 1
        message = KvEvents(
            worker=self.name,
            incarnation=self.incarnation,
            dp_rank=dp_rank,
            seq=self.seqs[dp_rank],
            block_tokens=BLOCK_TOKENS,
            events=(event,),
        )
        if not lost:
            await self.bus.publish(names.KV_EVENTS.of(model=MODEL, worker=self.name), encode(message))

    def _hear(self, received: Received) -> None:
        self.asked.append(time.monotonic())
        self.bus.spawn(self._answer(received))

    async def _answer(self, received: Received) -> None:
        """Two parts."""
        await self.answering.wait()
        dp_rank = int(received.subject.rpartition(".")[2])
        blocks = list(self.held[dp_rank])
        for part, half in enumerate((blocks[: len(blocks) // 2], blocks[len(blocks) // 2 :])):
            snapshot = KvSnapshot(
                worker=self.name,
                incarnation=self.incarnation,
                dp_rank=dp_rank,
                seq=self.seqs[dp_rank],
                block_tokens=BLOCK_TOKENS,
                part=part,
                parts=2,
                blocks=(BlocksStored(hashes=BlockHashes.of(half)),),
            )
            await self.bus.publish(received.reply, encode(snapshot))


def stored(*hashes: int) -> BlocksStored:
    return BlocksStored(hashes=BlockHashes.of(hashes))


async def until(holds: Callable[[], Any], within_s: float = DEADLINE_S) -> None:
    async with asyncio.timeout(within_s):
        while not holds():  # noqa: ASYNC110  the index has no event for it
            await asyncio.sleep(0.01)


@pytest_asyncio.fixture
async def workers(connect, nats_server) -> Bus:
    """The workers' own connection."""
    bus = await connect(nats_server.url, name="workers")
    await bus.provision([streams.KV_EVENTS], [], [])
    return bus


@pytest_asyncio.fixture
async def feed(bus: Bus, workers: Bus) -> AsyncIterator[KvIndexFeed]:
    """Not started."""
    presence = Presence(bus)
    await presence.start()
    feed = KvIndexFeed(bus, presence, MODEL, BLOCKS_MAX)
    yield feed
    await feed.close()
    await presence.close()


async def test_a_late_router_knows_what_was_there_before_it(feed: KvIndexFeed, workers: Bus):
    worker = await FakeWorker(workers, dp_size=2).begin()
    for block in (1, 2, 3):
        await worker.publish(stored(block))
    await worker.publish(stored(-7), dp_rank=1)
    await workers.flush()
    await feed.start()
    await until(lambda: feed.index.blocks(RankId("w", 0)) == {1, 2, 3} and feed.index.blocks(RankId("w", 1)) == {-7})
    await worker.publish(stored(4))
    await until(lambda: feed.index.blocks(RankId("w")) == {1, 2, 3, 4})
    assert await feed.wait_caught_up(DEADLINE_S)
    assert len(worker.asked) == 2


async def test_a_gap_is_filled_by_a_snapshot(feed: KvIndexFeed, workers: Bus):
    worker = await FakeWorker(workers).begin()
    await feed.start()
    await worker.publish(stored(1))
    await until(lambda: feed.index.blocks(RankId("w")) == {1} and not feed.behind())
    asked = len(worker.asked)
    await worker.publish(BlocksCleared(), lost=True)
    await worker.publish(stored(2), lost=True)
    await worker.publish(stored(3))
    await until(lambda: feed.index.blocks(RankId("w")) == {2, 3})
    assert len(worker.asked) == asked + 1 and not feed.behind()


async def test_what_comes_during_a_snapshot_is_applied_after_it(feed: KvIndexFeed, workers: Bus):
    worker = await FakeWorker(workers).begin()
    await worker.publish(stored(1))
    await workers.flush()
    worker.answering.clear()
    await feed.start()
    await until(lambda: worker.asked)
    await worker.publish(stored(2))
    await worker.publish(stored(3), lost=True)
    worker.answering.set()
    await worker.publish(stored(4))
    await until(lambda: feed.index.blocks(RankId("w")) == {1, 2, 3, 4})


async def test_the_last_message_is_not_missed_for_long(
    feed: KvIndexFeed, workers: Bus, monkeypatch: pytest.MonkeyPatch
):
    """Nothing follows it that would show a gap; the stream has it."""
    monkeypatch.setattr(kv_feed, "LAST_READ_S", 0.2)
    worker = await FakeWorker(workers).begin()
    await feed.start()
    await worker.publish(stored(1))
    await until(lambda: feed.index.blocks(RankId("w")) == {1} and not feed.behind())
    await feed._subscription.unsubscribe()
    await worker.publish(stored(2))
    await until(lambda: feed.index.blocks(RankId("w")) == {1, 2})


async def test_a_killed_worker_leaves_the_index_within_five_seconds(feed: KvIndexFeed, workers: Bus):
    survivor, victim = await FakeWorker(workers, "a").begin(), await FakeWorker(workers, "b").begin()
    await feed.start()
    for worker in (survivor, victim):
        await worker.publish(stored(1))
    await until(lambda: set(feed.index.ranks()) == {RankId("a"), RankId("b")})
    await victim.die()
    await until(lambda: set(feed.index.ranks()) == {RankId("a")}, DEAD_S_MAX)
    victim.incarnation, victim.seqs = "i2", [0]
    await victim.publish(stored(2))  # as if it were a first message
    await survivor.publish(stored(5))
    await until(lambda: feed.index.blocks(RankId("a")) == {1, 5})
    assert set(feed.index.ranks()) == {RankId("a")}


async def test_a_new_life_begins_empty(feed: KvIndexFeed, workers: Bus):
    first = await FakeWorker(workers).begin()
    await feed.start()
    await first.publish(stored(1))
    await until(lambda: feed.index.blocks(RankId("w")) == {1})
    await first.die()
    second = await FakeWorker(workers, incarnation="i2").begin()
    await second.publish(stored(2))
    await until(lambda: feed.index.blocks(RankId("w")) == {2})


async def test_after_an_outage_every_rank_is_asked(feed: KvIndexFeed, workers: Bus, nats_server, log):
    worker = await FakeWorker(workers).begin()
    await feed.start()
    await worker.publish(stored(1))
    await until(lambda: feed.index.blocks(RankId("w")) == {1} and not feed.behind())
    nats_server.kill()
    await worker.publish(BlocksCleared(), lost=True)
    await worker.publish(stored(9), lost=True)
    nats_server.start()
    await until(lambda: feed.index.blocks(RankId("w")) == {9})


async def test_a_rank_without_snapshots_is_not_pestered(
    feed: KvIndexFeed, workers: Bus, monkeypatch: pytest.MonkeyPatch
):
    """As workers without KV events are: with a tenth of the time to live, pauses of 0.25 and 0.5 s follow."""
    monkeypatch.setattr(kv_feed, "SNAPSHOT_S_MAX", 0.1)
    monkeypatch.setattr(kv_feed, "LOOK_S", 0.02)
    worker = await FakeWorker(workers).begin()
    worker.answering.clear()
    await feed.start()
    await until(lambda: len(worker.asked) == 3)
    pauses = [later - earlier for earlier, later in zip(worker.asked, worker.asked[1:], strict=False)]
    assert all(pause >= wanted for pause, wanted in zip(pauses, (0.25, 0.5), strict=True)), pauses
    assert feed.behind() == [RankId("w")]


async def test_few_snapshots_are_asked_for_at_once(feed: KvIndexFeed, workers: Bus):
    ranks = 3 * kv_feed.SNAPSHOTS_AT_ONCE
    worker = FakeWorker(workers, dp_size=ranks)
    worker.answering.clear()
    await worker.begin()
    await feed.start()
    await until(lambda: len(worker.asked) == kv_feed.SNAPSHOTS_AT_ONCE)
    await workers.flush()
    assert len(worker.asked) == kv_feed.SNAPSHOTS_AT_ONCE
    worker.answering.set()
    await until(lambda: len(worker.asked) == ranks and not feed.behind())


async def test_route_explains_who_comes_first(workers: Bus, nats_server, capsys: pytest.CaptureFixture[str]):
    prompt = "Once upon a time there was a router. " * 30
    tokens = ChatTokenizer.load(prepare_model(BUILTIN_MODEL)).encode(prompt, add_special_tokens=True)
    knowing = FakeWorker(workers, "knowing")
    await FakeWorker(workers, "idle").begin()
    await knowing.begin()
    await knowing.publish(stored(*block_hashes(tokens, BLOCK_TOKENS)))
    fields, settings = {"prompt": prompt}, RoutingSettings()
    code = await explain(nats_server.url, fields, settings, model=None, role="decode", session=None)
    said = capsys.readouterr().out
    cached = len(tokens) // BLOCK_TOKENS * BLOCK_TOKENS
    assert code == 0 and f"policy kv, prompt of {len(tokens)} tokens" in said
    first, second = (line for line in said.splitlines() if "/0" in line)
    assert "knowing" in first and f"{cached} cached: {len(tokens) - cached} to compute" in first
    assert "idle" in second and "nothing cached" in second

    assert await explain(nats_server.url, fields, settings, model=None, role="prefill", session=None) == 1
