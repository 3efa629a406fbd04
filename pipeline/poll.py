"""A poll: one consumer's pull requests, all to one inbox of the present connection.

The broker ends requests whose inbox nobody listens on: an inbox given up takes all its requests with it.
"""

import asyncio
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import msgspec
import structlog

from pipeline.errors import BusUnavailable
from pipeline.jetstream import DESCRIPTION, NS, PENDING_MESSAGES, STATUS, Delivery, Received, delivery_of, is_delivery
from subjects import names
from subjects.limits import LEASE_S
from subjects.streams import OWNER_PRIORITY, ConsumerSpec

if TYPE_CHECKING:
    from pipeline.bus import Bus, Subscription

EXPIRES_S: Final = 0.8 * LEASE_S
"""What a frozen worker has asked for lapses before the lease of what it got: that is not handed to it again."""
IDLE_HEARTBEAT_S: Final = 1.0
SILENCE_S_MAX: Final = 3 * IDLE_HEARTBEAT_S
TAKE_S_MAX: Final = 2.0
"""The broker answers within it what is there to take."""

log = structlog.get_logger()


def pull_subject(consumer: ConsumerSpec) -> str:
    """Where pull requests for a consumer go."""
    return f"{names.JS_API}.CONSUMER.MSG.NEXT.{consumer.stream}.{consumer.name}"


def by_priority(consumer: ConsumerSpec, priority: int) -> dict[str, Any]:
    """The fields of a pull request that say whose turn it is; none where the consumer has no priority group."""
    return {"group": consumer.priority_group, "priority": priority} if consumer.priority_group else {}


class Poll:
    """Of one consumer. `asked`: how many messages the broker may still send."""

    def __init__(
        self,
        bus: "Bus",
        consumer: ConsumerSpec,
        on_delivery: Callable[["Poll", Delivery], None],
        on_status: Callable[[bool], None],
        *,
        priority: int = OWNER_PRIORITY,
    ) -> None:
        """`priority` counts where the consumer has a priority group. `on_status` hears of every word of the broker
        beside deliveries; True: it ended the requests for a reason of its own."""
        self.consumer, self.asked = consumer, 0
        self._bus, self._on_delivery, self._on_status = bus, on_delivery, on_status
        self._subject = pull_subject(consumer)
        whose = by_priority(consumer, priority)
        self._long = {"expires": int(EXPIRES_S * NS), "idle_heartbeat": int(IDLE_HEARTBEAT_S * NS)} | whose
        self._short = {"no_wait": True} | whose
        self._subscription: Subscription | None = None
        self._generation = 0
        self._taken: asyncio.Future[bool] | None = None
        self._heard_s = 0.0

    @property
    def silent(self) -> bool:
        """Whether the broker, which has requests of ours, missed its heartbeats."""
        return self.asked > 0 and asyncio.get_running_loop().time() - self._heard_s > SILENCE_S_MAX

    async def ask(self, batch: int) -> None:
        """Ask for so many more messages, whenever they come."""
        await self._ask(batch, self._long)

    async def take(self, batch: int) -> bool:
        """Ask for what is there, and wait for it: whether it was as much as `batch`. Raises BusUnavailable."""
        self._taken = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(TAKE_S_MAX):
                await self._ask(batch, self._short)
                return await self._taken
        except TimeoutError:
            raise BusUnavailable(f"no word of what waits for {self.consumer.name} within {TAKE_S_MAX:g} s") from None
        finally:
            self._taken = None

    def break_off(self) -> None:
        """End a `take`: its connection is gone."""
        self._end_take(False)

    def give_up(self) -> None:
        """What was asked for is asked for no more; what is under way already is still handed over."""
        if old := self._let_go():
            self._bus.spawn(old.drain())

    async def withdraw(self) -> None:
        """As `give_up`, and when it returns nothing is under way any more."""
        if old := self._let_go():
            await old.drain()

    def _let_go(self) -> "Subscription | None":
        self.asked = 0
        self._generation += 1
        old, self._subscription = self._subscription, None
        return old

    async def _ask(self, batch: int, how: dict[str, Any]) -> None:
        self.asked += batch
        self._heard_s = asyncio.get_running_loop().time()
        generation, subscription = self._generation, self._subscription
        if subscription is None:
            hear = functools.partial(self._hear, generation)
            subscription = await self._bus.subscribe(self._bus.new_inbox(), hear)
            if generation != self._generation:  # given up meanwhile: nobody would end this inbox
                await subscription.unsubscribe()
                return
            self._subscription = subscription
        request = msgspec.json.encode({"batch": batch, **how})
        await self._bus.publish(self._subject, request, reply=subscription.subject)

    def _hear(self, generation: int, received: Received) -> None:
        self._heard_s = asyncio.get_running_loop().time()
        present = generation == self._generation
        if is_delivery(received.reply):
            self.asked -= present
            self._on_delivery(self, delivery_of(received))
            if present and self.asked <= 0:
                self._end_take(True)
        elif present:
            self._hear_status(received.headers or {})

    def _hear_status(self, headers: dict[str, str]) -> None:
        """100: alive. 404 and 408: a request ended, its rest is free again. Others: the consumer or its leader went."""
        status, text = headers.get(STATUS, ""), headers.get(DESCRIPTION, "")
        ended = status in ("404", "408") or text == "Batch Completed"
        if ended:
            self.asked -= int(headers.get(PENDING_MESSAGES, self.asked))
        elif status != "100":
            log.info("pull_ended_by_broker", consumer=self.consumer.name, code=status, reason=text)
        if status != "100":
            self._end_take(False)
        self._on_status(not ended and status != "100")

    def _end_take(self, full: bool) -> None:
        if self._taken is not None and not self._taken.done():
            self._taken.set_result(full)
