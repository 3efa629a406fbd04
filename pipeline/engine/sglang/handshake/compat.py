"""Every symbol of SGLang that the handshake leans on, checked at start and not in the middle of a handshake.

The same code runs with SGLang 0.5.17 and 0.5.21. A release that renames one of these makes the engine fail at
start with a sentence that names it.
"""

import functools
import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from pipeline.errors import EngineStartError

COMMON: Final = "sglang.srt.disaggregation.common.conn"
NIXL: Final = "sglang.srt.disaggregation.nixl.conn"
PACKAGE: Final = "sglang.srt.disaggregation.nixl"


@dataclass(frozen=True)
class Symbol:
    """A name in a module of SGLang and, for a function, the parameters that it must have, in this order."""

    module: str
    name: str  # dotted below the module
    parameters: tuple[str, ...] | None = None


SYMBOLS: Final = (
    Symbol(COMMON, "get_local_ip_auto", ("fallback",)),
    Symbol(COMMON, "get_zmq_socket_on_host", ("context", "socket_type", "host")),
    Symbol(COMMON, "requests"),
    Symbol(COMMON, "_get_bootstrap_session", ("bootstrap_addr",)),
    Symbol(COMMON, "CommonKVReceiver._connect", ("endpoint", "is_ipv6")),
    Symbol(COMMON, "CommonKVReceiver.disconnect_endpoint", ("endpoint",)),
    Symbol(COMMON, "CommonKVReceiver._connect_to_bootstrap_server", ("bootstrap_info",)),
    Symbol(COMMON, "CommonKVManager._connect", ("self", "endpoint", "is_ipv6")),
    Symbol(COMMON, "CommonKVManager._send_multipart_locked", ("self", "endpoint", "parts", "is_ipv6")),
    Symbol(COMMON, "CommonKVManager._start_heartbeat_checker_thread", ("self",)),
    Symbol(COMMON, "CommonKVManager.register_to_bootstrap", ("self",)),
    Symbol(COMMON, "CommonKVManager.try_ensure_parallel_info", ("self", "bootstrap_addr")),
    Symbol(COMMON, "CommonKVManager.update_status", ("self", "bootstrap_room", "status")),
    Symbol(COMMON, "CommonKVManager.check_status", ("self", "bootstrap_room")),
    Symbol(COMMON, "CommonKVManager.record_failure", ("self", "bootstrap_room", "failure_reason")),
    Symbol(COMMON, "CommonKVManager._handle_node_failure", ("self", "failed_bootstrap_addr")),
    Symbol(COMMON, "CommonKVBootstrapServer.__init__", ("self", "host", "port")),
    Symbol(COMMON, "CommonKVBootstrapServer.run", ("self",)),
    Symbol(COMMON, "CommonKVBootstrapServer._handle_route_put", ("self", "request")),
    Symbol(COMMON, "CommonKVBootstrapServer._handle_route_get", ("self", "request")),
    Symbol(COMMON, "CommonKVBootstrapServer._handle_register_dp_rank", ("self", "request")),
    Symbol(COMMON, "CommonKVBootstrapServer._handle_query_dp_ranks", ("self", "request")),
    Symbol(NIXL, "NixlKVManager.__init__", ("self", "args", "disaggregation_mode", "server_args", "is_mla_backend")),
    Symbol(NIXL, "NixlKVManager._add_remote_peer", ("self", "decode_kv_args")),
    Symbol(NIXL, "NixlKVReceiver.__init__", ("self", "mgr", "bootstrap_addr", "bootstrap_room")),
    Symbol(NIXL, "NixlKVReceiver.init", ("self", "prefill_dp_rank")),
    Symbol(NIXL, "NixlKVReceiver.clear", ("self",)),
    Symbol(NIXL, "NixlKVSender.__init__", ("self", "mgr", "bootstrap_addr", "bootstrap_room")),
    Symbol(NIXL, "NixlKVSender.send", ("self", "kv_indices")),
    Symbol(NIXL, "TransferInfo.from_zmq", ("msg",)),
    Symbol(NIXL, "KVArgsRegisterInfo.from_zmq", ("msg",)),
    Symbol(NIXL, "GUARD"),
    Symbol(PACKAGE, "NixlKVManager"),
    Symbol(PACKAGE, "NixlKVSender"),
    Symbol(PACKAGE, "NixlKVBootstrapServer"),
    Symbol("sglang.srt.disaggregation.base.conn", "KVPoll.Success"),
    Symbol("sglang.srt.disaggregation.base.conn", "KVPoll.Failed"),
    Symbol("sglang.srt.disaggregation.base.conn", "KVPoll.WaitingForInput"),
    Symbol("sglang.srt.environ", "envs.SGLANG_DISAGG_STAGING_BUFFER"),
)

SOURCES: Final = {
    "CommonKVManager.__init__": (
        "self.local_ip = get_local_ip_auto()",
        "self.rank_port, self.server_socket = get_zmq_socket_on_host(",
        "self.register_to_bootstrap()",
    ),
    "CommonKVSender.clear": ("self.kv_mgr.request_status.pop(self.bootstrap_room, None)",),
    "CommonKVReceiver._connect_to_bootstrap_server": ('["rank_ip"]', '["rank_port"]', "cls._connect("),
}
"""Text that must stand in functions of common/conn.py, where a name alone does not show how it is used."""


def problems(symbols: tuple[Symbol, ...] = SYMBOLS) -> Iterator[str]:
    """A sentence for each thing that this SGLang does not have as expected."""
    for symbol in symbols:
        try:
            found = _find(symbol.module, symbol.name)
        except (ImportError, AttributeError):
            yield f"{symbol.module}.{symbol.name} is missing"
            continue
        if symbol.parameters is not None:
            has = tuple(inspect.signature(found).parameters)[: len(symbol.parameters)]
            if has != symbol.parameters:
                yield f"{symbol.module}.{symbol.name} takes {has}, expected {symbol.parameters}"
    for name, lines in SOURCES.items():
        source = inspect.getsource(_find(COMMON, name))
        yield from (f"{COMMON}.{name} no longer has `{line}`" for line in lines if line not in source)


def check() -> None:
    """Raises EngineStartError with every difference."""
    found = tuple(problems())
    if found:
        version = importlib.import_module("sglang").__version__
        raise EngineStartError(
            f"SGLang {version} does not fit the handshake on NATS (tried with 0.5.17 and 0.5.21): {'; '.join(found)}"
        )


def _find(module: str, name: str) -> object:
    return functools.reduce(getattr, name.split("."), importlib.import_module(module))
