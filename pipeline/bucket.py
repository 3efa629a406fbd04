"""Key-value buckets: one value a key, watched through outages and wiped stores."""

import asyncio
import functools
from collections.abc import Callable
from secrets import token_hex
from typing import TYPE_CHECKING, Any, Final

import structlog

from pipeline.errors import BrokerRefused, Busy, PipelineError
from pipeline.jetstream import LAST_CONSUMER_SEQ, NS, STATUS, WRONG_LAST_SEQ, Received, delivery_of, is_delivery
from pipeline.provision import bucket_stream
from subjects import names
from subjects.headers import EXPECTED_LAST_SEQ
from subjects.streams import BucketSpec

if TYPE_CHECKING:
    from pipeline.bus import Bus, Subscription

IDLE_HEARTBEAT_S: Final = 1.0
SILENCE_S_MAX: Final = 3 * IDLE_HEARTBEAT_S
RETRY_S: Final = 0.25
_OPERATION: Final = "KV-Operation"
_MARKER: Final = "Nats-Marker-Reason"

log = structlog.get_logger()

OnChange = Callable[[str, bytes | None], None]


class Bucket:
    """A key-value bucket of the broker. Every call raises BusUnavailable where the broker stays away."""

    def __init__(self, bus: "Bus", spec: BucketSpec) -> None:
        self._bus, self.spec = bus, spec
        self._prefix = f"{names.KV}.{spec.name}."

    async def put(self, key: str, value: bytes) -> int:
        """Store a value; its revision."""
        return (await self._bus.publish_durable(self._prefix + key, value)).seq

    async def get(self, key: str) -> bytes | None:
        """The value, None where there is none."""
        stream = bucket_stream(self.spec.name)
        subject = f"{names.JS_API}.DIRECT.GET.{stream}.{self._prefix}{key}"
        received = await self._bus.request(subject)
        headers = received.headers or {}
        gone = headers.get(STATUS) == "404" or _OPERATION in headers or _MARKER in headers
        return None if gone else received.payload

    async def entry(self, key: str) -> tuple[bytes, int] | None:
        """The value and its revision, None where there is none."""
        stored = await self._bus.last(bucket_stream(self.spec.name), self._prefix + key)
        if stored is None or not {_OPERATION, _MARKER}.isdisjoint(stored.headers or {}):
            return None
        return stored.payload, stored.seq

    async def replace(self, key: str, value: bytes, revision: int) -> int:
        """Store a value in the place of the one with that revision; its own. Raises Busy where another one is there."""
        in_its_place = {EXPECTED_LAST_SEQ: str(revision)}
        try:
            return (await self._bus.publish_durable(self._prefix + key, value, headers=in_its_place)).seq
        except BrokerRefused as refusal:
            if refusal.error_number != WRONG_LAST_SEQ:
                raise
            raise Busy(f"{key} in {self.spec.name} was written by someone else") from None

    async def delete(self, key: str) -> None:
        await self._bus.publish_durable(self._prefix + key, b"", headers={_OPERATION: "DEL"})

    async def entries(self, timeout_s: float = 5.0) -> dict[str, bytes]:
        """Every key and its value now. Raises TimeoutError."""
        watch = await self.watch(lambda key, value: None)
        try:
            async with asyncio.timeout(timeout_s):
                await watch.synced.wait()
            return dict(watch.values)
        finally:
            await watch.stop()

    async def watch(self, on_change: OnChange) -> "Watch":
        """Call `on_change(key, value)` for each value there is and each change to come, None: gone.

        A value put again unchanged is no change. After an outage all values are compared, so that
        nothing is missed; a key that a wiped or expired store no longer has is gone.
        """
        watch = Watch(self._bus, self.spec, on_change)
        await watch.start()
        return watch


