"""One rank's place on the bus: the transport under SGLang's KV manager, on the process' `BusThread`.

SGLang's scheduler never waits for the broker: sending hands a message to the thread, receiving reads a queue
that the thread fills. Every message is receipted (see `link`). While a room is open its peers are pinged, so
that a killed process is noticed by the broker's "no responders" and a frozen one by its silence. Pings have a
subject of their own: a reader of `sglang.bootstrap.>` is a responder in the broker's eyes.
"""

import asyncio
import functools
import logging
import queue
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final, Protocol

import msgspec

from pipeline import metrics
from pipeline.bus import Bucket, Received
from pipeline.engine.sglang.bus_thread import BusThread
from pipeline.engine.sglang.handshake.link import MESSAGES_MAX, Incoming, Outbound, Outgoing
from pipeline.engine.sglang.handshake.settings import HandshakeSettings
from pipeline.engine.sglang.handshake.wire import (
    NO_RESPONDERS,
    PAIR,
    Address,
    Operation,
    Rank,
    pack,
    read_frames,
    unix_us,
    unpack,
)
from pipeline.errors import EngineStartError, PipelineError
from subjects import headers, limits, streams

OPEN_S: Final = 10.0
PUT_S: Final = 5.0
WATCH_S: Final = 0.25
SETTLE_S: Final = 0.05
RESEND_S: Final = 1.0
RECEIPT_S: Final = limits.PRESENCE_S
"""A message without a receipt for this long, while the bus was up, has failed."""
ABSENCES_MAX: Final = 2
"""A peer is lost after this many pings or messages in a row that nobody received."""
INBOX_MESSAGES_MAX: Final = 65_536
_FRAMES_BYTES_MAX: Final = limits.PAYLOAD_BYTES_MAX - 4096  # room for the headers

logger = logging.getLogger(__name__)


class Resident(Protocol):
    """Who lives at the address. Called on the postbox's thread; must not block or raise."""

    def peers_in_use(self) -> Iterable[Address]:
        """The ranks with which rooms are open now."""
        ...

    def undelivered(self, peer: Address, rooms: frozenset[int]) -> None:
        """Messages to `peer` were given up: these rooms, and any registration there, have failed."""
        ...

    def peer_lost(self, peer: Address, reason: str) -> None:
        """`peer` is down: all its rooms have failed."""
        ...

    def open_rooms(self) -> dict[str, list[int]]:
        """The rooms that SGLang holds anything for, by what it holds."""
        ...

    def sweep(self) -> None:
        """Four times a second: drop what nobody will ask for."""
        ...

    def route_changed(self, key: str, row: bytes | None) -> None:
        """A row of the routes bucket was put, or went (None)."""
        ...


class Inbox:
    """What SGLang's receiving thread reads in place of a ZMQ PULL socket."""

    def __init__(self) -> None:
        self._messages: queue.Queue[list[bytes]] = queue.Queue(INBOX_MESSAGES_MAX)

    def recv_multipart(self) -> list[bytes]:
        """Waits for the next message."""
        return self._messages.get()

    def put(self, frames: list[bytes]) -> bool:
        """False where the reader is so far behind that the message cannot be kept."""
        try:
            self._messages.put_nowait(frames)
        except queue.Full:
            return False
        return True


@dataclass
class _Peer:
    """What this rank knows of another."""

    address: Address
    number: int  # stands for the peer in reply subjects
    outgoing: Outgoing = field(default_factory=Outgoing)
    incoming: Incoming = field(default_factory=Incoming)
    parts: list[bytes] = field(default_factory=list)
    absences: int = 0
    heard_s: float = 0.0
    asked_s: float | None = None  # when it was first pinged without having been heard of since
    lost: bool = False


