"""The ownership protocol: hypothesis drives workers, broker, network and clock through any interleaving of steps.

Leases and their renewal, the fence, message ids, and the progress of owners and of the reader are the real ones. The
broker, the connections and the clock are models, and a worker is a coroutine that is resumed one step at a time: not to
resume it is to freeze it, to drop it is to kill it.
"""

import random
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from pipeline import fence as fence_module
from pipeline import lease as lease_module
from pipeline.errors import BrokerRefused, BusUnavailable
from pipeline.expiry import end_expired
from pipeline.fence import BrokerAge, Fence
from pipeline.follow import Output
from pipeline.jetstream import WRONG_LAST_SEQ, Delivery, Stored, StoredMessage, StreamState
from pipeline.lease import Lease, LeaseKeeper, LeaseLost
from pipeline.progress import History
from pipeline.stage import Emit, emit_frame
from subjects import names
from subjects.codec import TokenIds, decode
from subjects.headers import EXPECTED_LAST_SEQ
from subjects.limits import LEASE_S
from subjects.messages import Frame, PreprocessedRequest, StopConditions

WORKERS, CHOICES, TOKENS = 3, 2, 3
FORGOTTEN_S = 0.1
"""Deliveries, and removals, this young are not on a killed broker's disk."""
TASK = b"the task"
REQUEST = PreprocessedRequest(
    request_id="r",
    client="c",
    model="m",
    token_ids=TokenIds.of([1]),
    stop=StopConditions(max_tokens=TOKENS),
    choices=CHOICES,
)


def drawn(worker: int, choice: int, before: list[int]) -> int:
    """A token as a sampling engine draws it: another one for each worker and history."""
    return random.Random(f"{worker} {choice} {before}").randrange(3, 1_000_000)


class Pause:
    """Awaited where a process may be stopped between two steps."""

    def __await__(self):
        yield


@dataclass
class Sent:
    """A message on its way to the broker."""

    sent_s: float
    kind: str  # "publish", "ack", "nak"
    payload: bytes = b""
    msg_id: str | None = None
    owner_seq: int | None = None  # the owner that a terminal frame names
    answer: int | None = None  # the sequence number, once stored; minus the error number


class Broker:
    """One task in a work queue with `ack_wait`, and the log of frames with its message ids, both on disk."""

    def __init__(self, clock: SimpleNamespace) -> None:
        self._clock = clock
        self.born_s, self.stored_s = clock.now_s - 2, clock.now_s - 1
        self.has_task, self.removed_s = True, 0.0
        self.deliveries = self.serial = 0
        self.held_until_s: float | None = None
        self.recent: list[float] = []  # when the deliveries were made that may be forgotten
        self.log: list[Frame] = []
        self.owner_seq, self.owner_word = 0, b""
        self.ids: set[str] = set()

    @property
    def available(self) -> bool:
        return self.has_task and (self.held_until_s is None or self.held_until_s <= self._clock.now_s)

    def deliver(self) -> Delivery:
        self.deliveries, self.serial = self.deliveries + 1, self.serial + 1
        self.held_until_s = self._clock.now_s + LEASE_S
        self.recent.append(self._clock.now_s)
        return Delivery(
            payload=TASK,
            headers=None,
            subject="work",
            stream="WORK",
            stream_seq=1,
            consumer_seq=self.serial,
            attempt=self.deliveries,
            pending=0,
            stored_unix_s=self.stored_s,
            ack_subject=f"ack.{self.serial}",
        )

    def in_progress(self) -> None:
        """Not fenced: whoever says so, of whichever delivery."""
        if self.held_until_s is not None:
            self.held_until_s = self._clock.now_s + LEASE_S

    def remove(self) -> None:
        if self.has_task:
            self.has_task, self.removed_s, self.held_until_s = False, self._clock.now_s, None

    def restart(self) -> None:
        """After a kill -9: the last moment's deliveries and removals never were."""
        from_s = self._clock.now_s - FORGOTTEN_S
        forgotten = sum(at_s > from_s for at_s in self.recent)
        if forgotten:
            self.deliveries -= forgotten
            self.held_until_s = None
        if not self.has_task and self.removed_s > from_s:
            self.has_task = True
        self.recent.clear()
        self.born_s = self._clock.now_s

    def store(self, sent: Sent) -> None:
        """Keep the message, unless it is a duplicate or an earlier owner's."""
        if sent.owner_seq is not None and sent.owner_seq != self.owner_seq:
            sent.answer = -WRONG_LAST_SEQ
        elif sent.kind == "own":
            self.serial += 1
            self.owner_seq = sent.answer = self.serial
            self.owner_word = sent.payload
        else:
            sent.answer = 1
            if sent.msg_id is None or sent.msg_id not in self.ids:
                self.ids |= {sent.msg_id} - {None}
                self.log.append(decode(Frame, sent.payload))


