"""The bus: one connection of a process to NATS, and the only place that knows nats-py.

Built around what nats-py does not do well (docs/adr/0001): it loses pull requests and watches in an outage, its
read loop dies of an exception in a callback, some broker errors close it for good, its flush overtakes
what is still buffered, and messages wait in a queue that an unsubscribe throws away. So messages are
handed over right out of the parser, requests have an inbox of our own, and after every outage the bus
resumes its pullers and watches, provisions again, and then calls whoever registered `on_reconnect`.
"""

import asyncio
import contextlib
import functools
import re
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from datetime import datetime
from secrets import token_hex
from typing import Any, Final, Protocol, TypeVar
from urllib.parse import urlparse

import msgspec
import nats.errors
import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as NatsSubscription

from pipeline import provision
from pipeline.bucket import Bucket, Watch
from pipeline.errors import (
    BrokerRefused,
    BusConnectError,
    BusUnavailable,
    NoResponders,
    NotPermitted,
    Overloaded,
    PayloadTooLarge,
    PipelineError,
    ProvisionError,
)
from pipeline.jetstream import (
    MESSAGE_TOO_LARGE,
    NO_LEADER,
    NO_MESSAGE,
    NO_SPACE,
    NS,
    STATUS,
    STORE_FAILED,
    STREAM_NOT_FOUND,
    ConsumerState,
    Delivery,
    Received,
    Stored,
    StoredMessage,
    StreamState,
    answer_of,
    stored_of,
)
from pipeline.objects import Objects
from pipeline.puller import Others, Puller
from subjects import headers as header_names
from subjects import limits, names
from subjects.streams import OWNER_PRIORITY, BucketSpec, ConsumerSpec, ObjectBucketSpec, StreamSpec

__all__ = [
    "Bucket",
    "Bus",
    "ConsumerState",
    "Delivery",
    "Objects",
    "Puller",
    "Received",
    "Stored",
    "StoredMessage",
    "StreamState",
    "Subscription",
    "Watch",
]

RECONNECT_S: Final = 0.2
CONNECT_S_MAX: Final = 2.0  # one try to reach one server
PING_S: Final = 5.0  # with two unanswered, a silent connection is given up
PONG_S_MAX: Final = 60.0  # longer than a connection lives without a PONG
POLL_S: Final = 0.001
BUFFERED_BYTES_MAX: Final = 1024 * 1024
"""More than this is not buffered: a publisher waits while connected, and is refused while not."""
BUFFERED_S_MAX: Final = 10.0
ATTEMPT_S_MAX: Final = 2.0  # one try of a publish or an API request
PAUSE_S_MIN: Final = 0.02
PAUSE_S_MAX: Final = 0.5
API_S_MAX: Final = 5.0
RETRY_AFTER_S: Final = 1.0  # what a client is told when a queue is full
CLOSE_S_MAX: Final = 1.5
HEADER_BYTES: Final = 16  # at least what the wire adds for a header, and for all of them together
READ_BATCH: Final = 256
LOSSES_KEPT: Final = 256
_SCHEMES: Final = ("nats", "tls", "ws", "wss")
_VIOLATION: Final = re.compile(r'permissions violation for (publish to|subscription to) "([^"]*)"')

T = TypeVar("T")

log = structlog.get_logger()


class Resumable(Protocol):
    """What goes on after an outage."""

    def resume(self) -> None: ...

    async def stop(self) -> None: ...


class _Sink:
    """Stands where nats-py expects the future of a one-message subscription: it is called with every message,
    inside the parser. So there is no queue to overflow or to lose and no task to switch to. Never raises."""

    __slots__ = ("_callback",)

    def __init__(self, callback: Callable[[Received], None]) -> None:
        self._callback = callback

    def cancelled(self) -> bool:
        return False

    def set_result(self, message: Msg) -> None:
        try:
            self._callback(Received(message.subject, message.data, message.headers, message.reply))
        except Exception:  # the outermost guard: an exception here would end the connection's read loop
            log.exception("callback_failed", subject=message.subject)


class Subscription:
    """Interest in a subject, kept through reconnects until `unsubscribe`."""

    def __init__(self, bus: "Bus", subject: str, callback: Callable[[Received], None], queue: str) -> None:
        self.subject, self.queue = subject, queue
        self._bus, self._sink = bus, _Sink(callback)
        self._raw: NatsSubscription | None = None

    async def attach(self, client: Client) -> None:
        """Register with a connection: the first one, or one made anew after nats-py closed for good."""
        self._raw = await client.subscribe(self.subject, queue=self.queue, future=self._sink)

    async def unsubscribe(self) -> None:
        """No message is handed over after this returns."""
        raw, self._raw = self._raw, None
        self._bus.drop(self)
        if raw is not None:
            with contextlib.suppress(nats.errors.Error):
                await raw.unsubscribe()

    async def drain(self) -> None:
        """As `unsubscribe`, but what the broker sent before it took note is still handed over."""
        if self._raw is not None and self._bus.connected:
            with contextlib.suppress(BusUnavailable):
                await self._bus.end_interest(self._raw)
        await self.unsubscribe()


