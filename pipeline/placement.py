"""Where a prompt should go: the workers of a model ranked by their caches, their heartbeats and what was sent since.

A heartbeat is up to a second old. So that a burst does not all go to the worker that was idle a second ago, each
prompt that was placed here counts for its rank until a later heartbeat can have it in its figures, or the rank's KV
events say that it is computed.
"""

import asyncio
import time
from collections import deque
from functools import partial
from typing import Final, Protocol

import msgspec
import structlog

from pipeline.block_hashes import PromptHasher
from pipeline.bus import Bus
from pipeline.config import RoutingSettings
from pipeline.errors import BusUnavailable
from pipeline.kv_feed import KvIndexFeed
from pipeline.prefix_index import Overlap, PrefixIndex, RankId
from pipeline.presence import Presence, WorkerState
from pipeline.routing import Candidate, Ranking, RankLoad, Router, Score
from subjects import names
from subjects.codec import TokenIds
from subjects.messages import Role

LOOK_S: Final = 0.1
"""The workers' states are read so often, not for each prompt."""
SEEN_AFTER_S: Final = 0.25
"""So long after it was placed, a prompt is in its worker's figures, if that can take it."""
PLACED_MAX: Final = 4_096
"""Prompts of one rank that are remembered as placed."""
_NOTHING: Final = Overlap()

log = structlog.get_logger()


class _Placed(msgspec.Struct, frozen=True, gc=False):
    """A prompt that went to a rank."""

    at_s: float  # on the monotonic clock
    tokens: int  # to compute
    last_landmark: int | None  # once the rank holds it, the prompt is computed


class _Known(msgspec.Struct):
    """A rank that takes work."""

    load: RankLoad  # as its last heartbeat had it
    placed: deque[_Placed]  # what its heartbeat may not have, and what is not computed yet
    placed_tokens: int = 0

    def forget_first(self) -> None:
        self.placed_tokens -= self.placed.popleft().tokens


class Placement:
    """Ranks one model's workers of one role. Without an index their caches are unknown."""

    def __init__(
        self,
        presence: Presence,
        router: Router,
        hasher: PromptHasher,
        *,
        model: str,
        role: Role = "decode",
        index: PrefixIndex | None = None,
    ) -> None:
        self.model, self.role = model, role
        self._presence, self._router, self._hasher, self._index = presence, router, hasher, index
        self._known: dict[RankId, _Known] = {}
        self._looked_s = 0.0
        self._caches = True  # every worker; a decode worker whose prompts are prefilled elsewhere keeps no prefixes

    def choose(self, token_ids: TokenIds, session: str | None = None, salt: str = "") -> str | None:
        """The worker to address a prompt to, which then counts as placed there; None where any will do as well.

        That is where there is one worker or none, and where all cost the same and there is no session to keep.
        """
        ranking = self.rank(token_ids, session, salt)
        costs = {score.cost for score in ranking.scores}
        alike = ranking.by_cost and len(costs) < 2 and not ranking.kept_session
        if len({score.rank.worker for score in ranking.scores}) < 2 or alike:
            return None
        if ranking.policy == "kv" and not self._caches:
            return None
        assert ranking.best is not None
        self.placed(ranking.best, token_ids, salt)
        return ranking.best.rank.worker

    def rank(self, token_ids: TokenIds, session: str | None = None, salt: str = "") -> Ranking:
        """The workers that take work now, the best for this prompt first; none, where there is none.

        `salt`: see `block_hashes.salt_of`.
        """
        if time.monotonic() - self._looked_s > LOOK_S:
            self._look()
        landmarks = partial(self._hasher.landmarks, token_ids, salt=salt)
        overlaps = self._index.overlaps(landmarks) if self._index is not None else {}
        candidates = [
            Candidate(rank, overlaps.get(rank, _NOTHING), self._with_placed(rank, known))
            for rank, known in self._known.items()
        ]
        return self._router.rank(len(token_ids), candidates, session)

    def placed(self, score: Score, token_ids: TokenIds, salt: str = "") -> None:
        """The prompt went to this rank."""
        if known := self._known.get(score.rank):
            landmarks = partial(self._hasher.landmarks, token_ids, salt=salt)
            last = self._index.last_landmark(score.rank, landmarks) if self._index is not None else None
            if len(known.placed) == PLACED_MAX:
                known.forget_first()
            known.placed.append(_Placed(time.monotonic(), round(score.prefill_cost), last))
            known.placed_tokens += known.placed[-1].tokens

    def _with_placed(self, rank: RankId, known: _Known) -> RankLoad:
        """A rank's load with what was placed there and is not computed, as its events tell, in the order of placing."""
        while known.placed and self._computed(rank, known.placed[0]):
            known.forget_first()
        if not known.placed:
            return known.load
        load = known.load
        return RankLoad(load.running, load.waiting, load.queued_tokens + known.placed_tokens, load.kv_share)

    def _computed(self, rank: RankId, placed: _Placed) -> bool:
        return (
            self._index is not None
            and placed.last_landmark is not None
            and self._index.holds(rank, placed.last_landmark)
        )

    def _look(self) -> None:
        """Read who takes work and how loaded they are, and forget what their figures now contain."""
        now_s = self._looked_s = time.monotonic()
        before, self._known, self._caches = self._known, {}, True
        for state in self._presence.workers(self.role, self.model):
            if not state.ready or not state.registered:
                continue
            self._caches &= state.card is not None and state.card.disaggregation != "decode"
            load, heard_s = _load_of_a_rank(state), now_s - state.age_s
            for dp_rank in range(state.card.dp_size if state.card else 0):
                rank = RankId(state.worker, dp_rank)
                there = before.get(rank)
                known = self._known[rank] = (
                    _Known(load, there.placed, there.placed_tokens) if there else _Known(load, deque())
                )
                while known.placed and known.placed[0].at_s + SEEN_AFTER_S < heard_s:
                    known.forget_first()


