"""The front door without HTTP: a request on `sglang.generate.<model>` is answered on its reply subject.

    nats req sglang.generate.smollm2 '{"prompt": "The capital of France is"}'
    nats req sglang.generate.smollm2 '{"prompt": "...", "stream": true}' --replies=0 --timeout=30s

It is published to `sglang.requests.<model>` like any other, so the same promise holds, and its frames are sent on as
they come, in the request's own format. The answer ends in an empty message, the sentinel of NATS' request-many
(ADR-47). A frame with an error carries the error headers of micro services (ADR-32). Who asks is the client
"anonymous", so that `sglang-nats resume ID --client anonymous` reads what a door that died did not tell any more.
"""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Final

import msgspec
import structlog

from pipeline.bus import Bus, Received
from pipeline.client import Client, check_token
from pipeline.errors import BusUnavailable, InvalidRequest, Overloaded, PipelineError
from pipeline.micro import Endpoint, Identity, MicroService, error_headers
from pipeline.openai import identify
from pipeline.presence import Presence
from subjects import headers, names
from subjects.codec import Format, encode, format_of
from subjects.limits import REQUEST_S_DEFAULT
from subjects.messages import Failure, Frame

SERVICE: Final = "sglang-generate"
QUEUE: Final = "generate"
"""The queue group that all doors share."""
REQUESTS_MAX: Final = 1024
"""Requests at once at one door; one more is told to come again."""
RETRY_AFTER_S: Final = 1.0
GONE_S: Final = 2.0
"""Nobody has listened on the reply subject for this long: the request is cancelled. A reconnect takes less."""
DRAIN_S_MAX: Final = 25.0
"""Answers in progress have this long when the worker drains; less than a worker's tasks have."""
BROKEN_OFF: Final = Failure(
    code="bus_unavailable",
    message="the worker that answered here has stopped; the request goes on: read it with "
    "`sglang-nats resume ID --client anonymous`, where ID is its request_id",
    status=503,
)

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A request as it is published."""

    model: str
    request_id: str
    choices: int
    stream: bool
    deadline_unix_s: float
    payload: bytes


class FrontDoor:
    """One of those that answer; whoever of the queue group gets a request sees it through."""

    def __init__(self, bus: Bus, presence: Presence, worker: str, incarnation: str) -> None:
        self._bus, self._presence = bus, presence
        self._client = Client(bus, names.ANONYMOUS_CLIENT, shared=True)
        self._answers: set[asyncio.Task[None]] = set()
        identity = Identity(
            name=SERVICE,
            id=incarnation,
            version=version("sglang-nats"),
            description="generates text: OpenAI's requests in JSON, frames as answers, an empty message as the end",
            metadata={"worker": worker},
        )
        self._service = MicroService(bus, identity, self._endpoints)
        self._replies: dict[str, Reply] = {}  # by the subject on which the broker says that nobody listens
        self._inbox, self._serial = bus.new_inbox(), 0

    async def serve(self, until_drained: Awaitable[None]) -> None:
        """Answer until then; after that take no more, and see those through that have come."""
        await self._client.start()
        await self._bus.subscribe(f"{self._inbox}.*", self._hear_of_reply)
        await self._service.start()
        listening = await self._bus.subscribe(names.GENERATE.any(), self._hear, queue=QUEUE)
        await until_drained
        await listening.drain()
        if self._answers:
            await asyncio.wait(self._answers, timeout=DRAIN_S_MAX)
        for answer in self._answers:
            answer.cancel()
        await asyncio.gather(*self._answers, return_exceptions=True)

    def _endpoints(self) -> list[Endpoint]:
        """One for each model that a worker has registered."""
        return [
            Endpoint(name=names.token(model), subject=names.GENERATE.of(model=model), queue_group=QUEUE)
            for model in sorted(self._presence.models())
        ]

    def _hear(self, received: Received) -> None:
        if not names.is_inbox(received.reply):  # elsewhere this worker may publish what its client may not
            log.warning("request_unanswerable", subject=received.subject, reason="its reply subject is no inbox")
            return
        answer = asyncio.create_task(self._answer(received), name="front_door.answer")
        self._answers.add(answer)
        answer.add_done_callback(self._answers.discard)

    def _hear_of_reply(self, received: Received) -> None:
        """The broker found nobody on a reply subject."""
        if reply := self._replies.get(received.subject):
            reply.unheard()

    async def _answer(self, received: Received) -> None:
        """Everything that one request is told. Its end is told in any case."""
        started_s = time.monotonic()
        self._serial += 1
        reply = Reply(self._bus, received, f"{self._inbox}.{self._serial}")
        self._replies[reply.witness] = reply
        try:
            await self._see_through(received, reply)
        except asyncio.CancelledError:
            await reply.fail(BROKEN_OFF)
        except BusUnavailable as error:
            log.warning("request_not_answered", subject=received.subject, code=error.code, reason=str(error))
        finally:
            del self._replies[reply.witness]
            model = received.subject.rpartition(".")[2]
            if model in map(names.token, self._presence.models()):
                self._service.count(model, started_s, reply.error)

    async def _see_through(self, received: Received, reply: "Reply") -> None:
        """Raises BusUnavailable where an answer cannot be sent."""
        try:
            if len(self._answers) > REQUESTS_MAX:
                raise Overloaded(
                    f"{REQUESTS_MAX} requests are in progress here, and no more are taken",
                    size=len(self._answers),
                    limit=REQUESTS_MAX,
                    retry_after_s=RETRY_AFTER_S,
                )
            asked = parse(received)
            reply.about(asked)
            await self._relay(asked, reply, received.headers or {})
        except PipelineError as error:
            await reply.fail(error.failure())
        else:
            await reply.end()

    async def _relay(self, asked: Asked, reply: "Reply", about: Mapping[str, str]) -> None:
        """The request's frames, to their end or until nobody listens any more. Raises what `Client.run` does."""
        frames = self._client.run(
            asked.model,
            asked.payload,
            asked.request_id,
            asked.choices,
            deadline_unix_s=asked.deadline_unix_s,
            traceparent=about.get(headers.TRACEPARENT),
        )
        async with aclosing(frames):
            async for frame in frames:
                await reply.tell(frame)
                if reply.gone:
                    await self._client.cancel(asked.request_id)
                    return


