"""The runner's table of outcomes, row by row, against a real nats-server."""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from pipeline import runner as runner_module
from pipeline.bus import Bus, Received
from pipeline.cancel import Cancellations
from pipeline.errors import EngineFailed, Overloaded
from pipeline.lease import LeaseKeeper
from pipeline.runner import Runner
from pipeline.stage import Emit, Stage, Task, emit_frame, end_with_error, stage
from subjects import names, streams
from subjects.codec import TokenIds, decode, encode
from subjects.limits import ATTEMPTS_MAX, FAILURES_MAX
from subjects.messages import Cancel, DeadLetter, Frame, PreprocessedRequest, StopConditions

MODEL = "m"
WAIT_S = 10.0


def answer(task, error):
    return [end_with_error(task.payload, 0, error, task.attempt)]


def frame(task: Task[PreprocessedRequest], index: int, last: bool) -> Emit:
    request = task.payload
    body = Frame(
        request_id=request.request_id,
        attempt=task.attempt,
        index=index,
        token_ids=TokenIds.of([index]),
        text=f" {index}",
        finish_reason="stop" if last else None,
    )
    return emit_frame(request.client, request.request_id, body)


class Scene:
    """A runner over a real broker, a way to give it requests, and the frames that came back."""

    def __init__(self, bus: Bus, leases: LeaseKeeper) -> None:
        self.bus, self.leases = bus, leases
        self.frames: asyncio.Queue[Frame] = asyncio.Queue()
        self.runners: list[Runner] = []

    async def start(self) -> None:
        await self.bus.provision(streams.STREAMS, streams.CONSUMERS, streams.BUCKETS)
        await self.bus.ensure_consumer(streams.decode_any(MODEL))
        self.cancellations = Cancellations(self.bus)
        await self.cancellations.start()
        await self.bus.subscribe(names.RESPONSES.any(), self._hear)
        await self.bus.flush(timeout_s=WAIT_S)

    def _hear(self, received: Received) -> None:
        self.frames.put_nowait(decode(Frame, received.payload))

    async def run(self, a_stage: Stage, slots: int = 4) -> Runner:
        made = Runner(self.bus, self.leases, self.cancellations, a_stage)
        await made.pull(streams.decode_any(MODEL), slots=slots)
        self.runners.append(made)
        return made

    async def ask(self, request_id: str = "r1", **fields) -> None:
        request = PreprocessedRequest(
            request_id=request_id,
            client="c",
            model=MODEL,
            token_ids=TokenIds.of([1, 2]),
            stop=StopConditions(max_tokens=8),
            **fields,
        )
        await self.bus.publish_durable(names.DECODE_ANY.of(model=MODEL), encode(request), msg_id=request_id)

    async def next_frame(self) -> Frame:
        """The next one that says something: a later owner's first word holds nothing."""
        async with asyncio.timeout(WAIT_S):
            while not ((frame := await self.frames.get()).token_ids or frame.finish_reason):
                pass
        return frame

    async def settled(self) -> None:
        """Wait until the queue holds nothing."""
        async with asyncio.timeout(WAIT_S):
            while (await self.bus.stream_state("WORK")).messages:
                await self.bus.flush(timeout_s=WAIT_S)


@pytest.fixture
async def scene(nats_server):
    bus = await Bus.connect(nats_server.url, name="test")
    leases = LeaseKeeper(nats_server.url, "test")
    await leases.start()
    made = Scene(bus, leases)
    await made.start()
    yield made
    for each in made.runners:
        await each.drain(timeout_s=0)
    await leases.close()
    await bus.close()


async def test_a_finished_task_is_acked_after_its_frames(scene):
    @stage(name="decode", takes=PreprocessedRequest, answer=answer)
    async def two_frames(task) -> AsyncIterator[Emit]:
        yield frame(task, 0, last=False)
        yield frame(task, 1, last=True)

    await scene.run(two_frames)
    await scene.ask()
    assert [(await scene.next_frame()).finish_reason for _ in range(2)] == [None, "stop"]
    await scene.settled()
    assert (await scene.bus.stream_state("RESPONSES")).messages == 2


async def test_a_permanent_error_is_answered_and_not_retried(scene):
    @stage(name="decode", takes=PreprocessedRequest, answer=answer)
    async def broken(task) -> AsyncIterator[Emit]:
        raise EngineFailed("the engine broke on it")
        yield

    await scene.run(broken)
    await scene.ask()
    end = await scene.next_frame()
    assert (end.finish_reason, end.error.code, end.attempt) == ("error", "engine_failed", 1)
    await scene.settled()


