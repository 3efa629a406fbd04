"""Messages to bytes and back: MessagePack by default, JSON where the request was JSON.

The first byte tells them apart: a MessagePack map never starts with white space or `{`. On MessagePack token ids,
block hashes and vectors are raw little-endian bytes (40 times faster to decode than a list); in JSON they are numbers.
"""

import sys
from array import array
from collections.abc import Iterable, Iterator
from enum import StrEnum
from typing import Any, ClassVar, Final, Self, TypeVar

import msgspec

T = TypeVar("T")
_JSON_STARTS: Final = frozenset(b"{ \t\r\n")


class Format(StrEnum):
    """The wire format of a payload."""

    MSGPACK = "msgpack"
    JSON = "json"


class _Numbers:
    """An immutable sequence of numbers, held as little-endian bytes so that it travels without conversion."""

    __slots__ = ("raw",)
    code: ClassVar[str]  # of `array`
    size: ClassVar[int]  # bytes of one number
    bounds: ClassVar[tuple[float, float]]  # from, and below
    kinds: ClassVar[type | tuple[type, ...]] = int  # of a number in JSON

    def __init__(self, raw: bytes = b"") -> None:
        if len(raw) % self.size:
            raise ValueError(f"{type(self).__name__} take {self.size} bytes each; got {len(raw)} bytes")
        self.raw = raw

    @classmethod
    def of(cls, numbers: Iterable[float]) -> Self:
        """From numbers within `bounds`."""
        words = array(cls.code, numbers)
        if sys.byteorder == "big":
            words.byteswap()
        return cls(words.tobytes())

    def tolist(self) -> list[Any]:
        words = array(self.code, self.raw)
        if sys.byteorder == "big":
            words.byteswap()
        return words.tolist()

    def __len__(self) -> int:
        return len(self.raw) // self.size

    def __iter__(self) -> Iterator[Any]:
        return iter(self.tolist())

    def __add__(self, other: Self) -> Self:
        return type(self)(self.raw + other.raw)

    def __getitem__(self, span: slice) -> Self:
        return self.of(self.tolist()[span])

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.raw == other.raw  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return hash(self.raw)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)})"


class TokenIds(_Numbers):
    """Token ids, u32."""

    __slots__ = ()
    code, size, bounds = "I", 4, (0, 2**32)


class BlockHashes(_Numbers):
    """Hashes of KV blocks as SGLang's KV events have them, i64."""

    __slots__ = ()
    code, size, bounds = "q", 8, (-(2**63), 2**63)


class Vector(_Numbers):
    """An embedding, f32."""

    __slots__ = ()
    code, size, bounds = "f", 4, (-3.5e38, 3.5e38)
    kinds = (int, float)


NO_TOKENS: Final = TokenIds()


def _to_msgpack(value: Any) -> Any:
    if isinstance(value, _Numbers):
        return value.raw
    raise NotImplementedError(f"no MessagePack form for {type(value).__name__}")


def _to_json(value: Any) -> Any:
    if isinstance(value, _Numbers):
        return value.tolist()
    raise NotImplementedError(f"no JSON form for {type(value).__name__}")


def _from_wire(kind: type, value: Any) -> Any:
    if issubclass(kind, _Numbers):
        if isinstance(value, bytes):
            return kind(value)
        (low, high), kinds = kind.bounds, kind.kinds
        if isinstance(value, list) and all(isinstance(i, kinds) and low <= i < high for i in value):
            return kind.of(value)
        raise ValueError(f"expected {kind.__name__} in [{low}, {high})")
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
