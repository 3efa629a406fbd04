"""The connection: how it begins, how it ends, and what it lives through."""

import asyncio
import socket
import time

import pytest

from pipeline.bus import Bus
from pipeline.errors import BusConnectError, BusUnavailable, NoResponders, NotPermitted, PayloadTooLarge
from pipeline.nats_server import NatsServer
from subjects.limits import PAYLOAD_BYTES_MAX
from tests.server.conftest import TAKERS, VALUES, freeze, thaw


def restart(server: NatsServer) -> None:
    server.kill()
    server.start()


async def lose(server: NatsServer, bus: Bus) -> None:
    """Kill the server and return when the bus knows."""
    await bus.subscribe("held", lambda received: None)
    held = asyncio.create_task(bus.request("held", timeout_s=30))
    await bus.flush()
    server.kill()
    with pytest.raises(BusUnavailable, match="the connection was lost before held was answered"):
        await asyncio.wait_for(held, 3)


async def test_no_server_is_a_sentence_that_names_the_url():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"nats://someone:secret@127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(
        BusConnectError, match=r"no NATS server answers at nats://127\.0\.0\.1:\d+ within 0\.3 s"
    ) as raised:
        await Bus.connect(url, name="test", timeout_s=0.3)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    "url", ["", "localhost", "http://localhost:4222", "nats://", "nats://h:port", "nats://h:99999"]
)
async def test_what_is_no_url_is_a_sentence(url):
    with pytest.raises(BusConnectError, match="not a NATS URL"):
        await Bus.connect(url, name="test", timeout_s=1)


async def test_refused_credentials_are_told_at_once(tmp_path):
    server = NatsServer(tmp_path, extra_config="authorization { user: a, password: b }\n")
    server.start()
    try:
        began_s = time.monotonic()
        with pytest.raises(BusConnectError, match="refuses the credentials"):
            await Bus.connect(server.url, name="test", timeout_s=8)
        assert time.monotonic() - began_s < 4
        bus = await Bus.connect(server.url.replace("//", "//a:b@"), name="test")
        await bus.close()
    finally:
        server.kill()


async def test_a_subscription_and_its_order_survive_a_restart(nats_server, bus, back, log):
    await bus.subscribe("here.*", lambda received: log.add(received.payload))
    restart(nats_server)
    await asyncio.wait_for(back.wait(), 3)
    for i in range(100):
        await bus.publish("here.x", b"%d" % i)
    assert await log.until(lambda items: len(items) == 100) == [b"%d" % i for i in range(100)]


async def test_a_reconnect_takes_less_than_a_second(nats_server, bus, back):
    nats_server.kill()
    nats_server.start()
    began_s = time.monotonic()
    await asyncio.wait_for(back.wait(), 1)
    assert bus.connected
    assert bus.connected_since_s >= began_s - 0.5


async def test_an_error_that_closes_nats_py_for_good_is_survived(queue, back, log):
    """Too large a message is such an error; the bus never sends one, so go round its check."""
    bucket = await queue.bucket(VALUES)
    await queue.subscribe("here", lambda received: log.add(received.payload))
    await queue.pull(TAKERS, lambda delivery: log.add(delivery.payload), credit=4)
    await bucket.watch(lambda key, value: log.add(value))
    first_client = queue._client
    await queue._send("here", b"", {"X": "y" * (first_client.max_payload + 1)}, "")
    await asyncio.wait_for(back.wait(), 5)
    assert queue._client is not first_client
    assert first_client.is_closed
    await queue.publish("here", b"core")
    await queue.publish_durable("queue.a", b"work")
    await bucket.put("k", b"value")
    assert sorted(await log.until(lambda items: len(items) >= 3)) == [b"core", b"value", b"work"]
    with pytest.raises(NoResponders):
        await queue.request("nobody")


async def test_a_callback_that_raises_harms_nobody(bus, log):
    def hear(received):
        log.add(received.payload)
        raise RuntimeError("a bug of ours")

    await bus.subscribe("here", hear)
    await bus.publish("here", b"1")
    await bus.publish("here", b"2")
    assert await log.until(lambda items: len(items) == 2) == [b"1", b"2"]


async def test_unsubscribe_ends_it(bus, log):
    subscription = await bus.subscribe("here", lambda received: log.add(received.payload))
    await subscription.unsubscribe()
    await subscription.unsubscribe()
    await bus.publish("here", b"1")
    await bus.flush()
    assert log.items == []


async def test_drain_hears_all_that_was_sent_before(bus, raw_client, log):
    """1,000 messages lie unread in the socket when the interest ends: each is heard."""
    subscription = await bus.subscribe("here", lambda received: log.add(int(received.payload)))
    await bus.flush()
    raw_client.publish("here", (b"%d" % i for i in range(1_000)))
    assert log.items == []
    await subscription.drain()
    assert log.items == list(range(1_000))


async def test_a_flush_comes_after_what_was_published(bus, monkeypatch):
    """nats-py alone would write its PING first."""
    transport, written = bus._client._transport, []
    write, writelines = transport.write, transport.writelines
    monkeypatch.setattr(transport, "write", lambda piece: (written.append(piece), write(piece)))
    monkeypatch.setattr(transport, "writelines", lambda pieces: (written.extend(pieces), writelines(pieces)))
    await bus.publish("here", b"1")
    await bus.flush()
    assert b"".join(written) == b"PUB here  1\r\n1\r\nPING\r\n"


