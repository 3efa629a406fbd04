"""Presence: who is ready, who went away, and nobody judged by the silence of an outage."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import pytest_asyncio

from pipeline.errors import WorkerGone
from pipeline.presence import Announcer, Presence
from subjects import names, streams
from subjects.codec import encode
from subjects.limits import HEARTBEAT_S, PRESENCE_S
from subjects.messages import Heartbeat, ModelCard

SOON_S = 1.0
WORKER = """
import asyncio, sys
from pipeline.bus import Bus
from tests.server.test_presence import Worker

async def main():
    bus = await Bus.connect(sys.argv[1], name="child")
    await Worker(bus, "child").begin()
    print("up", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


class Worker:
    """A decode worker's announcements, with settable readiness."""

    def __init__(self, bus, name: str, incarnation: str = "i1", model: str | None = "m", role: str = "decode") -> None:
        self.name, self.incarnation, self.model, self.role = name, incarnation, model, role
        self.is_ready, self.draining = True, False
        self.announcer = Announcer(bus, role, name, model, incarnation, self.state)

    def state(self) -> Heartbeat:
        return Heartbeat(
            worker=self.name,
            role=self.role,
            incarnation=self.incarnation,
            model=self.model,
            ready=self.is_ready,
            draining=self.draining,
        )

    def card(self) -> ModelCard:
        return ModelCard(
            worker=self.name,
            role=self.role,
            model=self.model,
            incarnation=self.incarnation,
            model_path="/m",
            engine="simulated",
            context_len_tokens=8,
            max_running_requests=1,
            max_prefill_tokens=8,
            kv_blocks=1,
            kv_block_tokens=1,
        )

    async def begin(self) -> "Worker":
        await self.announcer.start()
        await self.announcer.publish_card(self.card())
        return self

    async def vanish(self) -> None:
        """End without a word, as a crash would."""
        for task in self.announcer._tasks:
            task.cancel()


@pytest_asyncio.fixture
async def make_presence():
    made = []

    async def make(bus) -> Presence:
        presence = Presence(bus)
        await presence.start()
        made.append(presence)
        return presence

    yield make
    for presence in made:
        await presence.close()


@pytest_asyncio.fixture
async def presence(bus, make_presence) -> Presence:
    return await make_presence(bus)


@pytest_asyncio.fixture
async def other(nats_server, connect):
    """The connection of the workers."""
    return await connect(nats_server.url, name="workers")


@pytest.fixture
def child(nats_server):
    """A worker in a process of its own, registered."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", WORKER, nats_server.url]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
    assert child.stdout.readline() == b"up\n"
    yield child
    child.kill()
    child.communicate()


async def test_ready_when_card_and_heartbeat_are_there(presence, other):
    waiting = asyncio.create_task(presence.wait_ready("m", timeout_s=5))
    worker = Worker(other, "w1")
    worker.is_ready = False
    await worker.begin()
    assert not await presence.wait_ready("m", timeout_s=0.2)
    assert not waiting.done()
    worker.is_ready = True
    assert await waiting
    assert presence.models() == {"m"}
    assert presence.known("m")
    assert not presence.known("other")
    assert not presence.ready("other")
    assert not presence.ready("m", role="prefill")
    (state,) = presence.workers(role="decode", model="m")
    assert (state.worker, state.role, state.card, state.ready) == ("w1", "decode", worker.card(), True)
    assert state.age_s < HEARTBEAT_S + SOON_S
    assert presence.workers(role="prefill") == presence.workers(model="other") == []


async def test_a_heartbeat_without_a_card_is_not_ready(presence, other):
    worker = Worker(other, "w1")
    await worker.announcer.start()
    assert not await presence.wait_ready("m", timeout_s=0.3)
    assert [state.worker for state in presence.workers()] == ["w1"]
    await worker.announcer.publish_card(worker.card())
    assert await presence.wait_ready("m", timeout_s=SOON_S)


async def test_a_card_without_a_heartbeat_is_not_ready(other, bus, make_presence):
    """A worker that was killed leaves its card until it expires."""
    worker = await Worker(other, "w1").begin()
    await worker.vanish()
    await other.flush()
    presence = await make_presence(bus)
    assert presence.known("m")
    assert not presence.ready("m")
    (state,) = presence.workers()
    assert (state.heartbeat, state.age_s) == (None, float("inf"))


async def test_leave_is_told_at_once(presence, other, log):
    presence.on_down(log.add)
    worker = await Worker(other, "w1").begin()
    assert await presence.wait_ready("m", timeout_s=SOON_S)
    await worker.announcer.close()
    assert await log.until(lambda items: items, timeout_s=SOON_S) == [("w1", "i1")]
    assert presence.workers() == []
    assert presence.known("m"), "a model that was served is known, though nobody serves it now"


async def test_draining_is_not_down_and_not_ready(presence, other, log):
    presence.on_down(log.add)
    worker = await Worker(other, "w1").begin()
    assert await presence.wait_ready("m", timeout_s=SOON_S)
    worker.draining = True
    async with asyncio.timeout(HEARTBEAT_S + SOON_S):
        while presence.ready("m"):
            await presence._changed.wait()
    assert log.items == []


async def test_a_killed_worker_is_down_in_time(presence, child, log):
    presence.on_down(log.add)
    assert await presence.wait_ready("m", timeout_s=5)
    child.kill()
    killed_s = time.monotonic()
    await log.until(lambda items: items == [("child", "i1")])
    assert PRESENCE_S - HEARTBEAT_S - SOON_S < time.monotonic() - killed_s < PRESENCE_S + SOON_S
    assert not presence.ready("m")
    (state,) = presence.workers()
    assert state.down


async def test_a_new_incarnation_ends_the_old_one(presence, other, log):
    presence.on_down(log.add)
    old = await Worker(other, "w1", "i1").begin()
    assert await presence.wait_ready("m", timeout_s=SOON_S)
    await old.vanish()
    new = Worker(other, "w1", "i2")
    await new.announcer.start()
    assert await log.until(lambda items: items, timeout_s=SOON_S) == [("w1", "i1")]
    assert not presence.ready("m"), "the card is the old incarnation's"
    await new.announcer.publish_card(new.card())
    assert await presence.wait_ready("m", timeout_s=SOON_S)
    assert log.items == [("w1", "i1")]


async def test_what_lasts_while_a_worker_is_up_ends_with_it(presence, other):
    lasting = asyncio.Event()

    async def last(worker: str) -> None:
        async with presence.while_up(worker):
            lasting.set()
            await asyncio.Event().wait()

    leaving, staying = [await Worker(other, name).begin() for name in ("w1", "w2")]
    assert await presence.wait_ready("m", timeout_s=SOON_S)
    async with presence.while_up("w1"):
        pass
    tasks = [asyncio.create_task(last(name)) for name in ("w1", "w1", "w2")]
    await asyncio.wait_for(lasting.wait(), SOON_S)
    await leaving.announcer.close()
    done, going_on = await asyncio.wait(tasks, timeout=SOON_S)
    assert done == set(tasks[:2]) and all(isinstance(task.exception(), WorkerGone) for task in done)
    await staying.vanish()
    with pytest.raises(WorkerGone, match="w2"):
        await asyncio.wait_for(going_on.pop(), PRESENCE_S + SOON_S)


async def test_a_worker_that_comes_back_is_up_again(presence, other, log):
    presence.on_down(log.add)
    worker = await Worker(other, "w1").begin()
    await worker.vanish()
    await log.until(lambda items: items)
    await worker.begin()
    assert await presence.wait_ready("m", timeout_s=SOON_S)


async def test_nobody_is_judged_by_an_outage(presence, other, nats_server, log, back):
    """The broker is away for longer than a worker may be silent; its store of cards is gone with it."""
    presence.on_down(log.add)
    for name in ("w1", "w2"):
        await Worker(other, name).begin()
    assert await presence.wait_ready("m", timeout_s=SOON_S)
    nats_server.kill()
    await asyncio.sleep(PRESENCE_S + SOON_S)  # the subject of the test: time that must not count
    assert presence.ready("m")
    shutil.rmtree(nats_server.store)
    nats_server.start()
    await asyncio.wait_for(back.wait(), 3)
    assert await presence.wait_ready("m", timeout_s=3)
    await asyncio.sleep(PRESENCE_S + SOON_S)
    assert log.items == []
    assert presence.ready("m")
    assert len(presence.workers()) == 2


async def test_a_worker_that_died_in_an_outage_is_down_after_it(presence, other, nats_server, log, back):
    presence.on_down(log.add)
    dead, alive = await Worker(other, "dead").begin(), await Worker(other, "alive").begin()
    assert await presence.wait_ready("m", timeout_s=SOON_S)
    nats_server.kill()
    await dead.vanish()
    nats_server.start()
    await asyncio.wait_for(back.wait(), 3)
    assert await log.until(lambda items: items, timeout_s=PRESENCE_S + SOON_S) == [("dead", "i1")]
    assert presence.ready("m")
    assert alive.name in {state.worker for state in presence.workers() if state.ready}


async def test_nobody_is_judged_by_our_own_stall(presence, bus, child, raw_client, log):
    """This process stands still for longer than a worker may be silent; heartbeats lie unread behind other things."""
    presence.on_down(log.add)
    await bus.subscribe("noise", lambda received: None)
    await bus.flush()
    assert await presence.wait_ready("m", timeout_s=5)
    raw_client.publish("noise", (bytes(100_000) for _ in range(200)))
    time.sleep(PRESENCE_S + SOON_S)  # noqa: ASYNC251  the subject of the test
    await asyncio.sleep(2 * HEARTBEAT_S)
    assert log.items == []
    assert presence.ready("m")
    os.kill(child.pid, signal.SIGSTOP)
    await log.until(lambda items: items == [("child", "i1")], timeout_s=PRESENCE_S + SOON_S)


async def test_a_lost_card_is_put_again(presence, other, log):
    """An operator deletes a card by mistake: not ready until the worker renews it, but not down."""
    presence.on_down(log.add)
    worker = await Worker(other, "w1").begin()
    assert await presence.wait_ready("m", timeout_s=SOON_S)
    await (await other.bucket(streams.CARDS)).delete(names.card_key("decode", "m", "w1"))
    async with asyncio.timeout(SOON_S):
        while presence.ready("m"):
            await presence._changed.wait()
    await worker.announcer._renew_card()
    assert await presence.wait_ready("m", timeout_s=SOON_S)
    assert log.items == []


async def test_a_worker_of_every_model_has_no_card(presence, other, log):
    presence.on_down(log.add)
    worker = Worker(other, "p1", model=None, role="preprocess")
    await worker.announcer.start()
    async with asyncio.timeout(SOON_S):
        while not presence.workers("preprocess"):
            await other.flush()
    (state,) = presence.workers("preprocess")
    assert state.ready
    await worker.vanish()
    await log.until(lambda items: items == [("p1", "i1")])
    assert presence.workers("preprocess") == []


async def test_what_is_not_a_heartbeat_or_a_card_is_passed_over(presence, other):
    subject = names.HEARTBEAT.of(role="decode", worker="w1")
    await other.publish(subject, b"nonsense")
    bucket = await other.bucket(streams.CARDS)
    await bucket.put("decode.m.w1", b"nonsense")
    await bucket.put("nonsense", b"")
    await other.publish(subject, encode(Worker(other, "w1").state()))
    await Worker(other, "w2").begin()
    assert await presence.wait_ready("m", timeout_s=SOON_S)


async def test_callbacks_that_raise_harm_nobody(presence, other, log):
    def fail(worker, incarnation):
        raise RuntimeError("a bug of ours")

    presence.on_down(fail)
    presence.on_down(log.add)
    worker = await Worker(other, "w1").begin()
    assert await presence.wait_ready("m", timeout_s=SOON_S)
    await worker.announcer.close()
    await log.until(lambda items: items == [("w1", "i1")], timeout_s=SOON_S)


async def test_close_is_quick_when_the_broker_is_dead(presence, other, nats_server):
    worker = await Worker(other, "w1").begin()
    nats_server.kill()
    began_s = time.monotonic()
    await worker.announcer.close()
    await presence.close()
    assert time.monotonic() - began_s < 3