class Link:
    """A worker's connection: what the fence and the lease keeper need of a `Bus`."""

    def __init__(self, world: "Ownership") -> None:
        self._world, self._clock = world, world.clock
        self.name = "worker"
        self.epoch, self.connected = 1, True
        self.losses_s: list[float] = []
        self.wire: deque[Sent] = deque()
        self.lease: Lease | None = None  # of the task that is worked on now
        self.sweeps = False  # a sweeper's: it needs no lease

    def lose(self) -> None:
        self.wire.clear()
        if self.connected:
            self.connected = False
            self.epoch += 1
            self.losses_s.append(self._clock.now_s)

    def reconnect(self) -> None:
        if not self.connected:
            self.connected = True
            self.epoch += 1

    def first_loss_after(self, moment_s: float) -> float | None:
        return next((loss_s for loss_s in self.losses_s if loss_s >= moment_s), None)

    async def until_connected(self) -> None:
        while not self.connected:
            await Pause()

    async def until_connected_for(self, seconds: float) -> None:
        until_s = self._clock.now_s + seconds
        while not self.connected or self._clock.now_s < until_s:
            await Pause()

    async def publish(self, subject: str, payload: bytes, *, headers: Any = None) -> None:
        self._send("publish", payload)
        await Pause()

    async def publish_durable(
        self,
        subject: str,
        payload: bytes,
        *,
        before: Callable[[], Awaitable[None]] | None = None,
        msg_id: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> Stored:
        kind = "own" if names.OWNERS.parse(subject) else "publish"
        owner_seq = (headers or {}).get(EXPECTED_LAST_SEQ)
        while True:
            await self.until_connected()
            if before is not None:
                await before()
            if not self.connected:
                continue
            sent, epoch = self._send(kind, payload, msg_id and self._world.msg_id(msg_id)), self.epoch
            if owner_seq is not None and self._world.owners:
                sent.owner_seq = int(owner_seq)
            while sent.answer is None and epoch == self.epoch:
                await Pause()
            if epoch != self.epoch:
                continue  # stored or not, its confirmation is lost
            assert sent.answer is not None
            if sent.answer < 0:
                raise BrokerRefused("wrong last sequence", error_number=-sent.answer)
            return Stored("RESPONSES", sent.answer)

    async def last(self, stream: str, subject: str) -> StoredMessage | None:
        await Pause()
        await self.until_connected()
        broker = self._world.broker
        return StoredMessage(subject, broker.owner_word, None, broker.owner_seq) if broker.owner_seq else None

    async def ack(self, delivery: Delivery, *, before: Callable[[], Awaitable[None]]) -> None:
        """It is not sent again: then the task is redelivered."""
        await self.until_connected()
        await before()
        self._settle("ack")

    async def nak(self, delivery: Delivery, delay_s: float) -> None:
        self._settle("nak")

    def _settle(self, kind: str) -> None:
        self._check()
        if self.connected:
            self.wire.append(Sent(self._clock.now_s, kind))

    async def in_progress(self, ack_subject: str) -> None:
        await Pause()
        if self.connected:
            self._world.broker.in_progress()

    async def flush(self, timeout_s: float) -> None:
        epoch = self.epoch
        await Pause()
        if not self.connected or epoch != self.epoch:
            raise BusUnavailable("no answer")

    async def ensure_bucket(self, spec: Any) -> None:
        await self.until_connected()

    async def stream_state(self, name: str) -> StreamState:
        await Pause()
        await self.until_connected()
        return StreamState(0, 0, 0, 0, 0, created_unix_s=self._world.broker.born_s)

    async def stored_at(self, stream: str, seq: int) -> StoredMessage | None:
        await Pause()
        await self.until_connected()
        there = stream == "RESPONSES" or self._world.broker.has_task
        return StoredMessage("work", TASK, None, seq) if there else None

    def _send(self, kind: str, payload: bytes, msg_id: str | None = None) -> Sent:
        self._check()
        sent = Sent(self._clock.now_s, kind, payload, msg_id)
        if self.connected:
            self.wire.append(sent)
        return sent

    def _check(self) -> None:
        """Nothing leaves a worker whose lease has ended: by the true clock, whatever the worker thinks."""
        if self.sweeps:
            return
        assert self.lease is not None
        assert self._clock.now_s < self.lease.expires_s, "a worker spoke for a task after its lease had ended"


@dataclass
class Worker:
    """A process: its connection, its leases, and the task that it works on, if any."""

    number: int
    link: Link
    keeper: LeaseKeeper = field(init=False)
    age: BrokerAge = field(init=False)
    fence: Fence | None = None
    work: Any = None
    renewal: Any = None

    def __post_init__(self) -> None:
        self.keeper = LeaseKeeper("nats://nowhere", f"w{self.number}")
        self.age = BrokerAge(self.link)  # type: ignore[arg-type]

    def step(self) -> None:
        """Resume the work until its next pause."""
        try:
            self.work.send(None)
        except (StopIteration, LeaseLost):
            self.leave()
        except BaseException:  # a broken promise: it is to be told, not that its work cannot be resumed
            self.leave()
            raise

    def renew(self) -> None:
        """Begin a renewal of the leases, or resume it."""
        self.renewal = self.renewal or self.keeper._renew(self.link)  # type: ignore[arg-type]
        try:
            self.renewal.send(None)
        except StopIteration:
            self.renewal = None

    def leave(self) -> None:
        """Work on nothing any more."""
        if self.work is not None:
            self.work.close()
        if self.link.lease is not None:
            self.keeper.release(self.link.lease)
        self.work = self.fence = self.link.lease = None


class Sweeper:
    """A preprocess worker that finds the request expired; the workers' clocks are behind, so they go on with it."""

    def __init__(self, world: "Ownership") -> None:
        self._world, self.link, self.work = world, Link(world), None
        self.link.sweeps = True

    async def _sweep(self) -> None:
        if self._world.broker.has_task:
            await end_expired(self.link, self, REQUEST)  # type: ignore[arg-type]
            self._world.broker.remove()

    async def history(self, request: PreprocessedRequest) -> History:
        return await self._world.read_log(self.link)

    def step(self) -> None:
        """Begin a sweep, or resume it until its next pause."""
        self.work = self.work or self._sweep()
        try:
            self.work.send(None)
        except (StopIteration, LeaseLost):
            self.work = None

    def leave(self) -> None:
        if self.work is not None:
            self.work.close()
        self.work = None


class Reader:
    """A client: live frames while it is connected, and the log after a gap or an outage, as `pipeline.follow` does."""

    def __init__(self, world: "Ownership") -> None:
        self._world = world
        self.connected = True
        self.output = Output(CHOICES)
        self.tokens: dict[int, list[int]] = {choice: [] for choice in range(CHOICES)}
        self.ends: Counter[int] = Counter()
        self.expired: set[int] = set()  # choices that a sweeper ended

    def hear(self, frame: Frame) -> None:
        if self.connected:
            if self.output.new_owner(frame) or self.output.missing(frame):
                self.catch_up()
            assert not self.output.missing(frame), f"the log does not have what is before {frame}"
            self._take(frame)

    def catch_up(self) -> None:
        for frame in self._world.broker.log:
            assert not self.output.missing(frame), f"the log has a gap before {frame}"
            self._take(frame)

    def _take(self, frame: Frame) -> None:
        new = self.output.add(frame)
        if new is None:
            return
        tokens = self.tokens[new.choice]
        for place, token in enumerate(new.token_ids, start=new.index):
            assert place == len(tokens), f"token {place} after {len(tokens)}"
            assert self._world.fits(token, new.choice, tokens), f"token {place} does not follow from those before it"
            tokens.append(token)
        self.ends[new.choice] += new.finish_reason is not None
        self.expired |= {new.choice} if new.error else set()


class Ownership(RuleBasedStateMachine):
    """Frames, ends and acks take as long as they like, or are lost with their connection."""

    lease_clock = True
    terminal_msg_ids = True
    owners = True

    def __init__(self) -> None:
        super().__init__()
        self.clock = SimpleNamespace(now_s=100.0)
        self.clock.monotonic = lambda: self.clock.now_s
        self._patches = ExitStack()
        for module in (lease_module, fence_module):
            self._patches.enter_context(patch.object(module, "time", self.clock))
        if not self.lease_clock:
            self._patches.enter_context(patch.object(Lease, "valid", property(lambda lease: True)))
        self.broker = Broker(self.clock)
        self.reader = Reader(self)
        self.workers = [Worker(number, Link(self)) for number in range(WORKERS)]
        self.sweepers = [Sweeper(self) for _ in range(2)]
        self.orphans: list[Link] = []  # connections of killed workers, with what was on its way
        self._unique = 0

    # --- what the models ask -----------------------------------------------------------------------

    def msg_id(self, msg_id: str) -> str:
        if self.terminal_msg_ids:
            return msg_id
        self._unique += 1
        return f"{msg_id}.{self._unique}"

    def fits(self, token: int, choice: int, before: list[int]) -> bool:
        return token in {drawn(worker, choice, before) for worker in range(WORKERS)}

    async def read_log(self, link: Link) -> History:
        await Pause()
        await link.until_connected()
        history = History()
        for frame in self.broker.log:
            history.of(frame.choice).add(frame)
        return history

    # --- a worker's steps --------------------------------------------------------------------------

    async def _work(self, worker: Worker, fence: Fence) -> None:
        """What `pipeline.runner` and `stages.decode` do, in their order."""
        attempt = await fence.attempt()
        attempt = await fence.own(REQUEST, attempt)
        history = await self.read_log(worker.link) if attempt > 1 else History()
        left = [choice for choice in range(CHOICES) if not history.of(choice).end]
        tokens = {choice: history.of(choice).token_ids.tolist() for choice in left}
        while left:
            for choice in list(left):
                emit = self._next(worker, attempt, choice, tokens[choice])
                await fence.publish(emit)
                await Pause()
                if emit.frame.finish_reason:
                    left.remove(choice)
        fence.check_lease()
        await fence.ack()

    def _next(self, worker: Worker, attempt: int, choice: int, tokens: list[int]) -> Emit:
        index = len(tokens)
        if index < TOKENS:
            tokens.append(drawn(worker.number, choice, tokens))
        frame = Frame(
            request_id="r",
            choice=choice,
            attempt=attempt,
            index=index,
            token_ids=TokenIds.of(tokens[index:]),
            finish_reason="length" if len(tokens) == TOKENS else None,
        )
        return emit_frame("c", "r", frame)

    @rule(
        number=st.integers(0, WORKERS - 1),
        steps=st.integers(1, 28),
        network=st.booleans(),
        then=st.sampled_from(["", "", "kill", "lose_connection", "lose_answers", "hand_over", "kill_broker", "freeze"]),
    )
    def work(self, number: int, steps: int, network: bool, then: str) -> None:
        """A worker takes the task if it can and goes on for some steps; then perhaps something happens to it."""
        worker = self.workers[number]
        if worker.work is None:
            self._take(worker)
        for _ in range(steps):
            if worker.work is not None:
                worker.step()
            if network:
                self._arrive(worker.link, 1)
        match then:
            case "kill":
                self.kill(number)
            case "lose_connection":
                self.lose_connection(number)
            case "lose_answers":
                self._arrive(worker.link, len(worker.link.wire))
                self.lose_connection(number)
            case "hand_over":
                self.hand_over(number)
            case "kill_broker":
                self.kill_broker()
            case "freeze":
                self.advance(LEASE_S)

    @rule(number=st.integers(0, WORKERS - 1))
    def take_again(self, number: int) -> None:
        """An older delivery of the task, if it is at the same worker, is superseded."""
        self._take(self.workers[number])

    def _take(self, worker: Worker) -> None:
        if not worker.link.connected or not self.broker.available:
            return
        worker.leave()
        delivery = self.broker.deliver()
        lease = worker.link.lease = worker.keeper.hold(delivery)
        worker.fence = Fence(worker.link, worker.age, delivery, lease)  # type: ignore[arg-type]
        worker.work = self._work(worker, worker.fence)

    @rule(number=st.integers(0, WORKERS - 1), steps=st.integers(1, 4))
    def renew(self, number: int, steps: int) -> None:
        for _ in range(steps):
            self.workers[number].renew()

    @rule(number=st.integers(0, WORKERS - 1))
    def hand_over(self, number: int) -> None:
        worker = self.workers[number]
        if worker.fence is not None:
            worker.work.close()
            worker.work = worker.fence.hand_over()

    @rule(number=st.integers(0, WORKERS - 1))
    def kill(self, number: int) -> None:
        """What it has sent may still arrive."""
        worker = self.workers[number]
        worker.leave()
        self.orphans.append(worker.link)
        self.workers[number] = Worker(number, Link(self))

    @rule(number=st.integers(0, 1), steps=st.integers(1, 12), then=st.sampled_from(["", "", "", "kill"]))
    def sweep(self, number: int, steps: int, then: str) -> None:
        """A sweeper comes by, or goes on."""
        sweeper = self.sweepers[number]
        for _ in range(steps):
            sweeper.step()
            self._arrive(sweeper.link, 1)
        if then == "kill":
            sweeper.leave()
            self.orphans.append(sweeper.link)
            self.sweepers[number] = Sweeper(self)

    # --- network, broker and clock -----------------------------------------------------------------

    @rule(number=st.integers(0, WORKERS - 1), count=st.integers(1, 8))
    def arrive(self, number: int, count: int) -> None:
        self._arrive(self.workers[number].link, count)

    @precondition(lambda self: self.orphans)
    @rule(count=st.integers(1, 8))
    def arrive_late(self, count: int) -> None:
        for link in self.orphans:
            self._arrive(link, count)

    def _arrive(self, link: Link, count: int) -> None:
        for _ in range(min(count, len(link.wire))):
            sent = link.wire.popleft()
            if sent.kind in ("publish", "own"):
                self.broker.store(sent)
                if sent.kind == "publish":  # live readers hear what the log refuses, too
                    self.reader.hear(decode(Frame, sent.payload))
            elif sent.kind == "ack":
                self.broker.remove()
            elif self.broker.held_until_s is not None:
                self.broker.held_until_s = self.clock.now_s

    @rule(number=st.integers(0, WORKERS - 1))
    def lose_connection(self, number: int) -> None:
        self.workers[number].link.lose()

    @rule(number=st.integers(0, WORKERS - 1))
    def reconnect(self, number: int) -> None:
        self.workers[number].link.reconnect()

    @rule()
    def kill_broker(self) -> None:
        for link in [one.link for one in (*self.workers, *self.sweepers)] + self.orphans:
            link.lose()
        self.orphans.clear()
        self.reader.connected = False
        self.broker.restart()

    @rule(connected=st.booleans())
    def reader_comes_or_goes(self, connected: bool) -> None:
        if connected and not self.reader.connected:
            self.reader.catch_up()
        self.reader.connected = connected

    @rule(seconds=st.sampled_from([0.02, 0.2, 1.0, 2.5, 6.0]))
    def advance(self, seconds: float) -> None:
        self.clock.now_s += seconds

    # --- what must hold ----------------------------------------------------------------------------

    @invariant()
    def at_most_one_end_is_in_the_log(self) -> None:
        ends = Counter(frame.choice for frame in self.broker.log if frame.finish_reason)
        assert all(count == 1 for count in ends.values()), f"terminal frames in the log: {ends}"

    def teardown(self) -> None:
        """Once nothing strikes any more the queue empties, and the reader has everything, once."""
        try:
            for _ in range(400):
                self._quiet_round()
                if not self.broker.has_task:
                    break
            assert not self.broker.has_task, "the task is left in the queue"
            self.reader.catch_up()
            self.at_most_one_end_is_in_the_log()
            whole = self.reader.tokens.keys() - self.reader.expired
            read = {choice: len(self.reader.tokens[choice]) for choice in whole}
            assert read == dict.fromkeys(whole, TOKENS), f"an ended choice is not whole: {read}"
            assert self.reader.ends == Counter(range(CHOICES))
        finally:
            for sweeper in self.sweepers:
                sweeper.leave()
            for worker in self.workers:
                worker.leave()
                if worker.renewal is not None:
                    worker.renewal.close()
            self._patches.close()

    def _quiet_round(self) -> None:
        for sweeper in self.sweepers:
            sweeper.link.reconnect()
            self._arrive(sweeper.link, len(sweeper.link.wire))
        for worker in self.workers:
            worker.link.reconnect()
            self.work(worker.number, 6, True, "")
            self._arrive(worker.link, len(worker.link.wire))
            self.renew(worker.number, 4)
        self.arrive_late(100)
        self.advance(0.2)


class WithoutLeaseClock(Ownership):
    lease_clock = False


class WithoutTerminalMsgIds(Ownership):
    terminal_msg_ids = False


class WithoutOwners(Ownership):
    owners = False


SETTINGS = settings(
    max_examples=200, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
)
SEARCH = settings(SETTINGS, max_examples=5_000, phases=[Phase.generate], derandomize=True, database=None)

TestOwnership = pytest.mark.timeout(240)(Ownership.TestCase)
TestOwnership.settings = SETTINGS


@pytest.mark.parametrize(
    ("broken", "found"),
    [
        (WithoutLeaseClock, "after its lease had ended"),
        (WithoutOwners, "does not follow|tokens? .* after|is left|is not whole"),
    ],
)
def test_it_finds_the_bug_when_a_part_is_taken_out(broken: type[Ownership], found: str) -> None:
    with pytest.raises(AssertionError, match=found):
        run_state_machine_as_test(broken, settings=SEARCH)


@pytest.mark.parametrize("machine", [Ownership, WithoutTerminalMsgIds])
def test_an_end_whose_answer_was_lost_is_sent_again_and_kept_once(machine: type[Ownership]) -> None:
    """The search finds this way once in some thousand examples, so it stands here; with message ids and without."""
    run = machine()
    try:
        run.work(0, 28, False, "lose_answers")
        run.reconnect(0)
        run.work(0, 28, True, "")
        if run.terminal_msg_ids:
            run.at_most_one_end_is_in_the_log()
        else:
            with pytest.raises(AssertionError, match="terminal frames in the log"):
                run.at_most_one_end_is_in_the_log()
                run.teardown()
    finally:
        run._patches.close()