class Watch:
    """A running watch of one bucket: an ephemeral consumer of the last value of each key."""

    def __init__(self, bus: "Bus", spec: BucketSpec, on_change: OnChange) -> None:
        self._bus, self._spec, self._on_change = bus, spec, on_change
        self._prefix = f"{names.KV}.{spec.name}."
        self.values: dict[str, bytes] = {}
        self.synced = asyncio.Event()
        self._unseen: set[str] = set()  # keys that the consumer has not confirmed yet
        self._subscription: Subscription | None = None
        self._generation = 0
        self._consumer_seq = 0
        self._heard_s = 0.0
        self._renew_due = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self._renew()
        self._task = asyncio.create_task(self._run(), name=f"watch.{self._spec.name}")
        self._bus.remember(self)

    def resume(self) -> None:
        """The connection is new: compare everything."""
        self._renew_due.set()

    async def stop(self) -> None:
        """No change is told after this."""
        self._generation += 1
        self._bus.forget(self)
        if self._task:
            self._task.cancel()
        if self._subscription:
            await self._subscription.unsubscribe()

    async def _run(self) -> None:
        while True:
            try:
                async with asyncio.timeout(IDLE_HEARTBEAT_S):
                    await self._renew_due.wait()
            except TimeoutError:
                if asyncio.get_running_loop().time() - self._heard_s < SILENCE_S_MAX:
                    continue
            if not self._bus.connected:
                self._renew_due.clear()
                continue
            try:
                await self._renew()
            except PipelineError as error:
                log.warning("watch_failed", bucket=self._spec.name, code=error.code, reason=str(error))
                await asyncio.sleep(RETRY_S)
                self._renew_due.set()

    async def _renew(self) -> None:
        """A new consumer, from the last value of each key. Raises ProvisionError, BusUnavailable."""
        self._renew_due.clear()
        self._generation += 1
        self._consumer_seq = 0
        self._unseen = set(self.values)
        self.synced.clear()
        if self._subscription:
            await self._subscription.unsubscribe()
        await self._bus.ensure_bucket(self._spec)
        inbox = self._bus.new_inbox()
        self._subscription = await self._bus.subscribe(inbox, functools.partial(self._hear, self._generation))
        self._heard_s = asyncio.get_running_loop().time()
        name, stream = f"watch-{token_hex(6)}", bucket_stream(self._spec.name)
        request = {"stream_name": stream, "config": self._consumer_config(name, inbox), "action": "create"}
        subject = f"CONSUMER.CREATE.{stream}.{name}.{self._prefix}>"
        created = await self._bus.api(subject, request)
        if not created.get("num_pending"):
            self._finish_sync()

    def _consumer_config(self, name: str, inbox: str) -> dict[str, Any]:
        return {
            "name": name,
            "deliver_subject": inbox,
            "deliver_policy": "last_per_subject",
            "ack_policy": "none",
            "filter_subject": f"{self._prefix}>",
            "idle_heartbeat": int(IDLE_HEARTBEAT_S * NS),
            "inactive_threshold": int(SILENCE_S_MAX * NS),
            "mem_storage": True,
            "num_replicas": 1,
        }

    def _hear(self, generation: int, received: Received) -> None:
        if generation != self._generation:
            return
        self._heard_s = asyncio.get_running_loop().time()
        if not is_delivery(received.reply):
            self._hear_status(received.headers or {})
            return
        delivery = delivery_of(received)
        self._consumer_seq += 1
        if delivery.consumer_seq != self._consumer_seq:
            self._renew_due.set()
            return
        headers = received.headers or {}
        gone = _OPERATION in headers or _MARKER in headers
        self._take(received.subject.removeprefix(self._prefix), None if gone else received.payload)
        if not delivery.pending:
            self._finish_sync()

    def _hear_status(self, headers: dict[str, str]) -> None:
        """An idle heartbeat: the broker has nothing more for us. Anything else: begin anew."""
        last = int(headers.get(LAST_CONSUMER_SEQ, self._consumer_seq))
        if headers.get(STATUS) != "100" or last != self._consumer_seq:
            self._renew_due.set()
        else:
            self._finish_sync()

    def _take(self, key: str, value: bytes | None) -> None:
        self._unseen.discard(key)
        if value == self.values.get(key):
            return
        if value is None:
            del self.values[key]
        else:
            self.values[key] = value
        try:
            self._on_change(key, value)
        except Exception:  # the outermost guard of a callback: the watch must go on
            log.exception("watch_callback_failed", bucket=self._spec.name)

    def _finish_sync(self) -> None:
        """All values there are have been told: a key that did not come is gone."""
        for key in self._unseen & set(self.values):
            self._take(key, None)
        self._unseen = set()
        self.synced.set()
