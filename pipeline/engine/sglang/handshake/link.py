"""Exactly once and in order between two ranks, over core NATS, which may lose messages. Pure: no I/O, no clock.

A sender numbers its messages to each rank and keeps them until receipted; what has no receipt is sent again. A
receiver takes the next number only, drops repeats and waits out gaps. A sender that gives messages up says so
with `base`, the oldest number that it still stands by, so that the row goes on.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

MESSAGES_MAX = 65_536
"""Messages to one rank that wait for a receipt; a room takes one or two."""


@dataclass(frozen=True)
class Outbound:
    """One message as it stands in the row."""

    seq: int  # from 1
    operation: str
    room: str
    payload: bytes
    headers: dict[str, str] = field(compare=False)
    since_s: float = field(compare=False)  # when it was first sent


class Outgoing:
    """The row of messages to one rank."""

    def __init__(self) -> None:
        self._next = 1
        self._waiting: dict[int, Outbound] = {}
        self.sent_s = 0.0  # when the row was last sent

    @property
    def base(self) -> int:
        return next(iter(self._waiting), self._next)

    def __iter__(self) -> Iterator[Outbound]:
        return iter(tuple(self._waiting.values()))

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, operation: str, room: str, payload: bytes, headers: dict[str, str], now_s: float) -> Outbound:
        message = Outbound(self._next, operation, room, payload, headers, now_s)
        self._waiting[self._next] = message
        self._next += 1
        return message

    def receipt(self, seq: int) -> None:
        """The receiver has every message up to `seq`."""
        for waiting in tuple(self._waiting):
            if waiting > seq:
                return
            del self._waiting[waiting]

    def give_up(self) -> tuple[Outbound, ...]:
        """Forget all that wait, and return them: their rooms have failed."""
        lost = tuple(self._waiting.values())
        self._waiting.clear()
        return lost


class Incoming:
    """The row of messages from one rank."""

    def __init__(self) -> None:
        self._last = 0

    @property
    def last(self) -> int:
        """What to receipt: every number up to it has been taken."""
        return self._last

    def take(self, seq: int, base: int) -> bool:
        """True where the message is the next of the row; False for a repeat or behind a gap."""
        if seq != max(self._last + 1, base):
            return False
        self._last = seq
        return True
