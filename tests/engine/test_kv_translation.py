"""SGLang's own event objects become ours: runs are put together, tiers are right, token ids stay behind."""

import pytest

from pipeline.engine.sglang import cpu_platform

pytestmark = pytest.mark.engine
cpu_platform.prepare()

from sglang.srt.disaggregation.kv_events import (  # noqa: E402, after prepare()
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    EventPublisherFactory,
    StorageMedium,
)
from sglang.srt.mem_cache.base_prefix_cache import InsertParams  # noqa: E402
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey  # noqa: E402

from pipeline.block_hashes import block_hashes  # noqa: E402
from pipeline.engine.sglang.kv_event_publisher import TIERS, NatsEventPublisher, publisher, translate  # noqa: E402
from pipeline.engine.sglang.kv_events import CONFIG, PUBLISHER, KvEventsSettings  # noqa: E402
from subjects.codec import BlockHashes, TokenIds  # noqa: E402
from subjects.messages import BlocksCleared, BlocksRemoved, BlocksStored, Tier  # noqa: E402


def theirs(*hashes: int, parent: int | None = None, medium: str | None = None, tokens: int = 2) -> BlockStored:
    return BlockStored(
        block_hashes=list(hashes),
        parent_block_hash=parent,
        token_ids=[7] * tokens * len(hashes),
        block_size=tokens,
        lora_id=None,
        medium=medium,
    )


def ours(*hashes: int, parent: int | None = None, tier: Tier = "gpu") -> BlocksStored:
    return BlocksStored(hashes=BlockHashes.of(hashes), parent=parent, tier=tier)


def test_blocks_stored_one_by_one_become_a_run():
    one_by_one = [theirs(1), theirs(2, parent=1), theirs(3, parent=2), theirs(9, parent=1)]
    assert translate(one_by_one, 2) == [ours(1, 2, 3), ours(9, parent=1)]
    assert translate([theirs(1, 2, 3)], 2) == [ours(1, 2, 3)]


def test_each_medium_has_its_tier():
    events = [theirs(1), theirs(2, parent=1, medium=StorageMedium.CPU), theirs(3, medium=StorageMedium.DISK)]
    gone = [BlockRemoved(block_hashes=[1, 2], medium=medium) for medium in (StorageMedium.GPU, StorageMedium.EXTERNAL)]
    assert translate([*events, *gone], 2) == [
        ours(1),
        ours(2, parent=1, tier="host"),
        ours(3, tier="disk"),
        BlocksRemoved(hashes=BlockHashes.of([1, 2])),
        BlocksRemoved(hashes=BlockHashes.of([1, 2]), tier="disk"),
    ]
    assert {medium.value for medium in StorageMedium} <= TIERS.keys()


def test_the_order_is_kept():
    events = [theirs(1), BlockRemoved(block_hashes=[1]), theirs(1), AllBlocksCleared(), theirs(1)]
    removed = BlocksRemoved(hashes=BlockHashes.of([1]))
    assert translate(events, 2) == [ours(1), removed, ours(1), BlocksCleared(), ours(1)]


def test_a_block_that_is_not_full_is_left_out():
    assert translate([theirs(1), theirs(2, parent=1, tokens=1)], 2) == [ours(1)]


@pytest.mark.parametrize("page_size", [1, 4])
def test_sglangs_own_tree_tells_of_the_hashes_of_its_tokens(page_size: int):
    import torch

    tree = RadixCache.create_simulated(page_size=page_size, enable_kv_cache_events=True)
    tokens = list(range(100, 116))
    for prompt in (tokens, [*tokens[:8], *range(500, 508)]):
        key = RadixKey(prompt, extra_key=None)
        tree.insert(InsertParams(key=key, value=torch.arange(len(prompt), dtype=torch.int64)))
    found = translate(tree.take_events(), page_size)
    hashes = block_hashes(TokenIds.of(tokens), page_size)
    branch = block_hashes(TokenIds.of([*tokens[:8], *range(500, 508)]), page_size)[8 // page_size :]
    assert found == [BlocksCleared(), ours(*hashes), ours(*branch, parent=hashes[8 // page_size - 1])]


def test_sglang_makes_our_publisher_from_its_configuration(monkeypatch: pytest.MonkeyPatch):
    place = KvEventsSettings(url="nats://broker", model="m", worker="w", incarnation="i")
    monkeypatch.setattr(EventPublisherFactory, "_registry", {PUBLISHER: publisher(place)})
    assert isinstance(EventPublisherFactory.create(CONFIG, 3), NatsEventPublisher)
