"""The continuous puller: credits, outages, ends."""

import asyncio
import dataclasses
import shutil
import time
from collections import defaultdict

import msgspec
import pytest

from pipeline.errors import ProvisionError
from subjects import names
from subjects.streams import ConsumerSpec
from tests.server.conftest import DEADLINE_S, QUEUE, TAKERS, Log, freeze, thaw


def pulls(spec: ConsumerSpec) -> str:
    """The subject of the consumer's pull requests."""
    return f"{names.JS_API}.CONSUMER.MSG.NEXT.{spec.stream}.{spec.name}"


def batch_of(received) -> int:
    return msgspec.json.decode(received.payload)["batch"]


async def store(bus, subject: str, numbers: range) -> None:
    await asyncio.gather(*(bus.publish_durable(subject, b"%d" % i) for i in numbers))


async def fill(bus, count: int, first: int = 0) -> None:
    await store(bus, "queue.a", range(first, first + count))


def numbers(deliveries) -> list[int]:
    return sorted(int(delivery.payload) for delivery in deliveries)


def acked(queue, hear, credit: int):
    """Pull, hear and ack every delivery; a killed broker confirms none of what it forgot, hence the short wait."""

    async def settle(delivery) -> None:
        await queue.ack(delivery, timeout_s=1)
        puller.add_credit()

    def take(delivery) -> None:
        hear(delivery)
        queue.spawn(settle(delivery))

    async def begin():
        nonlocal puller
        puller = await queue.pull(TAKERS, take, credit=credit)
        return puller

    puller = None
    return begin()


async def empty(bus) -> None:
    """Wait until the queue holds nothing."""
    async with asyncio.timeout(DEADLINE_S):
        while (await bus.stream_state(QUEUE.name)).messages:
            await bus.flush()


async def test_a_delivery_carries_its_facts(queue, log):
    began_s = time.time()
    await queue.publish_durable("queue.a", b"1", headers={"A": "b"})
    await queue.publish_durable("queue.a", b"2")
    await queue.pull(TAKERS, log.add, credit=1)
    (delivery,) = await log.until(lambda items: items)
    assert (delivery.payload, delivery.subject, delivery.stream) == (b"1", "queue.a", "QUEUE")
    assert (delivery.stream_seq, delivery.consumer_seq, delivery.attempt, delivery.pending) == (1, 1, 1, 1)
    assert delivery.headers["A"] == "b"
    assert abs(delivery.stored_unix_s - began_s) < 5


async def test_never_more_than_the_credit(queue, log):
    """Eight free slots: eight deliveries, and one more for each slot given back; never more is asked for."""
    requests = []
    spec = dataclasses.replace(TAKERS, name="slow", filter_subject="queue.b", ack_wait_s=60)
    await queue.subscribe(pulls(spec), lambda received: requests.append(batch_of(received)))
    await store(queue, "queue.b", range(100))
    puller = await queue.pull(spec, log.add, credit=8)
    await log.until(lambda items: len(items) == 8)
    await queue.flush()
    state = await queue.consumer_state(QUEUE.name, spec.name)
    assert (len(log.items), state.ack_pending, state.waiting, puller.credit) == (8, 8, 0, 0)
    puller.add_credit()
    await log.until(lambda items: len(items) == 9)
    puller.add_credit(3)
    await log.until(lambda items: len(items) == 12)
    await queue.flush()
    assert len(log.items) == 12
    assert sum(requests) == 12


async def test_no_credit_asks_for_nothing(queue, log):
    await fill(queue, 1)
    puller = await queue.pull(TAKERS, log.add, credit=0)
    await queue.flush()
    assert (await queue.consumer_state(QUEUE.name, TAKERS.name)).waiting == 0
    puller.add_credit()
    await log.until(lambda items: len(items) == 1)


