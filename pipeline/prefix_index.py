"""Which rank of which worker holds which blocks, in which tier: pure, in memory, bounded.

A block's hash stands for its whole prefix, so the index is flat: hash -> a bit for each rank. A prompt's overlap with
all ranks together is one walk along its landmarks (`pipeline.block_hashes`). Why so, and what it costs: docs/adr/0005.
"""

import operator
from collections.abc import Callable, Iterable, Iterator
from itertools import repeat
from typing import Final, NamedTuple, get_args

import msgspec

from pipeline.block_hashes import Landmarks, landmark_mask
from subjects.codec import BlockHashes
from subjects.messages import BlocksCleared, BlocksRemoved, BlocksStored, KvEvent, Tier

THINNING_SHIFT: Final = 32
"""Thinning looks at other bits of a hash than `landmark_mask` does."""
TIERS: Final[tuple[Tier, ...]] = get_args(Tier)  # the fastest first


class RankId(NamedTuple):
    """A data-parallel rank of a worker."""

    worker: str
    dp_rank: int = 0


class Overlap(msgspec.Struct, frozen=True, gc=False):
    """Leading tokens of a prompt that a rank has, by the fastest tier that holds them."""

    gpu_tokens: int = 0
    host_tokens: int = 0
    disk_tokens: int = 0

    @property
    def tokens(self) -> int:
        return self.gpu_tokens + self.host_tokens + self.disk_tokens


class _Held(msgspec.Struct):
    """What the index has of one rank."""

    bit: int  # a power of two
    block_tokens: int
    tiers: tuple[set[int], ...]  # hashes, in the order of TIERS

    def __len__(self) -> int:
        return sum(map(len, self.tiers))


