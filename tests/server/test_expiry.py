"""Requests that expire while nobody has them: answered soon, once, whoever else is at work."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from types import SimpleNamespace

import pytest

from pipeline import expiry, pause
from pipeline import runner as runner_module
from pipeline.cancel import Cancellations
from pipeline.expiry import Sweeper
from pipeline.fence import Owner
from pipeline.lease import LeaseKeeper, LeaseLost
from pipeline.responses import StreamLog
from pipeline.runner import Runner
from pipeline.stage import Emit, Task, emit_frame, end_with_error, stage
from subjects import names, streams
from subjects.codec import TokenIds, decode, encode
from subjects.messages import EmbeddingTask, Frame, PreprocessedRequest, StopConditions

MODEL = "m"
WAIT_S = 15.0


def request(request_id: str, deadline_unix_s: float, choices: int = 1, priority: int = 0) -> PreprocessedRequest:
    return PreprocessedRequest(
        request_id=request_id,
        client="c",
        model=MODEL,
        token_ids=TokenIds.of([5, 6]),
        stop=StopConditions(max_tokens=3),
        deadline_unix_s=deadline_unix_s,
        choices=choices,
        priority=priority,
    )


def answer(task, error):
    return [end_with_error(task.payload, choice, error, task.attempt) for choice in range(task.payload.choices)]


@stage(name="decode", takes=PreprocessedRequest, answer=answer)
async def three_tokens(task: Task[PreprocessedRequest]) -> AsyncIterator[Emit]:
    for index in range(3):
        await asyncio.sleep(0.002)  # so long it generates
        yield frame(task.payload, index, last=index == 2, attempt=task.attempt)


def frame(of: PreprocessedRequest, index: int, last: bool = False, choice: int = 0, attempt: int = 1) -> Emit:
    body = Frame(
        request_id=of.request_id,
        choice=choice,
        attempt=attempt,
        index=index,
        token_ids=TokenIds.of([index]),
        finish_reason="length" if last else None,
    )
    return emit_frame(of.client, of.request_id, body)


class Scene:
    def __init__(self, bus) -> None:
        self.bus = bus
        self.log = StreamLog(bus)

    async def ask(self, of: PreprocessedRequest) -> None:
        await self.bus.publish_durable(
            names.decode_tasks(of.priority).of(model=MODEL), encode(of), msg_id=of.request_id
        )

    async def frames(self) -> list[Frame]:
        return [decode(Frame, stored.payload) async for stored in self.bus.read("RESPONSES", names.RESPONSES.any())]

    async def ends(self) -> list[tuple[str, int, str]]:
        ends = [frame for frame in await self.frames() if frame.finish_reason]
        return sorted((end.request_id, end.choice, end.error.code if end.error else "") for end in ends)

    async def until_empty(self, *sweepers: Sweeper) -> None:
        async with asyncio.timeout(WAIT_S):
            while (await self.bus.stream_state("WORK")).messages:
                await asyncio.gather(*(sweeper.sweep() for sweeper in sweepers))


@pytest.fixture
async def scene(bus, monkeypatch):
    monkeypatch.setattr(expiry, "WAITED_S", 0.0)
    monkeypatch.setattr(expiry, "GRACE_S", 0.1)
    await bus.provision(streams.STREAMS, streams.CONSUMERS, streams.BUCKETS)
    return Scene(bus)


async def test_what_waits_is_ended_at_its_deadline_and_the_rest_is_left(scene):
    soon = time.time() + 0.5
    await scene.ask(request("later", soon + 600))
    for number, priority in enumerate((0, 1, -1)):
        await scene.ask(request(f"r{number}", soon, choices=2, priority=priority))
    await scene.bus.publish_durable(names.DECODE_ANY.of(model=MODEL), b"\xc1 no request")
    sweeper = Sweeper(scene.bus, scene.log)
    await sweeper.sweep()
    assert await scene.ends() == []
    async with asyncio.timeout(WAIT_S):
        while (await scene.bus.stream_state("WORK")).messages > 2:
            await sweeper.sweep()
    assert await scene.ends() == [(f"r{n}", choice, "deadline_exceeded") for n in range(3) for choice in range(2)]
    assert "before a worker took the request" in (await scene.frames())[-1].error.message


async def test_an_embedding_request_that_waits_is_ended_too(scene):
    task = EmbeddingTask(
        request_id="e",
        client="c",
        model=MODEL,
        choices=2,
        inputs=(TokenIds.of([5]), TokenIds.of([6, 7])),
        deadline_unix_s=time.time() + 0.3,
    )
    await scene.bus.publish_durable(names.EMBED_ANY.of(model=MODEL), encode(task), msg_id="e")
    await scene.until_empty(Sweeper(scene.bus, scene.log))
    assert await scene.ends() == [("e", 0, "deadline_exceeded"), ("e", 1, "deadline_exceeded")]


async def test_a_running_sweeper_answers_a_paused_model(scene, nats_server):
    """In its own time: seconds after the deadline."""
    for consumer in streams.decode_consumers(MODEL):
        await scene.bus.ensure_consumer(consumer)
    await pause.pause(nats_server.url, MODEL, None)
    deadline_unix_s = time.time() + 0.5
    await scene.ask(request("r", deadline_unix_s))
    sweeping = asyncio.create_task(Sweeper(scene.bus, scene.log).run())
    await scene.until_empty()
    sweeping.cancel()
    assert await scene.ends() == [("r", 0, "deadline_exceeded")]
    assert time.time() - deadline_unix_s < 3


async def test_one_that_was_started_keeps_its_ends_and_its_lost_owner_is_refused(scene):
    """Choice 0 had ended, choice 1 was in the middle when the owner died or froze; the owner wakes up too late."""
    of = request("r", time.time() - 1, choices=2)
    await scene.ask(of)
    for emit in (frame(of, 0), frame(of, 0, choice=1), frame(of, 1, last=True)):
        await scene.bus.publish_durable(emit.subject, emit.payload, msg_id=emit.msg_id)
    await scene.until_empty(Sweeper(scene.bus, scene.log))
    assert await scene.ends() == [("r", 0, ""), ("r", 1, "deadline_exceeded")]
    end = (await scene.frames())[-1]
    assert (end.attempt, "before its answer was whole" in end.error.message) == (2, True)
    with pytest.raises(LeaseLost):
        await Owner(scene.bus, of).end(frame(of, 1, last=True, choice=1))
    assert len(await scene.ends()) == 2


async def test_a_sweeper_between_two_owners_is_refused_and_tries_again(scene, monkeypatch):
    """Another owner comes while it reads the log: that one's end counts, or the next sweep's."""
    of = request("r", time.time() - 1)
    await scene.ask(of)
    sweeper, later = Sweeper(scene.bus, scene.log), Owner(scene.bus, of)
    history = scene.log.history

    async def overtaken(asked):
        monkeypatch.setattr(scene.log, "history", history)
        await later.write_down(2)
        return await history(asked)

    monkeypatch.setattr(scene.log, "history", overtaken)
    await sweeper.sweep()
    assert await scene.ends() == []
    assert (await scene.bus.stream_state("WORK")).messages == 1
    await later.end(frame(of, 0, last=True, attempt=3))
    await scene.until_empty(sweeper)
    assert await scene.ends() == [("r", 0, "")]


@pytest.mark.parametrize("behind_s", [0, 3600], ids=["worker with the right time", "worker whose clock is behind"])
async def test_two_sweepers_and_a_worker_that_starts_right_then_make_one_end(
    scene, connect, nats_server, monkeypatch, behind_s
):
    """The worker whose clock is behind does not know that the requests have expired: it generates them."""
    clock = SimpleNamespace(time=lambda: time.time() - behind_s, monotonic=time.monotonic)
    monkeypatch.setattr(runner_module, "time", clock)
    requests = [request(f"r{number}", time.time() - 1) for number in range(150)]
    for of in requests:
        await scene.ask(of)
    sweepers = []
    for number in range(2):
        bus = await connect(nats_server.url, name=f"sweeper{number}")
        sweepers.append(Sweeper(bus, StreamLog(bus)))
    worker = await connect(nats_server.url, name="worker")
    leases, cancellations = LeaseKeeper(nats_server.url, "worker"), Cancellations(worker)
    await leases.start()
    runner = Runner(worker, leases, cancellations, three_tokens)
    await asyncio.gather(runner.pull(*streams.decode_consumers(MODEL), slots=8), *(s.sweep() for s in sweepers))
    await scene.until_empty(*sweepers)
    await runner.drain(timeout_s=WAIT_S)
    await leases.close()
    ends = await scene.ends()
    assert Counter(request_id for request_id, _, _ in ends) == {of.request_id: 1 for of in requests}
    if behind_s:
        assert {code for _, _, code in ends} == {"", "deadline_exceeded"}  # both were there in time for some
