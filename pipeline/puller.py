"""The continuous puller: keeps free slots asked for at one consumer or several, the first of them before the next.

With several consumers it is in one of two states:

- It listens: something of every consumer is asked for, since nothing waits at any of them. The one that was busy last
  is asked for nearly all the free slots, the others for one message each. A burst over several consumers can then bring
  one task more than there are slots for each consumer but one; those go back to the broker at once. Others, whose
  consumers are not its own, may be helped meanwhile.
- It looks: after a time without a free slot, or when a consumer turns out to have more than was asked for, it asks one
  consumer after another for what waits there, until the slots are full or nothing is left.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, Protocol

import structlog

from pipeline.errors import PipelineError
from pipeline.jetstream import Delivery
from pipeline.poll import IDLE_HEARTBEAT_S, Poll
from subjects.streams import OWNER_PRIORITY, PEER_PRIORITY, ConsumerSpec

if TYPE_CHECKING:
    from pipeline.bus import Bus

RETRY_S_MIN: Final = 0.05
RETRY_S_MAX: Final = 1.0

log = structlog.get_logger()


class Others(Protocol):
    """Consumers of others, which are helped out where one's own leave slots free."""

    @property
    def aided(self) -> Sequence[ConsumerSpec]:
        """Those to look at when slots come free, before one's own of the same kind."""
        ...

    def start(self, on_delivery: Callable[[Delivery], None]) -> None: ...

    def set_idle(self, idle: bool) -> None:
        """Whether slots are free and nothing of one's own waits. Only meanwhile anything is handed over."""
        ...

    def resume(self) -> None:
        """The connection is new."""
        ...

    async def withdraw(self) -> None:
        """As `set_idle(False)`; when it returns, nothing is under way any more."""
        ...

    async def stop(self) -> None:
        """As `withdraw`, for ever."""
        ...


