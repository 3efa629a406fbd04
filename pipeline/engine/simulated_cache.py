"""The simulated engine's prefix cache: which KV blocks it would still have. Pure: no I/O, no clock.

The least recently used block goes first. A prompt's first block counts as used last, so that no block goes before
those that follow it.
"""

from collections import OrderedDict
from collections.abc import Sequence

from subjects.codec import BlockHashes
from subjects.messages import BlocksCleared, BlocksRemoved, BlocksStored, KvEvent


class PrefixCache:
    """At most `blocks_max` blocks, each known by its hash."""

    def __init__(self, blocks_max: int) -> None:
        self._blocks_max = blocks_max
        self._blocks: OrderedDict[int, None] = OrderedDict()  # the least recently used first

    def held(self, hashes: Sequence[int]) -> int:
        """How many of a prompt's blocks are there, from the first on."""
        return next((at for at, block in enumerate(hashes) if block not in self._blocks), len(hashes))

    def keep(self, hashes: Sequence[int]) -> list[KvEvent]:
        """Take in a sequence's blocks, in the place of those that were not used for longest; what became of it."""
        hashes = hashes[: self._blocks_max]
        held = self.held(hashes)
        for block in reversed(hashes):
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        removed = [self._blocks.popitem(last=False)[0] for _ in range(len(self._blocks) - self._blocks_max)]
        events: list[KvEvent] = [BlocksRemoved(hashes=BlockHashes.of(removed))] if removed else []
        if held < len(hashes):
            parent = hashes[held - 1] if held else None
            events.append(BlocksStored(hashes=BlockHashes.of(hashes[held:]), parent=parent))
        return events

    def clear(self) -> list[KvEvent]:
        """Give every block up; what became of it."""
        self._blocks.clear()
        return [BlocksCleared()]
