"""SGLang's NIXL disaggregation over a postbox: its own messages and bookkeeping, another transport and other deaths.

The classes derive from SGLang's and replace only what opens a socket or waits for one. See docs/adr/0002.
"""

import itertools
import logging
import threading
import time
import weakref
from collections.abc import Iterable
from typing import Any, Final

from sglang.srt.disaggregation.base.conn import KVArgs, KVPoll
from sglang.srt.disaggregation.nixl.conn import KVArgsRegisterInfo, NixlKVManager, NixlKVReceiver, NixlKVSender
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.server_args import ServerArgs

from pipeline import metrics
from pipeline.engine.sglang import bus_thread
from pipeline.engine.sglang.handshake.postbox import Inbox, Postbox
from pipeline.engine.sglang.handshake.routes import RouteBook, RouteRequests
from pipeline.engine.sglang.handshake.settings import HandshakeSettings
from pipeline.engine.sglang.handshake.wire import Address, Operation, Rank
from pipeline.errors import EngineStartError
from subjects import headers

ROUTE_WAIT_S: Final = 0.5
"""How long a room waits for the registration of a prefill worker that this process has not heard of."""

ROOM_TABLES: Final = {
    "status": "request_status",
    "failure": "failure_records",
    "receiving": "transfer_statuses",
    "held_after_abort": "_deferred_abort_ack_tracker",
    "transfer": "transfer_infos",
    "outstanding": "_staging_outstanding",
}
"""What SGLang's manager keeps by room; not every role and release has each."""
LATE_S: Final = 2.0
"""Decode forgets what it noted of a room that no request of its has had for so long."""
ORPHAN_S: Final = 60.0
"""Prefill forgets a room that decode named and no request of this engine opened within this time."""

logger = logging.getLogger(__name__)


class Publisher:
    """Stands where SGLang keeps a ZMQ PUSH socket to one rank."""

    def __init__(self, postbox: Postbox, to: Address) -> None:
        self._postbox, self._to = postbox, to

    def send_multipart(self, frames: list[bytes]) -> None:
        """Never waits; what cannot be delivered fails its room."""
        self._postbox.send(self._to, frames)


class Place:
    """This scheduler process on the bus: set up by the KV manager before SGLang's own code asks for sockets."""

    def __init__(self, settings: HandshakeSettings) -> None:
        self._settings = settings
        self._postbox: Postbox | None = None
        self.book = RouteBook()
        self.requests = RouteRequests(lambda: self.postbox, self.book)
        self._lock = threading.Lock()

    @property
    def postbox(self) -> Postbox:
        if self._postbox is None:
            raise EngineStartError("SGLang asked for a socket before its NIXL KV manager was made")
        return self._postbox

    def open(self, rank: Rank, page_bytes: int) -> Postbox:
        """Connect as `rank`. Raises EngineStartError."""
        settings = self._settings
        thread = bus_thread.of_this_process(settings.url, f"engine {settings.worker}.{settings.incarnation}.{rank}")
        self._postbox = Postbox(thread, settings, rank, page_bytes)
        self._postbox.start()
        return self._postbox

    def local_ip(self, *_: object, **__: object) -> str:
        """Takes the place of SGLang's `get_local_ip_auto`."""
        return self.postbox.address.host

    def socket_on_host(self, *_: object, **__: object) -> tuple[int, Inbox]:
        """Takes the place of SGLang's `get_zmq_socket_on_host`."""
        return self.postbox.address.port, self.postbox.inbox

    def publisher(self, endpoint: str) -> Publisher:
        return Publisher(self.postbox, Address.of_endpoint(endpoint))

    def connect(self, endpoint: str, is_ipv6: bool = False) -> tuple[Publisher, threading.Lock]:
        """Takes the place of `CommonKVReceiver._connect`."""
        return self.publisher(endpoint), self._lock


def kv_manager(place: Place) -> type[NixlKVManager]:
    """The NIXL KV manager of a process whose place on the bus is `place`."""

    class NatsKVManager(_NatsKVManager):
        pass

    NatsKVManager.place = place
    return NatsKVManager