class Puller:
    """Hands the consumers' messages to `on_delivery`, at most `credit` before `add_credit` gives more."""

    def __init__(
        self,
        bus: "Bus",
        consumers: Sequence[ConsumerSpec],
        on_delivery: Callable[[Delivery], None],
        *,
        credit: int,
        priority: int = OWNER_PRIORITY,
        others: Others | None = None,
    ) -> None:
        """`priority` is that of the pull requests, where a consumer has a priority group."""
        self._bus, self._on_delivery, self._credit, self._others = bus, on_delivery, credit, others
        self._polls = tuple(
            Poll(bus, consumer, self._take, self._hear_status, priority=priority) for consumer in consumers
        )
        self._name = ",".join(consumer.name for consumer in consumers)
        owned = (poll for poll in self._polls if poll.consumer.priority_group)
        self._owned = next(owned, self._polls[0])  # what it leaves, others take: it is asked for most
        self._busiest = self._owned
        self._listens = len(self._polls) == 1
        self._started = self._renew_due = False
        self._retry_s = RETRY_S_MIN
        self._wake = asyncio.Event()
        self._stopped = self._paused = False
        self._task: asyncio.Task[None] | None = None

    @property
    def credit(self) -> int:
        """Free slots."""
        return self._credit

    async def start(self) -> None:
        """Make the consumers if need be and ask for the first messages; none is handed over before it returns."""
        await self._renew()
        self._task = asyncio.create_task(self._run(), name=f"pull.{self._name}")
        if self._others is not None:
            self._others.start(lambda delivery: self._take(None, delivery))
        if self._listens:
            await self._top_up()
        else:
            self._wake.set()

    def add_credit(self, n: int = 1) -> None:
        """`n` more slots are free."""
        self._credit += n
        if self._due():
            self._wake.set()

    def resume(self) -> None:
        """The connection is new: ask again for everything that was asked on the old one."""
        self._renew_due = True
        self._retry_s = RETRY_S_MIN
        for poll in self._polls:
            poll.break_off()
        if self._others is not None:
            self._others.resume()
        self._wake.set()

    async def pause(self) -> None:
        """Take back what is asked for, until `unpause`; one that is under way goes back to the broker at once."""
        self._paused = True
        for poll in self._polls:
            poll.break_off()
        withdrawn = [poll.withdraw() for poll in self._polls]
        await asyncio.gather(*withdrawn, *([self._others.withdraw()] if self._others is not None else []))

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
        withdrawn = [poll.withdraw() for poll in self._polls]
        await asyncio.gather(*withdrawn, *([self._others.stop()] if self._others is not None else []))

    async def _run(self) -> None:
        while True:
            try:
                async with asyncio.timeout(IDLE_HEARTBEAT_S):
                    await self._wake.wait()
            except TimeoutError:
                self._renew_due |= any(poll.silent for poll in self._polls)
            self._wake.clear()
            if self._paused or not self._bus.connected:
                continue
            try:
                if self._renew_due:
                    await self._renew()
                await self._top_up()
                self._tell_others()
            except PipelineError as error:
                log.warning("pull_failed", consumer=self._name, code=error.code, reason=str(error))
                self._renew_due = True
                await self._back_off()

    async def _back_off(self) -> None:
        """Wait longer each time, until the broker is heard of again."""
        await asyncio.sleep(self._retry_s)
        self._retry_s = min(2 * self._retry_s, RETRY_S_MAX)
        self._wake.set()

    async def _renew(self) -> None:
        """Start afresh on new inboxes. Raises ProvisionError, BusUnavailable."""
        if self._started:
            await asyncio.sleep(0 if self._retry_s == RETRY_S_MIN else self._retry_s)
        self._started = True
        for poll in self._polls:
            poll.give_up()
            await self._bus.ensure_consumer(poll.consumer)
        self._listens = len(self._polls) == 1
        self._renew_due = False

    async def _top_up(self) -> None:
        """Have the free slots asked for. Raises BusUnavailable."""
        while self._asks() and self._due():
            if self._listens and not self._too_much():
                for poll in self._polls:
                    if (short := self._short_by(poll)) and self._asks():
                        await poll.ask(short)
                continue
            self._listens = False
            await asyncio.gather(*(poll.withdraw() for poll in self._polls if poll.asked > 0))
            await self._look()
            self._listens = self._credit > 0

    async def _look(self) -> None:
        """Take what waits now, of the first consumer before of the next; from the first again when slots came free."""
        at, polls = 0, self._polls if self._others is None else self._with_aided(self._others.aided)
        try:
            while at < len(polls) and self._credit > 0 and self._asks():
                at = 0 if await polls[at].take(self._credit) else at + 1
        finally:
            for poll in set(polls) - set(self._polls):
                poll.give_up()

    def _with_aided(self, consumers: Sequence[ConsumerSpec]) -> tuple[Poll, ...]:
        """One's own polls, and before the one that has an owner those of others whose owner takes nothing."""
        aided = (
            Poll(self._bus, consumer, self._take, lambda _: None, priority=PEER_PRIORITY) for consumer in consumers
        )
        at = self._polls.index(self._owned)
        return (*self._polls[:at], *aided, *self._polls[at:])

    def _tell_others(self) -> None:
        if self._others is not None:
            self._others.set_idle(self._listens and self._credit > 0 and self._asks())

    def _asks(self) -> bool:
        """Whether anything may be asked for now."""
        return not (self._stopped or self._paused or self._renew_due)

    def _due(self) -> bool:
        """Whether there is something to ask for, or to withdraw."""
        if self._credit <= 0:
            return any(poll.asked > 0 for poll in self._polls)
        return not self._listens or any(self._short_by(poll) for poll in self._polls)

    def _short_by(self, poll: Poll) -> int:
        """How much more to ask for: 0 while at least half of its share of the free slots is asked for."""
        if self._credit <= 0:
            return 0
        share = 1 if poll is not self._busiest else max(1, self._credit - len(self._polls) + 1)
        return share - poll.asked if poll.asked <= 0 or 2 * poll.asked <= share else 0

    def _too_much(self) -> bool:
        """Whether more would be asked for than the free slots and one for each consumer but one."""
        asked = sum(poll.asked + self._short_by(poll) for poll in self._polls)
        return self._listens and asked > self._credit + len(self._polls) - 1

    def _take(self, poll: Poll | None, delivery: Delivery) -> None:
        """`poll`: one's own or an aided one; None where the others' own requests brought it."""
        if self._stopped or self._paused or self._credit <= 0:
            self._bus.spawn(self._bus.nak(delivery))
            return
        self._retry_s = RETRY_S_MIN
        self._credit -= 1
        self._listens &= self._credit > 0 or len(self._polls) == 1
        if poll in self._polls and delivery.pending and poll.asked <= 0:
            self._busiest = poll
        if self._credit <= 0 and self._others is not None:
            self._others.set_idle(False)
        try:
            self._on_delivery(delivery)
        except Exception:  # the outermost guard of a callback: the message goes to another attempt
            log.exception("delivery_refused", subject=delivery.subject, stream_seq=delivery.stream_seq)
            self._credit += 1
            self._bus.spawn(self._bus.nak(delivery, delay_s=RETRY_S_MAX))
        if self._due():
            self._wake.set()

    def _hear_status(self, ended_by_broker: bool) -> None:
        """Where the broker ended the requests for a reason of its own, begin anew, with a pause."""
        if ended_by_broker:
            self._renew_due = True
            self._retry_s = min(2 * self._retry_s, RETRY_S_MAX)
        else:
            self._retry_s = RETRY_S_MIN
        if self._renew_due or self._due():
            self._wake.set()
