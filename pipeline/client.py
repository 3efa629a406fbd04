"""The Python client: publish a request, read its frames.

async with Client.connect("nats://127.0.0.1:4222") as client:
    async for frame in client.generate(model="smollm2", prompt="The capital of France is"):
        print(frame.text, end="")
"""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any, Final

from pipeline.bus import Bus, Received, Subscription
from pipeline.errors import DeadlineExceeded, InvalidRequest
from pipeline.progress import Progress
from subjects import headers, names
from subjects.codec import decode, encode
from subjects.limits import CHOICES_MAX, REQUEST_S_DEFAULT
from subjects.messages import Cancel, Frame, Request

GRACE_S: Final = 5.0
"""How much longer than the request's own deadline a client waits for the frame that says so."""


class Client:
    """Requests over one connection. All answers come in on one wildcard subscription."""

    def __init__(self, bus: Bus, client: str) -> None:
        self._bus, self.name = bus, client
        self._streams: dict[str, asyncio.Queue[Frame]] = {}
        self._subscription: Subscription | None = None

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(cls, url: str, *, client: str | None = None) -> AsyncIterator["Client"]:
        """Connect as `client`: two processes of one name read each other's answers. Raises BusUnavailable."""
        name = client or f"py-{uuid.uuid4().hex[:12]}"
        bus = await Bus.connect(url, name=f"client.{name}")
        self = cls(bus, name)
        try:
            self._subscription = await bus.subscribe(names.RESPONSES.any(client=name), self._hear)
            yield self
        finally:
            await bus.close()

    async def generate(self, *, model: str, **fields: Any) -> AsyncIterator[Frame]:
        """Publish one request and yield its frames until each choice has ended.

        `fields` are those of `subjects.messages.Request`; `stream` is True unless given. Frames that bring
        nothing new (of a worker that lost its lease) are left out. A failed request yields a terminal frame
        with `error`. Closing the iterator early cancels the request.

        Raises:
            InvalidRequest: `n` is out of its limits, so there is no telling how many frames end it.
            Overloaded: the model's queue is full.
            PayloadTooLarge: the request is larger than a subject carries.
            BusUnavailable: the broker did not acknowledge the request.
            DeadlineExceeded: no frame said so, but the request's deadline has passed.
        """
        request_id = fields.setdefault("request_id", uuid.uuid4().hex)
        fields.setdefault("stream", True)
        deadline_unix_s = fields.setdefault("deadline", time.time() + REQUEST_S_DEFAULT)
        request = Request(**fields)
        if not 1 <= request.n <= CHOICES_MAX:
            raise InvalidRequest(
                f"n: {request.n} choices; 1 to {CHOICES_MAX} can be asked for", field="n", size=request.n
            )
        frames = self._streams[request_id] = asyncio.Queue()
        done = False
        try:
            await self._bus.publish_durable(
                names.REQUESTS.of(model=model),
                encode(request),
                msg_id=f"{self.name}.{request_id}",
                headers={headers.CLIENT: self.name},
            )
            progress: dict[int, Progress] = {}
            while sum(choice.end is not None for choice in progress.values()) < request.n:
                frame = await self._next(frames, deadline_unix_s)
                if new := progress.setdefault(frame.choice, Progress()).add(frame):
                    yield new
            done = True
        finally:
            del self._streams[request_id]
            if not done:
                await self.cancel(request_id)

    async def cancel(self, request_id: str, reason: str = Cancel().reason) -> None:
        """Ask whoever holds a request to end it."""
        await self._bus.publish(names.CANCEL.of(request_id=request_id), encode(Cancel(reason=reason)))

    async def _next(self, frames: asyncio.Queue[Frame], deadline_unix_s: float) -> Frame:
        try:
            return await asyncio.wait_for(frames.get(), max(0.0, deadline_unix_s - time.time()) + GRACE_S)
        except TimeoutError:
            raise DeadlineExceeded("no answer came before the request's deadline", field="deadline") from None

    def _hear(self, received: Received) -> None:
        parts = names.RESPONSES.parse(received.subject)
        frames = self._streams.get(parts["request_id"]) if parts else None
        if frames is not None:
            frames.put_nowait(decode(Frame, received.payload))
