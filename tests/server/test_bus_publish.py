"""Durable publishing, and reading back what was stored."""

import asyncio
import dataclasses
import time

import pytest

from pipeline.errors import BusUnavailable, NotPermitted, Overloaded, PayloadTooLarge
from pipeline.nats_server import NatsServer
from subjects.limits import PAYLOAD_BYTES_MAX
from tests.server.conftest import QUEUE


async def read_all(bus, subject, **options) -> list[bytes]:
    return [message.payload async for message in bus.read(QUEUE.name, subject, **options)]


async def store(bus, count: int, subjects: str) -> None:
    """Message i goes to the next of `subjects`, in order: their tasks start in order."""
    sends = (bus.publish_durable(f"queue.{subjects[i % len(subjects)]}", b"%d" % i) for i in range(count))
    await asyncio.gather(*sends)


async def test_a_message_is_stored_once(queue):
    first = await queue.publish_durable("queue.a", b"1", msg_id="x")
    again = await queue.publish_durable("queue.a", b"1", msg_id="x")
    other = await queue.publish_durable("queue.a", b"2")
    assert (first.stream, first.seq, first.duplicate) == ("QUEUE", 1, False)
    assert (again.seq, again.duplicate) == (1, True)
    assert (other.seq, other.duplicate) == (2, False)


async def test_nothing_is_lost_or_doubled_over_restarts(nats_server, queue):
    """200 publishes are under way while the server is killed twice."""
    sends = asyncio.gather(*(queue.publish_durable("queue.a", b"%d" % i, timeout_s=20) for i in range(200)))
    for _ in range(2):
        nats_server.kill()
        nats_server.start()
        await queue.publish_durable("queue.b", b"between", timeout_s=20)
    await sends
    assert sorted(await read_all(queue, "queue.a"), key=int) == [b"%d" % i for i in range(200)]


async def test_a_publish_waits_for_its_stream(bus):
    sending = asyncio.create_task(bus.publish_durable("queue.a", b"early"))
    await bus.flush()
    await bus.provision([QUEUE], [], [])
    assert (await sending).seq == 1


async def test_no_stream_is_told_at_the_end_of_the_time(bus):
    began_s = time.monotonic()
    with pytest.raises(BusUnavailable, match=r"no stream confirmed a message on queue\.a within 0\.5 s"):
        await bus.publish_durable("queue.a", b"", timeout_s=0.5)
    assert time.monotonic() - began_s < 1


async def test_no_broker_is_told_at_the_end_of_the_time(nats_server, queue):
    nats_server.kill()
    with pytest.raises(BusUnavailable, match=r"within 0\.5 s"):
        await queue.publish_durable("queue.a", b"", timeout_s=0.5)


async def test_a_full_queue_is_overloaded(bus):
    await bus.provision([dataclasses.replace(QUEUE, max_msgs_per_subject=2)], [], [])
    await bus.publish_durable("queue.a", b"1")
    await bus.publish_durable("queue.a", b"2")
    with pytest.raises(Overloaded, match=r"the queue of queue\.a is full: maximum") as raised:
        await bus.publish_durable("queue.a", b"3")
    assert raised.value.retry_after_s > 0
    await bus.publish_durable("queue.b", b"another subject's queue is not full")


async def test_a_full_store_is_overloaded(bus):
    await bus.provision([dataclasses.replace(QUEUE, max_bytes=600 * 1024)], [], [])
    await bus.publish_durable("queue.a", bytes(500 * 1024))
    with pytest.raises(Overloaded, match="maximum bytes"):
        await bus.publish_durable("queue.a", bytes(500 * 1024))


async def test_more_than_the_stream_takes_is_too_large(queue):
    with pytest.raises(PayloadTooLarge) as raised:
        await queue.publish_durable("queue.a", bytes(QUEUE.max_msg_bytes + 1))
    assert raised.value.size > raised.value.limit == PAYLOAD_BYTES_MAX


async def test_more_than_the_broker_takes_is_too_large(queue):
    with pytest.raises(PayloadTooLarge) as raised:
        await queue.publish_durable("queue.a", bytes(2 * 1024 * 1024))
    assert raised.value.limit == 1024 * 1024


