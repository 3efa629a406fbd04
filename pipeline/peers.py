"""Addressed work: offered to one worker first; the others of its role see to it that it never waits for that one.

Each decode and each prefill worker has a consumer of its own. JetStream serves the owner's pull requests there before
all others. A worker that has nothing else to do keeps a request for one message open at its peers' consumers, so that a
task whose worker has no free slot, is paused or dead goes to an idle one at once. Where all are busy, a worker whose
slot comes free looks at the consumers of those that take no work before it takes what is anyone's.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Final

import msgspec
import structlog

from pipeline import metrics
from pipeline.bus import Bus, Received, Subscription
from pipeline.errors import BrokerRefused, PipelineError
from pipeline.jetstream import NS, Delivery, delivery_of, is_delivery
from pipeline.poll import by_priority, pull_subject
from pipeline.presence import Presence
from pipeline.provision import provision_consumer
from subjects import names, streams
from subjects.messages import Role
from subjects.streams import PEER_PRIORITY, ConsumerSpec

PEERS_MAX: Final = 16
"""So many consumers of others a worker asks at a time; of more, others each time."""
SETTLE_S: Final = 0.02
"""A worker that has had a free slot for this long has nothing else to do."""
RENEW_S: Final = 10.0
"""Its requests at others' consumers are made again so often, which also finds those that a broker lost."""
EXPIRES_S: Final = 1.2 * RENEW_S
LOOK_S: Final = 2.0
"""Who has which consumer, and where something waits, is looked up so often."""
AIDED_MAX: Final = 4
"""So many consumers of workers that take no work are looked at when a slot comes free."""
GONE_S: Final = 60.0
"""A worker not heard of for this long is gone for good: its consumer is deleted once it is empty."""

log = structlog.get_logger()


async def addressed(bus: Bus, models: Iterable[str] | None = None, role: str | None = None) -> list[ConsumerSpec]:
    """The workers' own consumers that there are, of some models or all, of one role or both.

    Raises BusUnavailable, BrokerRefused.
    """
    return _addressed(await bus.consumer_names(streams.WORK.name), models, role)


async def all_consumers(bus: Bus, models: Iterable[str]) -> list[ConsumerSpec]:
    """Every consumer that there is of a pipeline that serves these models. Raises as `addressed`."""
    served, there = tuple(models), await bus.consumer_names(streams.WORK.name)
    shared = (spec for spec in streams.all_consumers(served) if spec.stream != streams.WORK.name or spec.name in there)
    return [*shared, *_addressed(there, served)]


def _addressed(there: Iterable[str], models: Iterable[str] | None, role: str | None = None) -> list[ConsumerSpec]:
    wanted = None if models is None else {names.token(model) for model in models}
    found = (streams.whose_consumer(name) for name in there)
    return [
        streams.own_consumer(*whose)
        for whose in sorted(filter(None, found))
        if role in (None, whose[0]) and (wanted is None or whose[1] in wanted)
    ]


