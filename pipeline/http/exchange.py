"""One HTTP request's way through the pipeline: its frames as they come, and its end in any case."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, Final, Protocol, TypeVar

import structlog
from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from pipeline.errors import PipelineError
from pipeline.http import visits
from pipeline.http.chunks import KEEP_ALIVE
from subjects.messages import Failure, Frame

CLIENT_GONE: Final = "client_gone"
"""In the log, in place of an error's code: the client left before the end, or the gateway was stopped."""

T = TypeVar("T")
log = structlog.get_logger()


class Teller(Protocol):
    """Turns frames into server-sent events."""

    def event(self, frame: Frame) -> bytes: ...

    def end(self) -> bytes: ...

    def failed(self, failure: Failure) -> bytes: ...


class Exchange:
    """Reads a request's frames ahead in a task of its own, so that a silence can be told from an end."""

    def __init__(self, frames: AsyncGenerator[Frame, None], on_end: Callable[[bool], None]) -> None:
        """`on_end` is called once, with whether the frames came to their own end."""
        self._frames: list[Frame] = []  # read and not taken: no more than the request's output
        self._came = asyncio.Event()
        self._visit = visits.current()
        self._on_end: Callable[[bool], None] | None = on_end
        self._reading = asyncio.create_task(self._read(frames), name="gateway.exchange")
        self._reading.add_done_callback(lambda _: self._came.set())

    async def take(self) -> list[Frame]:
        """Every frame that has come since the last call, at least one; none at the end. Raises PipelineError."""
        while not self._frames and not self._reading.done():
            self._came.clear()
            await self._came.wait()
        if not self._frames:
            self._reading.result()
        taken, self._frames = self._frames, []
        return taken

    def end(self) -> None:
        """Stop reading. Idempotent."""
        done = self._reading.done()
        self._reading.cancel()
        if self._on_end is not None:
            if not done:
                self._visit.code = self._visit.code or CLIENT_GONE
            on_end, self._on_end = self._on_end, None
            on_end(done)

    async def _read(self, frames: AsyncGenerator[Frame, None]) -> None:
        async with aclosing(frames):
            async for frame in frames:
                if frame.token_ids:
                    self._visit.first_token()
                self._frames.append(frame)
                self._came.set()


class EventStream(StreamingResponse):
    """Server-sent events; the exchange behind them ends with the response, whoever ends that."""

    media_type = "text/event-stream"

    def __init__(self, exchange: Exchange, events: AsyncIterator[bytes], headers: dict[str, str]) -> None:
        # The second is nginx' word for a response that must not be held back.
        super().__init__(events, headers=headers | {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._exchange.end()


async def first_frames(exchange: Exchange, patience_s: float) -> list[Frame] | None:
    """What comes first, so that an error before any output has a status of its own; None where nothing came in time."""
    try:
        async with asyncio.timeout(patience_s):
            return await exchange.take()
    except TimeoutError:
        return None


async def events(
    exchange: Exchange, chunks: Teller, begun: bytes, frames: list[Frame] | None, patience_s: float
) -> AsyncIterator[bytes]:
    """A stream from its first event to `[DONE]` or an error; `frames` have come already, `begun` is their event."""
    yield begun or KEEP_ALIVE
    try:
        while frames != []:
            try:
                async with asyncio.timeout(patience_s):
                    frames = await exchange.take()
            except TimeoutError:
                yield KEEP_ALIVE
            else:
                if told := b"".join(map(chunks.event, frames)):
                    yield told
        yield chunks.end()
    except PipelineError as error:
        visits.current().code = error.code
        log.info("stream_failed", code=error.code, reason=str(error))
        yield chunks.failed(error.failure())


async def while_there(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The work's result. Raises ClientDisconnect, and the work is cancelled, where the client goes first."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    """Until the client has closed its connection; the body is read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
