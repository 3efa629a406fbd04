"""The set of announced blocks: what it holds, parents first, and how it fits into messages."""

import pytest

from pipeline import kv_blocks
from pipeline.kv_blocks import EVENT_BYTES, HASH_BYTES, KvBlocks, batches, blocks_in
from subjects.codec import BlockHashes, Format, encode
from subjects.limits import PAYLOAD_BYTES_MAX
from subjects.messages import BlocksCleared, BlocksRemoved, BlocksStored, KvEvent, KvEvents, KvSnapshot, Tier


def stored(*hashes: int, parent: int | None = None, tier: Tier = "gpu") -> BlocksStored:
    return BlocksStored(hashes=BlockHashes.of(hashes), parent=parent, tier=tier)


def removed(*hashes: int, tier: Tier = "gpu") -> BlocksRemoved:
    return BlocksRemoved(hashes=BlockHashes.of(hashes), tier=tier)


def after(*events: KvEvent) -> KvBlocks:
    blocks = KvBlocks()
    for event in events:
        blocks.apply(event)
    return blocks


def test_a_chain_comes_back_as_one_run_and_a_branch_as_another():
    blocks = after(stored(1, 2), stored(3, parent=2), stored(8, 9, parent=1))
    assert list(blocks.runs()) == [stored(1, 2, 3), stored(8, 9, parent=1)]


def test_a_parent_comes_before_its_children_however_they_were_stored():
    blocks = after(stored(3, parent=2), stored(1), stored(2, parent=1))
    assert list(blocks.runs()) == [stored(1, 2, 3)]


def test_a_removed_block_is_gone_and_its_children_keep_their_parent():
    blocks = after(stored(1, 2, 3), removed(2, 7))
    assert list(blocks.runs()) == [stored(1), stored(3, parent=2)]


def test_a_block_lies_in_each_tier_until_it_is_removed_there():
    blocks = after(stored(1, 2), stored(1, 2, tier="host"), removed(2))
    assert list(blocks.runs()) == [stored(1), stored(1, tier="host"), stored(2, parent=1, tier="host")]
    assert len(blocks) == 2
    blocks.apply(removed(1, 2, tier="host"))
    assert list(blocks.runs()) == [stored(1)]
    assert len(blocks) == 1


def test_cleared_means_every_tier():
    assert list(after(stored(1), stored(1, tier="host"), BlocksCleared()).runs()) == []


def test_a_copy_stays_as_it_was():
    blocks = after(stored(1, 2))
    copy = blocks.copy()
    blocks.apply(BlocksCleared())
    assert list(copy.runs()) == [stored(1, 2)]


def test_hashes_that_collide_into_a_circle_end():
    assert sorted(block for run in after(stored(1, 2), stored(1, parent=2)).runs() for block in run.hashes) == [1, 2]


def test_a_long_run_is_split_with_its_parents(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kv_blocks, "RUN_BLOCKS_MAX", 2)
    (group,) = batches([stored(1, 2, 3, 4, 5, parent=9)])
    assert group == (stored(1, 2, parent=9), stored(3, 4, parent=2), stored(5, parent=4))
    (group,) = batches([removed(1, 2, 3)])
    assert group == (removed(1, 2), removed(3))


def test_what_does_not_fit_goes_into_the_next_message(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kv_blocks, "MESSAGE_BYTES_MAX", 2 * EVENT_BYTES + 3 * HASH_BYTES)
    events = [stored(1, 2), stored(3, parent=2), BlocksCleared(), removed(4)]
    assert list(batches(events)) == [tuple(events[:2]), tuple(events[2:])]
    assert list(batches([])) == []


@pytest.mark.parametrize("form", Format)
def test_a_full_message_is_under_the_payload_limit_in_either_format(form: Format):
    low = -(2**63)
    many = [stored(*range(low, low + 4096), parent=low) for _ in range(40)]
    single = [stored(low + at, parent=low, tier="host") for at in range(20_000)]
    for events in (many, single):
        groups = list(batches(events))
        assert len(groups) > 1
        assert blocks_in(event for group in groups for event in group) == blocks_in(events)
        for group in groups:
            ends = {"worker": "w" * 64, "incarnation": "i" * 64, "seq": 2**53, "block_tokens": 65_536}
            assert len(encode(KvEvents(events=group, **ends), form)) <= PAYLOAD_BYTES_MAX
            snapshot = KvSnapshot(blocks=group, part=2**20, parts=2**20, **ends)
            assert len(encode(snapshot, form)) <= PAYLOAD_BYTES_MAX
