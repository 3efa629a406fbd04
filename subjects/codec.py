"""Messages to bytes and back: MessagePack by default, JSON where the request was JSON.

The first byte tells them apart: a MessagePack map never starts with white space or `{`. On MessagePack
token ids are raw little-endian u32 bytes (40 times faster to decode than a list); in JSON they are numbers.
"""

import sys
from array import array
from collections.abc import Iterable, Iterator
from enum import StrEnum
from typing import Any, Final, TypeVar

import msgspec

T = TypeVar("T")
_JSON_STARTS: Final = frozenset(b"{ \t\r\n")


class Format(StrEnum):
    """The wire format of a payload."""

    MSGPACK = "msgpack"
    JSON = "json"


class TokenIds:
    """An immutable sequence of token ids, held as little-endian u32 bytes so that it travels without conversion."""

    __slots__ = ("raw",)

    def __init__(self, raw: bytes = b"") -> None:
        if len(raw) % 4:
            raise ValueError(f"token ids take 4 bytes each; got {len(raw)} bytes")
        self.raw = raw

    @classmethod
    def of(cls, ids: Iterable[int]) -> "TokenIds":
        """From token ids in [0, 2**32)."""
        words = array("I", ids)
        if sys.byteorder == "big":
            words.byteswap()
        return cls(words.tobytes())

    def tolist(self) -> list[int]:
        words = array("I", self.raw)
        if sys.byteorder == "big":
            words.byteswap()
        return words.tolist()

    def __len__(self) -> int:
        return len(self.raw) // 4

    def __iter__(self) -> Iterator[int]:
        return iter(self.tolist())

    def __add__(self, other: "TokenIds") -> "TokenIds":
        return TokenIds(self.raw + other.raw)

    def __getitem__(self, span: slice) -> "TokenIds":
        return TokenIds.of(self.tolist()[span])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TokenIds) and self.raw == other.raw

    def __hash__(self) -> int:
        return hash(self.raw)

    def __repr__(self) -> str:
        return f"TokenIds({len(self)})"


NO_TOKENS: Final = TokenIds()


def _to_msgpack(value: Any) -> Any:
    if isinstance(value, TokenIds):
        return value.raw
    raise NotImplementedError(f"no MessagePack form for {type(value).__name__}")


def _to_json(value: Any) -> Any:
    if isinstance(value, TokenIds):
        return value.tolist()
    raise NotImplementedError(f"no JSON form for {type(value).__name__}")


def _from_wire(kind: type, value: Any) -> Any:
    if kind is TokenIds:
        if isinstance(value, bytes):
            return TokenIds(value)
        if isinstance(value, list) and all(isinstance(i, int) and 0 <= i < 2**32 for i in value):
            return TokenIds.of(value)
        raise ValueError("expected token ids in [0, 2**32)")
    raise NotImplementedError(f"no wire form for {kind.__name__}")


_MSGPACK: Final = msgspec.msgpack.Encoder(enc_hook=_to_msgpack)
_JSON: Final = msgspec.json.Encoder(enc_hook=_to_json)
_decoders: dict[tuple[type, Format], Any] = {}


def format_of(payload: bytes) -> Format:
    """The wire format of a payload, told from its first byte."""
    return Format.JSON if payload[:1] and payload[0] in _JSON_STARTS else Format.MSGPACK


def encode(message: msgspec.Struct, form: Format = Format.MSGPACK) -> bytes:
    return (_JSON if form is Format.JSON else _MSGPACK).encode(message)


def decode(kind: type[T], payload: bytes) -> T:
    """A message of type `kind`. Raises msgspec.DecodeError; its ValidationError names the field's path."""
    form = format_of(payload)
    decoder = _decoders.get((kind, form))
    if decoder is None:
        module = msgspec.json if form is Format.JSON else msgspec.msgpack
        decoder = _decoders[kind, form] = module.Decoder(kind, dec_hook=_from_wire)
    return decoder.decode(payload)
