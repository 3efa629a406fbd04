"""The KV blocks that one rank has announced, and how they fit into messages. Pure: no I/O, no clock.

A publisher keeps the set as it announces blocks, so that it can tell a reader that came late. The set is as large as
the engine's pools: an engine removes a block before it stores another in its place.
"""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Final, Self, get_args

import msgspec

from subjects import limits
from subjects.codec import BlockHashes
from subjects.messages import BlocksCleared, BlocksRemoved, BlocksStored, KvEvent, Tier

TIERS: Final[tuple[Tier, ...]] = get_args(Tier)
RUN_BLOCKS_MAX: Final = 4_096
"""Blocks in one event: a longer run is split, and a snapshot is computed in steps of so many."""
HASH_BYTES: Final = 24
"""A hash at its longest, as JSON for a person who asks by hand; 8 on MessagePack."""
EVENT_BYTES: Final = 96
"""What an event takes beside its hashes, at most."""
MESSAGE_BYTES_MAX: Final = limits.PAYLOAD_BYTES_MAX - 4_096
"""Room for the events of a message, with the rest of it aside."""


class KvBlocks:
    """What is announced of one rank: each block's parent and tiers."""

    def __init__(self) -> None:
        self._parents: dict[int, int | None] = {}  # by hash, of every block in any tier
        self._held: dict[Tier, set[int]] = {tier: set() for tier in TIERS}

    def __len__(self) -> int:
        """Blocks in any tier."""
        return len(self._parents)

    def apply(self, event: KvEvent) -> None:
        """Take an event in. A block stored twice, or removed without having been stored, changes nothing."""
        if isinstance(event, BlocksStored):
            hashes = event.hashes.tolist()
            self._parents.update(zip(hashes, chain((event.parent,), hashes), strict=False))
            self._held[event.tier].update(hashes)
        elif isinstance(event, BlocksRemoved):
            hashes = event.hashes.tolist()
            self._held[event.tier].difference_update(hashes)
            self._forget(hashes)
        else:
            self._parents.clear()
            for held in self._held.values():
                held.clear()

    def _forget(self, hashes: list[int]) -> None:
        """Drop blocks that are in no tier any more."""
        others = [held for held in self._held.values() if held]
        for block in hashes:
            if not any(block in held for held in others):
                self._parents.pop(block, None)

    def copy(self) -> Self:
        """The blocks as they are now."""
        other = type(self)()
        other._parents = self._parents.copy()
        other._held = {tier: held.copy() for tier, held in self._held.items()}
        return other

    def runs(self) -> Iterator[BlocksStored]:
        """Every block as a store, a parent before its children, at most `RUN_BLOCKS_MAX` blocks each.

        A block that lies in two tiers is in two of them. The set must not change meanwhile.
        """
        run: list[int] = []
        where: tuple[Tier, ...] = ()
        for block in self._parents_first():
            tiers = tuple(tier for tier in TIERS if block in self._held[tier])
            if run and (self._parents[block] != run[-1] or tiers != where or len(run) == RUN_BLOCKS_MAX):
                yield from self._stores(run, where)
                run = []
            run.append(block)
            where = tiers
        if run:
            yield from self._stores(run, where)

    def _stores(self, run: list[int], tiers: tuple[Tier, ...]) -> Iterator[BlocksStored]:
        hashes, parent = BlockHashes.of(run), self._parents[run[0]]
        return (BlocksStored(hashes=hashes, parent=parent, tier=tier) for tier in tiers)

    def _parents_first(self) -> Iterator[int]:
        seen: set[int] = set()
        for block in self._parents:
            path: list[int] = []
            step: int | None = block
            while step is not None and step in self._parents and step not in seen:
                seen.add(step)  # at once: hashes that collide could make a circle
                path.append(step)
                step = self._parents[step]
            yield from reversed(path)


def batches(events: Iterable[KvEvent]) -> Iterator[tuple[KvEvent, ...]]:
    """The events in order, in groups that each fit into a message; long ones are split."""
    group: list[KvEvent] = []
    size = 0
    for event in chain.from_iterable(map(_split, events)):
        more = _bytes_of(event)
        if group and size + more > MESSAGE_BYTES_MAX:
            yield tuple(group)
            group, size = [], 0
        group.append(event)
        size += more
    if group:
        yield tuple(group)


def blocks_in(events: Iterable[KvEvent]) -> int:
    """How many hashes the events carry."""
    return sum(len(event.hashes) for event in events if not isinstance(event, BlocksCleared))


def _bytes_of(event: KvEvent) -> int:
    return EVENT_BYTES + (0 if isinstance(event, BlocksCleared) else HASH_BYTES * len(event.hashes))


def _split(event: KvEvent) -> Iterator[KvEvent]:
    if isinstance(event, BlocksCleared) or len(event.hashes) <= RUN_BLOCKS_MAX:
        yield event
        return
    hashes = event.hashes.tolist()
    for start in range(0, len(hashes), RUN_BLOCKS_MAX):
        part = BlockHashes.of(hashes[start : start + RUN_BLOCKS_MAX])
        if isinstance(event, BlocksStored) and start:
            yield msgspec.structs.replace(event, hashes=part, parent=hashes[start - 1])
        else:
            yield msgspec.structs.replace(event, hashes=part)