async def test_the_first_in_priority_takes_everything_while_it_has_room(queue, connect, nats_server, log):
    spec = ConsumerSpec(name="owned", stream=QUEUE.name, filter_subject="queue.b", priority_group="g")
    backup = await connect(nats_server.url, name="backup")
    owner = await queue.pull(spec, lambda delivery: log.add("owner"), credit=50, priority=0)
    await backup.pull(spec, lambda delivery: log.add("backup"), credit=50, priority=5)
    for i in range(50):
        await queue.publish_durable("queue.b", b"%d" % i)
    assert await log.until(lambda items: len(items) == 50) == ["owner"] * 50
    await queue.publish_durable("queue.b", b"50")
    await log.until(lambda items: items[50:] == ["backup"])
    await owner.stop()
    await queue.publish_durable("queue.b", b"51")
    await log.until(lambda items: items[51:] == ["backup"])


async def test_two_workers_share_everything_once(queue, connect, nats_server, log):
    other = await connect(nats_server.url, name="other")
    for member in (queue, other):
        await acked(member, log.add, credit=4)
    await fill(queue, 500)
    await log.until(lambda items: len(items) >= 500)
    await empty(queue)
    assert numbers(log.items) == list(range(500))


@pytest.mark.parametrize("end", ["stop", "kill"])
async def test_a_restart_loses_nothing_and_doubles_only_by_redelivery(nats_server, queue, log, end):
    """A broker that was killed may have forgotten what it had just handed out, so each of its lives counts alone."""
    lives = defaultdict(list)

    def hear(delivery) -> None:
        lives[queue.connected_since_s].append(delivery)
        log.add(delivery)

    await acked(queue, hear, credit=16)
    sends = asyncio.create_task(fill(queue, 400))
    await log.until(lambda items: len(items) >= 50)
    getattr(nats_server, end)()
    nats_server.start()
    await sends
    await log.until(lambda items: len({item.payload for item in items}) == 400)
    await empty(queue)
    assert len(lives) == 2
    for life in lives.values():
        first = [item.payload for item in life if item.attempt == 1]
        assert len(set(first)) == len(first), "handed out twice as a first attempt"
    assert set(numbers(log.items)) == set(range(400))


async def test_after_an_outage_the_free_slots_are_asked_again_exactly(nats_server, queue, log, back):
    """Two of eight slots are taken when the broker goes: six are asked for afterwards."""
    spec = dataclasses.replace(TAKERS, name="slow", filter_subject="queue.b", ack_wait_s=60)
    await store(queue, "queue.b", range(2))
    puller = await queue.pull(spec, log.add, credit=8)
    await log.until(lambda items: len(items) == 2)
    nats_server.stop()  # killed, it might have forgotten the two
    nats_server.start()
    await asyncio.wait_for(back.wait(), 3)
    for delivery in log.items:
        assert await queue.ack(delivery)
    await store(queue, "queue.b", range(2, 22))
    await log.until(lambda items: len(items) == 8)
    await queue.flush()
    assert numbers(log.items) == list(range(8))
    assert puller.credit == 0
    assert (await queue.consumer_state(QUEUE.name, "slow")).ack_pending == 6


async def test_the_first_message_after_a_restart_comes_within_a_second(nats_server, queue, log, back):
    await queue.pull(TAKERS, log.add, credit=4)
    nats_server.kill()
    nats_server.start()
    began_s = time.monotonic()
    await queue.publish_durable("queue.a", b"1")
    await log.until(lambda items: items)
    assert time.monotonic() - began_s < 1


async def test_a_wiped_store_is_made_again(nats_server, queue, log, back):
    await acked(queue, log.add, credit=4)
    nats_server.kill()
    shutil.rmtree(nats_server.store)
    nats_server.start()
    await asyncio.wait_for(back.wait(), 3)
    await fill(queue, 20)
    await log.until(lambda items: len(items) == 20)


async def test_a_deleted_consumer_is_made_again(queue, log):
    await acked(queue, log.add, credit=4)
    await queue.api("CONSUMER.DELETE.QUEUE.takers")
    await fill(queue, 20)
    await log.until(lambda items: len(items) == 20)


async def test_a_deleted_stream_is_made_again(queue, log):
    await acked(queue, log.add, credit=4)
    await queue.api("STREAM.DELETE.QUEUE")
    await fill(queue, 20)
    await log.until(lambda items: len(items) == 20)