class _Ask(msgspec.Struct, frozen=True):
    subject: str
    answer: asyncio.Future[Any]


class Bus:
    """A connection to NATS that outlives outages. Make it with `Bus.connect`."""

    def __init__(self, url: str, name: str) -> None:
        self.url, self.name = _without_password(url), name
        self._servers = [server.strip() for server in url.split(",")]
        self._client = Client()
        self._inbox = f"_INBOX_{names.token(name)}.{token_hex(8)}"
        self._asks: dict[str, _Ask] = {}
        self._serial = 0
        self._subscriptions: set[Subscription] = set()
        self._resumables: set[Resumable] = set()
        self._callbacks: list[Callable[[], Awaitable[None]]] = []
        self._declared: dict[str, dict[str, Any]] = {}  # streams, buckets among them, by name
        self._consumers: dict[tuple[str, str], ConsumerSpec] = {}
        self._replicas = 1
        self._up = asyncio.Event()
        self._connections = 0
        self._epoch = 0
        self._losses_s: deque[float] = deque(maxlen=LOSSES_KEPT)
        self._connected_since_s = 0.0
        self._last_error = "no answer"
        self._refused: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._background: set[asyncio.Task[Any]] = set()
        self._recovery: asyncio.Task[None] | None = None
        self._reopening = False
        self._closing = False

    # --- the connection -------------------------------------------------------------------------------

    @classmethod
    async def connect(cls, url: str, *, name: str, timeout_s: float = 10.0) -> "Bus":
        """Connect to `url` (several, parted by commas, are one cluster). Raises BusConnectError."""
        bus = cls(url, name)
        for server in bus._servers:
            _check_url(server)
        try:
            async with asyncio.timeout(timeout_s):
                await bus._open()
                bus._note_connected()
        except TimeoutError:
            await bus.close()
            raise BusConnectError(
                f"no NATS server answers at {bus.url} within {timeout_s:g} s ({bus._last_error})"
            ) from None
        except nats.errors.Error as error:
            await bus.close()
            raise BusConnectError(f"cannot connect to {bus.url}: {error}") from None
        return bus

    async def _open(self) -> None:
        """Make the nats-py connection and attach every subscription to it."""
        client = self._client = Client()
        connecting = asyncio.ensure_future(self._dial(client))
        try:
            await asyncio.wait({connecting, self._refused}, return_when=asyncio.FIRST_COMPLETED)
            if not connecting.done():
                raise nats.errors.Error(self._refused.result())
            await connecting
        finally:
            connecting.cancel()
        if not self._subscriptions:
            await self.subscribe(f"{self._inbox}.r.*", self._hear_answer)
        else:
            for subscription in list(self._subscriptions):
                await subscription.attach(client)

    async def _dial(self, client: Client) -> None:
        await client.connect(
            self._servers,
            name=self.name,
            error_cb=self._on_error,
            disconnected_cb=self._on_disconnected,
            reconnected_cb=self._on_reconnected,
            closed_cb=self._on_closed,
            connect_timeout=CONNECT_S_MAX,
            reconnect_time_wait=RECONNECT_S,
            max_reconnect_attempts=-1,
            ping_interval=PING_S,
            pending_size=64 * BUFFERED_BYTES_MAX,  # never reached: nats-py's own wait swallows cancellation
            inbox_prefix=self._inbox,
            skip_subject_validation=True,  # checked here, five times as fast
        )

    @property
    def connected(self) -> bool:
        """Whether there is a connection, and since when is known: nats-py says so a moment before its callback does."""
        return self._client.is_connected and self._up.is_set()

    @property
    def connected_since_s(self) -> float:
        """When the present connection was made, on the monotonic clock."""
        return self._connected_since_s

    @property
    def max_payload_bytes(self) -> int:
        """The largest payload that a subject carries here, headers not counted."""
        return min(self._client.max_payload, limits.PAYLOAD_BYTES_MAX)

    @property
    def epoch(self) -> int:
        """Changes whenever a connection is lost or made: two messages of one epoch were sent over one connection,
        and arrive in order or, from some point on, not at all."""
        return self._epoch

    def doubt(self) -> None:
        """Begin a new epoch: what was sent lately may be lost though the connection was not."""
        self._epoch += 1

    def first_loss_after(self, moment_s: float) -> float | None:
        """When a connection was lost for the first time since then, on the monotonic clock."""
        return next((loss_s for loss_s in self._losses_s if loss_s >= moment_s), None)

    async def until_connected(self) -> None:
        """Wait for the end of an outage."""
        await self._up.wait()

    async def until_connected_for(self, seconds: float) -> None:
        """Wait until the present connection is so old."""
        while (left_s := self._connected_since_s + seconds - time.monotonic()) > 0 or not self.connected:
            await self._up.wait()
            await asyncio.sleep(max(left_s, 0))

    def on_reconnect(self, callback: Callable[[], Awaitable[None]]) -> None:
        """Call after each outage, once pullers and watches were told to go on and streams are provisioned."""
        self._callbacks.append(callback)

    def off_reconnect(self, callback: Callable[[], Awaitable[None]]) -> None:
        """Call it no more."""
        self._callbacks.remove(callback)

    def new_inbox(self) -> str:
        """A subject that only this connection listens on."""
        self._serial += 1
        return f"{self._inbox}.{self._serial}"

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run `work` beside; what the bus raises in it is logged."""
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._note_end)

    def remember(self, resumable: Resumable) -> None:
        """Resume it after each outage."""
        self._resumables.add(resumable)

    def forget(self, resumable: Resumable) -> None:
        self._resumables.discard(resumable)

    def drop(self, subscription: Subscription) -> None:
        self._subscriptions.discard(subscription)

    def _note_end(self, task: asyncio.Task[Any]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.warning("background_failed", code=type(error).__name__, reason=str(error))

    def _note_connected(self) -> None:
        self._connections += 1
        self._epoch += 1
        self._connected_since_s = time.monotonic()
        self._last_error = "no answer"
        self._up.set()

    async def _on_error(self, error: Exception) -> None:
        """nats-py's word of anything that went wrong. It must not raise: that would end the read loop."""
        reason = str(error) or type(error).__name__
        again, self._last_error = reason == self._last_error, reason
        if violation := _VIOLATION.search(reason):
            self._refuse_asks(violation[2])
        elif "authorization" in reason.lower() and not self._refused.done():
            self._refused.set_result(f"the server refuses the credentials ({reason})")
        if not again and not isinstance(error, OSError | TimeoutError):
            log.warning("bus_error", reason=reason)

    def _refuse_asks(self, subject: str) -> None:
        """Tell those who wait for an answer on a forbidden subject; the broker's word is in lower case."""
        for ask in self._asks.values():
            if ask.subject.lower() == subject and not ask.answer.done():
                ask.answer.set_exception(NotPermitted(f"{self.name} may not publish to {ask.subject}"))

    async def _on_disconnected(self) -> None:
        """What nats-py has not written yet is dropped: it would reach the broker without what was lost before it."""
        self._up.clear()
        self._client._pending.clear()
        self._client._pending_data_size = 0
        self._epoch += 1
        self._losses_s.append(time.monotonic())
        if not self._closing and self._connections:
            log.warning("bus_lost", url=self.url, reason=self._last_error)
        self._fail_asks("the connection was lost")

    def _fail_asks(self, why: str) -> None:
        for ask in self._asks.values():
            if not ask.answer.done():
                ask.answer.set_exception(BusUnavailable(f"{why} before {ask.subject} was answered"))

    async def _on_reconnected(self) -> None:
        self._note_connected()
        log.info("bus_back", url=self.url)
        if self._recovery:
            self._recovery.cancel()
        self._recovery = asyncio.get_running_loop().create_task(self._recover())

    async def _on_closed(self) -> None:
        """nats-py gave up, as it does on most errors that a broker names: begin with a new client."""
        if not self._closing and not self._reopening and self._connections:
            self._reopening = True
            self.spawn(self._reopen())

    async def _reopen(self) -> None:
        while not self._closing:
            self._refused = asyncio.get_running_loop().create_future()
            try:
                await self._open()
            except nats.errors.Error as error:
                log.warning("bus_reopen_failed", url=self.url, reason=str(error))
                await self._client.close()
                await asyncio.sleep(PAUSE_S_MAX)
            else:
                self._reopening = False
                await self._on_reconnected()
                return

    async def _recover(self) -> None:
        """Go on after an outage. What was provisioned may be gone, with a memory store or a wiped disk.

        Pullers and watches make what they need themselves, so a slow election of other streams holds none up.
        """
        for resumable in list(self._resumables):
            resumable.resume()
        try:
            await self._provision_again()
        except PipelineError as error:
            log.error("provision_again_failed", code=error.code, reason=str(error))
        for callback in list(self._callbacks):
            try:
                await callback()
            except Exception:  # the outermost guard: one callback's failure must not keep others from theirs
                log.exception("reconnect_callback_failed")

    async def flush(self, timeout_s: float = 5.0) -> None:
        """Wait until the broker has everything that was published so far. Raises BusUnavailable.

        nats-py writes its PING past what it still buffers, so the buffer has to be empty first. Its wait is
        never cut short, since the late answer to a cancelled one ends its read loop.
        """
        token = self.new_inbox()
        ask = self._asks[token] = _Ask("a flush", asyncio.get_running_loop().create_future())
        try:
            async with asyncio.timeout(timeout_s):
                await self._written()
                pong = asyncio.ensure_future(self._client.flush(timeout=PONG_S_MAX))
                pong.add_done_callback(functools.partial(_settle_flush, ask.answer))
                await ask.answer
        except TimeoutError:
            raise BusUnavailable(f"{self.url} did not answer a flush within {timeout_s:g} s") from None
        finally:
            del self._asks[token]

    async def _written(self) -> None:
        """Wait until nats-py has given its buffer to the socket; it has no event for it."""
        pause_s = 0.0  # one turn of the loop is enough unless the broker is slow
        while self._client.pending_data_size > 0:
            await asyncio.sleep(pause_s)
            pause_s = POLL_S

    async def end_interest(self, raw: NatsSubscription) -> None:
        """Tell the broker to send no more to a subscription, and hear all that it sent before it knew."""
        await self._client._send_unsubscribe(raw._id)
        await self.flush(CLOSE_S_MAX)

    async def close(self) -> None:
        """End everything within a few seconds. Idempotent."""
        if self._closing:
            return
        self._closing = True
        if self._recovery:
            self._recovery.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S_MAX):
                await asyncio.gather(*(resumable.stop() for resumable in list(self._resumables)))
        if self.connected:
            with contextlib.suppress(BusUnavailable):
                await self.flush(CLOSE_S_MAX)
        if not self.connected:  # nats-py would write what waits to a transport that is closed, and uvloop's raises
            self._client._pending.clear()
            self._client._pending_data_size = 0
        with contextlib.suppress(TimeoutError, OSError, nats.errors.Error):
            async with asyncio.timeout(CLOSE_S_MAX):
                await self._client.close()
        self._fail_asks("the bus was closed")
        for task in list(self._background):
            task.cancel()

    # --- core NATS ------------------------------------------------------------------------------------

    async def publish(
        self, subject: str, payload: bytes, *, headers: dict[str, str] | None = None, reply: str = ""
    ) -> None:
        """Send a message and wait for nobody. Raises PayloadTooLarge, and BusUnavailable in a long outage.

        In a short outage the message waits in a buffer of `BUFFERED_BYTES_MAX`.
        """
        self._check_size(subject, payload, headers, self.max_payload_bytes)
        await self._send(subject, payload, headers, reply)

    async def _send(self, subject: str, payload: bytes, headers: dict[str, str] | None, reply: str) -> None:
        if " " in subject or not subject.isprintable() or not subject:
            raise ValueError(f"not a subject: {subject!r}")
        if self._client.pending_data_size > BUFFERED_BYTES_MAX:
            await self._make_room(subject)
        try:
            await self._client.publish(subject, payload, reply=reply, headers=headers)
        except nats.errors.Error as error:
            raise BusUnavailable(f"cannot publish to {subject}: {error}") from None

    def _check_size(self, subject: str, payload: bytes, headers: dict[str, str] | None, limit: int) -> None:
        """Refuse what the subject does not carry, and what would make the broker end the connection."""
        size = len(payload)
        if headers and size <= limit:
            limit = self._client.max_payload
            size += HEADER_BYTES + sum(len(name) + len(value) + HEADER_BYTES for name, value in headers.items())
        if size > limit:
            raise PayloadTooLarge(
                f"{size} bytes are more than the {limit} that {subject} carries",
                field="payload",
                size=size,
                limit=limit,
            )

    async def _make_room(self, subject: str) -> None:
        """Wait for the buffer to be written. nats-py's own such wait cannot be cancelled."""
        deadline_s = time.monotonic() + BUFFERED_S_MAX
        while self._client.pending_data_size > BUFFERED_BYTES_MAX:
            if not self.connected or time.monotonic() > deadline_s:
                raise BusUnavailable(
                    f"{BUFFERED_BYTES_MAX} bytes wait for the broker already; not published: {subject}",
                    size=self._client.pending_data_size,
                    limit=BUFFERED_BYTES_MAX,
                )
            await asyncio.sleep(POLL_S)

    async def request(
        self, subject: str, payload: bytes = b"", *, timeout_s: float = 2.0, headers: dict[str, str] | None = None
    ) -> Received:
        """Ask and wait for one answer. Raises NoResponders at once, BusUnavailable at the end of the time."""
        self._check_size(subject, payload, headers, self.max_payload_bytes)
        return await self._ask(subject, payload, headers, timeout_s)

    async def _ask(
        self,
        subject: str,
        payload: bytes,
        headers: dict[str, str] | None,
        timeout_s: float,
        before: Callable[[], Awaitable[None]] | None = None,
    ) -> Received:
        self._serial += 1
        token = str(self._serial)
        ask = _Ask(subject, asyncio.get_running_loop().create_future())
        self._asks[token] = ask
        try:
            async with asyncio.timeout(timeout_s):
                if not self._client.is_connected:
                    await self._up.wait()
                if before is not None:
                    await before()
                    if not self._client.is_connected:
                        raise BusUnavailable(f"the connection was lost before {subject} was sent")
                await self._send(subject, payload, headers, f"{self._inbox}.r.{token}")
                received = await ask.answer
        except TimeoutError:
            raise BusUnavailable(f"no answer on {subject} within {timeout_s:g} s") from None
        finally:
            del self._asks[token]
        if received.headers and received.headers.get(STATUS) == "503" and not received.payload:
            raise NoResponders(f"nobody listens on {subject}")
        return received

    def _hear_answer(self, received: Received) -> None:
        ask = self._asks.get(received.subject.rpartition(".")[2])
        if ask and not ask.answer.done():
            ask.answer.set_result(received)

    async def subscribe(self, subject: str, callback: Callable[[Received], None], *, queue: str = "") -> Subscription:
        """Call `callback` with each message, on the loop and in order. What it raises is logged."""
        subscription = Subscription(self, subject, callback, queue)
        self._subscriptions.add(subscription)
        try:
            await subscription.attach(self._client)
        except nats.errors.Error as error:
            self._subscriptions.discard(subscription)
            raise BusUnavailable(f"cannot subscribe to {subject}: {error}") from None
        return subscription

    async def respond(self, received: Received, payload: bytes, headers: dict[str, str] | None = None) -> None:
        """Answer a request; nothing happens where nobody waits for an answer."""
        if received.reply:
            await self.publish(received.reply, payload, headers=headers)

    # --- JetStream ------------------------------------------------------------------------------------

    async def publish_durable(
        self,
        subject: str,
        payload: bytes,
        *,
        msg_id: str | None = None,
        headers: dict[str, str] | None = None,
        timeout_s: float = 10.0,
        before: Callable[[], Awaitable[None]] | None = None,
    ) -> Stored:
        """Store a message once, retried under one message id through outages until `timeout_s`.

        `before` is awaited each time that the message is about to be sent; what it publishes goes ahead of the
        message over the same connection, and what it raises but BusUnavailable ends the retries.

        Raises PayloadTooLarge, Overloaded where the stream is full, NotPermitted, and BusUnavailable where no
        stream took it in time: it may then be stored or not, and a repeat with the same `msg_id` is safe.
        """
        headers = {header_names.MSG_ID: msg_id or token_hex(12), **(headers or {})}
        self._check_size(subject, payload, headers, self._client.max_payload)
        publish = functools.partial(self._store, subject, payload, headers, before)
        return await self._retried(publish, timeout_s, f"no stream confirmed a message on {subject}", _may_pass)

    async def _retried(
        self,
        attempt: Callable[[float], Awaitable[T]],
        timeout_s: float,
        failed: str,
        may_pass: Callable[[BusUnavailable], bool],
    ) -> T:
        """Attempt it until it succeeds. Raises what may not pass at once, BusUnavailable at the end of the time."""
        deadline_s = time.monotonic() + timeout_s
        pause_s = PAUSE_S_MIN
        while True:
            try:
                return await attempt(min(ATTEMPT_S_MAX, deadline_s - time.monotonic()))
            except BusUnavailable as error:
                if not may_pass(error):
                    raise
                if time.monotonic() + pause_s >= deadline_s:
                    raise BusUnavailable(f"{failed} within {timeout_s:g} s: {error}") from None
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, PAUSE_S_MAX)

    async def _store(
        self,
        subject: str,
        payload: bytes,
        headers: dict[str, str],
        before: Callable[[], Awaitable[None]] | None,
        timeout_s: float,
    ) -> Stored:
        received = await self._ask(subject, payload, headers, timeout_s, before)
        try:
            answer = answer_of(received.payload)
        except BrokerRefused as refusal:
            if refusal.error_number == MESSAGE_TOO_LARGE:
                raise self._too_large(subject, payload) from None
            if refusal.error_number in (STORE_FAILED, *NO_SPACE):
                raise Overloaded(f"the queue of {subject} is full: {refusal}", retry_after_s=RETRY_AFTER_S) from None
            raise
        return Stored(answer["stream"], answer["seq"], answer.get("duplicate", False))

    def _too_large(self, subject: str, payload: bytes) -> PayloadTooLarge:
        limit = limits.PAYLOAD_BYTES_MAX
        message = f"{len(payload)} bytes are more than the {limit} that the stream of {subject} takes"
        return PayloadTooLarge(message, field="payload", size=len(payload), limit=limit)

    async def api(self, operation: str, body: dict[str, Any] | None = None, timeout_s: float = API_S_MAX) -> Any:
        """Ask JetStream's API, again where an outage or an election came between: every operation bears it.

        Raises BrokerRefused with its error number, NoResponders where JetStream is off, BusUnavailable.
        """
        payload = msgspec.json.encode(body) if body else b""
        call = functools.partial(self._call_api, f"{names.JS_API}.{operation}", payload)
        return await self._retried(call, timeout_s, f"JetStream did not answer {operation}", _may_pass_at_api)

    async def _call_api(self, subject: str, payload: bytes, timeout_s: float) -> dict[str, Any]:
        return answer_of((await self._ask(subject, payload, None, timeout_s)).payload)

    async def ack(
        self, delivery: Delivery, timeout_s: float = 5.0, *, before: Callable[[], Awaitable[None]] | None = None
    ) -> bool:
        """Settle a delivery. True: the broker confirmed it. `before`: as in `publish_durable`.

        A broker that was killed may have forgotten that it handed the message out: it confirms nothing, and
        delivers the message again, perhaps with the same attempt.
        """

        async def settle(timeout_s: float) -> Received:
            return await self._ask(delivery.ack_subject, b"+ACK", None, timeout_s, before)

        try:
            await self._retried(settle, timeout_s, "an ack was not confirmed", _may_pass)
        except BusUnavailable:
            return False
        return True

    async def nak(self, delivery: Delivery, delay_s: float = 0) -> None:
        """Hand a delivery back: to be delivered again at once, or after `delay_s`."""
        body = b'-NAK {"delay": %d}' % (delay_s * NS) if delay_s else b"-NAK"
        await self.publish(delivery.ack_subject, body)

    async def term(self, delivery: Delivery, reason: str) -> None:
        """Give a delivery up: it is never delivered again."""
        await self.publish(delivery.ack_subject, f"+TERM {reason}".encode())

    async def in_progress(self, ack_subject: str) -> None:
        """Begin the delivery's lease anew."""
        await self.publish(ack_subject, b"+WPI")

    async def pull(
        self,
        consumers: ConsumerSpec | Sequence[ConsumerSpec],
        on_delivery: Callable[[Delivery], None],
        *,
        credit: int,
        priority: int = OWNER_PRIORITY,
        others: Others | None = None,
    ) -> Puller:
        """Begin to take the consumers' messages, the first one's before the next one's, never more than `credit` and
        what `add_credit` gives back. `others` are helped out where that leaves slots free."""
        several = (consumers,) if isinstance(consumers, ConsumerSpec) else tuple(consumers)
        puller = Puller(self, several, on_delivery, credit=credit, priority=priority, others=others)
        self.remember(puller)
        await puller.start()
        return puller

    async def bucket(self, spec: BucketSpec) -> Bucket:
        """A key-value bucket, created where it is missing. Raises ProvisionError, BusUnavailable."""
        await self.ensure_bucket(spec)
        return Bucket(self, spec)

    async def objects(self, spec: ObjectBucketSpec) -> Objects:
        """An object bucket, created where it is missing. Raises ProvisionError, BusUnavailable."""
        await self.ensure_bucket(spec)
        return Objects(self, spec)

    async def read(
        self, stream: str, subject: str, *, from_seq: int = 1, timeout_s: float = 5.0, at_once: int = READ_BATCH
    ) -> AsyncIterator[StoredMessage]:
        """The messages that a stream now has on a subject, in order.

        They are asked for `at_once` at a time, which is how many are in memory. Each such batch may take `timeout_s`,
        outages included; then it raises BusUnavailable. In a cluster any replica hands them over, and one may be
        behind: what the stream has is its leader's word.
        """
        end, deadline_s = None, time.monotonic() + timeout_s
        while True:
            read = functools.partial(self._read_batch, stream, subject, from_seq, at_once)
            batch = await self._retried(read, timeout_s, f"stream {stream} could not be read", _may_pass)
            for message in batch:
                yield message
            if batch:
                from_seq, deadline_s = batch[-1].seq + 1, time.monotonic() + timeout_s
            if len(batch) == at_once:
                continue
            last = await self._ask_leader(stream, {"last_by_subj": subject}, timeout_s)
            last_seq = last.seq if last else 0
            end = last_seq if end is None else min(end, last_seq)
            if end < from_seq:
                return
            if time.monotonic() > deadline_s:
                raise BusUnavailable(f"no replica of stream {stream} came up to its leader within {timeout_s:g} s")
            await asyncio.sleep(PAUSE_S_MIN)

    async def stored_at(self, stream: str, seq: int) -> StoredMessage | None:
        """The message that a stream has under a sequence number; None where it has none. Raises BusUnavailable."""
        return await self._ask_leader(stream, {"seq": seq})

    async def last(self, stream: str, subject: str) -> StoredMessage | None:
        """The newest message that a stream has on a subject; None where it has none. Raises BusUnavailable."""
        return await self._ask_leader(stream, {"last_by_subj": subject})

    async def next_stored(self, stream: str, subject: str, from_seq: int) -> StoredMessage | None:
        """The oldest message on a subject from a sequence number on, as any replica knows it; None where there is none.

        Raises BusUnavailable.
        """
        return await self._get(stream, msgspec.json.encode({"seq": from_seq, "next_by_subj": subject}))

    async def _ask_leader(
        self, stream: str, which: dict[str, Any], timeout_s: float = API_S_MAX
    ) -> StoredMessage | None:
        """One message, in the words of the stream's leader: no election's loser answers."""
        payload = msgspec.json.encode(which)

        async def ask(timeout_s: float) -> StoredMessage | None:
            try:
                return stored_of(await self._call_api(f"{names.JS_API}.STREAM.MSG.GET.{stream}", payload, timeout_s))
            except BrokerRefused as refusal:
                if refusal.error_number == NO_MESSAGE:
                    return None
                if refusal.error_number == STREAM_NOT_FOUND:
                    raise NoResponders(f"there is no stream {stream}") from None
                raise

        return await self._retried(ask, timeout_s, f"stream {stream} could not be read", _may_pass)

    async def _get(self, stream: str, which: bytes) -> StoredMessage | None:
        """One message by Direct Get (NATS ADR-31)."""

        async def ask(timeout_s: float) -> Received:
            return await self._ask(f"{names.JS_API}.DIRECT.GET.{stream}", which, None, timeout_s)

        received = await self._retried(ask, API_S_MAX, f"stream {stream} could not be read", _may_pass)
        headers = received.headers or {}
        if STATUS in headers:
            return None
        return StoredMessage(headers["Nats-Subject"], received.payload, headers, int(headers["Nats-Sequence"]))

    async def _read_batch(
        self, stream: str, subject: str, from_seq: int, at_once: int, timeout_s: float
    ) -> list[StoredMessage]:
        """Up to so many messages by one Direct Get (NATS ADR-31); an empty status message ends them."""
        found: list[StoredMessage] = []
        end: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def hear(received: Received) -> None:
            headers = received.headers or {}
            if STATUS in headers:
                if not end.done():
                    end.set_result(headers[STATUS])
            else:
                seq = int(headers["Nats-Sequence"])
                found.append(StoredMessage(headers["Nats-Subject"], received.payload, headers, seq))

        subscription = await self.subscribe(self.new_inbox(), hear)
        try:
            request = msgspec.json.encode({"seq": from_seq, "next_by_subj": subject, "batch": at_once})
            await self.publish(f"{names.JS_API}.DIRECT.GET.{stream}", request, reply=subscription.subject)
            async with asyncio.timeout(timeout_s):
                status = await end
        except TimeoutError:
            raise BusUnavailable(f"{len(found)} messages and no end within {timeout_s:g} s") from None
        finally:
            await subscription.unsubscribe()
        if status == "503":
            raise NoResponders(f"there is no stream {stream}")
        return found

    # --- provisioning and states ----------------------------------------------------------------------

    async def provision(
        self,
        streams: Sequence[StreamSpec],
        consumers: Sequence[ConsumerSpec],
        buckets: Sequence[BucketSpec | ObjectBucketSpec],
        *,
        replicas: int = 1,
    ) -> None:
        """Create what is missing and check what is there. Raises ProvisionError naming field, wanted and found.

        It is done again after each outage.
        """
        self._replicas = replicas
        for stream in streams:
            await self._ensure_stream(provision.stream_config(stream, replicas))
        for bucket in buckets:
            await self.ensure_bucket(bucket)
        for consumer in consumers:
            await self.ensure_consumer(consumer)

    async def _ensure_stream(self, config: dict[str, Any]) -> None:
        await provision.provision_stream(self, config)
        self._declared[config["name"]] = config

    async def ensure_bucket(self, spec: BucketSpec | ObjectBucketSpec) -> None:
        await self._ensure_stream(provision.bucket_config(spec, self._replicas))

    async def ensure_consumer(self, spec: ConsumerSpec) -> None:
        """Create the consumer, and its stream if it was declared here, or check it."""
        try:
            await provision.provision_consumer(self, spec)
        except BrokerRefused as refusal:
            if refusal.error_number != STREAM_NOT_FOUND or spec.stream not in self._declared:
                raise ProvisionError(f"consumer {spec.name}: there is no stream {spec.stream}") from None
            await provision.provision_stream(self, self._declared[spec.stream])
            await provision.provision_consumer(self, spec)
        self._consumers[spec.stream, spec.name] = spec

    async def _provision_again(self) -> None:
        for config in list(self._declared.values()):
            await provision.provision_stream(self, config)
        for consumer in list(self._consumers.values()):
            await self.ensure_consumer(consumer)

    async def stream_state(self, name: str) -> StreamState:
        """Raises BrokerRefused where there is no such stream."""
        info = await self.api(f"STREAM.INFO.{name}")
        state = info["state"]
        return StreamState(
            messages=state["messages"],
            bytes=state["bytes"],
            first_seq=state["first_seq"],
            last_seq=state["last_seq"],
            consumers=state["consumer_count"],
            created_unix_s=datetime.fromisoformat(info["created"]).timestamp(),
        )

    async def consumer_state(self, stream: str, name: str) -> ConsumerState:
        """Raises BrokerRefused where there is no such consumer."""
        info = await self.api(f"CONSUMER.INFO.{stream}.{name}")
        paused_until = datetime.fromisoformat(info["config"]["pause_until"]).timestamp() if info.get("paused") else None
        return ConsumerState(
            pending=info["num_pending"],
            ack_pending=info["num_ack_pending"],
            redelivered=info["num_redelivered"],
            waiting=info["num_waiting"],
            paused_until_unix_s=paused_until,
            ack_floor=info["ack_floor"]["stream_seq"],
        )

    async def consumer_names(self, stream: str) -> list[str]:
        """The names of a stream's consumers. Raises BrokerRefused where there is no such stream."""
        found: list[str] = []
        while True:
            page = await self.api(f"CONSUMER.NAMES.{stream}", {"offset": len(found)})
            found += page["consumers"] or ()
            if not page["consumers"] or len(found) >= page["total"]:
                return found

    async def subjects_state(self, name: str, filter_subject: str) -> dict[str, int]:
        """How many messages a stream has on each subject that matches."""
        info = await self.api(f"STREAM.INFO.{name}", {"subjects_filter": filter_subject})
        return info["state"].get("subjects") or {}


def _check_url(url: str) -> None:
    try:
        parsed = urlparse(url)
        known = parsed.scheme in _SCHEMES and parsed.hostname and parsed.port != 0
    except ValueError:  # the port is no number, or out of range
        known = False
    if not known:
        raise BusConnectError(f"not a NATS URL: {_without_password(url)!r}; it should be like nats://127.0.0.1:4222")


def _without_password(url: str) -> str:
    return re.sub(r"//[^@/,]*@", "//", url)


def _may_pass(error: BusUnavailable) -> bool:
    """Whether to try again: the connection, a stream or a cluster's new leader may yet come."""
    return not isinstance(error, BrokerRefused) or error.error_number in NO_LEADER


def _may_pass_at_api(error: BusUnavailable) -> bool:
    """As `_may_pass`, but where nobody listens, JetStream is off and stays off."""
    return not isinstance(error, NoResponders) and _may_pass(error)


def _settle_flush(answer: asyncio.Future[None], pong: asyncio.Future[None]) -> None:
    """Pass on that the broker answered; of a flush that failed, only its own deadline tells."""
    if not pong.cancelled() and pong.exception() is None and not answer.done():
        answer.set_result(None)
