"""The continuous puller: keeps a consumer's free slots asked for, and never one more.

Each pull request goes to an inbox of the present connection; the broker ends requests whose inbox nobody
listens on, so an inbox renewed after an outage takes all old requests with it.
"""

import asyncio
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import msgspec
import structlog

from pipeline.errors import PipelineError
from pipeline.jetstream import (
    DESCRIPTION,
    NS,
    PENDING_MESSAGES,
    STATUS,
    Delivery,
    Received,
    delivery_of,
    is_delivery,
)
from subjects import names
from subjects.streams import ConsumerSpec

if TYPE_CHECKING:
    from pipeline.bus import Bus, Subscription

EXPIRES_S: Final = 30.0
IDLE_HEARTBEAT_S: Final = 1.0
SILENCE_S_MAX: Final = 3 * IDLE_HEARTBEAT_S
RETRY_S_MIN: Final = 0.05
RETRY_S_MAX: Final = 1.0

log = structlog.get_logger()


class Puller:
    """Hands the consumer's messages to `on_delivery`, at most `credit` before `add_credit` gives more.

    `credit` counts the free slots, `asked` how many of them are asked for at the broker.
    """

    def __init__(
        self,
        bus: "Bus",
        consumer: ConsumerSpec,
        on_delivery: Callable[[Delivery], None],
        *,
        credit: int,
        group: str | None = None,
        priority: int | None = None,
    ) -> None:
        self._bus, self._consumer, self._on_delivery = bus, consumer, on_delivery
        self._credit, self._asked = credit, 0
        self._subject = f"{names.JS_API}.CONSUMER.MSG.NEXT.{consumer.stream}.{consumer.name}"
        self._options: dict[str, Any] = {"expires": int(EXPIRES_S * NS), "idle_heartbeat": int(IDLE_HEARTBEAT_S * NS)}
        if group is not None:
            self._options["group"] = group
        if priority is not None:
            self._options["priority"] = priority
        self._subscription: Subscription | None = None
        self._generation = 0
        self._renew_due = False
        self._heard_s = 0.0
        self._retry_s = RETRY_S_MIN
        self._wake = asyncio.Event()
        self._stopped = self._paused = False
        self._task: asyncio.Task[None] | None = None

    @property
    def credit(self) -> int:
        """Free slots."""
        return self._credit

    async def start(self) -> None:
        """Make the consumer if need be and ask for the first messages; none is handed over before it returns."""
        await self._renew()
        self._task = asyncio.create_task(self._run(), name=f"pull.{self._consumer.name}")
        await self._top_up()

    def add_credit(self, n: int = 1) -> None:
        """`n` more slots are free."""
        self._credit += n
        if self._short():
            self._wake.set()

    def resume(self) -> None:
        """The connection is new: ask again for everything that was asked on the old one."""
        self._renew_due = True
        self._retry_s = RETRY_S_MIN
        self._wake.set()

    async def pause(self) -> None:
        """Take back what is asked for, until `unpause`; one that is under way goes back to the broker at once."""
        self._paused = True
        self._asked = 0
        self._generation += 1
        old, self._subscription = self._subscription, None
        if old:
            await old.drain()

    def unpause(self) -> None:
        """Ask again."""
        self._paused = False
        self.resume()

    async def stop(self) -> None:
        """After this, no delivery is handed over; one that is under way goes back to the broker at once."""
        if self._stopped:
            return
        self._stopped = True
        self._bus.forget(self)
        if self._task:
            self._task.cancel()
        if self._subscription:
            await self._subscription.drain()

    async def _run(self) -> None:
        while True:
            try:
                async with asyncio.timeout(IDLE_HEARTBEAT_S):
                    await self._wake.wait()
            except TimeoutError:
                self._renew_due |= self._silent()
            self._wake.clear()
            if self._paused or not self._bus.connected:
                continue
            try:
                if self._renew_due:
                    await self._renew()
                await self._top_up()
            except PipelineError as error:
                log.warning("pull_failed", consumer=self._consumer.name, code=error.code, reason=str(error))
                await self._back_off()

    async def _back_off(self) -> None:
        """Wait longer each time, until the broker is heard of again."""
        await asyncio.sleep(self._retry_s)
        self._retry_s = min(2 * self._retry_s, RETRY_S_MAX)
        self._wake.set()

    def _silent(self) -> bool:
        """Whether the broker, which has requests of ours, missed its heartbeats."""
        return self._asked > 0 and asyncio.get_running_loop().time() - self._heard_s > SILENCE_S_MAX

    def _short(self) -> bool:
        """Whether it is time to ask: nothing is asked for, or at most half of the free slots."""
        return self._credit > self._asked and (self._asked <= 0 or 2 * self._asked <= self._credit)

    async def _renew(self) -> None:
        """Start afresh on a new inbox. Raises ProvisionError, BusUnavailable."""
        if self._generation:
            await asyncio.sleep(0 if self._retry_s == RETRY_S_MIN else self._retry_s)
        self._generation += 1
        old, self._subscription = self._subscription, None
        if old:
            self._bus.spawn(old.drain())
        await self._bus.ensure_consumer(self._consumer)
        hear = functools.partial(self._hear, self._generation)
        self._subscription = await self._bus.subscribe(self._bus.new_inbox(), hear)
        self._asked = 0
        self._renew_due = False

    async def _top_up(self) -> None:
        if self._stopped or self._paused or self._subscription is None or not self._short():
            return
        batch = self._credit - self._asked
        self._asked += batch
        self._heard_s = asyncio.get_running_loop().time()
        request = msgspec.json.encode({"batch": batch, **self._options})
        await self._bus.publish(self._subject, request, reply=self._subscription.subject)

    def _hear(self, generation: int, received: Received) -> None:
        self._heard_s = asyncio.get_running_loop().time()
        if not is_delivery(received.reply):
            if generation == self._generation:
                self._hear_status(received.headers or {})
            return
        if generation == self._generation:
            self._asked -= 1
        delivery = delivery_of(received)
        if self._stopped or self._paused or self._credit <= 0:
            self._bus.spawn(self._bus.nak(delivery))
            return
        self._retry_s = RETRY_S_MIN
        self._credit -= 1
        try:
            self._on_delivery(delivery)
        except Exception:  # the outermost guard of a callback: the message goes to another attempt
            log.exception("delivery_refused", consumer=self._consumer.name, stream_seq=delivery.stream_seq)
            self._credit += 1
            self._bus.spawn(self._bus.nak(delivery, delay_s=RETRY_S_MAX))
        if self._short():
            self._wake.set()

    def _hear_status(self, headers: dict[str, str]) -> None:
        """100: alive. 404 and 408: a request ended, its rest is free again. Others: begin anew, with a pause."""
        status, text = headers.get(STATUS, ""), headers.get(DESCRIPTION, "")
        if status == "100":
            self._retry_s = RETRY_S_MIN
            return
        if status in ("404", "408") or text == "Batch Completed":
            self._asked -= int(headers.get(PENDING_MESSAGES, self._asked))
        else:
            log.info("pull_ended_by_broker", consumer=self._consumer.name, code=status, reason=text)
            self._renew_due = True
            self._retry_s = min(2 * self._retry_s, RETRY_S_MAX)
        self._wake.set()
