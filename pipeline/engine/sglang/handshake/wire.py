"""What a handshake message looks like on NATS. Pure: needs neither SGLang nor a connection.

SGLang's own frames travel unchanged, as a MessagePack array of byte strings, because their layout changes in
every release. What an operator wants to read stands outside them: the subject ends in the operation and the
room, the headers say who sent it, how many KV pages and bytes it moves and when it was sent.
"""

import re
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

import msgspec

from subjects import headers, names

PAIR: Final = "pair"
"""Stands in the room's place in a message that concerns two ranks and no room."""
_GUARD: Final = b"NixlMsgGuard"
_TAG: Final = re.compile(rb"[A-Z_]{3,32}")
_RANK: Final = re.compile(r"dp(\d+)pp(\d+)tp(\d+)")
_RANKS_MAX: Final = 1000
_PORT_SALTS: Final = 999


class Operation(StrEnum):
    """The last but one token of a handshake subject. Further tags of SGLang appear in lower case."""

    REGISTER = "register"
    TRANSFER = "transfer"
    STATUS = "status"
    ABORT = "abort"
    ABORT_ACK = "abort_ack"
    RECEIPT = "receipt"
    ROOMS = "rooms"  # request: which rooms are open; answered in JSON to anyone, an operator too


@dataclass(frozen=True, order=True)
class Rank:
    """One scheduler process of an engine: each in [0, 1000)."""

    dp: int = 0
    pp: int = 0
    tp: int = 0

    def __post_init__(self) -> None:
        if not all(0 <= part < _RANKS_MAX for part in (self.dp, self.pp, self.tp)):
            raise ValueError(f"ranks must be in [0, {_RANKS_MAX}); got {self}")

    def __str__(self) -> str:
        return f"dp{self.dp}pp{self.pp}tp{self.tp}"

    @classmethod
    def parse(cls, text: str) -> "Rank":
        """Raises ValueError."""
        match = _RANK.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is not a rank")
        return cls(*map(int, match.groups()))


