"""Our block hashes are SGLang's: computed by its own functions, without an engine."""

import random
from array import array
from types import SimpleNamespace

import pytest

from pipeline.engine.sglang import cpu_platform

cpu_platform.prepare()
from sglang.srt.mem_cache import utils  # noqa: E402
from sglang.srt.mem_cache.radix_cache import RadixKey  # noqa: E402
from sglang.srt.mem_cache.utils import get_hash_str, hash_str_to_int64  # noqa: E402

from pipeline.block_hashes import block_hashes  # noqa: E402
from subjects.codec import TokenIds  # noqa: E402

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("block_tokens", [1, 16, 64])
def test_hashes_are_sglangs(block_tokens: int):
    tokens = random.Random(block_tokens).choices(range(150_000), k=64 * 5 + 3)
    tokens[7] = 2**32 - 1
    whole = tokens[: len(tokens) // block_tokens * block_tokens]
    theirs = [hash_str_to_int64(digest) for digest in get_hash_str(whole, page_size=block_tokens)]
    assert block_hashes(TokenIds.of(tokens), block_tokens) == theirs
    assert any(block < 0 for block in theirs) and any(block > 0 for block in theirs)


@pytest.mark.skipif("cache_salt" not in RadixKey.__slots__, reason="this SGLang hashes no salt (before 0.5.21)")
@pytest.mark.parametrize("adapter", [None, "an adapter's id"])
def test_salted_hashes_are_sglangs(adapter: str | None):
    """An adapter's id stands in SGLang's `extra_key`, which its hashes leave out."""
    tokens = random.Random(7).choices(range(150_000), k=64)
    key = RadixKey(array("q", tokens), adapter, cache_salt="tenant-7")
    node = SimpleNamespace(key=key, parent=None, hash_value=None, event_hash_value=None)
    theirs = [hash_str_to_int64(digest) for digest in utils.compute_node_event_hash_values(node, 16)]
    assert block_hashes(TokenIds.of(tokens), 16, "tenant-7") == theirs