async def test_a_transient_error_is_retried_as_a_new_attempt(scene):
    @stage(name="decode", takes=PreprocessedRequest, answer=answer)
    async def busy_once(task) -> AsyncIterator[Emit]:
        if task.attempt == 1:
            raise Overloaded("later", retry_after_s=0.1)
        yield frame(task, 0, last=True)

    await scene.run(busy_once)
    await scene.ask()
    end = await scene.next_frame()
    assert (end.finish_reason, end.attempt) == ("stop", 2)
    await scene.settled()


async def test_a_task_that_always_fails_is_dead_lettered_and_answered(scene, monkeypatch):
    monkeypatch.setattr(runner_module, "RETRY_S", 0.01)

    @stage(name="decode", takes=PreprocessedRequest, answer=answer)
    async def bug(task) -> AsyncIterator[Emit]:
        raise ZeroDivisionError("a bug")
        yield

    letters: asyncio.Queue[DeadLetter] = asyncio.Queue()
    await scene.bus.subscribe(names.DEAD.any(), lambda got: letters.put_nowait(decode(DeadLetter, got.payload)))
    await scene.run(bug)
    await scene.ask()
    end = await scene.next_frame()
    assert (end.finish_reason, end.error.code, end.attempt) == ("error", "attempts_exhausted", FAILURES_MAX)
    assert "a bug" in end.error.message
    letter = await asyncio.wait_for(letters.get(), WAIT_S)
    assert (letter.stage, letter.request_id, letter.attempts) == ("decode", "r1", FAILURES_MAX)
    assert decode(PreprocessedRequest, letter.payload).request_id == "r1"
    await scene.settled()


async def test_what_may_pass_is_tried_more_often_than_what_breaks_workers(scene):
    @stage(name="decode", takes=PreprocessedRequest, answer=answer)
    async def busy(task) -> AsyncIterator[Emit]:
        raise Overloaded("later", retry_after_s=0.01)
        yield

    await scene.run(busy)
    await scene.ask()
    end = await scene.next_frame()
    assert (end.finish_reason, end.error.code, end.attempt) == ("error", "overloaded", ATTEMPTS_MAX)
    await scene.settled()


async def test_a_payload_that_is_no_task_is_dead_lettered_at_once(scene):
    @stage(name="decode", takes=PreprocessedRequest, answer=answer)
    async def never(task) -> AsyncIterator[Emit]:
        raise AssertionError("the stage must not see it")
        yield

    letters: asyncio.Queue[DeadLetter] = asyncio.Queue()
    await scene.bus.subscribe(names.DEAD.any(), lambda got: letters.put_nowait(decode(DeadLetter, got.payload)))
    await scene.run(never)
    await scene.bus.publish_durable(names.DECODE_ANY.of(model=MODEL), b"\xc1 not msgpack")
    letter = await asyncio.wait_for(letters.get(), WAIT_S)
    assert letter.error.code == "invalid_request"
    assert letter.payload == b"\xc1 not msgpack"
    await scene.settled()


def endless():
    """A stage that streams for ever, and whether it was closed."""
    closed = asyncio.Event()

    @stage(name="decode", takes=PreprocessedRequest, answer=answer)
    async def run(task) -> AsyncIterator[Emit]:
        try:
            yield frame(task, 0, last=False)
            await asyncio.Event().wait()
        finally:
            closed.set()

    return run, closed


async def test_a_cancelled_task_ends_as_aborted(scene):
    a_stage, closed = endless()
    await scene.run(a_stage)
    await scene.ask()
    await scene.next_frame()
    await scene.bus.publish(names.CANCEL.of(request_id="r1"), encode(Cancel(reason="enough")))
    end = await scene.next_frame()
    assert (end.finish_reason, end.error.code, end.error.message) == ("abort", "cancelled", "enough")
    assert closed.is_set()
    await scene.settled()


async def test_a_task_cancelled_in_the_queue_never_starts(scene):
    a_stage, closed = endless()
    await scene.bus.publish(names.CANCEL.of(request_id="r1"), b"by hand")
    await scene.bus.flush(timeout_s=WAIT_S)
    await scene.ask()
    await scene.run(a_stage)
    end = await scene.next_frame()
    assert (end.finish_reason, end.error.message, closed.is_set()) == ("abort", "by hand", False)
    await scene.settled()


