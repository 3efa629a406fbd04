"""Hashes of a prompt's KV blocks, equal to those in SGLang's KV events.

The hash of a block is the first 8 bytes of SHA-256 over its parent's full digest and its token ids as little-endian
u32, read as a signed big-endian integer (`get_hash_str` and `hash_str_to_int64` in sglang/srt/mem_cache/utils.py). So a
hash stands for all tokens from the first on. `tests/engine/test_block_hashes.py` holds this against SGLang.

From 0.5.21 on SGLang seeds the chain with a request's `cache_salt`, as `chain_seed` does; it leaves out `extra_key`,
where it keeps an adapter's name. So the pipeline puts the adapter into the salt (`salt_of`). SGLang 0.5.17 has no salt,
and announces such blocks as if they had none: there, salted prompts go by load, and their blocks count as those of
unsalted ones. With EAGLE speculative decoding pairs of tokens are hashed: those blocks match no prompt here, and
routing goes by load.
"""

import hashlib
import sys
from array import array
from collections import OrderedDict
from typing import Final

import msgspec

from subjects.codec import TokenIds
from subjects.messages import EngineOptions

TOKEN_BYTES: Final = 4
LANDMARK_TOKENS: Final = 16
"""Blocks smaller than this are looked up one in so many tokens (docs/adr/0005)."""
PIECE_TOKENS_MIN: Final = 64
PIECE_BLOCKS_MIN: Final = 8
"""Prompts are remembered in pieces: of as many tokens, and of as many blocks."""
PIECES_MAX: Final = 16_384
"""At least a million tokens, in some 15 MB."""


def salt_of(options: EngineOptions) -> str:
    """What separates a request's KV from that of others with the same tokens; "" where nothing does."""
    adapter = f"adapter {options.lora_path}\0" if options.lora_path else ""
    return adapter + (options.cache_salt or "")


def chain_seed(salt: str) -> bytes:
    """What stands in place of a parent's digest before the first block (`compute_node_event_hash_values`)."""
    return hashlib.sha256(b"sglang-cache-salt-v1\0" + salt.encode()).digest() if salt else b""


def block_hashes(token_ids: TokenIds, block_tokens: int, salt: str = "") -> list[int]:
    """i64[num_tokens // block_tokens]: the hashes of the whole blocks."""
    whole_bytes = len(token_ids) // block_tokens * block_tokens * TOKEN_BYTES
    return _chain(chain_seed(salt), token_ids.raw[:whole_bytes], block_tokens)[1]


def _chain(digest: bytes, raw: bytes, block_tokens: int) -> tuple[bytes, list[int]]:
    """Go on from a block's digest through the whole blocks of `raw`: the last digest, and each block's hash."""
    sha256, block_bytes = hashlib.sha256, block_tokens * TOKEN_BYTES
    heads = bytearray()
    for start in range(0, len(raw), block_bytes):
        digest = sha256(digest + raw[start : start + block_bytes]).digest()
        heads += digest[:8]
    words = array("q", heads)
    if sys.byteorder == "little":
        words.byteswap()
    return digest, words.tolist()


def landmark_mask(block_tokens: int) -> int:
    """A block is a landmark where these bits of its hash are all 0: about one in `LANDMARK_TOKENS` tokens.

    Large blocks are all landmarks. The rule needs the hash alone, so whoever sees an event and whoever sees a prompt
    choose the same blocks.
    """
    spacing = max(1, LANDMARK_TOKENS // block_tokens)
    return (1 << (spacing.bit_length() - 1)) - 1


class Landmarks(msgspec.Struct, frozen=True):
    """The blocks of a prompt that are looked up, in order."""

    hashes: list[int]
    ends: list[int]  # how many tokens each covers, from the first on


class _Piece(msgspec.Struct, frozen=True, gc=False):
    """What is remembered of a part of a prompt, and of all before it."""

    digest: bytes  # of its last block
    hashes: tuple[int, ...]  # of its landmarks
    ends: tuple[int, ...]  # in tokens, from the prompt's first on


_PieceKey = tuple[int, bytes, bytes]
"""Block size in tokens, digest of the block before (which stands for all tokens before), the piece's tokens."""


class PromptHasher:
    """Hashes prompts for lookup, and remembers what it hashed: prompts that share a prefix are why there is an index.

    At a block of one token SHA-256 over 4k tokens takes milliseconds; remembered pieces take a hundredth of it.
    """

    def __init__(self, pieces_max: int = PIECES_MAX) -> None:
        self._pieces: OrderedDict[_PieceKey, _Piece] = OrderedDict()  # the least recently used first
        self._pieces_max = pieces_max

    def __len__(self) -> int:
        """How many pieces are remembered."""
        return len(self._pieces)

    def landmarks(self, token_ids: TokenIds, block_tokens: int, *, salt: str = "") -> Landmarks:
        """The landmarks among the blocks that a prompt may find cached: an engine always computes its last token."""
        raw = token_ids.raw
        piece_bytes = max(PIECE_TOKENS_MIN // block_tokens, PIECE_BLOCKS_MIN) * block_tokens * TOKEN_BYTES
        whole_bytes = max(0, len(token_ids) - 1) // block_tokens * block_tokens * TOKEN_BYTES
        digest = chain_seed(salt)
        hashes: list[int] = []
        ends: list[int] = []
        for start in range(0, whole_bytes, piece_bytes):
            key = (block_tokens, digest, raw[start : min(start + piece_bytes, whole_bytes)])
            piece = self._pieces.get(key)
            if piece is None:
                piece = self._pieces[key] = _hashed(key, start // TOKEN_BYTES)
            else:
                self._pieces.move_to_end(key)
            digest = piece.digest
            hashes += piece.hashes
            ends += piece.ends
        while len(self._pieces) > self._pieces_max:
            self._pieces.popitem(last=False)
        return Landmarks(hashes, ends)


def _hashed(key: _PieceKey, start: int) -> _Piece:
    """The piece that begins after `start` tokens."""
    block_tokens, digest, raw = key
    last, hashes = _chain(digest, raw, block_tokens)
    mask = landmark_mask(block_tokens)
    found = [(block, start + (n + 1) * block_tokens) for n, block in enumerate(hashes) if not block & mask]
    return _Piece(last, tuple([block for block, _ in found]), tuple([end for _, end in found]))
