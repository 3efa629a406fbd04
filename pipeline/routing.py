"""The choice of a worker: pure. What each rank has of a prompt and how loaded it is, in; a ranking with reasons, out.

A rank's cost is what this prompt would wait for and use up there, in prompt tokens to compute: its own that are not
cached, those that others wait for, something for each running request, and more where the KV pool is nearly full.
docs/adr/0005 says why.
"""

import math
import random
from collections.abc import Sequence
from hashlib import blake2b

import msgspec

from pipeline.config import RoutingSettings
from pipeline.prefix_index import Overlap, RankId


class RankLoad(msgspec.Struct, frozen=True, gc=False):
    """What a rank has to do."""

    running: int = 0  # requests
    waiting: int = 0  # requests whose length is not known: each counts as long as the prompt that is placed
    queued_tokens: int = 0  # prompt tokens known to wait for prefill
    kv_share: float = 0.0  # of the KV pool in use, in [0, 1]; what can be evicted is free


class Candidate(msgspec.Struct, frozen=True, gc=False):
    """A rank that can take the prompt."""

    rank: RankId
    overlap: Overlap = Overlap()
    load: RankLoad = RankLoad()


class Score(msgspec.Struct, frozen=True, gc=False):
    """A candidate's place in a ranking and how it came about. Costs are in prompt tokens to compute."""

    candidate: Candidate
    prefill_cost: float  # the prompt's tokens that are not there, and what it costs to fetch those in lower tiers
    load_cost: float
    cost: float  # what the policy compares

    @property
    def rank(self) -> RankId:
        return self.candidate.rank

    @property
    def why(self) -> str:
        """The cost in words."""
        overlap, load = self.candidate.overlap, self.candidate.load
        there = [f"{overlap.gpu_tokens} cached"] if overlap.gpu_tokens else []
        there += [f"{overlap.host_tokens} in host memory"] if overlap.host_tokens else []
        there += [f"{overlap.disk_tokens} on disk"] if overlap.disk_tokens else []
        busy = [f"{load.running} running"] if load.running else []
        busy += [f"{load.waiting} waiting"] if load.waiting else []
        busy += [f"{load.queued_tokens} tokens queued"] if load.queued_tokens else []
        busy += [f"KV pool {load.kv_share:.0%} in use"] if load.kv_share else []
        own, others = f"{self.prefill_cost:.0f} to compute", f"load {self.load_cost:.0f}"
        return f"{', '.join(there) or 'nothing cached'}: {own}; {', '.join(busy) or 'idle'}: {others}"


class Ranking(msgspec.Struct, frozen=True):
    """The candidates, the chosen one first, then by cost."""

    policy: str
    prompt_tokens: int
    scores: tuple[Score, ...]
    kept_session: bool = False  # the first was chosen for the session among those that cost little more

    @property
    def by_cost(self) -> bool:
        """Whether the policy compares costs."""
        return self.policy in ("kv", "least_loaded")

    @property
    def best(self) -> Score | None:
        """None where nobody can take the prompt."""
        return self.scores[0] if self.scores else None


class Router:
    """Ranks candidates by one policy. Keeps nothing but its random numbers and whose turn it is."""

    def __init__(self, settings: RoutingSettings) -> None:
        self._settings = settings
        self._rng = random.Random(settings.seed)
        self._turn = 0

    def rank(self, prompt_tokens: int, candidates: Sequence[Candidate], session: str | None = None) -> Ranking:
        """Rank them. Requests of one session go to one rank while its cost is within `affinity_slack` of the least.

        Equal costs are ordered by chance, or by turn where the policy is round_robin.
        """
        settings = self._settings
        scores = self._ordered([self._score(prompt_tokens, candidate) for candidate in candidates])
        chances = _softmax([score.cost for score in scores], settings.temperature * prompt_tokens)
        first = 0
        if session and scores:
            first = _kept(scores, session, settings.affinity_slack * prompt_tokens)
        elif chances:
            first = self._rng.choices(range(len(scores)), chances)[0]
        if first:
            scores.insert(0, scores.pop(first))
        return Ranking(settings.policy, prompt_tokens, tuple(scores), kept_session=bool(session))

    def _ordered(self, scores: list[Score]) -> list[Score]:
        """By cost; equal ones by turn or by chance."""
        if self._settings.policy == "round_robin" and scores:
            scores.sort(key=lambda score: score.rank)
            self._turn = (self._turn + 1) % len(scores)
            return scores[self._turn :] + scores[: self._turn]
        draw = self._rng.random
        return sorted(scores, key=lambda score: (score.cost, draw()))

    def _score(self, prompt_tokens: int, candidate: Candidate) -> Score:
        settings, overlap, load = self._settings, candidate.overlap, candidate.load
        prefill_cost = (
            prompt_tokens
            - overlap.gpu_tokens
            - (1 - settings.host_share) * overlap.host_tokens
            - (1 - settings.disk_share) * overlap.disk_tokens
        )
        waiting_tokens = load.queued_tokens + load.waiting * prompt_tokens
        load_cost = waiting_tokens + load.running * settings.running_tokens + self._pressure(load) * prompt_tokens
        cost = 0.0
        if settings.policy == "kv":
            cost = prefill_cost + settings.load_weight * load_cost
        elif settings.policy == "least_loaded":
            cost = load_cost
        return Score(candidate, prefill_cost, load_cost, cost)

    def _pressure(self, load: RankLoad) -> float:
        """How full the KV pool is, from 0 at `kv_full_from` to 1: what comes in then drives out what others use."""
        room = 1 - self._settings.kv_full_from
        return min(1.0, max(0.0, load.kv_share - self._settings.kv_full_from) / room) if room else 0.0


def _softmax(costs: list[float], temperature: float) -> list[float]:
    """The weights of a draw: equal costs have equal weights. Empty without a temperature."""
    if not temperature or not costs:
        return []
    least = min(costs)
    return [math.exp((least - cost) / temperature) for cost in costs]


def _kept(scores: list[Score], session: str, slack: float) -> int:
    """Which of the ranks that cost at most `slack` more than the cheapest is the session's.

    By rendezvous hashing: every router finds the same one, and one that comes or goes moves its own sessions only.
    """
    good = [index for index, score in enumerate(scores) if score.cost <= scores[0].cost + slack]
    return max(good, key=lambda index: _weight(session, scores[index].rank))


def _weight(session: str, rank: RankId) -> bytes:
    return blake2b(f"{rank.worker} {rank.dp_rank} {session}".encode(), digest_size=8).digest()