@dataclass(frozen=True, order=True)
class Address:
    """One rank of one incarnation of a worker. Takes the place of SGLang's IP address and port."""

    worker: str
    incarnation: str
    rank: Rank = Rank()

    def __str__(self) -> str:
        return f"{self.host}.{self.rank}"

    @property
    def host(self) -> str:
        """What SGLang takes for a host name, the same for all ranks."""
        return f"{self.worker}.{self.incarnation}"

    @property
    def port(self) -> int:
        """What SGLang takes for a port: the rank, and salt, as SGLang spreads its queues by the port's remainder."""
        number = (self.rank.dp * _RANKS_MAX + self.rank.pp) * _RANKS_MAX + self.rank.tp
        return number * (_PORT_SALTS + 1) + 1 + zlib.crc32(self.host.encode()) % _PORT_SALTS

    @classmethod
    def of(cls, host: str, port: int) -> "Address":
        """The address behind SGLang's host and port. Raises ValueError."""
        worker, dot, incarnation = host.partition(".")
        if not (dot and worker and incarnation):
            raise ValueError(f"{host!r} is not <worker>.<incarnation>")
        high, tp = divmod(port // (_PORT_SALTS + 1), _RANKS_MAX)
        dp, pp = divmod(high, _RANKS_MAX)
        return cls(worker, incarnation, Rank(dp, pp, tp))

    @classmethod
    def of_endpoint(cls, endpoint: str) -> "Address":
        """From SGLang's `tcp://<host>:<port>`. Raises ValueError."""
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        return cls.of(host, int(port))

    @classmethod
    def parse(cls, text: str) -> "Address":
        """From `str(address)`. Raises ValueError."""
        host, _, rank = text.rpartition(".")
        worker, _, incarnation = host.partition(".")
        return cls(worker, incarnation, Rank.parse(rank))

    def inbox(self) -> str:
        """The subject on which this rank gets every message."""
        return names.BOOTSTRAP.any(worker=self.worker, rank=self._rank_token)

    def subject(self, operation: str, room: str) -> str:
        return names.BOOTSTRAP.of(worker=self.worker, rank=self._rank_token, operation=operation, room=room)

    def presence(self) -> str:
        """The subject on which this rank answers whether it is there."""
        return names.PEER.of(worker=self.worker, rank=self._rank_token)

    @property
    def _rank_token(self) -> str:
        return f"{self.incarnation}-{self.rank}"

    @classmethod
    def of_subject(cls, subject: str) -> tuple["Address", str, str] | None:
        """(receiver, operation, room) of a handshake subject; None for any other subject."""
        parts = names.BOOTSTRAP.parse(subject)
        if parts is None:
            return None
        incarnation, _, rank = parts["rank"].rpartition("-")
        if _RANK.fullmatch(rank) is None:
            return None
        return cls(parts["worker"], incarnation, Rank.parse(rank)), parts["operation"], parts["room"]


@dataclass(frozen=True)
class Meaning:
    """What SGLang's frames say, as far as a reader needs it."""

    operation: str
    room: str = PAIR
    pages: int = 0


def read_frames(frames: Sequence[bytes]) -> Meaning:
    """Tell SGLang's messages apart by their first frames (disaggregation/nixl/conn.py).

    Guarded messages are a registration (room "None") or a room's destination pages, int32[pages] in the sixth
    frame; all others carry a tag and then the room.
    """
    first, room = frames[0], _room(frames[1]) if len(frames) > 1 else PAIR
    if first == _GUARD:
        if room == PAIR:
            return Meaning(Operation.REGISTER)
        return Meaning(Operation.TRANSFER, room, len(frames[5]) // 4 if len(frames) > 5 else 0)
    tag = first.removeprefix(b"KV_") if _TAG.fullmatch(first) else b"OTHER"
    return Meaning(tag.decode().lower(), room)


def _room(frame: bytes) -> str:
    return frame.decode() if frame.isdigit() else PAIR


def pack(frames: Sequence[bytes], payload_bytes_max: int) -> list[bytes]:
    """Frames as one payload, or as several where they exceed what a subject carries."""
    whole = msgspec.msgpack.encode(list(frames))
    return [whole[at : at + payload_bytes_max] for at in range(0, len(whole), payload_bytes_max)]


_FRAMES: Final = msgspec.msgpack.Decoder(list[bytes])


def unpack(parts: Sequence[bytes]) -> list[bytes]:
    """Raises msgspec.DecodeError."""
    return _FRAMES.decode(b"".join(parts))


class Received(Protocol):
    """A message as `pipeline.bus` hands it over."""

    subject: str
    payload: bytes
    headers: Mapping[str, str] | None


@dataclass(frozen=True)
class BootstrapLine:
    """One handshake message for a reader. Zero where a message says nothing of it."""

    room: str
    sender: str  # "<worker>.<incarnation>.<rank>"; empty where the broker itself answered
    to: str
    operation: str  # "status" is followed by what it reports, e.g. "status success"
    pages: int = 0
    kv_bytes: int = 0
    microseconds: int = 0  # see headers.HANDSHAKE_US

    def __str__(self) -> str:
        took = f"{self.microseconds} us" if self.microseconds else ""
        return (
            f"{self.room:>20}  {self.sender:<36} -> {self.to:<36} {self.operation:<16}"
            f" {self.pages:>6} pages {self.kv_bytes:>12} bytes {took:>12}"
        )


def describe(received: Received) -> BootstrapLine | None:
    """A handshake message in an operator's words; None for any other message."""
    found = Address.of_subject(received.subject)
    if found is None:
        return None
    to, operation, room = found
    said = received.headers or {}
    if said.get("Status") == NO_RESPONDERS:
        operation = "no responders"
    elif status := said.get(headers.HANDSHAKE_STATUS):
        operation = f"{operation} {status}"
    return BootstrapLine(
        room=room.partition("_")[0],
        sender=said.get(headers.HANDSHAKE_FROM, ""),
        to=str(to),
        operation=operation,
        pages=_number(said.get(headers.HANDSHAKE_PAGES)),
        kv_bytes=_number(said.get(headers.HANDSHAKE_BYTES)),
        microseconds=_number(said.get(headers.HANDSHAKE_US)),
    )


NO_RESPONDERS: Final = "503"
"""The broker's answer, as header `Status`, to a message with a reply subject that nobody receives."""


def _number(text: str | None) -> int:
    return int(text) if text and text.isdigit() else 0


def unix_us() -> int:
    return time.time_ns() // 1000