class _NatsKVManager(NixlKVManager):
    """SGLang's manager; also the postbox's resident, called on its thread."""

    place: Place

    def __init__(
        self,
        args: KVArgs,
        disaggregation_mode: DisaggregationMode,
        server_args: ServerArgs,
        is_mla_backend: bool | None = False,
    ) -> None:
        if vars(server_args).get("enable_pd_role_switch"):
            raise EngineStartError("enable_pd_role_switch needs SGLang's own sockets; it does not go with NATS")
        rank = Rank(dp=args.system_dp_rank or 0, pp=args.pp_rank, tp=args.engine_rank)
        self._postbox = self.place.open(rank, sum(args.kv_item_lens))
        self._got_s: dict[int, float] = {}  # prefill: when a room's transfer message was here
        self._opened_s: dict[int, float] = {}  # prefill: when a room was first heard of
        self.senders: weakref.WeakValueDictionary[int, NatsKVSender] = weakref.WeakValueDictionary()
        self._late_s: dict[int, float] = {}  # decode: since when a room has an account and no request
        self._warm_rooms = itertools.count(-1, -1)  # never a request's: those are not negative
        super().__init__(args, disaggregation_mode, server_args, is_mla_backend)
        self._postbox.attach(self)

    @property
    def _decodes(self) -> bool:
        return self.disaggregation_mode == DisaggregationMode.DECODE

    # --- in place of SGLang's sockets -------------------------------------------------------------

    def _connect(self, endpoint: str, is_ipv6: bool = False) -> Publisher:
        return self.place.publisher(endpoint)

    def _send_multipart_locked(self, endpoint: str, parts: list[bytes], is_ipv6: bool = False) -> None:
        self._connect(endpoint).send_multipart(parts)

    def _start_heartbeat_checker_thread(self) -> None:
        """SGLang polls prefill's HTTP server every 5 s; the postbox knows within half a second."""

    # --- decode -----------------------------------------------------------------------------------

    def try_ensure_parallel_info(self, bootstrap_addr: str) -> bool:
        """As SGLang's, but an unknown or unfit worker fails its rooms now, not after 15 tries of a second."""
        if bootstrap_addr in self.prefill_info_table:
            return True
        if not self.place.book.ready(_host(bootstrap_addr)):
            self._postbox.run(lambda: self._await_route(bootstrap_addr))
            return False
        try:
            return super().try_ensure_parallel_info(bootstrap_addr)
        except RuntimeError as unfit:  # SGLang lets it end the scheduler
            self._fail_rooms_of(bootstrap_addr, str(unfit))
            return False

    def _await_route(self, bootstrap_addr: str) -> None:
        """The registration may be on its way. Runs beside the scheduler and the postbox."""
        time.sleep(ROUTE_WAIT_S)
        if not self.place.book.ready(_host(bootstrap_addr)):
            self._fail_rooms_of(bootstrap_addr, f"prefill worker {_host(bootstrap_addr)} is not registered")

    def _fail_rooms_of(self, bootstrap_addr: str, reason: str) -> None:
        for room in tuple(self.addr_to_rooms_tracker.get(bootstrap_addr, ())):
            self._fail_room(room, reason)

    def _fail_room(self, room: int, reason: str) -> None:
        if room in self.request_status and self.check_status(room) != KVPoll.Success:
            self.record_failure(room, reason)
            self.update_status(room, KVPoll.Failed)

    def _warm(self, host: str) -> None:
        """Register this rank's memory with a prefill worker before the first request between the two."""
        bootstrap_addr = f"{host}:{self.bootstrap_port}"
        try:
            if not self.try_ensure_parallel_info(bootstrap_addr):
                return
            for dp_rank in range(self.prefill_info_table[bootstrap_addr].dp_size):
                receiver = NixlKVReceiver(self, bootstrap_addr, next(self._warm_rooms))
                receiver.init(dp_rank)
                receiver.clear()
        except Exception:  # the outermost guard of a thread; the first request registers in any case
            logger.exception("registering with prefill worker %s failed", host)

    # --- prefill ----------------------------------------------------------------------------------

    def _add_remote_peer(self, decode_kv_args: KVArgsRegisterInfo) -> None:
        """Connect at registration, as the first transfer of a pair would take the time. One bad peer must not
        end the thread that serves all."""
        known = decode_kv_args.agent_name in self.decode_kv_args_table
        try:
            super()._add_remote_peer(decode_kv_args)
            if not known:
                self.agent.make_connection(decode_kv_args.agent_name)
        except Exception:  # NIXL's errors have no common base; the peer's rooms fail at their transfer
            logger.exception("decode rank %s cannot be registered", decode_kv_args.endpoint)
            self.decode_kv_args_table.pop(decode_kv_args.agent_name, None)

    def update_status(self, bootstrap_room: int, status: KVPoll) -> None:
        """Note when a room's transfer message came, and tell readers of the bus when its KV was written."""
        if not self._decodes:
            self._note(bootstrap_room, status)
        super().update_status(bootstrap_room, status)

    def _note(self, room: int, status: KVPoll) -> None:
        self._opened_s.setdefault(room, time.monotonic())
        if status == KVPoll.WaitingForInput:
            self._got_s[room] = time.monotonic()
        elif status == KVPoll.Success and (got_s := self._got_s.pop(room, None)) is not None:
            self._report_written(room, got_s)

    def _report_written(self, room: int, got_s: float) -> None:
        now_s, sender = time.monotonic(), self.senders.get(room)
        handed_s = sender.handed_s if sender is not None else now_s
        metrics.KV_TRANSFER_SECONDS.observe(now_s - got_s)
        metrics.KV_WRITE_SECONDS.observe(now_s - handed_s)
        for info in tuple(self.transfer_infos.get(room, {}).values()):
            pages = len(info.dst_kv_indices)
            metrics.KV_TRANSFER_BYTES.inc(pages * self.kv_item_lens_sum)
            said = {
                headers.HANDSHAKE_STATUS: "success",
                headers.HANDSHAKE_PAGES: str(pages),
                headers.HANDSHAKE_BYTES: str(pages * self.kv_item_lens_sum),
                headers.HANDSHAKE_US: str(int((now_s - got_s) * 1e6)),
                headers.HANDSHAKE_WRITE_US: str(int((now_s - handed_s) * 1e6)),
            }
            self._postbox.report(Address.of(info.endpoint, info.dst_port), Operation.STATUS, room, said)

    def sweep(self) -> None:
        """Forget rooms that no request of this engine has any more, or none has claimed for long.

        SGLang drops a room with the request that sends it. It keeps those for ever that decode opened and gave
        up before their request came, and those whose request was aborted in the waiting queue. And it keeps the
        count of chunks in flight, at nought, of a room that was aborted between two chunks.
        """
        if self._decodes:
            self._sweep_late()
            return
        counts = vars(self).get(ROOM_TABLES["outstanding"], {})
        for room, in_flight in tuple(counts.items()):
            if in_flight <= 0 and room not in self.request_status:
                counts.pop(room, None)
        for room, opened_s in tuple(self._opened_s.items()):
            status = self.request_status.get(room)
            if room in self.senders:
                continue
            if status in (None, KVPoll.Failed) or time.monotonic() - opened_s > ORPHAN_S:
                self._forget_room(room)

    def _sweep_late(self) -> None:
        """Decode: NIXL's word of a room that was given up already begins an account that nobody ends."""
        accounts, now_s = vars(self)[ROOM_TABLES["receiving"]], time.monotonic()
        late = [room for room in tuple(accounts) if room not in self.request_status]
        self._late_s = {room: self._late_s.get(room, now_s) for room in late}
        for room, seen_s in self._late_s.items():
            if now_s - seen_s > LATE_S:
                accounts.pop(room, None)

    def _forget_room(self, room: int) -> None:
        self._opened_s.pop(room, None)
        self._got_s.pop(room, None)
        self.request_status.pop(room, None)
        self.transfer_infos.pop(room, None)
        self.req_to_decode_prefix_len.pop(room, None)
        with self.failure_lock:
            self.failure_records.pop(room, None)

    def _rooms_with(self, peer: Address) -> tuple[int, ...]:
        """Prefill's open rooms whose pages a decode rank has named."""
        return tuple(
            room
            for room, infos in tuple(self.transfer_infos.items())
            if any(Address.of(info.endpoint, info.dst_port) == peer for info in tuple(infos.values()))
        )

    # --- the postbox's resident -------------------------------------------------------------------

    def peers_in_use(self) -> Iterable[Address]:
        if self._decodes:
            hosts = [_host(addr) for addr, rooms in tuple(self.addr_to_rooms_tracker.items()) if rooms]
            return [Address.of(*at) for host in hosts for at in self.place.book.addresses(host)]
        rooms = tuple(self.transfer_infos.values())
        return [Address.of(info.endpoint, info.dst_port) for infos in rooms for info in tuple(infos.values())]

    def open_rooms(self) -> dict[str, list[int]]:
        held = vars(self)
        return {name: sorted(tuple(held[table])) for name, table in ROOM_TABLES.items() if table in held}

    def undelivered(self, peer: Address, rooms: frozenset[int]) -> None:
        for room in rooms:
            self._fail_room(room, f"{peer} does not receive: no responders on the bus")
        if self._decodes:
            self._forget_registration(peer)

    def _forget_registration(self, peer: Address) -> None:
        """The next room registers again."""
        with self.connection_lock:
            for key, infos in tuple(self.connection_pool.items()):
                if any((info["rank_ip"], int(info["rank_port"])) == (peer.host, peer.port) for info in infos):
                    del self.connection_pool[key]

    def peer_lost(self, peer: Address, reason: str) -> None:
        if self._decodes:
            for bootstrap_addr in tuple(self.addr_to_rooms_tracker):
                if _host(bootstrap_addr) == peer.host:
                    self._fail_rooms_of(bootstrap_addr, f"prefill worker {peer.host} is down: {reason}")
                    self._handle_node_failure(bootstrap_addr)
            return
        for room in self._rooms_with(peer):
            self._fail_room(room, f"decode worker {peer.host} is down: {reason}")

    def route_changed(self, key: str, row: bytes | None) -> None:
        host = self.place.book.change(key, row)
        if not self._decodes:
            return
        if row is None:
            self.peer_lost(Address.parse(key), "its registration is gone")
        elif self.place.book.ready(host):
            self._postbox.run(lambda: self._warm(host))


class NatsKVSender(NixlKVSender):
    """SGLang's sender of one room, known to its manager for as long as a request holds it."""

    def __init__(
        self, mgr: _NatsKVManager, bootstrap_addr: str, bootstrap_room: int, *args: Any, **kwargs: Any
    ) -> None:
        self.handed_s = time.monotonic()  # when KV was last handed over to be written
        mgr.senders[bootstrap_room] = self
        super().__init__(mgr, bootstrap_addr, bootstrap_room, *args, **kwargs)

    def send(self, *args: Any, **kwargs: Any) -> None:
        self.handed_s = time.monotonic()
        super().send(*args, **kwargs)


def _host(bootstrap_addr: str) -> str:
    """SGLang's `<host>:<port>` without the port."""
    return bootstrap_addr.rpartition(":")[0]
