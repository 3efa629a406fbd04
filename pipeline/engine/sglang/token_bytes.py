"""A token's bytes, where its text alone does not tell them: one that is a part of a character. Pure.

Tokenizers write a token's bytes as characters, each byte as one (GPT-2's table), or a lone byte as `<0xF0>` (Llama's
byte fallback). SGLang shows a part of a character as U+FFFD; since 0.5.21 its OpenAI answers carry the bytes.
"""

import re
from collections.abc import Callable
from typing import Final

LOST: Final = "\ufffd"
"""What stands in a text for bytes that are no character."""
PieceOf = Callable[[int], str | None]
"""A token as its tokenizer writes it."""

_LONE_BYTE: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _table() -> dict[str, int]:
    """GPT-2's: printable characters of Latin-1 stand for themselves, all other bytes for those from 256 on."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_OF: Final = _table()


def bytes_of(piece: str | None) -> bytes | None:
    """The bytes of a token as its tokenizer writes it; None where that is in neither of the two ways.

    >>> bytes_of("ðŁ"), bytes_of("<0xE5>"), bytes_of("▁a")
    (b'\\xf0\\x9f', b'\\xe5', None)
    """
    if not piece:
        return None
    if lone := _LONE_BYTE.fullmatch(piece):
        return bytes([int(lone[1], 16)])
    found = [_BYTE_OF.get(character) for character in piece]
    return None if None in found else bytes(byte for byte in found if byte is not None)
