"""The answers of a running batch, kept where a gateway that takes it over finds them.

They are put into the object bucket a part at a time, and count from when the batch's state names their number. What a
gateway had and did not put when it was killed is found in the log of frames (`pipeline.batch.Run.recover`), which
keeps them for longer than they wait here.
"""

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final

import msgspec

from pipeline.batch import BatchAnswer, BatchError
from pipeline.bus import Objects
from subjects.messages import BatchAnswers, BatchState

PART_BYTES: Final = 4 * 1024 * 1024
PART_LINES: Final = 1_000
_PLACE: Final = "~answers"
"""No client's name begins so."""


class _Kept(msgspec.Struct, frozen=True):
    """What matters of a line that is kept."""

    id: str
    error: BatchError | None = None


class KeptAnswers:
    """One owner's view of a batch's answers."""

    def __init__(self, objects: Objects, batch_id: str, owner: str, commit: Callable[[BatchAnswers], Awaitable[None]]):
        """`commit` writes into the batch's state how many parts this owner has put."""
        self._objects, self._batch_id, self._owner, self._commit = objects, batch_id, owner, commit
        self._parts: dict[str, int] = {}  # by owner
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._since_s = 0.0  # when the oldest of them came, monotonic
        self.answered: set[str] = set()
        self.completed = 0
        self.failed = 0

    async def load(self, state: BatchState) -> None:
        """Read what this batch's owners have put. Raises ObjectNotFound, BusUnavailable."""
        for written in state.answers:
            self._parts[written.owner] = written.parts
        async for part in self._all():
            for line in part.splitlines():
                kept = msgspec.json.decode(line, type=_Kept)
                self._count(kept.id, failed=kept.error is not None)

    def add(self, answer: BatchAnswer) -> None:
        """Take an answer in; it is safe from `flush` on, and until then found in the log."""
        line = msgspec.json.encode(answer)
        self._since_s = self._since_s if self._waiting else time.monotonic()
        self._waiting.append(line)
        self._waiting_bytes += len(line)
        self._count(answer.id, failed=answer.error is not None)

    def due(self, wait_s: float) -> bool:
        """Whether it is time to flush: enough waits, or something has waited for so long."""
        full = self._waiting_bytes >= PART_BYTES or len(self._waiting) >= PART_LINES
        return full or (bool(self._waiting) and time.monotonic() - self._since_s >= wait_s)

    async def flush(self) -> None:
        """Put what waits. Raises BusUnavailable, Overloaded, and what `commit` raises: then it waits on."""
        if not (count := len(self._waiting)):
            return
        number = self._parts.get(self._owner, 0)
        lines = self._waiting[:count]
        await self._objects.put(self._name(self._owner, number), b"".join(line + b"\n" for line in lines))
        await self._commit(BatchAnswers(owner=self._owner, parts=number + 1))
        self._parts[self._owner] = number + 1
        del self._waiting[:count]
        self._waiting_bytes -= sum(map(len, lines))
        self._since_s = time.monotonic()

    async def lines(self, *, failed: bool) -> AsyncIterator[bytes]:
        """The kept answers of one kind, many lines at a time."""
        async for part in self._all():
            wanted = [
                line
                for line in part.splitlines()
                if (msgspec.json.decode(line, type=_Kept).error is not None) == failed
            ]
            if wanted:
                yield b"".join(line + b"\n" for line in wanted)

    async def remove(self) -> None:
        """Delete every part: the batch has its output."""
        for owner, parts in self._parts.items():
            for number in range(parts):
                await self._objects.delete(self._name(owner, number))

    async def _all(self) -> AsyncIterator[bytes]:
        for owner, parts in self._parts.items():
            for number in range(parts):
                yield await self._objects.get(self._name(owner, number))

    def _count(self, answer_id: str, *, failed: bool) -> None:
        self.answered.add(answer_id)
        self.failed += failed
        self.completed += not failed

    def _name(self, owner: str, number: int) -> str:
        return f"{_PLACE}/{self._batch_id}/{owner}/{number}"