def _load_of_a_rank(state: WorkerState) -> RankLoad:
    """A worker's load in equal parts: heartbeats do not tell its ranks apart."""
    assert state.heartbeat and state.card, "only a registered worker has ranks"
    beat, ranks = state.heartbeat, state.card.dp_size
    beyond_slots = max(0, beat.in_flight - beat.slots) if beat.slots else 0
    return RankLoad(
        running=round(beat.load.running / ranks),
        waiting=round((beat.load.waiting + beyond_slots) / ranks),
        kv_share=beat.load.kv_tokens_used / beat.load.kv_tokens if beat.load.kv_tokens else 0.0,
    )


class Places(Protocol):
    """Where prompts go."""

    async def choose(self, model: str, token_ids: TokenIds, session: str | None = None, salt: str = "") -> str | None:
        """The worker to address a prompt to; None where any will do. `salt`: see `block_hashes.salt_of`."""
        ...


class Placements:
    """A process's placements, one for each model that it is asked about; KV events are followed from then on."""

    def __init__(self, bus: Bus, presence: Presence, settings: RoutingSettings, role: Role = "decode") -> None:
        self._bus, self._presence, self._settings, self._role = bus, presence, settings, role
        self._hasher = PromptHasher()
        self._feeds: dict[str, KvIndexFeed] = {}
        self._placements: dict[str, Placement] = {}
        self._starting = asyncio.Lock()

    async def of(self, model: str) -> Placement:
        """A model's placement. The first time it subscribes to the model's KV events: raises BusUnavailable."""
        if placement := self._placements.get(model):
            return placement
        async with self._starting:
            if model not in self._placements:
                self._placements[model] = await self._start(model)
        return self._placements[model]

    async def choose(self, model: str, token_ids: TokenIds, session: str | None = None, salt: str = "") -> str | None:
        """The worker to address a prompt to; None where any will do, or no worker's blocks can be heard of now."""
        if self._settings.policy == "any":
            return None
        try:
            placement = await self.of(names.token(model))
        except BusUnavailable as error:
            log.warning("kv_events_unheard", model=model, code=error.code, reason=str(error))
            return None
        return placement.choose(token_ids, session, salt)

    async def _start(self, model: str) -> Placement:
        feed = None
        if self._settings.policy == "kv":
            feed = KvIndexFeed(self._bus, self._presence, model, self._settings.blocks_max)
            await feed.start()
            self._feeds[model] = feed
        return Placement(
            self._presence,
            Router(self._settings),
            self._hasher,
            model=model,
            role=self._role,
            index=feed.index if feed else None,
        )

    def behind(self, model: str) -> list[RankId]:
        """Ranks of the model whose blocks are not all known; none where the policy does not look at caches."""
        return self._feeds[model].behind() if model in self._feeds else []

    async def wait_caught_up(self, model: str, timeout_s: float) -> bool:
        """Wait until no rank of the model is behind; False when the time is over."""
        return model not in self._feeds or await self._feeds[model].wait_caught_up(timeout_s)

    async def close(self) -> None:
        for feed in self._feeds.values():
            await feed.close()
