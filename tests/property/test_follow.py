"""A reader of the log and of live frames has every token behind its cursor once, in order, whatever it hears or not."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.bus import StoredMessage
from pipeline.errors import OutputGone
from pipeline.follow import Follower, LiveFrames, Output, Pause
from subjects.codec import TokenIds, encode
from subjects.messages import Frame

OUTPUT = [100 + i for i in range(20)]


class Log:
    """Stands for the bus where a follower reads the log: what was published so far."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []

    async def read(self, stream: str, subject: str, *, timeout_s: float) -> AsyncIterator[StoredMessage]:
        for seq, frame in enumerate(self.frames, start=1):
            yield StoredMessage(subject, encode(frame), None, seq)


def cut(edges: list[int], attempt: int = 1, start: int = 0) -> list[Frame]:
    """The output from token `start` on as frames; the last one is terminal."""
    places = sorted({start, len(OUTPUT), *(edge for edge in edges if edge > start)})
    return [
        Frame(
            request_id="r",
            attempt=attempt,
            index=begin,
            token_ids=TokenIds.of(OUTPUT[begin:end]),
            finish_reason="length" if end == len(OUTPUT) else None,
        )
        for begin, end in itertools.pairwise(places)
    ]


def follower(log: Log, live: LiveFrames, cursor: int) -> Follower:
    async def is_held() -> bool:
        return True

    output = Output(from_token=cursor)
    return Follower(log, "subject", live, output, is_held=is_held, deadline_unix_s=time.time() + 5)  # type: ignore[arg-type]


async def read(reader: Follower, cursor: int) -> list[int]:
    """Its tokens, each frame checked to begin where the last one ended."""
    tokens: list[int] = []
    for frames in (reader.begin(), reader.to_the_end()):
        async for frame in frames:
            assert not frame.token_ids or frame.index == cursor + len(tokens)
            tokens += frame.token_ids.tolist()
    return tokens


EDGES = st.lists(st.integers(1, len(OUTPUT) - 1), max_size=8)


@given(
    first=EDGES,
    second=EDGES,
    died_after=st.integers(0, 8),
    logged_before=st.integers(0, 20),
    cursor=st.integers(0, len(OUTPUT)),
    data=st.data(),
)
def test_whatever_is_heard_late_twice_or_not_at_all(first, second, died_after, logged_before, cursor, data):
    """The first owner dies; the second goes on. Any live frame may be lost but one pause, which an outage leaves."""
    early = cut(first)[:-1][:died_after]
    seam = sum(len(frame.token_ids) for frame in early)
    published = early + cut(second, attempt=2, start=seam)
    heard: list[Frame | Pause] = []
    for frame in published:
        heard += [frame] * data.draw(st.integers(0, 2))
    heard.append(Pause.OUTAGE)

    async def scenario() -> list[int]:
        log, live = Log(), asyncio.Queue()
        log.frames = published[: min(logged_before, len(published))]
        reader = follower(log, live, cursor)
        tokens: list[int] = []
        async for frame in reader.begin():
            tokens += frame.token_ids.tolist()
        log.frames = published
        for item in heard:
            live.put_nowait(item)
        async for frame in reader.to_the_end():
            assert not frame.token_ids or frame.index == cursor + len(tokens)
            tokens += frame.token_ids.tolist()
        return tokens

    assert asyncio.run(scenario()) == OUTPUT[cursor:]


@given(edges=EDGES, cursor=st.integers(0, len(OUTPUT)))
def test_from_the_log_alone(edges, cursor):
    async def scenario() -> list[int]:
        log = Log()
        log.frames = cut(edges)
        return await read(follower(log, asyncio.Queue(), cursor), cursor)

    assert asyncio.run(scenario()) == OUTPUT[cursor:]


async def test_a_gap_that_stays_is_an_error_and_no_token_behind_it_is_given(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipeline.follow.LAG_S_MAX", 0.05)
    log = Log()
    log.frames = [frame for frame in cut([5, 10]) if frame.index != 5]
    reader = follower(log, asyncio.Queue(), 0)
    given_out = []
    with pytest.raises(OutputGone, match="tokens 5 to 9 of choice 0"):
        async for frame in reader.begin():
            given_out += frame.token_ids.tolist()
    assert given_out == OUTPUT[:5]


async def test_the_log_s_lag_begins_when_it_can_be_read(monkeypatch: pytest.MonkeyPatch):
    """A cluster elects a leader for longer than the log may lag, and only then what is missing is sent again."""
    monkeypatch.setattr("pipeline.follow.LAG_S_MAX", 0.05)
    first, missing, last = cut([5, 10])

    class Leaderless(Log):
        async def read(self, stream: str, subject: str, *, timeout_s: float) -> AsyncIterator[StoredMessage]:
            if len(self.frames) > 1:
                await asyncio.sleep(0.2)
                asyncio.get_running_loop().call_later(0.02, self.frames.append, missing)
            async for stored in super().read(stream, subject, timeout_s=timeout_s):
                yield stored

    log = Leaderless()
    log.frames = [first]
    live: LiveFrames = asyncio.Queue()
    reader = follower(log, live, 0)
    tokens = [token async for frame in reader.begin() for token in frame.token_ids.tolist()]
    log.frames = [first, last]
    live.put_nowait(last)
    tokens += [token async for frame in reader.to_the_end() for token in frame.token_ids.tolist()]
    assert tokens == OUTPUT
