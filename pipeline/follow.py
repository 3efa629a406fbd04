"""Follow one request's output to its end: what the log has, then what comes live, without a gap or a repeat.

Live frames come at core speed, and what an outage swallows of them stands in the log. So a follower that meets a gap,
that has heard nothing for a while, or whose connection was made anew reads the log again.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

import msgspec

from pipeline.bus import Bus
from pipeline.errors import BusUnavailable, DeadlineExceeded, OutputGone
from pipeline.progress import Progress
from subjects import streams
from subjects.codec import TokenIds, decode
from subjects.messages import Frame

GRACE_S: Final = 5.0
"""How much longer than the request's own deadline a reader waits for the frame that says so."""
SILENCE_S: Final = 10.0
"""Heard nothing for this long: what may have been missed is looked up."""
LAG_S_MAX: Final = 2.0
"""The log takes a frame in a moment after live readers had it, and what an outage swallowed is sent again: a gap that
stays for longer is real."""
LAG_STEP_S: Final = 0.02
READ_S_MAX: Final = 20.0
"""An outage may last so long; a cluster's election takes 4 to 10 s."""
NOTHING_SAID: Final = {"text": "", "reasoning": "", "tool_calls": ()}
"""A frame without what its tokens say."""
_KEPT: Final = "the log has no older frames, or lost them"


class Pause(Enum):
    """Why there is no frame."""

    SILENCE = "nothing was heard for a while"
    OUTAGE = "the connection was lost for a while"


LiveFrames = asyncio.Queue[Frame | Pause]
"""Frames as they are heard, and what came between."""


@dataclass(slots=True)
class Output:
    """What its reader has of a request's choices.

    `from_token`: the reader has so many tokens of each choice already; `only`: it wants no other choice.
    """

    choices: int = 1
    from_token: int = 0
    only: int | None = None
    _progress: dict[int, Progress] = field(default_factory=dict)
    _last: dict[int, Frame] = field(default_factory=dict)  # the newest frame of each choice
    _ended: set[int] = field(default_factory=set)

    @property
    def whole(self) -> bool:
        """Whether every wanted choice has ended."""
        return len(self._ended) >= self.choices if self.only is None else self.only in self._ended

    @property
    def begun(self) -> bool:
        """Whether any frame has come."""
        return bool(self._progress)

    def has(self, choice: int) -> int:
        """Tokens of a choice that the reader has."""
        return len(self._progress[choice].token_ids) if choice in self._progress else self.from_token

    def missing(self, frame: Frame) -> bool:
        """Whether tokens are missing between what the reader has and this frame."""
        if self._unwanted(frame):
            return False
        known = self._progress.get(frame.choice)
        stale = known is not None and (known.end is not None or frame.attempt < known.attempt)
        return not stale and frame.index > self.has(frame.choice)

    def new_owner(self, frame: Frame) -> bool:
        """Whether a later owner than known speaks: what was missed of the one before can be told by the log alone."""
        known = self._progress.get(frame.choice)
        return not self._unwanted(frame) and frame.attempt > max(1, known.attempt if known else 1)

    def add(self, frame: Frame) -> Frame | None:
        """Take a frame in; the part of it that is new, None where nothing is.

        Tokens and their logprobs are cut where the reader has some of them; the frame's text, which belongs to all
        of its tokens, comes as it is.
        """
        without_place = not frame.token_ids and frame == self._last.get(frame.choice)  # only text: no index tells it
        if self._unwanted(frame) or without_place:
            return None
        self.choices = max(self.choices, frame.choice + 1)
        have = self.has(frame.choice)
        # Which tokens the reader has does not matter here, only how many.
        progress = self._progress.setdefault(frame.choice, Progress(token_ids=TokenIds(bytes(4 * have))))
        if not progress.add(frame):
            return None
        self._last[frame.choice] = frame
        if progress.end is not None:
            self._ended.add(frame.choice)
        known = have - frame.index
        if known <= 0 or not frame.token_ids:
            return frame
        return msgspec.structs.replace(
            frame,
            index=have,
            token_ids=frame.token_ids[known:],
            logprobs=frame.logprobs and frame.logprobs[known:],
            echo=None,  # came with the first of them
            **(NOTHING_SAID if known >= len(frame.token_ids) else {}),
        )

    def _unwanted(self, frame: Frame) -> bool:
        return self.only is not None and frame.choice != self.only