class Postbox:
    """Sends and receives for one rank. Public methods may be called from any thread."""

    def __init__(self, thread: BusThread, settings: HandshakeSettings, rank: Rank, page_bytes: int) -> None:
        """`thread`: started. `page_bytes`: KV bytes of one page over all layers, for readers of the messages."""
        self.address = Address(settings.worker, settings.incarnation, rank)
        self.inbox = Inbox()
        self.thread, self._loop, self._bus = thread, thread.loop, thread.bus
        self._page_bytes = page_bytes
        self._resident: Resident | None = None
        self._rows: dict[str, bytes] = {}  # of this worker, in the routes bucket
        self._peers: dict[Address, _Peer] = {}
        self._by_number: list[_Peer] = []
        self._stood_still_s = -limits.PRESENCE_S

    def start(self) -> None:
        """Subscribe. Raises EngineStartError."""
        try:
            self.thread.run(self._open(), OPEN_S)
        except (PipelineError, TimeoutError) as error:
            reason = str(error) or f"no answer within {OPEN_S:.0f} s"
            raise EngineStartError(f"the handshake cannot start: {reason}") from error

    def attach(self, resident: Resident) -> None:
        """From now on `resident` is told of peers and routes; it gets all routes known so far first."""
        self.thread.call(self._attach, resident)

    def send(self, to: Address, frames: list[bytes]) -> None:
        """Deliver SGLang's frames once and in order, or report them as undelivered."""
        self.thread.call(self._send, to, frames)

    def report(self, to: Address, operation: str, room: int, said: dict[str, str]) -> None:
        """Publish a message for readers only; the peer's SGLang does not see it."""
        said = {headers.HANDSHAKE_FROM: str(self.address)} | said
        self.thread.call(self._publish, to.subject(operation, str(room)), b"", said)

    def put_row(self, key: str, row: bytes, *, keep: bool = True) -> None:
        """Put a row into the routes bucket and wait for the broker; `keep`: put it again before it ages.

        Raises TimeoutError or PipelineError; a kept row is put again all the same.
        """
        if keep:
            self._rows[key] = row
        self.thread.run(self._bucket.put(key, row), PUT_S)

    def run(self, task: Callable[[], None]) -> None:
        """Run a slow function on another thread, so that the postbox goes on."""
        self.thread.call(self._loop.run_in_executor, None, task)

    # --- on the thread ----------------------------------------------------------------------------

    async def _open(self) -> None:
        self._outbox: asyncio.Queue[tuple[str, bytes, dict[str, str], str]] = asyncio.Queue(MESSAGES_MAX)
        self._first_connected_s = self._bus.connected_since_s
        self._bus.on_reconnect(self._reconnected)
        await self._bus.subscribe(self.address.inbox(), self._on_message)
        await self._bus.subscribe(self.address.presence(), self._on_ping)
        self._pongs = self._bus.new_inbox()
        await self._bus.subscribe(f"{self._pongs}.*", self._on_pong)
        self._bucket: Bucket = await self._bus.bucket(streams.ROUTES)
        await self._drop_former_rows()
        await self._bus.flush(OPEN_S)
        for work in (self._drain(), self._watch(), self._refresh()):
            self._bus.spawn(work)

    async def _drop_former_rows(self) -> None:
        """A worker of the same name has taken the former one's place."""
        for key in await self._bucket.entries():
            worker, incarnation, *_ = key.split(".")
            if worker == self.address.worker and incarnation != self.address.incarnation:
                await self._bucket.delete(key)

    def _attach(self, resident: Resident) -> None:
        self._resident = resident
        self._bus.spawn(self._follow_routes(resident))

    async def _follow_routes(self, resident: Resident) -> None:
        self._routes = await self._bucket.watch(functools.partial(self._on_route, resident))

    def _on_route(self, resident: Resident, key: str, row: bytes | None) -> None:
        """A restarted broker has forgotten all rows: their owners, who are back in a moment, put them again."""
        if row is None and self._calm(self._loop.time()):
            self._loop.call_later(limits.PRESENCE_S, self._forget_route, resident, key)
        else:
            resident.route_changed(key, row)

    def _forget_route(self, resident: Resident, key: str) -> None:
        if key not in self._routes.values:
            resident.route_changed(key, None)

    async def _drain(self) -> None:
        """Publish in the order of sending. What an outage swallows is sent again for want of a receipt."""
        while True:
            subject, payload, said, reply = await self._outbox.get()
            try:
                await self._bus.publish(subject, payload, headers=said, reply=reply)
            except PipelineError as error:
                logger.warning("handshake message on %s was not published: %s", subject, error)

    async def _refresh(self) -> None:
        """Put this worker's rows again before they age."""
        while True:
            await asyncio.sleep(streams.ROUTES.ttl_s / 3)
            await self._put_rows()

    async def _put_rows(self) -> None:
        for key, row in tuple(self._rows.items()):
            try:
                await self._bucket.put(key, row)
            except (PipelineError, TimeoutError) as error:
                logger.warning("route %s was not put: %s", key, error)

    async def _reconnected(self) -> None:
        """The bus was away: register again, and send again what has no receipt."""
        now_s = self._loop.time()
        for peer in self._by_number:
            peer.absences, peer.asked_s = 0, None
            if peer.outgoing:
                self._resend(peer, now_s)
        await self._put_rows()

    # --- sending ----------------------------------------------------------------------------------

    def _peer(self, address: Address) -> _Peer:
        peer = self._peers.get(address)
        if peer is None:
            peer = self._peers[address] = _Peer(address, len(self._by_number))
            self._by_number.append(peer)
        return peer

    def _send(self, to: Address, frames: list[bytes]) -> None:
        peer, meaning, now_s = self._peer(to), read_frames(frames), self._loop.time()
        said = {headers.HANDSHAKE_FROM: str(self.address), headers.HANDSHAKE_SENT: str(unix_us())}
        if meaning.pages:
            said[headers.HANDSHAKE_PAGES] = str(meaning.pages)
            said[headers.HANDSHAKE_BYTES] = str(meaning.pages * self._page_bytes)
        parts = pack(frames, _FRAMES_BYTES_MAX)
        for number, part in enumerate(parts, 1):
            if len(parts) > 1:
                said = said | {headers.HANDSHAKE_PART: f"{number}/{len(parts)}"}
            message = peer.outgoing.add(meaning.operation, meaning.room, part, said, now_s)
            self._post(peer, message, now_s)
        self._ping(peer)

    def _post(self, peer: _Peer, message: Outbound, now_s: float) -> None:
        said = message.headers | {headers.HANDSHAKE_SEQ: f"{message.seq}/{peer.outgoing.base}"}
        reply = self._reply_subject(peer, message.room, message.seq)
        peer.outgoing.sent_s = now_s
        self._publish(peer.address.subject(message.operation, message.room), message.payload, said, reply)

    def _resend(self, peer: _Peer, now_s: float) -> None:
        for message in peer.outgoing:
            self._post(peer, message, now_s)

    def _ping(self, peer: _Peer) -> None:
        self._publish(peer.address.presence(), b"", {}, f"{self._pongs}.{peer.number}")

    def _publish(self, subject: str, payload: bytes, said: dict[str, str], reply: str = "") -> None:
        try:
            self._outbox.put_nowait((subject, payload, said, reply))
        except asyncio.QueueFull:
            logger.warning("handshake message on %s was dropped: %d are waiting", subject, MESSAGES_MAX)

    def _reply_subject(self, peer: _Peer, room: str, seq: int) -> str:
        """Where the receipt, or the broker's "no responders", names the room, the peer and the message."""
        return self.address.subject(Operation.RECEIPT, f"{room}_{peer.number}_{seq}")

    # --- receiving --------------------------------------------------------------------------------

    def _on_message(self, received: Received) -> None:
        found = Address.of_subject(received.subject)
        said = received.headers or {}
        if found is None:
            return
        _, operation, room = found
        if operation == Operation.RECEIPT:
            self._on_receipt(room, said)
            return
        if operation == Operation.ROOMS:
            self._answer_rooms(received.reply)
            return
        try:
            peer = self._peer(Address.parse(said[headers.HANDSHAKE_FROM]))
            seq, base = map(int, said.get(headers.HANDSHAKE_SEQ, "0/0").split("/"))
        except (KeyError, ValueError):
            logger.warning("dropped a message on %s without a sender or a number", received.subject)
            return
        self._heard(peer)
        if seq and peer.incoming.take(seq, base):
            self._take(peer, received.payload, said)
        if received.reply:
            self._receipt(peer, received.reply, said)

    def _take(self, peer: _Peer, payload: bytes, said: dict[str, str]) -> None:
        """Hand a whole message to SGLang."""
        part, parts = map(int, said.get(headers.HANDSHAKE_PART, "1/1").split("/"))
        if part == 1:
            peer.parts.clear()
        peer.parts.append(payload)
        if part < parts:
            return
        try:
            frames = unpack(peer.parts)
        except msgspec.DecodeError as error:
            logger.warning("dropped an unreadable handshake message from %s: %s", peer.address, error)
            return
        finally:
            peer.parts.clear()
        if not self.inbox.put(frames):
            logger.error("dropped a message from %s: %d are unread", peer.address, INBOX_MESSAGES_MAX)

    def _receipt(self, peer: _Peer, reply: str, said: dict[str, str]) -> None:
        answer = {
            headers.HANDSHAKE_FROM: str(self.address),
            headers.HANDSHAKE_SEQ: f"{peer.incoming.last}/0",
        }
        if sent := said.get(headers.HANDSHAKE_SENT):
            answer[headers.HANDSHAKE_US] = str(max(0, unix_us() - int(sent)))
        self._publish(reply, b"", answer)

    def _answer_rooms(self, reply: str) -> None:
        if reply and self._resident is not None:
            said = {headers.HANDSHAKE_FROM: str(self.address)}
            self._publish(reply, msgspec.json.encode(self._resident.open_rooms()), said)

    def _on_ping(self, received: Received) -> None:
        if received.reply:
            self._publish(received.reply, b"", {})

    def _on_pong(self, received: Received) -> None:
        peer = self._by_number[int(received.subject.rpartition(".")[2])]
        if (received.headers or {}).get("Status") == NO_RESPONDERS:
            self._absent(peer)
        else:
            self._heard(peer)

    def _on_receipt(self, room: str, said: dict[str, str]) -> None:
        try:
            _, number, _ = room.split("_")
            peer = self._by_number[int(number)]
        except (ValueError, IndexError):
            return
        if said.get("Status") == NO_RESPONDERS:
            self._absent(peer)
            return
        self._heard(peer)
        if (took_us := said.get(headers.HANDSHAKE_US, "")).isdigit():
            metrics.HANDSHAKE_SECONDS.observe(int(took_us) / 1e6)
        peer.outgoing.receipt(int(said.get(headers.HANDSHAKE_SEQ, "0/0").partition("/")[0]))

    # --- peers ------------------------------------------------------------------------------------

    def _heard(self, peer: _Peer) -> None:
        peer.absences, peer.asked_s, peer.lost = 0, None, False
        peer.heard_s = self._loop.time()

    def _calm(self, now_s: float) -> bool:
        """True for a while after the bus, or this process, was away: its peers then seem to be."""
        connected_s = self._bus.connected_since_s  # on the loop's clock
        reconnected = connected_s > self._first_connected_s and now_s - connected_s < limits.PRESENCE_S
        return reconnected or now_s - self._stood_still_s < limits.PRESENCE_S

    def _absent(self, peer: _Peer) -> None:
        """Nobody receives at the peer's address. Judged a moment later, as the answer to what the bus sends right
        after an outage overtakes the news that there was one."""
        self._loop.call_later(SETTLE_S, self._judge, peer, self._loop.time())

    def _judge(self, peer: _Peer, absent_s: float) -> None:
        if peer.heard_s > absent_s or not self._bus.connected or self._calm(self._loop.time()):
            return
        self._give_up(peer)
        peer.absences += 1
        if peer.absences < ABSENCES_MAX:
            self._ping(peer)
        else:
            self._lose(peer, "it left the bus")

    def _give_up(self, peer: _Peer) -> None:
        messages = peer.outgoing.give_up()
        if messages and self._resident is not None:
            rooms = frozenset(int(message.room) for message in messages if message.room != PAIR)
            self._resident.undelivered(peer.address, rooms)

    def _lose(self, peer: _Peer, reason: str) -> None:
        self._give_up(peer)
        if not peer.lost and self._resident is not None:
            peer.lost = True
            self._resident.peer_lost(peer.address, reason)

    async def _watch(self) -> None:
        """Four times a second: ping the peers of open rooms, send again what has no receipt, judge the silent."""
        before_s = self._loop.time()
        while True:
            await asyncio.sleep(WATCH_S)
            now_s = self._loop.time()
            if now_s - before_s > 4 * WATCH_S:
                self._stood_still_s = now_s
            before_s = now_s
            if self._resident is None:
                continue
            self._resident.sweep()
            if self._bus.connected:
                self._look_at_peers(frozenset(self._resident.peers_in_use()), now_s)

    def _look_at_peers(self, in_use: frozenset[Address], now_s: float) -> None:
        calm = self._calm(now_s)
        for address in in_use:
            self._ping(self._peer(address))
        for peer in tuple(self._by_number):
            waiting = len(peer.outgoing) > 0
            if waiting and now_s - peer.outgoing.sent_s >= RESEND_S:
                self._resend(peer, now_s)
            if calm or not (waiting or peer.address in in_use):
                peer.asked_s = None
            elif peer.asked_s is None:
                peer.asked_s = now_s
            elif now_s - peer.asked_s > RECEIPT_S:
                self._lose(peer, f"it was silent for {RECEIPT_S:.0f} s")