async def test_a_forbidden_subject_is_told_at_once(tmp_path, connect):
    users = 'authorization { users: [{user: a, password: b, permissions: {publish: ["$JS.API.>"]}}] }\n'
    server = NatsServer(tmp_path, extra_config=users)
    server.start()
    try:
        bus = await connect(server.url.replace("//", "//a:b@"))
        await bus.provision([QUEUE], [], [])
        began_s = time.monotonic()
        with pytest.raises(NotPermitted):
            await bus.publish_durable("queue.a", b"")
        assert time.monotonic() - began_s < 1
    finally:
        server.kill()


async def test_reading_back_gives_every_message_in_order(queue):
    await store(queue, 600, "ab")
    found = [message async for message in queue.read(QUEUE.name, "queue.a", timeout_s=5)]
    assert [message.payload for message in found] == [b"%d" % i for i in range(0, 600, 2)]
    assert found[0].subject == "queue.a"
    assert await read_all(queue, "queue.a", from_seq=found[-1].seq) == [b"598"]
    assert await read_all(queue, "queue.a", from_seq=found[-1].seq + 1) == []
    assert await read_all(queue, "queue.none") == []
    assert len(await read_all(queue, "queue.*")) == 600


async def test_reading_gives_headers(queue):
    await queue.publish_durable("queue.a", b"", msg_id="x", headers={"A": "b"})
    (message,) = [message async for message in queue.read(QUEUE.name, "queue.a")]
    assert (message.headers["Nats-Msg-Id"], message.headers["A"]) == ("x", "b")


async def test_a_replica_that_is_behind_is_asked_again(queue, monkeypatch):
    """In a cluster, one that was restarted answers for a second or so before it has everything."""
    await store(queue, 5, "a")
    read_batch = queue._read_batch

    async def behind(stream: str, subject: str, from_seq: int, at_once: int, timeout_s: float):
        batch = await read_batch(stream, subject, from_seq, at_once, timeout_s)
        return batch[:2] if from_seq == 1 else batch

    monkeypatch.setattr(queue, "_read_batch", behind)
    assert await read_all(queue, "queue.a") == [b"%d" % i for i in range(5)]


async def test_one_message_is_read_as_it_was_stored(queue):
    began_s = time.time()
    await queue.publish_durable("queue.a", b"\x00\xff", msg_id="x", headers={"A": "b: c"})
    await queue.publish("queue.b", b"")
    await queue.flush()
    for message in (await queue.last(QUEUE.name, "queue.a"), await queue.stored_at(QUEUE.name, 1)):
        assert (message.subject, message.payload, message.seq) == ("queue.a", b"\x00\xff", 1)
        assert (message.headers["Nats-Msg-Id"], message.headers["A"]) == ("x", "b: c")
        assert abs(message.stored_unix_s - began_s) < 5
    bare = await queue.last(QUEUE.name, "queue.b")
    assert (bare.payload, bare.seq) == (b"", 2)
    assert await queue.last(QUEUE.name, "queue.c") is None
    assert await queue.stored_at(QUEUE.name, 3) is None


async def test_reading_no_stream_is_told(bus):
    with pytest.raises(BusUnavailable, match=r"could not be read within .* there is no stream QUEUE"):
        await read_all(bus, "queue.a", timeout_s=0.3)


async def test_reading_goes_on_over_a_restart(nats_server, queue):
    await store(queue, 300, "a")
    found = []
    async for message in queue.read(QUEUE.name, "queue.a", timeout_s=10):
        found.append(message.payload)
        if len(found) == 100:
            nats_server.kill()
            nats_server.start()
    assert found == [b"%d" % i for i in range(300)]


async def test_reading_from_a_dead_broker_is_told_in_time(nats_server, queue):
    nats_server.kill()
    with pytest.raises(BusUnavailable):
        await read_all(queue, "queue.a", timeout_s=0.5)


async def test_states(queue):
    for subject in ("queue.a", "queue.a", "queue.b"):
        await queue.publish_durable(subject, b"x")
    state = await queue.stream_state(QUEUE.name)
    assert (state.messages, state.first_seq, state.last_seq, state.consumers) == (3, 1, 3, 1)
    assert (await queue.consumer_state(QUEUE.name, "takers")).pending == 2
    assert await queue.subjects_state(QUEUE.name, "queue.*") == {"queue.a": 2, "queue.b": 1}
    assert await queue.subjects_state(QUEUE.name, "queue.none") == {}
    with pytest.raises(BusUnavailable, match="stream not found"):
        await queue.stream_state("NONE")
