"""Postboxes on a real broker: delivery, its failure, and peers that die, freeze or come back."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from pipeline.engine.sglang.bus_thread import BusThread
from pipeline.engine.sglang.handshake.postbox import Postbox
from pipeline.engine.sglang.handshake.settings import HandshakeSettings
from pipeline.engine.sglang.handshake.wire import Address, Rank
from pipeline.errors import EngineStartError
from pipeline.nats_server import NatsServer

DEADLINE_S = 15.0
DEATH_S = 1.0
ONLY_RANK = Rank()


class Resident:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.heard: queue.Queue[tuple[str, object]] = queue.Queue()
        self.in_use: set[Address] = set()

    def peers_in_use(self) -> Iterable[Address]:
        return tuple(self.in_use)

    def undelivered(self, peer: Address, rooms: frozenset[int]) -> None:
        self.heard.put(("undelivered", rooms))

    def peer_lost(self, peer: Address, reason: str) -> None:
        self.heard.put(("lost", peer))

    def open_rooms(self) -> dict[str, list[int]]:
        return {}

    def sweep(self) -> None:
        pass

    def route_changed(self, key: str, row: bytes | None) -> None:
        self.heard.put((key, row))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NatsServer]:
    server = NatsServer(tmp_path / "nats")
    server.start()
    yield server
    server.kill()


Open = Callable[..., tuple[Postbox, Resident]]


@pytest.fixture
def open_box(server: NatsServer) -> Iterator[Open]:
    boxes: list[Postbox] = []

    def opened(worker: str, incarnation: str = "i1", rank: Rank = ONLY_RANK) -> tuple[Postbox, Resident]:
        settings = HandshakeSettings(url=server.url, worker=worker, incarnation=incarnation, role="decode")
        thread = BusThread(server.url, worker)
        thread.start()
        box, resident = Postbox(thread, settings, rank, page_bytes=10), Resident()
        box.start()
        box.attach(resident)
        boxes.append(box)
        return box, resident

    yield opened
    for box in boxes:
        box.thread.close()


def read(box: Postbox) -> list[bytes]:
    """The next message, with a deadline."""
    got: queue.Queue[list[bytes]] = queue.Queue()
    threading.Thread(target=lambda: got.put(box.inbox.recv_multipart()), daemon=True).start()
    return got.get(timeout=DEADLINE_S)


def frames(room: int, size: int = 4) -> list[bytes]:
    return [b"NixlMsgGuard", str(room).encode(), b"host", b"1", b"agent", b"\1" * size]


def test_messages_arrive_in_order_even_larger_than_a_subject_carries(open_box: Open) -> None:
    (decode, _), (prefill, _) = open_box("decode"), open_box("prefill")
    sent = [frames(room, size) for room, size in enumerate((4, 1_500_000, 0, 8))]
    for message in sent:
        decode.send(prefill.address, message)
    assert [read(prefill) for _ in sent] == sent


def test_ranks_of_a_worker_have_each_their_own_inbox(open_box: Open) -> None:
    (decode, _), (first, _) = open_box("decode"), open_box("prefill")
    second, _ = open_box("prefill", "i1", Rank(tp=1))
    decode.send(second.address, frames(2))
    decode.send(first.address, frames(1))
    assert read(first) == frames(1)
    assert read(second) == frames(2)


def test_a_message_to_nobody_fails_its_room_at_once(open_box: Open) -> None:
    decode, resident = open_box("decode")
    decode.send(Address("nobody", "i1"), frames(41))
    assert resident.heard.get(timeout=DEATH_S) == ("undelivered", frozenset({41}))


def test_a_peer_that_leaves_the_bus_is_lost_within_a_second(open_box: Open) -> None:
    (_, resident), (prefill, _) = open_box("decode"), open_box("prefill")
    resident.in_use.add(prefill.address)
    prefill.thread.close()
    assert resident.heard.get(timeout=DEATH_S) == ("lost", prefill.address)


def test_a_peer_that_is_not_in_use_is_not_judged(open_box: Open) -> None:
    (_, resident), (prefill, _) = open_box("decode"), open_box("prefill")
    prefill.thread.close()
    with pytest.raises(queue.Empty):
        resident.heard.get(timeout=DEATH_S)


def test_messages_outlive_the_broker_and_nobody_is_judged_for_its_absence(open_box: Open, server: NatsServer) -> None:
    (decode, resident), (prefill, _) = open_box("decode"), open_box("prefill")
    decode.send(prefill.address, frames(1))
    assert read(prefill) == frames(1)
    resident.in_use.add(prefill.address)
    server.kill()
    for room in (2, 3):
        decode.send(prefill.address, frames(room))
    server.start()
    assert [read(prefill) for _ in range(2)] == [frames(2), frames(3)]
    assert resident.heard.empty()


def test_routes_reach_who_comes_later_and_a_worker_of_the_same_name_takes_over(open_box: Open) -> None:
    former, _ = open_box("prefill", "i1")
    former.put_row(str(former.address), b"row 1")
    _, resident = open_box("decode")
    assert resident.heard.get(timeout=DEADLINE_S) == (str(former.address), b"row 1")
    former.thread.close()
    newer, _ = open_box("prefill", "i2")
    newer.put_row(str(newer.address), b"row 2")
    assert resident.heard.get(timeout=DEADLINE_S) == (str(former.address), None)
    assert resident.heard.get(timeout=DEADLINE_S) == (str(newer.address), b"row 2")


def test_routes_are_put_again_after_a_broker_that_forgot_them(open_box: Open, server: NatsServer) -> None:
    prefill, _ = open_box("prefill")
    prefill.put_row(str(prefill.address), b"row")
    server.kill()
    server.start()
    _, resident = open_box("decode")
    assert resident.heard.get(timeout=DEADLINE_S) == (str(prefill.address), b"row")


def test_what_the_broker_forgot_is_gone_only_when_nobody_puts_it_again(open_box: Open, server: NatsServer) -> None:
    prefill, _ = open_box("prefill")
    prefill.put_row(str(prefill.address), b"row", keep=False)
    _, resident = open_box("decode")
    assert resident.heard.get(timeout=DEADLINE_S) == (str(prefill.address), b"row")
    server.kill()
    server.start()
    with pytest.raises(queue.Empty):
        resident.heard.get(timeout=DEATH_S)
    assert resident.heard.get(timeout=DEADLINE_S) == (str(prefill.address), None)


def test_no_broker_is_a_sentence() -> None:
    with pytest.raises(EngineStartError, match=r"127\.0\.0\.1:1"):
        BusThread("nats://127.0.0.1:1", "w").start()