class PrefixIndex:
    """The landmarks among the blocks of the ranks that serve one model.

    Entries are counted once for each rank and tier. Where there would be more than `blocks_max`, the index keeps every
    second landmark of all ranks, chosen by hash, and from then on takes in no others: overlaps are known half as
    finely, and no rank and no long prefix is lost.
    """

    def __init__(self, blocks_max: int) -> None:
        self._blocks_max = blocks_max
        self._blocks = 0
        self._thinned = 1
        self._held: dict[RankId, _Held] = {}
        self._tables: tuple[dict[int, int], ...] = tuple({} for _ in TIERS)  # hash -> bits of ranks, for each tier
        self._ranks: dict[int, RankId] = {}  # by bit

    def __len__(self) -> int:
        return self._blocks

    @property
    def thinned(self) -> int:
        """One landmark of so many is kept: 1, or a power of two."""
        return self._thinned

    @property
    def _thinning_mask(self) -> int:
        """Bits of a hash that are 0 in all that is kept."""
        return (self._thinned - 1) << THINNING_SHIFT

    def ranks(self) -> dict[RankId, int]:
        """How many entries each rank has."""
        return {rank: len(held) for rank, held in self._held.items()}

    def blocks(self, rank: RankId, tier: Tier = "gpu") -> frozenset[int]:
        """The hashes that the index has of a rank."""
        held = self._held.get(rank)
        return frozenset(held.tiers[TIERS.index(tier)]) if held else frozenset()

    def last_landmark(self, rank: RankId, landmarks_of: Callable[[int], Landmarks]) -> int | None:
        """The hash by which a prompt will be known as computed by a rank; None where none is indexed of it."""
        held = self._held.get(rank)
        hashes = landmarks_of(held.block_tokens).hashes if held is not None else ()
        return next((block for block in reversed(hashes) if not block & self._thinning_mask), None)

    def holds(self, rank: RankId, block: int) -> bool:
        """Whether a rank has a landmark, in whatever tier."""
        held = self._held.get(rank)
        return held is not None and any(block in there for there in held.tiers)

    # --- what becomes of blocks -----------------------------------------------------------------------

    def apply(self, rank: RankId, block_tokens: int, events: Iterable[KvEvent]) -> None:
        """Take in a rank's events, in order. Removing what is not there, or storing what is, changes nothing."""
        held = self._entry(rank, block_tokens)
        for event in events:
            match event:
                case BlocksStored():
                    self._store(held, event.tier, event.hashes)
                case BlocksRemoved():
                    self._remove(held, event.tier, event.hashes)
                case BlocksCleared():
                    self._clear(held)
        self._keep_within_limit()

    def replace(self, rank: RankId, block_tokens: int, events: Iterable[KvEvent]) -> None:
        """A rank holds what `events` store, and nothing else."""
        self.drop(rank)
        self.apply(rank, block_tokens, events)

    def drop(self, rank: RankId) -> None:
        """Forget a rank."""
        if held := self._held.pop(rank, None):
            self._clear(held)
            del self._ranks[held.bit]
            if not self._blocks:
                self._thinned = 1

    def _entry(self, rank: RankId, block_tokens: int) -> _Held:
        """A rank's entry; anew where its blocks have another size now, since their hashes are others."""
        held = self._held.get(rank)
        if held is not None and held.block_tokens == block_tokens:
            return held
        self.drop(rank)
        bit = 1
        while bit in self._ranks:
            bit <<= 1
        self._ranks[bit] = rank
        held = self._held[rank] = _Held(bit, block_tokens, tuple(set() for _ in TIERS))
        return held

    def _store(self, held: _Held, tier: Tier, hashes: BlockHashes) -> None:
        number = TIERS.index(tier)
        table, there, bit = self._tables[number], held.tiers[number], held.bit
        mask = self._thinning_mask | landmark_mask(held.block_tokens)
        before = len(there)
        for block in [block for block in hashes if not block & mask]:
            there.add(block)
            table[block] = table.get(block, 0) | bit
        self._blocks += len(there) - before

    def _remove(self, held: _Held, tier: Tier, hashes: BlockHashes) -> None:
        number = TIERS.index(tier)
        gone = held.tiers[number].intersection(hashes)
        held.tiers[number].difference_update(gone)
        self._forget(number, held.bit, gone)

    def _clear(self, held: _Held) -> None:
        for number, there in enumerate(held.tiers):
            self._forget(number, held.bit, there)
            there.clear()

    def _forget(self, tier: int, bit: int, hashes: set[int]) -> None:
        table = self._tables[tier]
        for block in hashes:
            if left := table[block] ^ bit:
                table[block] = left
            else:
                del table[block]
        self._blocks -= len(hashes)

    def _keep_within_limit(self) -> None:
        while self._blocks > self._blocks_max:
            self._thinned *= 2
            mask = self._thinning_mask
            self._tables = tuple({b: bits for b, bits in table.items() if not b & mask} for table in self._tables)
            for held in self._held.values():
                held.tiers = tuple({block for block in there if not block & mask} for there in held.tiers)
            self._blocks = sum(map(len, self._held.values()))

    # --- what a prompt finds --------------------------------------------------------------------------

    def overlaps(self, landmarks_of: Callable[[int], Landmarks]) -> dict[RankId, Overlap]:
        """Of each rank that has any, the leading part of a prompt; `landmarks_of` gives its landmarks by block size.

        At least so much is there: it ends with a landmark.
        """
        bits_of_size: dict[int, int] = {}
        for held in self._held.values():
            bits_of_size[held.block_tokens] = bits_of_size.get(held.block_tokens, 0) | held.bit
        found: dict[RankId, Overlap] = {}
        for block_tokens, bits in bits_of_size.items():
            self._find(landmarks_of(block_tokens), bits, found)
        return found

    def _find(self, landmarks: Landmarks, ranks: int, found: dict[RankId, Overlap]) -> None:
        """Add the overlaps of those ranks."""
        hashes, ends = landmarks.hashes, landmarks.ends
        if mask := self._thinning_mask:
            kept = [index for index, block in enumerate(hashes) if not block & mask]
            hashes, ends = [hashes[index] for index in kept], [ends[index] for index in kept]
        reaches = [_reach(self._holders(hashes, 1), ends, ranks)]
        for tiers in range(2, len(TIERS) + 1):
            more = bool(self._tables[tiers - 1])
            reaches.append(_reach(self._holders(hashes, tiers), ends, ranks) if more else reaches[-1])
        gpu, host, disk = reaches
        for bit, tokens in disk.items():
            in_gpu, in_host = gpu.get(bit, 0), host.get(bit, 0)
            found[self._ranks[bit]] = Overlap(in_gpu, in_host - in_gpu, tokens - in_host)

    def _holders(self, hashes: list[int], tiers: int) -> Iterator[int]:
        """For each block the bits of the ranks that have it in one of the fastest `tiers`."""
        holders: Iterator[int] = map(self._tables[0].get, hashes, repeat(0))
        for table in self._tables[1:tiers]:
            holders = map(operator.or_, holders, map(table.get, hashes, repeat(0)))
        return holders


def _reach(holders: Iterator[int], ends: list[int], ranks: int) -> dict[int, int]:
    """For each rank's bit that holds the first block: how many tokens it has without a gap."""
    reach: dict[int, int] = {}
    reached = 0
    for bits, end in zip(holders, ends, strict=True):
        if ranks & bits != ranks:
            _note(reach, ranks & ~bits, reached)
            ranks &= bits
            if not ranks:
                return reach
        reached = end
    _note(reach, ranks, reached)
    return reach


def _note(reach: dict[int, int], ranks: int, tokens: int) -> None:
    """Note of each rank's bit how far it reaches."""
    while ranks and tokens:
        bit = ranks & -ranks
        reach[bit] = tokens
        ranks ^= bit
