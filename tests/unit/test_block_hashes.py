"""Block hashes by their definition, and what a hasher remembers. That they are SGLang's: tests/engine."""

import hashlib
import random

import pytest

from pipeline.block_hashes import LANDMARK_TOKENS, PromptHasher, block_hashes, landmark_mask, salt_of
from subjects.codec import TokenIds
from subjects.messages import EngineOptions

TOKENS = TokenIds.of(random.Random(1).choices(range(100_000), k=2_000))
SIZES = (1, 4, 16, 64)


def test_a_hash_covers_all_tokens_from_the_first_on():
    first = hashlib.sha256(b"\1\0\0\0" + b"\2\0\0\0").digest()
    second = hashlib.sha256(first + b"\3\0\0\0" + b"\xff\xff\xff\xff").digest()
    wanted = [int.from_bytes(digest[:8], "big", signed=True) for digest in (first, second)]
    assert block_hashes(TokenIds.of([1, 2, 3, 2**32 - 1, 9]), 2) == wanted
    assert block_hashes(TokenIds.of([1]), 2) == []


@pytest.mark.parametrize("block_tokens", SIZES)
def test_about_one_block_in_sixteen_tokens_is_a_landmark(block_tokens: int):
    blocks = block_hashes(TOKENS, block_tokens)
    found = sum(not block & landmark_mask(block_tokens) for block in blocks)
    if block_tokens >= LANDMARK_TOKENS:
        assert found == len(blocks)
    else:
        assert 0.75 < found / (len(TOKENS) / LANDMARK_TOKENS) < 1.25


@pytest.mark.parametrize("pieces_max", [3, 1000])
@pytest.mark.parametrize("block_tokens", SIZES)
def test_what_is_remembered_changes_nothing(block_tokens: int, pieces_max: int):
    hasher = PromptHasher(pieces_max)
    for length in (2_000, 0, 1, 64, 65, 513, 1_300, 1_301, 2_000):
        prompt = TokenIds(TOKENS.raw[: 4 * length])
        blocks = block_hashes(TokenIds(prompt.raw[:-4]), block_tokens)  # the last token is always computed
        wanted = [(n + 1, block) for n, block in enumerate(blocks) if not block & landmark_mask(block_tokens)]
        found = hasher.landmarks(prompt, block_tokens)
        assert found.hashes == [block for _, block in wanted]
        assert found.ends == [number * block_tokens for number, _ in wanted]
        assert len(hasher) <= pieces_max
    assert len(hasher) == pieces_max or pieces_max == 1000


def test_a_salt_and_an_adapter_have_blocks_of_their_own():
    kinds = (EngineOptions(), EngineOptions(cache_salt="a"), EngineOptions(lora_path="a"))
    both = EngineOptions(cache_salt="a", lora_path="a")
    hasher = PromptHasher()
    seen = set()
    for salt in map(salt_of, (*kinds, both)):
        found = hasher.landmarks(TOKENS, 16, salt=salt)
        assert found.hashes == block_hashes(TokenIds(TOKENS.raw[:-4]), 16, salt), "also where others are remembered"
        assert not seen & set(found.hashes)
        seen |= set(found.hashes)