class Follower:
    """Reads one request's output. Listen before the request or the first `caught_up`, so that nothing is missed."""

    def __init__(
        self,
        bus: Bus,
        subject: str,
        live: LiveFrames,
        output: Output,
        *,
        is_held: Callable[[], Awaitable[bool]],
        deadline_unix_s: float,
    ) -> None:
        """`is_held` tells whether a queue has the request still; where that cannot be told, it does."""
        self._bus, self._subject, self._live, self._output = bus, subject, live, output
        self._is_held, self._deadline_unix_s = is_held, deadline_unix_s
        self._gap: Frame | None = None  # a frame of the log that something is missing before

    async def begin(self) -> AsyncIterator[Frame]:
        """What the log has. Raises OutputGone where it has nothing and no queue holds the request, BusUnavailable."""
        async for new in self.caught_up():
            yield new
        if not self._output.begun:
            async for new in self._found():
                yield new

    async def caught_up(self) -> AsyncIterator[Frame]:
        """What the log has that the reader has not. Raises OutputGone for a gap in it, BusUnavailable."""
        async for new in self._logged():
            yield new
        if self._gap:
            async for new in self._bridged(self._gap):
                yield new

    async def _logged(self) -> AsyncIterator[Frame]:
        """As `caught_up`, but no frame behind a gap: what is missing may stand further on, sent again."""
        gap = None
        async for stored in self._bus.read(streams.RESPONSES.name, self._subject, timeout_s=READ_S_MAX):
            frame = decode(Frame, stored.payload)
            if self._output.missing(frame):
                gap = gap or frame
            elif new := self._output.add(frame):
                yield new
        self._gap = gap if gap and self._output.missing(gap) else None

    async def to_the_end(self) -> AsyncIterator[Frame]:
        """Every new frame until each wanted choice has ended.

        Raises OutputGone where tokens are missing that the log no longer has, DeadlineExceeded where no frame says
        so but the deadline has passed, BusUnavailable where a gap shows and the log cannot be read.
        """
        while not self._output.whole:
            frame = await self._heard()
            if isinstance(frame, Pause):
                with contextlib.suppress(BusUnavailable):  # another outage: its end is heard of
                    async for new in self._found() if frame is Pause.OUTAGE else self.caught_up():
                        yield new
                continue
            if self._output.new_owner(frame):
                async for new in self._logged():
                    yield new
            if self._output.missing(frame):
                async for new in self._bridged(frame):
                    yield new
            if new := self._output.add(frame):
                yield new

    async def _found(self) -> AsyncIterator[Frame]:
        """As `caught_up`; raises OutputGone where the rest will never come, for no queue holds the request."""
        async for new in self.caught_up():
            yield new
        if self._output.whole or await self._is_held():
            return
        async for new in self.caught_up():  # it may have ended while its queues were looked through
            yield new
        if not self._output.whole:
            raise OutputGone(
                f"the rest of what {self._subject} carried is gone: no queue holds the request, and {_KEPT}",
                field="request_id",
            )

    async def _bridged(self, frame: Frame) -> AsyncIterator[Frame]:
        """From the log, what is missing before a frame that was heard live. Raises OutputGone, BusUnavailable.

        The time that the log may lag begins when it can be read: while a cluster elects its leader, nobody can send
        again what the last one took with it.
        """
        readable_s: float | None = None
        while self._output.missing(frame):
            async for new in self._logged():
                yield new
            if self._output.missing(frame):
                readable_s = readable_s or time.monotonic()
                if time.monotonic() > readable_s + LAG_S_MAX:
                    raise self._gone(frame)
                await asyncio.sleep(LAG_STEP_S)

    async def _heard(self) -> Frame | Pause:
        """The next live frame, or why there is none. Raises DeadlineExceeded."""
        remaining_s = self._deadline_unix_s + GRACE_S - time.time()
        try:
            async with asyncio.timeout(max(0.0, min(remaining_s, SILENCE_S))):  # 3.11's wait_for may lose a cancel
                return await self._live.get()
        except TimeoutError:
            if remaining_s > SILENCE_S:
                return Pause.SILENCE
            raise DeadlineExceeded("no answer came before the request's deadline", field="deadline") from None

    def _gone(self, frame: Frame) -> OutputGone:
        have = self._output.has(frame.choice)
        where = f"choice {frame.choice} of request {frame.request_id}"
        return OutputGone(
            f"tokens {have} to {frame.index - 1} of {where} are gone: {_KEPT}",
            field="from_token",
            size=have,
            limit=frame.index,
        )
