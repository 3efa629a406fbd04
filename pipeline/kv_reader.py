"""What a reader knows of one rank's KV blocks, from messages that may be lost, doubled, reordered or late: pure.

Messages are numbered within a life (an incarnation) of a rank, and applied one after the other. A gap leaves the reader
`behind` until a snapshot, or the missing message, comes; a life that it hears of for the first time, until a snapshot
confirms it: the message may be a straggler of one that is over.
"""

from collections import deque
from typing import Final

from pipeline.prefix_index import PrefixIndex, RankId
from subjects.messages import BlocksCleared, KvEvents, KvSnapshot

EARLY_MAX: Final = 256
EARLY_BLOCKS_MAX: Final = 1_000_000
"""What comes before its turn is kept, so many messages and blocks; beyond that the oldest goes, and a newer snapshot is
needed."""
LIVES_MAX: Final = 8
"""Former lives of a rank that are remembered, so that their stragglers are known as such."""
PARTS_MAX: Final = 4_096
"""Parts of a snapshot: of 512 KiB each they hold 268 million blocks."""


class KvReader:
    """Keeps an index's content of one rank equal to what the rank holds."""

    def __init__(self, rank: RankId, index: PrefixIndex) -> None:
        self.rank = rank
        self._index = index
        self.incarnation: str | None = None
        self._former: deque[str] = deque(maxlen=LIVES_MAX)
        self._seq = 0  # of the last message that the index contains
        self._early: dict[int, KvEvents] = {}
        self._early_blocks = 0
        self._attempt = 0
        self._parts: dict[int, KvSnapshot] = {}
        self._confirmed = False  # by a snapshot: the rank itself says that it lives this life
        self._stale = False

    @property
    def behind(self) -> bool:
        """A snapshot has to be asked for."""
        return not self._confirmed or self._stale or bool(self._early)

    @property
    def attempt(self) -> int:
        """The number of the last attempt; a new life or a whole snapshot voids it."""
        return self._attempt

    @property
    def seq(self) -> int:
        """The number of the last message that the index contains; 0 for none of this life."""
        return self._seq

    def take(self, events: KvEvents) -> None:
        """Apply a message in its turn, keep it until then, or drop it: its turn has passed, or it makes no sense."""
        if events.incarnation in self._former or events.block_tokens < 1:
            return
        if events.incarnation != self.incarnation:
            self._begin_life(events.incarnation)
        if events.seq <= self._seq or events.seq in self._early:
            return
        self._early[events.seq] = events
        self._early_blocks += _blocks(events)
        self._catch_up()

    def begin_snapshot(self) -> int:
        """A snapshot is about to be asked for: the number of this attempt. Parts for earlier ones are void."""
        self._attempt += 1
        self._parts.clear()
        return self._attempt

    def take_part(self, attempt: int, part: KvSnapshot) -> bool:
        """A part of the answer to an attempt. True: the last one that was missing, and it has been applied.

        One that contains less than the reader has seen changes nothing: the reader is still `behind`.
        """
        if attempt != self._attempt or not 0 <= part.part < part.parts <= PARTS_MAX or part.block_tokens < 1:
            return False
        first = next(iter(self._parts.values()), part)
        if (part.incarnation, part.seq, part.parts) != (first.incarnation, first.seq, first.parts):
            return False
        self._parts[part.part] = part
        if len(self._parts) < part.parts:
            return False
        self._apply_snapshot([self._parts[number] for number in range(part.parts)])
        return True

    def lose(self) -> None:
        """Messages may have gone unheard: a snapshot is needed, unless the next one's number proves that none did."""
        self._stale = True

    def drop(self) -> None:
        """The rank is gone: empty its part of the index."""
        self._index.drop(self.rank)

    def _begin_life(self, incarnation: str) -> None:
        """The rank is another one now, with no blocks yet; whatever was asked of the former is void."""
        if self.incarnation is not None:
            self._former.append(self.incarnation)
        self.incarnation, self._seq = incarnation, 0
        self._confirmed = self._stale = False
        self._forget_early(set(self._early))
        self.begin_snapshot()
        self._index.drop(self.rank)

    def _apply_snapshot(self, parts: list[KvSnapshot]) -> None:
        snapshot = parts[0]
        self.begin_snapshot()
        if snapshot.incarnation != self.incarnation:  # it answers what was asked in this life, so it is newer
            self._begin_life(snapshot.incarnation)
            if snapshot.incarnation in self._former:
                self._former.remove(snapshot.incarnation)
        self._confirmed = True
        if snapshot.seq < self._seq:
            return
        blocks = [stored for part in parts for stored in part.blocks]
        self._index.replace(self.rank, snapshot.block_tokens, blocks)
        self._seq, self._stale = snapshot.seq, False
        self._forget_early({seq for seq in self._early if seq <= snapshot.seq})
        self._catch_up()

    def _catch_up(self) -> None:
        """Apply what follows on the last message that was applied, and keep the rest within its limits."""
        while events := self._early.get(self._seq + 1):
            self._index.apply(self.rank, events.block_tokens, events.events)
            self._seq, self._stale = events.seq, False
            self._forget_early({events.seq})
        while len(self._early) > EARLY_MAX or (self._early_blocks > EARLY_BLOCKS_MAX and len(self._early) > 1):
            self._forget_early({min(self._early)})

    def _forget_early(self, seqs: set[int]) -> None:
        for seq in seqs:
            self._early_blocks -= _blocks(self._early.pop(seq))


def _blocks(events: KvEvents) -> int:
    """How many blocks a message holds; one more for itself."""
    return 1 + sum(len(event.hashes) for event in events.events if not isinstance(event, BlocksCleared))