class Reply:
    """What goes to one reply subject."""

    def __init__(self, bus: Bus, received: Received, witness: str) -> None:
        """`witness`: where the broker says that nobody listens on the reply subject."""
        self.witness, self.error = witness, ""
        self._bus, self._to = bus, received.reply
        self._form = identify(received.payload, {}, 0).reply_format
        self._request_id, self._replies = "", 0
        self._unheard_s: tuple[float, float] | None = None  # from, to; monotonic

    def about(self, asked: Asked) -> None:
        """What is known before the first frame. Not streamed, it has one for each choice, and the end."""
        self._request_id, self._replies = asked.request_id, 0 if asked.stream else asked.choices + 1

    @property
    def gone(self) -> bool:
        """Whether its reader has been away for too long."""
        return self._unheard_s is not None and self._unheard_s[1] - self._unheard_s[0] >= GONE_S

    def unheard(self) -> None:
        """What was sent last reached nobody; once in a while that is a reconnect."""
        now_s = time.monotonic()
        since_s, last_s = self._unheard_s or (now_s, now_s)
        self._unheard_s = (now_s if now_s - last_s > GONE_S else since_s, now_s)

    async def tell(self, frame: Frame) -> None:
        """Raises BusUnavailable."""
        about = {}
        if frame.error is not None:
            self.error = frame.error.message
            about = error_headers(frame.error.message, frame.error.status)
        if self._replies:
            about[headers.REPLY_COUNTER] = str(self._replies)
            self._replies = 0
        await self._bus.publish(self._to, encode(frame, self._form), headers=about or None, reply=self.witness)

    async def fail(self, failure: Failure) -> None:
        """There is no frame but this error, and the end. Raises BusUnavailable."""
        self._replies = 2
        await self.tell(Frame(request_id=self._request_id, finish_reason="error", error=failure))
        await self.end()

    async def end(self) -> None:
        """Raises BusUnavailable."""
        await self._bus.publish(self._to, b"")


def parse(received: Received) -> Asked:
    """Checks only what decides where the request goes and its answer comes; preprocess checks the rest.

    Raises InvalidRequest.
    """
    parts, about = names.GENERATE.parse(received.subject), received.headers or {}
    assert parts, received.subject
    fields = _decoded(received.payload)
    request_id = fields.get("request_id") or about.get(headers.MSG_ID) or uuid.uuid4().hex
    if not isinstance(request_id, str):
        raise InvalidRequest("request_id: must be a string", field="request_id")
    check_token("request_id", request_id)
    if fields.get("client") not in (None, names.ANONYMOUS_CLIENT):
        raise InvalidRequest(
            f"client: is {names.ANONYMOUS_CLIENT!r} here; to ask as another, publish to "
            f"{names.REQUESTS.of(model=parts['model'])}",
            field="client",
        )
    deadline = fields.get("deadline")
    if deadline is None:
        deadline = _deadline(about)
    known = isinstance(deadline, int | float) and not isinstance(deadline, bool)
    encoder = msgspec.json if format_of(received.payload) is Format.JSON else msgspec.msgpack
    return Asked(
        model=parts["model"],
        request_id=request_id,
        choices=identify(received.payload, about, 0).choices,
        stream=fields.get("stream") is True,
        deadline_unix_s=deadline if known else time.time() + REQUEST_S_DEFAULT,
        payload=encoder.encode(fields | {"request_id": request_id, "deadline": deadline}),
    )


def _deadline(about: Mapping[str, str]) -> float:
    """Unix seconds, of the header or the default. Raises InvalidRequest."""
    text = about.get(headers.DEADLINE)
    try:
        return time.time() + REQUEST_S_DEFAULT if text is None else float(text)
    except ValueError:
        raise InvalidRequest(
            f"{headers.DEADLINE}: {text[:64]!r} is no number of seconds since the Unix epoch", field=headers.DEADLINE
        ) from None


def _decoded(payload: bytes) -> dict[str, Any]:
    read = msgspec.json.decode if format_of(payload) is Format.JSON else msgspec.msgpack.decode
    try:
        fields = read(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise InvalidRequest(
            'payload: is no request; send JSON like {"prompt": "The capital of France is"}, or MessagePack',
            field="payload",
            size=len(payload),
        )
    return fields
