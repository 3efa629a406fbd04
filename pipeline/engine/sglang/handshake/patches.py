"""The few places where SGLang's modules are changed: names that its disaggregation code looks up at run time."""

import sglang.srt.disaggregation.common.conn as common
import sglang.srt.disaggregation.nixl as nixl
from sglang.srt.environ import envs

from pipeline.engine.sglang.handshake import compat
from pipeline.engine.sglang.handshake.managers import NatsKVSender, Place, kv_manager
from pipeline.engine.sglang.handshake.routes import SilentBootstrapServer
from pipeline.engine.sglang.handshake.settings import HandshakeSettings
from pipeline.errors import EngineStartError

_applied: list[HandshakeSettings] = []


def apply(settings: HandshakeSettings) -> None:
    """Raises EngineStartError."""
    if settings in _applied:
        return
    if _applied:
        raise EngineStartError(f"this process is {_applied[0].worker} already; it cannot be {settings.worker} too")
    compat.check()
    if envs.SGLANG_DISAGG_STAGING_BUFFER.get():
        raise EngineStartError("SGLANG_DISAGG_STAGING_BUFFER opens ZMQ sockets between engines; unset it")
    place = Place(settings)
    common.get_local_ip_auto = place.local_ip
    common.get_zmq_socket_on_host = place.socket_on_host
    common.requests = place.requests
    common._get_bootstrap_session = lambda bootstrap_addr: place.requests
    common.CommonKVReceiver._connect = place.connect
    common.CommonKVReceiver.disconnect_endpoint = staticmethod(lambda endpoint: None)
    nixl.NixlKVManager = kv_manager(place)
    nixl.NixlKVSender = NatsKVSender
    nixl.NixlKVBootstrapServer = SilentBootstrapServer
    _applied.append(settings)
