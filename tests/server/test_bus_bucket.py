"""Key-value buckets and their watches."""

import asyncio
import dataclasses
import shutil
import time

from tests.server.conftest import VALUES, freeze, thaw


def restart(server) -> None:
    server.kill()
    server.start()


async def test_put_get_delete_entries(queue):
    bucket = await queue.bucket(VALUES)
    assert await bucket.entries() == {}
    assert await bucket.put("a.b", b"1") < await bucket.put("a.b", b"2")
    await bucket.put("c", b"3")
    assert await bucket.get("a.b") == b"2"
    assert await bucket.entries() == {"a.b": b"2", "c": b"3"}
    await bucket.delete("a.b")
    assert await bucket.get("a.b") is None
    assert await bucket.get("never") is None
    assert await bucket.entries() == {"c": b"3"}


async def test_many_entries(queue):
    bucket = await queue.bucket(VALUES)
    await asyncio.gather(*(bucket.put(f"k.{i}", b"%d" % i) for i in range(1_500)))
    assert await bucket.entries() == {f"k.{i}": b"%d" % i for i in range(1_500)}


async def test_a_watch_tells_what_is_and_what_comes(queue, log):
    bucket = await queue.bucket(VALUES)
    await bucket.put("a", b"1")
    watch = await bucket.watch(log.add)
    await asyncio.wait_for(watch.synced.wait(), 2)
    assert log.items == [("a", b"1")]
    await bucket.put("a", b"1")
    await bucket.put("b", b"2")
    await bucket.delete("a")
    await bucket.delete("never")
    await bucket.put("c", b"3")
    await log.until(lambda items: ("c", b"3") in items)
    assert log.items == [("a", b"1"), ("b", b"2"), ("a", None), ("c", b"3")]
    await watch.stop()
    await bucket.put("d", b"4")
    await queue.flush()
    assert len(log.items) == 4


async def test_a_value_that_expires_is_gone(bus, log):
    spec = dataclasses.replace(VALUES, ttl_s=1)
    bucket = await bus.bucket(spec)
    await bucket.watch(log.add)
    await bucket.put("a", b"1")
    await log.until(lambda items: items[-1:] == [("a", None)], timeout_s=5)
    assert await bucket.get("a") is None
    assert await bucket.entries() == {}


async def test_a_watch_goes_on_within_three_seconds_of_a_restart(nats_server, bus, back, log):
    """The store is on disk: what was put before is not told again, what comes is told."""
    bucket = await bus.bucket(dataclasses.replace(VALUES, storage="file"))
    await bucket.put("a", b"1")
    await bucket.watch(log.add)
    await log.until(lambda items: items == [("a", b"1")])
    restart(nats_server)
    began_s = time.monotonic()
    await bucket.put("b", b"2")
    await log.until(lambda items: items == [("a", b"1"), ("b", b"2")])
    assert time.monotonic() - began_s < 3


async def test_a_change_during_an_outage_is_told_after_it(nats_server, bus, connect, log):
    spec = dataclasses.replace(VALUES, storage="file")
    bucket = await bus.bucket(spec)
    for key in "abc":
        await bucket.put(key, b"1")
    await bucket.watch(log.add)
    await log.until(lambda items: len(items) == 3)
    bus._client._transport.close()  # this connection only: others go on
    other = await (await connect(nats_server.url, name="other")).bucket(spec)
    await other.put("a", b"2")
    await other.delete("b")
    await log.until(lambda items: {("a", b"2"), ("b", None)} <= set(items[3:]))


async def test_a_wiped_store_tells_what_is_gone_and_goes_on(nats_server, queue, log):
    bucket = await queue.bucket(VALUES)
    await bucket.put("a", b"1")
    await bucket.watch(log.add)
    await log.until(lambda items: items == [("a", b"1")])
    nats_server.kill()
    shutil.rmtree(nats_server.store)
    nats_server.start()
    await log.until(lambda items: items[1:] == [("a", None)], timeout_s=3)
    await bucket.put("a", b"1")
    await log.until(lambda items: items[2:] == [("a", b"1")], timeout_s=3)


async def test_a_deleted_bucket_is_made_again(queue, log):
    bucket = await queue.bucket(VALUES)
    await bucket.watch(log.add)
    await queue.api("STREAM.DELETE.KV_VALUES")
    watch_again_s = 8  # two and a half heartbeats, and the way back
    async with asyncio.timeout(watch_again_s):
        await bucket.put("a", b"1")
    await log.until(lambda items: items == [("a", b"1")])


async def test_a_frozen_broker_is_watched_again(nats_server, queue, log):
    bucket = await queue.bucket(VALUES)
    await bucket.watch(log.add)
    freeze(nats_server)
    asyncio.get_running_loop().call_later(7, thaw, nats_server)
    await queue.publish_durable("$KV.VALUES.a", b"1", timeout_s=15)
    await log.until(lambda items: items == [("a", b"1")])


async def test_a_watch_callback_that_raises_is_called_again(queue, log):
    def hear(key, value):
        log.add(key)
        raise RuntimeError("a bug of ours")

    bucket = await queue.bucket(VALUES)
    await bucket.watch(hear)
    await bucket.put("a", b"1")
    await bucket.put("b", b"1")
    await log.until(lambda items: items == ["a", "b"])
