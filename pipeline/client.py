"""The Python client: publish a request, read its frames, and go on reading after whatever came between.

async with Client.connect("nats://127.0.0.1:4222", client="me") as client:
    async for frame in client.generate(model="smollm2", prompt="The capital of France is", request_id="r1"):
        print(frame.text, end="")

A process that was killed in the middle goes on with `client.resume("r1", from_token=tokens_it_has)`.
"""

import asyncio
import contextlib
import functools
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Final

import structlog

from pipeline import metrics
from pipeline.bus import Bus, Received, Subscription
from pipeline.embeddings import Embeddings
from pipeline.errors import InvalidRequest, Overloaded, PipelineError, from_failure
from pipeline.follow import Follower, LiveFrames, Output, Pause
from pipeline.openai import identify, inputs_of
from pipeline.request_options import base_model
from pipeline.tracing import TraceContext
from subjects import headers, names, streams
from subjects.codec import decode, encode
from subjects.limits import CHOICES_MAX, REQUEST_S_DEFAULT
from subjects.messages import Cancel, EmbeddingRequest, Frame, OwnedTask, Request

PUBLISH_S_MAX: Final = 10.0
"""A broker that is away is waited for so long, and not beyond a request's deadline."""
PUBLISH_S_MIN: Final = 0.5
"""A deadline that has passed is preprocess' to answer."""
SCANNED_MAX: Final = 20_000
"""So many waiting tasks are looked through for a request that the log does not know."""
BYTES_MAX: Final = 64 * 1024 * 1024
"""And so many bytes of them."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Submitted:
    """The broker's promise. `duplicate`: it was promised before under this id, and is not run again."""

    request_id: str
    duplicate: bool