class Peers:
    """The other workers of a model and a role, as one of them sees and helps them."""

    def __init__(self, bus: Bus, presence: Presence, role: Role, model: str, worker: str) -> None:
        self._bus, self._presence, self._role = bus, presence, role
        self._tasks_for = names.ADDRESSED[role]
        self._model, self._worker = names.token(model), names.token(worker)
        self._consumers: dict[str, ConsumerSpec] = {}  # by worker
        self._urgent: tuple[str, ...] = ()  # workers that take no work, with tasks in the stream
        self._missing_since_s: dict[str, float] = {}
        self._epoch = -1
        self._idle, self._stale = asyncio.Event(), asyncio.Event()
        self._subscription: Subscription | None = None
        self._asked: tuple[ConsumerSpec, ...] = ()
        self._on_delivery: Callable[[Delivery], None] = lambda _: None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def aided(self) -> Sequence[ConsumerSpec]:
        """Consumers with tasks whose workers take none now, to be looked at before what is anyone's."""
        return [self._consumers[worker] for worker in self._urgent if worker in self._consumers]

    def start(self, on_delivery: Callable[[Delivery], None]) -> None:
        """Look who is there from now on, and hand over what is taken of them; nothing is while not `set_idle`."""
        self._on_delivery = on_delivery
        self._tasks = [
            asyncio.create_task(self._look_on(), name="peers.look"),
            asyncio.create_task(self._help(), name="peers.help"),
        ]

    def set_idle(self, idle: bool) -> None:
        """Whether there is a free slot and nothing of one's own to take."""
        if idle:
            self._idle.set()
        elif self._idle.is_set():
            self._idle.clear()
            self._stale.set()

    def resume(self) -> None:
        """The connection is new: ask again."""
        self._stale.set()

    async def withdraw(self) -> None:
        """Ask for nothing; when it returns, nothing is under way any more."""
        self.set_idle(False)
        await self._close()

    async def stop(self) -> None:
        """As `withdraw`, for ever."""
        for task in self._tasks:
            task.cancel()
        await self.withdraw()

    # --- to ask at others' consumers ----------------------------------------------------------------------

    async def _help(self) -> None:
        while True:
            await self._idle.wait()
            await asyncio.sleep(SETTLE_S)
            if not self._idle.is_set():
                continue
            self._stale.clear()
            try:
                async with self._asking():
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(RENEW_S):
                            await self._stale.wait()
            except PipelineError as error:
                log.info("peers_not_asked", code=error.code, reason=str(error))
                await asyncio.sleep(LOOK_S)
            except Exception:  # the outermost guard: the worker's own work goes on, and the next time may succeed
                log.exception("peers_not_asked", code="internal")
                await asyncio.sleep(LOOK_S)

    @contextlib.asynccontextmanager
    async def _asking(self) -> AsyncIterator[None]:
        """While it lasts, one message is asked for of each of some peers. Raises BusUnavailable."""
        self._asked = self._chosen()
        inbox = self._bus.new_inbox()
        if self._asked:
            self._subscription = await self._bus.subscribe(f"{inbox}.*", self._hear)
        try:
            for number in range(len(self._asked)):
                await self._ask(inbox, number)
            yield
        finally:
            await self._close()

    def _chosen(self) -> tuple[ConsumerSpec, ...]:
        """Those that are in need first, then others by chance."""
        others = [worker for worker in self._consumers if worker not in self._urgent]
        random.shuffle(others)
        return tuple(self._consumers[worker] for worker in [*self._urgent, *others][:PEERS_MAX])

    async def _ask(self, inbox: str, number: int) -> None:
        consumer = self._asked[number]
        how = {"batch": 1, "expires": int(EXPIRES_S * NS)} | by_priority(consumer, PEER_PRIORITY)
        await self._bus.publish(pull_subject(consumer), msgspec.json.encode(how), reply=f"{inbox}.{number}")

    def _hear(self, received: Received) -> None:
        """A message, after which one more of its consumer's is asked for. The broker's own words need no answer."""
        if not is_delivery(received.reply):
            return
        delivery = delivery_of(received)
        metrics.TAKEN_OVER.inc()
        self._on_delivery(delivery)
        parts = self._tasks_for.parse(delivery.subject)
        consumer = self._consumers.get(parts["worker"]) if parts else None
        if self._subscription is not None and self._idle.is_set() and consumer in self._asked:
            inbox = self._subscription.subject.removesuffix(".*")
            self._bus.spawn(self._ask(inbox, self._asked.index(consumer)))

    async def _close(self) -> None:
        """The broker ends requests whose inbox nobody listens on."""
        old, self._subscription = self._subscription, None
        if old is not None:
            await old.drain()

    # --- to know them --------------------------------------------------------------------------------------

    async def _look_on(self) -> None:
        while True:
            try:
                await self._look()
            except PipelineError as error:
                log.info("peers_unseen", code=error.code, reason=str(error))
            except Exception:  # the outermost guard, as above
                log.exception("peers_unseen", code="internal")
            await asyncio.sleep(LOOK_S * random.uniform(0.5, 1.0))  # so that workers do not go in step

    async def _look(self) -> None:
        """See who has a consumer, who needs help, and who is gone for good. Raises BusUnavailable, BrokerRefused."""
        consumers = {consumer.name: consumer for consumer in await addressed(self._bus, [self._model], self._role)}
        counts = await self._bus.subjects_state(streams.WORK.name, self._tasks_for.any(model=self._model))
        waiting = {parts["worker"] for subject in counts if (parts := self._tasks_for.parse(subject))}
        for worker in waiting:
            consumer = streams.own_consumer(self._role, self._model, worker)
            if consumer.name not in consumers:  # it was deleted by hand, or with a store that came back
                await provision_consumer(self._bus, consumer)
                consumers[consumer.name] = consumer
        mine = streams.own_consumer(self._role, self._model, self._worker).name
        peers = {streams.whose_consumer(name)[2]: consumer for name, consumer in consumers.items() if name != mine}
        taking = {state.worker for state in self._presence.workers(self._role, self._model) if state.ready}
        urgent = sorted(worker for worker in waiting & peers.keys() if worker not in taking)[:AIDED_MAX]
        if peers.keys() != self._consumers.keys() or not set(urgent) <= {*self._urgent}:
            self._stale.set()
        self._consumers, self._urgent = peers, tuple(urgent)
        await self._remove_gone(peers.keys() - waiting)

    async def _remove_gone(self, empty: Iterable[str]) -> None:
        """Delete the empty consumers of workers that have not been heard of for long. Raises BusUnavailable."""
        now_s = time.monotonic()
        if self._epoch != self._bus.epoch:  # nobody is judged by an outage
            self._epoch, self._missing_since_s = self._bus.epoch, {}
        heard = {names.token(state.worker) for state in self._presence.workers(self._role, self._model)}
        missing = [worker for worker in empty if worker not in heard]
        self._missing_since_s = {worker: self._missing_since_s.get(worker, now_s) for worker in missing}
        for worker, since_s in self._missing_since_s.items():
            if now_s - since_s < GONE_S:
                continue
            name = self._consumers.pop(worker).name
            with contextlib.suppress(BrokerRefused):  # another one was here first
                state = await self._bus.consumer_state(streams.WORK.name, name)
                if not state.pending and not state.ack_pending:
                    await self._bus.api(f"CONSUMER.DELETE.{streams.WORK.name}.{name}")
                    log.info("consumer_of_gone_worker_deleted", worker=worker, model=self._model)