async def test_a_queue_group_shares(bus, connect, nats_server, log):
    other = await connect(nats_server.url, name="other")
    for member in (bus, other):
        await member.subscribe("work", lambda received: log.add(received.payload), queue="group")
        await member.flush()
    for i in range(200):
        await bus.publish("work", b"%d" % i)
    heard = await log.until(lambda items: len(items) >= 200)
    assert sorted(heard, key=int) == [b"%d" % i for i in range(200)]


async def test_request_and_answer(bus, connect, nats_server):
    async def answer(received):
        await other.respond(received, received.payload + b"!", headers={"A": "b"})

    other = await connect(nats_server.url, name="other")
    await other.subscribe("ask", lambda received: other.spawn(answer(received)))
    await other.flush()
    received = await bus.request("ask", b"hi")
    assert (received.payload, received.headers) == (b"hi!", {"A": "b"})


async def test_nobody_there_is_told_at_once(bus):
    began_s = time.monotonic()
    with pytest.raises(NoResponders, match="nobody listens on ask"):
        await bus.request("ask", timeout_s=5)
    assert time.monotonic() - began_s < 0.5


async def test_no_answer_is_told_in_time(bus):
    await bus.subscribe("ask", lambda received: None)
    with pytest.raises(BusUnavailable, match=r"no answer on ask within 0\.2 s"):
        await bus.request("ask", timeout_s=0.2)


async def test_a_request_of_a_lost_connection_fails_at_once(nats_server, bus):
    await lose(nats_server, bus)


async def test_too_large_is_refused_before_it_is_sent(bus):
    assert bus.max_payload_bytes == PAYLOAD_BYTES_MAX
    with pytest.raises(PayloadTooLarge) as raised:
        await bus.publish("here", bytes(PAYLOAD_BYTES_MAX + 1))
    assert (raised.value.size, raised.value.limit) == (PAYLOAD_BYTES_MAX + 1, PAYLOAD_BYTES_MAX)
    await bus.publish("here", bytes(PAYLOAD_BYTES_MAX), headers={"A": "b"})
    with pytest.raises(PayloadTooLarge) as raised:
        await bus.publish("here", b"", headers={"A": "b" * bus._client.max_payload})
    assert raised.value.size > raised.value.limit == bus._client.max_payload
    await bus.flush()


@pytest.mark.parametrize("subject", ["", "a b", "a\r\nPUB x 0", "a\tb"])
async def test_a_subject_cannot_smuggle_commands(bus, subject):
    with pytest.raises(ValueError, match="not a subject"):
        await bus.publish(subject, b"")


async def test_a_forbidden_subject_is_told_to_who_waits(tmp_path, connect):
    users = 'authorization { users: [{user: a, password: b, permissions: {publish: ["Ok.>"]}}] }\n'
    server = NatsServer(tmp_path, extra_config=users)
    server.start()
    try:
        bus = await connect(server.url.replace("//", "//a:b@"))
        with pytest.raises(NotPermitted, match=r"test may not publish to Not\.ok"):
            await bus.request("Not.ok", timeout_s=5)
        with pytest.raises(NoResponders):
            await bus.request("Ok.nobody", timeout_s=5)
    finally:
        server.kill()


async def test_an_outage_is_buffered_up_to_a_limit(nats_server, bus, connect, back, log):
    await bus.subscribe("here", lambda received: log.add(received.payload))
    await lose(nats_server, bus)
    await bus.publish("here", b"kept")
    with pytest.raises(BusUnavailable, match="wait for the broker already"):
        for _ in range(4):
            await bus.publish("elsewhere", bytes(PAYLOAD_BYTES_MAX))
    nats_server.start()
    await asyncio.wait_for(back.wait(), 3)
    await log.until(lambda items: items == [b"kept"])


async def test_a_publisher_waits_for_a_slow_broker(nats_server, bus):
    """More than the buffer's limit goes through; where the broker reads no more, the wait can be cancelled."""
    for _ in range(64):
        await bus.publish("here", bytes(PAYLOAD_BYTES_MAX))
    await bus.flush()
    freeze(nats_server)
    try:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                for _ in range(100):
                    await bus.publish("here", bytes(PAYLOAD_BYTES_MAX))
    finally:
        thaw(nats_server)
    await bus.flush()


async def test_a_flush_that_is_not_answered_raises(nats_server, bus):
    freeze(nats_server)
    try:
        with pytest.raises(BusUnavailable, match="did not answer a flush"):
            await bus.flush(timeout_s=0.2)
    finally:
        thaw(nats_server)
    await bus.flush(timeout_s=3)  # the late answer to the first did not break the connection
    with pytest.raises(NoResponders):
        await bus.request("nobody")


async def test_close_is_quick_even_when_the_broker_is_frozen(nats_server, connect, queue):
    for state in ("well", "frozen", "dead"):
        bus = await connect(nats_server.url)
        await bus.subscribe("here", lambda received: None)
        if state == "frozen":
            freeze(nats_server)
        if state == "dead":
            nats_server.kill()
        began_s = time.monotonic()
        await bus.close()
        assert time.monotonic() - began_s < 2, state
        if state == "frozen":
            thaw(nats_server)
        with pytest.raises(BusUnavailable):
            await bus.publish("here", b"")