class Client:
    """Requests over one connection. All answers come in on one wildcard subscription, or each on its own."""

    def __init__(self, bus: Bus, client: str, *, shared: bool = False) -> None:
        """On a connection that others use too; `start` comes next. Raises InvalidRequest for a name no subject has.

        `shared`: other processes ask under this name, and this one hears only the answers to what it asks itself,
        for the price of a subscription each. `connect` is for who has no connection yet.
        """
        check_token("client", client)
        self._bus, self.name, self._shared = bus, client, shared
        self._live: dict[str, list[LiveFrames]] = {}  # by request id
        self._subscription: Subscription | None = None
        self._reader: Subscription | None = None  # where workers ask whether this process still reads
        self._looking = asyncio.Lock()
        self._looked_s = -1.0  # when the last look into the queues began, monotonic
        self._held: set[str] | None = None

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(cls, url: str, *, client: str | None = None) -> AsyncIterator["Client"]:
        """Connect as `client`: two processes of one name read each other's answers.

        Raises BusConnectError, and InvalidRequest for a name that does not fit in a subject.
        """
        name = client or f"py-{uuid.uuid4().hex[:12]}"
        check_token("client", name)
        bus = await Bus.connect(url, name=f"client.{name}")
        try:
            self = cls(bus, name)
            await self.start()
            yield self
        finally:
            await bus.close()

    async def start(self) -> None:
        """Begin to listen, until the connection's end."""
        if not self._shared:
            self._subscription = await self._bus.subscribe(names.RESPONSES.any(client=self.name), self._hear)
        self._bus.on_reconnect(self._look_again)

    async def stop(self) -> None:
        """Listen no more: for a name that is done with before its connection is."""
        if self._subscription is not None:
            await self._subscription.unsubscribe()
        if self._reader is not None:
            await self._reader.unsubscribe()
        self._bus.off_reconnect(self._look_again)

    async def submit(self, *, model: str, traceparent: str | None = None, **fields: Any) -> Submitted:
        """Publish one request and leave: its answer can be read within the log's time with `resume`.

        `fields` are those of `subjects.messages.Request`. Raises what `generate` raises on publishing.
        """
        request_id, payload, _ = _encoded(fields)
        return await self.publish(model, payload, request_id, traceparent=traceparent)

    async def publish(
        self,
        model: str,
        payload: bytes,
        request_id: str,
        *,
        traceparent: str | None = None,
        cancel_if_gone: bool = False,
        timeout_s: float = PUBLISH_S_MAX,
    ) -> Submitted:
        """Publish a request that is encoded already, under its own id: again under the same id it is not run twice.

        That holds for `subjects.limits.DEDUPE_S`. `traceparent`: the caller's place in its trace (W3C Trace Context);
        missing or malformed, a new trace begins. `cancel_if_gone`: the request ends with this process's connection.
        `timeout_s`: a broker that is away is waited for so long.
        Raises Overloaded, PayloadTooLarge, BusUnavailable.
        """
        subject = names.REQUESTS.of(model=base_model(model))
        context = TraceContext.parse(traceparent) or TraceContext.new()
        about = {headers.CLIENT: self.name, headers.TRACEPARENT: context.traceparent}
        if cancel_if_gone:
            about[headers.READER] = await self._readers_inbox()
        try:
            stored = await self._bus.publish_durable(
                subject, payload, msg_id=f"{self.name}.{request_id}", headers=about, timeout_s=timeout_s
            )
        except Overloaded:
            metrics.OVERLOADED.labels(names.token(model)).inc()
            raise
        return Submitted(request_id, stored.duplicate)

    async def generate(
        self,
        *,
        model: str,
        on_duplicate: Callable[[str], None] | None = None,
        traceparent: str | None = None,
        cancel_if_gone: bool = False,
        **fields: Any,
    ) -> AsyncIterator[Frame]:
        """Publish one request and yield its frames until each choice has ended.

        `fields` are those of `subjects.messages.Request`; `stream` is True unless given. Frames that bring
        nothing new (of a worker that lost its lease) are left out. A failed request yields a terminal frame
        with `error`. Closing the iterator early cancels the request. A request whose id was accepted before, running
        or finished, is not run again: `on_duplicate` is called with the id, and the frames are those of that run.
        With `cancel_if_gone` the request is also cancelled when this process dies, within some seconds; without it, it
        is worked on and can be read with `resume`. `traceparent`: see `publish`.

        Raises:
            InvalidRequest: `n` is out of its limits, so there is no telling how many frames end it.
            Overloaded: the model's queue is full; try again after `retry_after_s`.
            PayloadTooLarge: the request is larger than a subject carries.
            BusUnavailable: the broker did not acknowledge the request.
            DeadlineExceeded: no frame said so, but the request's deadline has passed.
            OutputGone: frames were missed, and the log does not have them any more.
        """
        request_id, payload, request = _encoded({"stream": True, **fields})
        assert request.deadline is not None, "_encoded sets it"
        left = True
        try:
            frames = self.run(
                model,
                payload,
                request_id,
                request.n,
                deadline_unix_s=request.deadline,
                on_duplicate=on_duplicate,
                traceparent=traceparent,
                cancel_if_gone=cancel_if_gone,
            )
            async with contextlib.aclosing(frames):
                async for frame in frames:
                    yield frame
            left = False
        except PipelineError:
            left = False  # not taken, or to be read on: a cancel would also end a second try under its id
            raise
        finally:
            if left:
                await self.cancel(request_id)

    async def embed(self, *, model: str, traceparent: str | None = None, **fields: Any) -> Embeddings:
        """The vectors of one input or many; `fields` are those of `subjects.messages.EmbeddingRequest`.

        Cancelling it cancels the request. Raises what `generate` raises, and the error of the first input that failed.
        """
        filled = {"request_id": uuid.uuid4().hex, "deadline": time.time() + REQUEST_S_DEFAULT} | fields
        request = EmbeddingRequest(**filled)
        check_token("request_id", filled["request_id"])
        answer = Embeddings(filled["request_id"], model, inputs_of(request.input))
        try:
            await self.collect(answer, encode(request), deadline_unix_s=filled["deadline"], traceparent=traceparent)
        except asyncio.CancelledError:
            await self.cancel(answer.request_id)
            raise
        return answer

    async def collect(
        self, answer: Embeddings, payload: bytes, *, deadline_unix_s: float, traceparent: str | None = None
    ) -> None:
        """As `embed`, of a request that is encoded already: fill its answer. Cancelling it leaves it running."""
        frames = self.run(
            answer.model,
            payload,
            answer.request_id,
            answer.inputs,
            deadline_unix_s=deadline_unix_s,
            traceparent=traceparent,
        )
        async with contextlib.aclosing(frames):
            async for frame in frames:
                answer.add(frame)
        if answer.failure is not None:
            raise from_failure(answer.failure)

    async def run(
        self,
        model: str,
        payload: bytes,
        request_id: str,
        choices: int,
        *,
        deadline_unix_s: float,
        on_duplicate: Callable[[str], None] | None = None,
        traceparent: str | None = None,
        cancel_if_gone: bool = False,
    ) -> AsyncIterator[Frame]:
        """As `generate`, of a request that is encoded already. Closing the iterator early leaves it running."""
        async with self._following(request_id, Output(choices), deadline_unix_s) as follower:
            submitted = await self.publish(
                model,
                payload,
                request_id,
                traceparent=traceparent,
                cancel_if_gone=cancel_if_gone,
                timeout_s=min(PUBLISH_S_MAX, max(PUBLISH_S_MIN, deadline_unix_s - time.time())),
            )
            if submitted.duplicate:
                log.info("request_known", request_id=request_id, client=self.name)
                if on_duplicate:
                    on_duplicate(request_id)
                async for frame in follower.begin():
                    yield frame
            async for frame in follower.to_the_end():
                yield frame

    async def resume(
        self,
        request_id: str,
        *,
        from_token: int = 0,
        choices: int = 1,
        choice: int | None = None,
        deadline: float | None = None,
        accepted: bool = False,
    ) -> AsyncIterator[Frame]:
        """The rest of a request's output: what the log has from token `from_token` on, then live to the end.

        It may be any request of this client's name, of this process or of one that was killed. `choices`: how many it
        has; `choice`: only that one; `accepted`: it is known to wait or run, so it is not looked for. Closing the
        iterator early leaves the request running.

        Raises:
            OutputGone: the log no longer has what is asked for, and the request neither waits nor runs.
            DeadlineExceeded: no frame came before `deadline` (Unix seconds; default in `REQUEST_S_DEFAULT`).
            BusUnavailable: the log cannot be read.
        """
        check_token("request_id", request_id)
        deadline_unix_s = time.time() + REQUEST_S_DEFAULT if deadline is None else deadline
        async with self._following(request_id, Output(choices, from_token, choice), deadline_unix_s) as follower:
            await self._bus.flush()  # the subscription stands: what the log does not have yet will be heard
            async for frame in follower.caught_up() if accepted else follower.begin():
                yield frame
            async for frame in follower.to_the_end():
                yield frame

    async def cancel(self, request_id: str, reason: str = Cancel().reason) -> None:
        """Ask whoever holds a request to end it."""
        await self._bus.publish(names.CANCEL.of(request_id=request_id), encode(Cancel(reason=reason)))

    async def _readers_inbox(self) -> str:
        """The inbox on which this process says that it reads."""
        if self._reader is None:
            inbox = self._bus.new_inbox()
            self._reader = await self._bus.subscribe(
                inbox, lambda asked: self._bus.spawn(self._bus.respond(asked, b""))
            )
        return self._reader.subject

    async def stored(self, request_id: str | None = None) -> AsyncIterator[Frame]:
        """Every frame that the log has for this client, or for one request, in the order in which they were stored."""
        which = names.RESPONSES.any(client=self.name, **({"request_id": request_id} if request_id else {}))
        async for stored in self._bus.read(streams.RESPONSES.name, which):
            yield decode(Frame, stored.payload)

    async def held(self, *, messages_max: int = SCANNED_MAX, bytes_max: int = BYTES_MAX) -> set[str] | None:
        """The ids of this client's requests that wait or run; None where too much waits to look through it.

        Raises BusUnavailable, BrokerRefused where there are no streams.
        """
        waiting = [await self._bus.stream_state(stream.name) for stream in (streams.REQUESTS, streams.WORK)]
        if sum(state.messages for state in waiting) > messages_max or sum(state.bytes for state in waiting) > bytes_max:
            return None
        found: set[str] = set()
        async for stored in self._bus.read(streams.REQUESTS.name, names.REQUESTS.any()):
            identity = identify(stored.payload, stored.headers or {}, stored.seq)
            if identity.client == self.name:
                found.add(identity.request_id)
        for tasks in names.OWNED_TASKS:  # after: requests move this way
            async for stored in self._bus.read(streams.WORK.name, tasks):
                work = decode(OwnedTask, stored.payload)
                if work.client == self.name:
                    found.add(work.request_id)
        return found

    async def _is_held(self, request_id: str) -> bool:
        """Whether a request waits or runs; True where that cannot be told. Many that ask at once share one look."""
        asked_s = time.monotonic()
        async with self._looking:
            if self._looked_s <= asked_s:
                began_s = time.monotonic()
                self._held = await self.held()
                self._looked_s = began_s
            return self._held is None or request_id in self._held

    @contextlib.asynccontextmanager
    async def _following(self, request_id: str, output: Output, deadline_unix_s: float) -> AsyncIterator[Follower]:
        """A follower that hears what comes of a request inside the block."""
        live: LiveFrames = asyncio.Queue()
        subject = names.RESPONSES.of(client=self.name, request_id=request_id)
        own = await self._bus.subscribe(subject, functools.partial(_hear_into, live)) if self._shared else None
        self._live.setdefault(request_id, []).append(live)
        try:
            yield Follower(
                self._bus,
                subject,
                live,
                output,
                is_held=functools.partial(self._is_held, request_id),
                deadline_unix_s=deadline_unix_s,
            )
        finally:
            self._live[request_id].remove(live)
            if not self._live[request_id]:
                del self._live[request_id]
            if own is not None:
                self._bus.spawn(own.unsubscribe())

    def _hear(self, received: Received) -> None:
        parts = names.RESPONSES.parse(received.subject)
        if parts and (readers := self._live.get(parts["request_id"])):
            frame = decode(Frame, received.payload)
            for live in readers:
                live.put_nowait(frame)

    async def _look_again(self) -> None:
        """The connection was lost for a while: what came meanwhile is in the log."""
        for readers in self._live.values():
            for live in readers:
                live.put_nowait(Pause.OUTAGE)


def _hear_into(live: LiveFrames, received: Received) -> None:
    live.put_nowait(decode(Frame, received.payload))


def _encoded(fields: dict[str, Any]) -> tuple[str, bytes, Request]:
    """A request's id, payload and value, with id and deadline filled in. Raises InvalidRequest."""
    filled = {"request_id": uuid.uuid4().hex, "deadline": time.time() + REQUEST_S_DEFAULT} | fields
    request = Request(**filled)
    check_token("request_id", filled["request_id"])
    if not 1 <= request.n <= CHOICES_MAX:
        raise InvalidRequest(f"n: {request.n} choices; 1 to {CHOICES_MAX} can be asked for", field="n", size=request.n)
    return filled["request_id"], encode(request), request


def check_token(field: str, name: str) -> None:
    """Raises InvalidRequest for a name that an answer's subject could not have."""
    if not names.is_token(name):
        raise InvalidRequest(
            f"{field}: {name[: names.TOKEN_CHARS_MAX]!r} does not fit in a subject: 1 to {names.TOKEN_CHARS_MAX} of "
            "A-Z a-z 0-9 _ -",
            field=field,
            size=len(name),
            limit=names.TOKEN_CHARS_MAX,
        )
