"""Addressed work over a real broker: its worker takes it, and where that cannot, an idle peer does, and at once."""

import asyncio
import time
from collections.abc import AsyncIterator

import msgspec
import pytest
import pytest_asyncio

from pipeline import peers, poll
from pipeline.bus import Bus, Puller
from pipeline.jetstream import NS
from pipeline.pause import keep_paused, pause, unpause
from pipeline.peers import Peers, addressed
from pipeline.poll import pull_subject
from pipeline.presence import Announcer, Presence
from subjects import names, streams
from subjects.limits import LEASE_S
from subjects.messages import Heartbeat, ModelCard, Role
from tests.server.conftest import DEADLINE_S, Log

MODEL = "m"
AT_ONCE_S = 0.1
TAKES = {"decode": streams.decode_takes, "prefill": streams.prefill_takes}


class Taker:
    """A worker's puller, and the heartbeats that say whether it takes work."""

    def __init__(self, bus: Bus, name: str, role: Role) -> None:
        self.bus, self.name, self.role = bus, name, role
        self.log, self.ready = Log(), True
        self.presence = Presence(bus)
        self.announcer = Announcer(bus, role, name, MODEL, "i1", self._state)
        self.own = streams.own_consumer(role, MODEL, name)
        self.puller: Puller

    def _state(self) -> Heartbeat:
        return Heartbeat(worker=self.name, role=self.role, incarnation="i1", model=MODEL, ready=self.ready)

    async def begin(self, slots: int) -> "Taker":
        await self.presence.start()
        await self.announcer.start()
        await self.announcer.publish_card(
            ModelCard(
                worker=self.name,
                role=self.role,
                model=MODEL,
                incarnation="i1",
                model_path="p",
                engine="simulated",
                context_len_tokens=8,
                max_running_requests=slots,
                max_prefill_tokens=8,
                kv_blocks=1,
                kv_block_tokens=8,
            )
        )
        self.peers = Peers(self.bus, self.presence, self.role, MODEL, self.name)
        takes = TAKES[self.role](MODEL, self.name)
        self.puller = await self.bus.pull(takes, self._take, credit=slots, others=self.peers)
        return self

    def _take(self, delivery) -> None:
        self.log.add((delivery.payload.decode(), delivery.attempt, time.monotonic(), delivery))

    def got(self) -> list[str]:
        return [item[0] for item in self.log.items]

    async def done(self) -> None:
        """Settle the oldest that is not, which frees its slot."""
        await self.bus.ack(self.log.items[self._settled][3])
        self._settled += 1
        self.puller.add_credit()

    _settled = 0

    async def die(self) -> None:
        """End without a word."""
        for task in self.announcer._tasks:
            task.cancel()
        await self.presence.close()
        await self.bus.close()


@pytest_asyncio.fixture
async def team(nats_server, connect, bus, monkeypatch) -> AsyncIterator:
    """Makes workers. Their looks at each other are quick here."""
    monkeypatch.setattr(peers, "LOOK_S", 0.1)
    await bus.provision(streams.STREAMS, streams.CONSUMERS, streams.BUCKETS)
    made: list[Taker] = []

    async def make(name: str, slots: int = 4, role: Role = "decode") -> Taker:
        made.append(await Taker(await connect(nats_server.url, name=name), name, role).begin(slots))
        return made[-1]

    yield make
    for taker in made:
        if taker.bus.connected:
            await taker.puller.stop()
            await taker.presence.close()


async def put(bus: Bus, worker: str | None, *payloads: str) -> float:
    """Publish tasks to a worker, or to any; when that began."""
    subject = names.DECODE_WORKER.of(model=MODEL, worker=worker) if worker else names.DECODE_ANY.of(model=MODEL)
    began_s = time.monotonic()
    for payload in payloads:
        await bus.publish_durable(subject, payload.encode())
    return began_s


async def until_asked(bus: Bus, worker: str, pulls: int, role: Role = "decode") -> None:
    """Wait until so many pull requests are open at a worker's consumer, its own among them."""
    async with asyncio.timeout(DEADLINE_S):
        while (await bus.consumer_state("WORK", streams.own_consumer(role, MODEL, worker).name)).waiting != pulls:
            await bus.flush()


async def test_its_own_worker_takes_it_while_it_has_a_slot(bus, team):
    first, second = await team("w1", slots=20), await team("w2", slots=20)
    await until_asked(bus, "w1", 2)
    for number in range(15):
        await put(bus, "w1", f"a{number}")
        await put(bus, "w2", f"b{number}")
    await first.log.until(lambda items: len(items) == 15)
    await second.log.until(lambda items: len(items) == 15)
    assert {payload[0] for payload in first.got()} == {"a"} and {payload[0] for payload in second.got()} == {"b"}


async def test_an_idle_peer_takes_what_a_busy_worker_cannot(bus, team):
    busy, idle = await team("w1", slots=1), await team("w2", slots=4)
    await until_asked(bus, "w1", 2)
    await put(bus, "w1", "a")
    await busy.log.until(lambda items: items)
    began_s = await put(bus, "w1", "b", "c")
    await idle.log.until(lambda items: len(items) == 2)
    assert idle.log.items[1][2] - began_s < AT_ONCE_S
    assert (busy.got(), idle.got()) == (["a"], ["b", "c"])
    assert [item[1] for item in idle.log.items] == [1, 1]
    await busy.done()
    await until_asked(bus, "w1", 2)
    await put(bus, "w1", "d")
    assert await busy.log.until(lambda items: len(items) == 2)


