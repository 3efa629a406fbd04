"""Placement: who is ranked, what heartbeats and placed prompts count for, sessions of all ranks of a worker."""

import time
from dataclasses import dataclass, field, replace

import msgspec
import pytest

from pipeline import placement
from pipeline.block_hashes import PromptHasher, block_hashes
from pipeline.config import RoutingSettings
from pipeline.placement import Placement
from pipeline.prefix_index import PrefixIndex, RankId
from pipeline.presence import WorkerState
from pipeline.routing import Router
from subjects.codec import BlockHashes, TokenIds
from subjects.messages import BlocksStored, Heartbeat, Load, ModelCard

BLOCK_TOKENS = 16
PROMPT = TokenIds.of(range(500))


def state(worker: str, *, dp_size: int = 1, **beat: object) -> WorkerState:
    card = ModelCard(
        worker=worker,
        role="decode",
        model="m",
        incarnation="i",
        model_path="/m",
        engine="simulated",
        context_len_tokens=1000,
        max_running_requests=8,
        max_prefill_tokens=1000,
        kv_blocks=100,
        kv_block_tokens=BLOCK_TOKENS,
        dp_size=dp_size,
    )
    heartbeat = Heartbeat(worker=worker, role="decode", incarnation="i", model="m", **{"ready": True} | beat)
    return WorkerState("decode", worker, card, heartbeat, age_s=0.0, down=False)


@dataclass
class Workers:
    """Stands where Presence does."""

    states: list[WorkerState] = field(default_factory=list)

    def workers(self, role: str, model: str) -> list[WorkerState]:
        assert model == "m" and role in ("decode", "prefill")
        return self.states


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Workers:
    monkeypatch.setattr(placement, "LOOK_S", -1.0)  # look each time
    return Workers()


def placing(workers: Workers, index: PrefixIndex | None = None) -> Placement:
    router = Router(RoutingSettings(seed=1))
    return Placement(workers, router, PromptHasher(), model="m", index=index)


def order(placing: Placement) -> list[tuple[str, int]]:
    return [tuple(score.rank) for score in placing.rank(PROMPT).scores]


def test_the_rank_with_the_cache_is_first(workers: Workers):
    index = PrefixIndex(1000)
    hashes = BlockHashes.of(block_hashes(PROMPT, BLOCK_TOKENS))
    index.apply(RankId("b", 1), BLOCK_TOKENS, [BlocksStored(hashes=hashes)])
    index.apply(RankId("gone"), BLOCK_TOKENS, [BlocksStored(hashes=hashes)])
    workers.states = [state("a"), state("b", dp_size=2)]
    found = order(placing(workers, index))
    assert found[0] == ("b", 1) and sorted(found) == [("a", 0), ("b", 0), ("b", 1)]
    assert order(placing(workers))[0] in found


def test_only_who_takes_work_is_ranked(workers: Workers):
    workers.states = [state("starting", ready=False), state("leaving", draining=True), state("up")]
    assert order(placing(workers)) == [("up", 0)]
    workers.states = []
    assert placing(workers).rank(PROMPT).best is None


def test_heartbeats_tell_the_load(workers: Workers):
    workers.states = [
        state("waiting", load=Load(waiting=1)),
        state("running", load=Load(running=2, kv_tokens_used=10, kv_tokens=100)),
        state("full", load=Load(kv_tokens_used=99, kv_tokens=100)),
        state("slots", slots=4, in_flight=7),
        state("idle"),
    ]
    scores = {score.rank.worker: score.candidate.load for score in placing(workers).rank(PROMPT).scores}
    assert scores["waiting"].waiting == 1
    assert (scores["running"].running, scores["running"].kv_share) == (2, 0.1)
    assert scores["slots"].waiting == 3
    assert order(placing(workers)) == [("idle", 0), ("running", 0), ("full", 0), ("waiting", 0), ("slots", 0)]


def test_a_burst_spreads_before_the_next_heartbeat(workers: Workers):
    workers.states = [state(name) for name in "abcd"]
    burst = placing(workers)
    firsts = []
    for _ in range(8):
        best = burst.rank(PROMPT).best
        burst.placed(best, PROMPT)
        firsts.append(best.rank.worker)
    assert sorted(firsts) == sorted("abcd" * 2)


def test_what_a_heartbeat_knows_counts_no_more(workers: Workers, monkeypatch: pytest.MonkeyPatch):
    workers.states = [state("a")]
    one = placing(workers)
    one.placed(one.rank(PROMPT).best, PROMPT)
    assert one.rank(PROMPT).best.candidate.load.queued_tokens == len(PROMPT)
    later_s = time.monotonic() + placement.SEEN_AFTER_S + 1.0
    monkeypatch.setattr(placement.time, "monotonic", lambda: later_s)
    assert one.rank(PROMPT).best.candidate.load.queued_tokens == 0


def test_what_its_events_tell_to_be_computed_counts_no_more(workers: Workers):
    """Long before the next heartbeat; what was placed after it still counts."""
    workers.states = [state("a")]
    index, rank, later = PrefixIndex(1000), RankId("a"), TokenIds.of(range(1000, 1100))
    index.apply(rank, BLOCK_TOKENS, [])
    one = placing(workers, index)
    one.placed(one.rank(PROMPT).best, PROMPT)
    one.placed(one.rank(later).best, later)
    assert one.rank(PROMPT).best.candidate.load.queued_tokens == len(PROMPT) + len(later)
    hashes = BlockHashes.of(block_hashes(PROMPT, BLOCK_TOKENS))
    index.apply(rank, BLOCK_TOKENS, [BlocksStored(hashes=hashes)])
    assert one.rank(PROMPT).best.candidate.load.queued_tokens == len(later)


def test_a_prompt_is_addressed_only_where_that_makes_a_difference(workers: Workers):
    index = PrefixIndex(1000)
    index.apply(RankId("b"), BLOCK_TOKENS, [BlocksStored(hashes=BlockHashes.of(block_hashes(PROMPT, BLOCK_TOKENS)))])
    alone, unlike = [state("b")], [state("a"), state("b")]
    workers.states = unlike
    assert placing(workers).choose(PROMPT) is None  # without their caches they are alike
    assert placing(workers, index).choose(PROMPT) == "b"
    assert placing(workers, index).choose(PROMPT, salt="tenant-7") is None  # b has it without that salt
    assert len({placing(workers).choose(PROMPT, "talk") for _ in range(9)} - {None}) == 1  # but a session stays
    workers.states = alone
    assert placing(workers, index).choose(PROMPT) is None
    card = msgspec.structs.replace(unlike[0].card, disaggregation="decode")
    workers.states = [replace(each, card=card) for each in unlike]
    assert placing(workers, index).choose(PROMPT) is None  # they compute no prompts
    card = msgspec.structs.replace(card, disaggregation="prefill")
    workers.states = [replace(each, card=card) for each in unlike]
    ours = Placement(workers, Router(RoutingSettings(seed=1)), PromptHasher(), model="m", role="prefill", index=index)
    assert ours.choose(PROMPT) == "b"  # and these do
