"""A reader that starts late, loses, doubles and reorders messages, through restarts, against one that saw all."""

import random
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.kv_reader import KvReader
from pipeline.prefix_index import TIERS, PrefixIndex, RankId
from subjects.codec import BlockHashes
from subjects.messages import BlocksCleared, BlocksRemoved, BlocksStored, KvEvent, KvEvents, KvSnapshot

RANK = RankId("w")
BLOCK_TOKENS = 64
BLOCKS_MAX = 10_000
SNAPSHOTS_MAX = 20
LOST_SHARE = 0.3
BLOCKS_A_PART = 3


@dataclass
class Engine:
    """A rank that publishes what becomes of its blocks, and restarts now and then."""

    lives: int = 1
    seq: int = 0
    held: dict[str, dict[int, None]] = field(default_factory=lambda: {tier: {} for tier in TIERS})

    def publish(self, events: list[KvEvent]) -> KvEvents:
        for event in events:
            self._note(event)
        self.seq += 1
        return KvEvents(
            worker=RANK.worker,
            incarnation=f"life-{self.lives}",
            seq=self.seq,
            block_tokens=BLOCK_TOKENS,
            events=tuple(events),
        )

    def _note(self, event: KvEvent) -> None:
        match event:
            case BlocksStored():
                self.held[event.tier].update(dict.fromkeys(event.hashes))
            case BlocksRemoved():
                for block in event.hashes:
                    self.held[event.tier].pop(block, None)
            case BlocksCleared():
                for tier in TIERS:
                    self.held[tier].clear()

    def restart(self) -> None:
        self.lives, self.seq = self.lives + 1, 0
        self._note(BlocksCleared())

    def snapshot(self) -> list[KvSnapshot]:
        stored = [
            BlocksStored(hashes=BlockHashes.of(blocks[start : start + BLOCKS_A_PART]), tier=tier)
            for tier in TIERS
            for blocks in [list(self.held[tier])]
            for start in range(0, len(blocks), BLOCKS_A_PART)
        ]
        parts = max(1, len(stored))
        return [
            KvSnapshot(
                worker=RANK.worker,
                incarnation=f"life-{self.lives}",
                seq=self.seq,
                block_tokens=BLOCK_TOKENS,
                part=part,
                parts=parts,
                blocks=tuple(stored[part : part + 1]),
            )
            for part in range(parts)
        ]


BLOCKS = st.lists(st.integers(-5, 15), max_size=6).map(BlockHashes.of)
EVENT = st.one_of(
    st.builds(BlocksStored, hashes=BLOCKS, tier=st.sampled_from(TIERS)),
    st.builds(BlocksRemoved, hashes=BLOCKS, tier=st.sampled_from(TIERS)),
    st.builds(BlocksCleared),
)
STEP = st.one_of(st.lists(EVENT, min_size=1, max_size=3), st.none())  # None: the rank restarts


class Follower:
    """A reader behind a bad wire: messages and parts of snapshots are lost, doubled and overtaken."""

    reader_kind: ClassVar[type[KvReader]] = KvReader

    def __init__(self, rng: random.Random) -> None:
        self.index = PrefixIndex(BLOCKS_MAX)
        self.reader = self.reader_kind(RANK, self.index)
        self._rng = rng
        self._wire: list[KvEvents] = []
        self._answer: tuple[int, list[KvSnapshot]] | None = None  # on its way

    def send(self, events: KvEvents) -> None:
        """Put a message on the wire, and let some of what is there arrive."""
        if self._rng.random() > LOST_SHARE:
            self._wire += [events] * self._rng.choice((1, 1, 2))
        for _ in range(self._rng.randrange(3)):
            self._arrive()

    def _arrive(self) -> None:
        near = min(len(self._wire), 4)  # a message is overtaken by few
        if near:
            self.reader.take(self._wire.pop(self._rng.randrange(near)))

    def ask(self, engine: Engine) -> None:
        """Ask for a snapshot; its parts arrive over the next steps."""
        if self.reader.behind and self._answer is None:
            self._answer = self.reader.begin_snapshot(), engine.snapshot()

    def hear_part(self) -> None:
        if self._answer and self._rng.random() < 0.4:
            attempt, parts = self._answer
            part = parts.pop(self._rng.randrange(len(parts)))
            if self._rng.random() > LOST_SHARE / 3:
                self.reader.take_part(attempt, part)
            if not parts:
                self._answer = None

    def settle(self, engine: Engine, last: KvEvents) -> None:
        """The wire is emptied, the last message is heard (the stream has it), and nothing is lost any more."""
        while self._wire:
            self._arrive()
        self.reader.take(last)
        for _ in range(SNAPSHOTS_MAX):
            if not self.reader.behind:
                return
            attempt = self.reader.begin_snapshot()
            for part in engine.snapshot():
                self.reader.take_part(attempt, part)
        raise AssertionError("behind after all those snapshots")