async def test_a_deadline_ends_a_running_task_and_one_that_has_not_started(scene):
    a_stage, closed = endless()
    await scene.run(a_stage)
    await scene.ask("late", deadline_unix_s=time.time() - 1)
    end = await scene.next_frame()
    assert (end.request_id, end.error.code, closed.is_set()) == ("late", "deadline_exceeded", False)
    await scene.ask("slow", deadline_unix_s=time.time() + 0.3)
    assert (await scene.next_frame()).finish_reason is None
    end = await scene.next_frame()
    assert (end.request_id, end.error.code, closed.is_set()) == ("slow", "deadline_exceeded", True)
    await scene.settled()


async def test_a_draining_runner_hands_over_at_once(scene):
    a_stage, closed = endless()
    first = await scene.run(a_stage)
    await scene.ask()
    assert (await scene.next_frame()).attempt == 1
    second, _ = endless()
    await scene.run(second)
    await first.drain(timeout_s=0)
    assert closed.is_set()
    # The first worker's last frame comes once more: its confirmation says that the log has all of them.
    assert [(await scene.next_frame()).attempt for _ in range(2)] == [1, 2]


async def test_a_worker_that_lost_its_lease_says_nothing_more(scene):
    go_on = asyncio.Event()

    @stage(name="decode", takes=PreprocessedRequest, answer=answer)
    async def frozen(task) -> AsyncIterator[Emit]:
        yield frame(task, 0, last=False)
        await go_on.wait()
        yield frame(task, 1, last=True)

    made = await scene.run(frozen)
    await scene.ask()
    await scene.next_frame()
    for lease in list(scene.leases._leases):
        lease.expires_s = time.monotonic()
    go_on.set()
    async with asyncio.timeout(WAIT_S):
        while made.in_flight:
            await scene.bus.flush(timeout_s=WAIT_S)
    assert scene.frames.empty()
    assert (await scene.bus.consumer_state("WORK", streams.decode_any(MODEL).name)).ack_pending == 1


async def test_no_more_tasks_at_once_than_slots(scene):
    a_stage, _ = endless()
    made = await scene.run(a_stage, slots=3)
    for number in range(8):
        await scene.ask(f"r{number}")
    seen = {(await scene.next_frame()).request_id for _ in range(3)}
    assert len(seen) == made.in_flight == 3
    state = await scene.bus.consumer_state("WORK", streams.decode_any(MODEL).name)
    assert (state.ack_pending, state.pending) == (3, 5)


async def test_a_paused_runner_takes_nothing_until_nobody_wants_the_pause(scene):
    @stage(name="decode", takes=PreprocessedRequest, answer=answer)
    async def one_frame(task) -> AsyncIterator[Emit]:
        yield frame(task, 0, last=True)

    runner = Runner(scene.bus, scene.leases, scene.cancellations, one_frame)
    await runner.pause("operator")
    await runner.pull(streams.decode_any(MODEL), slots=2)
    scene.runners.append(runner)
    await scene.ask("r1")
    await runner.pause("engine")
    runner.resume("operator")
    runner.resume("nobody")
    assert runner.paused == ("engine",)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(scene.frames.get(), 0.5)
    assert (await scene.bus.consumer_state("WORK", streams.decode_any(MODEL).name)).ack_pending == 0
    runner.resume("engine")
    assert (await scene.next_frame()).finish_reason == "stop"
    await scene.settled()


async def test_a_paused_runner_finishes_what_it_has_or_hands_it_over(scene):
    go = asyncio.Event()

    @stage(name="decode", takes=PreprocessedRequest, answer=answer)
    async def waits(task) -> AsyncIterator[Emit]:
        yield frame(task, 0, last=False)
        if task.attempt == 1:
            await go.wait()
        yield frame(task, 1, last=True)

    runner = await scene.run(waits)
    await scene.ask("r1")
    assert (await scene.next_frame()).index == 0
    await runner.pause("engine")
    assert runner.in_flight == 1
    runner.hand_over()
    other = await scene.run(waits)
    frames = [await scene.next_frame() for _ in range(3)]
    assert [(one.attempt, one.index) for one in frames] == [(1, 0), (2, 0), (2, 1)]  # first its checkpoint
    await scene.settled()
    async with asyncio.timeout(WAIT_S):  # the broker may have its ack before the runner has heard so
        while runner.in_flight or other.in_flight:
            await scene.bus.flush(timeout_s=WAIT_S)