@pytest.mark.parametrize("how", ["paused", "dead"])
async def test_an_idle_peer_takes_what_a_worker_that_takes_none_was_given(bus, team, how):
    away, idle = await team("w1"), await team("w2")
    await until_asked(bus, "w1", 2)
    await (away.puller.pause() if how == "paused" else away.die())
    began_s = await put(bus, "w1", "a")
    await idle.log.until(lambda items: items)
    assert idle.log.items[0][2] - began_s < AT_ONCE_S and away.got() == []
    if how == "paused":
        away.puller.unpause()
        await until_asked(bus, "w1", 2)
        await put(bus, "w1", "b")
        await away.log.until(lambda items: items)


async def test_prefill_workers_help_each_other_and_nobody_else(bus, team):
    """Its own worker first; once that is busy or dead an idle one of its role, and at once; never a decode worker."""
    own, idle, decoding = await team("p1", 1, "prefill"), await team("p2", 4, "prefill"), await team("p1")
    subject = names.PREFILL_WORKER.of(model=MODEL, worker="p1")
    await until_asked(bus, "p1", 2, "prefill")
    await bus.publish_durable(subject, b"a")
    await own.log.until(lambda items: items)
    for payload in (b"b", b"c"):
        began_s = time.monotonic()
        await bus.publish_durable(subject, payload)
        await idle.log.until(lambda items, payload=payload: items and items[-1][0] == payload.decode())
        assert idle.log.items[-1][2] - began_s < AT_ONCE_S
        if own.bus.connected:
            await own.die()
    assert (own.got(), idle.got(), decoding.got()) == (["a"], ["b", "c"], [])


async def test_a_frozen_worker_costs_one_lease(bus, team):
    """It has asked for several and hears none: what it got comes back with its lease's end, and not to it again."""
    idle, frozen = await team("w2"), streams.own_consumer("decode", MODEL, "w1")
    await bus.ensure_consumer(frozen)
    inbox = bus.new_inbox()
    await bus.subscribe(inbox, lambda _: None)
    how = {"batch": 8, "expires": int(poll.EXPIRES_S * NS)} | poll.by_priority(frozen, streams.OWNER_PRIORITY)
    await bus.publish(pull_subject(frozen), msgspec.json.encode(how), reply=inbox)
    await until_asked(bus, "w1", 2)
    began_s = await put(bus, "w1", "a")
    await idle.log.until(lambda items: items, timeout_s=LEASE_S + 3)
    assert idle.log.items[0][1] == 2
    assert LEASE_S - 0.5 < idle.log.items[0][2] - began_s < LEASE_S + 1


async def test_where_all_are_busy_the_tasks_of_a_worker_that_takes_none_come_before_what_is_anyones(bus, team):
    away, busy = await team("w1"), await team("w2", slots=1)
    await until_asked(bus, "w1", 2)
    await put(bus, "w2", "own")
    await busy.log.until(lambda items: items)
    away.ready = False
    await away.puller.pause()
    await until_asked(bus, "w1", 0)
    await put(bus, None, *(f"any{number}" for number in range(5)))
    await put(bus, "w1", "a1", "a2")
    await until_aided(busy)
    for count in range(2, 6):
        await busy.done()
        await busy.log.until(lambda items, count=count: len(items) == count)
    assert busy.got() == ["own", "a1", "a2", "any0", "any1"]


async def until_aided(taker: Taker) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not taker.peers.aided:
            await taker.bus.flush()


async def test_tasks_for_a_worker_that_no_consumer_is_there_for_find_one(bus, team):
    idle = await team("w2")
    await put(bus, "nobody", "a")
    await idle.log.until(lambda items: items)


async def test_the_consumer_of_a_worker_that_is_gone_for_good_is_deleted_once_it_is_empty(bus, team, monkeypatch):
    monkeypatch.setattr(peers, "GONE_S", 0.5)
    idle = await team("w2")
    await put(bus, "gone", "a")
    await idle.log.until(lambda items: items)
    await asyncio.sleep(1.0)  # longer than GONE_S: the task is in work, so the consumer stays
    assert {each.name for each in await addressed(bus)} == {"decode~m~gone", "decode~m~w2"}
    await idle.done()
    async with asyncio.timeout(DEADLINE_S):
        while len(await addressed(bus)) > 1:
            await bus.flush()
    await put(bus, "gone", "b")
    await idle.log.until(lambda items: len(items) == 2)


async def test_a_model_s_pause_holds_addressed_tasks_as_well(bus, team, nats_server):
    first, second = await team("w1"), await team("w2")
    await until_asked(bus, "w1", 2)
    await pause(nats_server.url, MODEL, None)
    await put(bus, "w1", "a")
    await put(bus, "w2", "b")
    await bus.flush()
    late = streams.own_consumer("decode", MODEL, "late")
    await bus.ensure_consumer(late)
    await keep_paused(bus, MODEL, "late")
    assert (await bus.consumer_state("WORK", late.name)).paused_until_unix_s
    state = await bus.consumer_state("WORK", first.own.name)
    assert (state.pending, first.got(), second.got()) == (1, [], [])
    await unpause(nats_server.url, MODEL)
    await first.log.until(lambda items: items)
    await second.log.until(lambda items: items)
    assert (first.got(), second.got()) == (["a"], ["b"])


async def test_all_goes_on_after_an_outage(bus, team, nats_server, back):
    away, idle = await team("w1"), await team("w2")
    await until_asked(bus, "w1", 2)
    nats_server.kill()
    nats_server.start()
    await asyncio.wait_for(back.wait(), DEADLINE_S)
    await until_asked(bus, "w1", 2)
    await put(bus, "w1", "a")
    await away.log.until(lambda items: items)
    await away.die()
    await put(bus, "w1", "b")
    await idle.log.until(lambda items: items)