def content(index: PrefixIndex) -> dict[str, set[int]]:
    return {tier: set(index.blocks(RANK, tier)) for tier in TIERS}


def ends_equal(steps: list[list[KvEvent] | None], starts_at: int, rng: random.Random) -> bool:
    """Whether a follower that starts at a step ends with what the rank holds, and one that saw all does."""
    engine, witness, follower = Engine(), KvReader(RANK, saw_all := PrefixIndex(BLOCKS_MAX)), Follower(rng)
    for number, step in enumerate(steps):
        if step is None:
            engine.restart()
            continue
        message = engine.publish(step)
        witness.take(message)
        if number >= starts_at:
            follower.send(message)
            follower.ask(engine)
            follower.hear_part()
    last = engine.publish([])
    witness.take(last)
    follower.settle(engine, last)
    return content(follower.index) == content(saw_all) == {tier: set(engine.held[tier]) for tier in TIERS}


@settings(max_examples=400)
@given(st.lists(STEP, max_size=60), st.integers(0, 40), st.randoms(use_true_random=False))
def test_every_reader_ends_with_what_the_rank_holds(
    steps: list[list[KvEvent] | None], starts_at: int, rng: random.Random
):
    assert ends_equal(steps, starts_at, rng)


def believe_any_snapshot(reader: KvReader, attempt: int, part: KvSnapshot) -> bool:
    return KvReader.take_part(reader, reader.attempt, part)


def believe_any_number(reader: KvReader, events: KvEvents) -> None:
    reader._seq = min(reader._seq, events.seq - 1) if events.seq <= reader._seq else events.seq - 1
    KvReader.take(reader, events)


@pytest.mark.parametrize(
    ("method", "fault"), [("take", believe_any_number), ("take_part", believe_any_snapshot)], ids=["number", "snapshot"]
)
def test_a_careless_reader_is_found_out(method: str, fault: Any, monkeypatch: pytest.MonkeyPatch):
    """The same test with a fault planted."""
    monkeypatch.setattr(Follower, "reader_kind", type("Careless", (KvReader,), {method: fault}))
    assert not all(ends_equal(scenario(random.Random(seed)), 0, random.Random(seed)) for seed in range(1_000))


def scenario(rng: random.Random) -> list[list[KvEvent] | None]:
    def event() -> KvEvent:
        kind = rng.choice((BlocksStored, BlocksStored, BlocksRemoved))
        return kind(hashes=BlockHashes.of(rng.choices(range(20), k=rng.randrange(6))), tier=rng.choice(TIERS))

    return [None if rng.random() < 0.1 else [event()] for _ in range(40)]


def test_a_straggler_of_a_life_never_heard_of_is_not_believed():
    """Its number is the first, so nothing seems to be missing."""
    engine, reader = Engine(), KvReader(RANK, index := PrefixIndex(BLOCKS_MAX))
    straggler = engine.publish([BlocksStored(hashes=BlockHashes.of([1]))])
    engine.restart()
    reader.take(engine.publish([BlocksStored(hashes=BlockHashes.of([2]))]))
    reader.take(straggler)
    assert reader.behind
    attempt = reader.begin_snapshot()
    for part in engine.snapshot():
        reader.take_part(attempt, part)
    assert not reader.behind and index.blocks(RANK) == {2}