async def test_a_frozen_broker_is_pulled_from_again(nats_server, queue, log):
    """The broker stands still for longer than its heartbeats may be missing."""
    await acked(queue, log.add, credit=4)
    freeze(nats_server)
    asyncio.get_running_loop().call_later(6, thaw, nats_server)
    await queue.publish_durable("queue.a", b"0", timeout_s=20)
    await log.until(lambda items: items)
    await fill(queue, 20, first=1)
    await log.until(lambda items: len(items) == 21)
    assert numbers(log.items) == list(range(21))


async def test_requests_that_expire_are_asked_again(queue, log, monkeypatch):
    monkeypatch.setattr("pipeline.poll.EXPIRES_S", 0.3)
    monkeypatch.setattr("pipeline.poll.IDLE_HEARTBEAT_S", 0.1)
    requests = log
    await queue.subscribe(pulls(TAKERS), lambda received: requests.add(batch_of(received)))
    await queue.pull(TAKERS, lambda delivery: None, credit=4)
    assert await requests.until(lambda items: len(items) == 4) == [4, 4, 4, 4]


async def test_after_stop_nothing_is_handed_over_and_nothing_is_held(queue, connect, nats_server, raw_client, log):
    """Stop while 2,000 deliveries are under way: another worker has them at once, not after their ack_wait."""
    other = await connect(nats_server.url, name="other")
    spec = dataclasses.replace(TAKERS, name="slow", filter_subject="queue.b", ack_wait_s=60)
    puller = await queue.pull(spec, log.add, credit=10_000)
    await queue.flush()
    raw_client.publish("queue.b", (b"%d" % i for i in range(2_000)))
    while raw_client.request(f"{names.JS_API}.CONSUMER.INFO.QUEUE.slow")["delivered"]["consumer_seq"] < 2_000:
        pass  # nothing of it is read here meanwhile
    await puller.stop()
    heard = len(log.items)
    others = Log()
    await other.pull(spec, others.add, credit=10_000)
    await others.until(lambda items: len(items) >= 2_000 - heard)
    assert len(log.items) == heard
    assert numbers(log.items + others.items) == list(range(2_000))
    assert heard == 0, "handed over after `stop` was called"
    assert {delivery.attempt for delivery in others.items} == {2}


async def test_stop_is_quick_when_the_broker_is_dead(nats_server, queue, log):
    puller = await queue.pull(TAKERS, log.add, credit=4)
    nats_server.kill()
    await asyncio.wait_for(puller.stop(), 2)
    await puller.stop()


async def test_a_callback_that_raises_hands_the_message_on(queue, log):
    def take(delivery) -> None:
        log.add(delivery.attempt)
        if delivery.attempt == 1:
            raise RuntimeError("a bug of ours")

    await queue.pull(TAKERS, take, credit=1)
    await fill(queue, 1)
    assert await log.until(lambda items: len(items) == 2) == [1, 2]


async def test_settling(queue, log):
    """nak: again at once or later; term: never again; in_progress: the lease goes on."""
    puller = await queue.pull(TAKERS, log.add, credit=10)
    await fill(queue, 1)
    (first,) = await log.until(lambda items: len(items) == 1)
    await queue.nak(first)
    (_, second) = await log.until(lambda items: len(items) == 2, timeout_s=0.5)
    began_s = time.monotonic()
    await queue.nak(second, delay_s=0.4)
    (_, _, third) = await log.until(lambda items: len(items) == 3)
    assert 0.3 < time.monotonic() - began_s < 0.9
    for _ in range(15):  # 1.5 s, longer than ack_wait
        await queue.in_progress(third.ack_subject)
        await queue.flush()
        await asyncio.sleep(0.1)
    assert len(log.items) == 3
    await queue.term(third, "enough")
    await empty(queue)
    assert puller.credit == 7


async def test_an_ack_is_confirmed_or_not(nats_server, queue, log):
    await queue.pull(TAKERS, log.add, credit=2)
    await fill(queue, 2)
    first, second = await log.until(lambda items: len(items) == 2)
    assert await queue.ack(first)
    assert await queue.ack(first), "a second ack does no harm"
    await queue.api("STREAM.DELETE.QUEUE")
    assert not await queue.ack(second, timeout_s=0.5)


async def test_a_consumer_of_no_stream_is_a_sentence(bus, log):
    with pytest.raises(ProvisionError, match="consumer takers: there is no stream QUEUE"):
        await bus.pull(TAKERS, log.add, credit=1)
