"""SGLang's prefill-decode handshake on NATS: no HTTP bootstrap server, no ZMQ between engines, no open port.

The worker puts `HandshakeSettings.to_environment()` into the environment before it starts its engine; the SGLang
plugin calls `install(from_environment())` in every process that SGLang starts. `describe` needs neither.
"""

from pipeline.engine.sglang.handshake.settings import (
    ENVIRONMENT,
    ONE_MACHINE_ENVIRONMENT,
    HandshakeSettings,
    from_environment,
)
from pipeline.engine.sglang.handshake.wire import Address, BootstrapLine, Rank, describe

__all__ = [
    "ENVIRONMENT",
    "ONE_MACHINE_ENVIRONMENT",
    "Address",
    "BootstrapLine",
    "HandshakeSettings",
    "Rank",
    "bootstrap_host",
    "describe",
    "from_environment",
    "install",
]


def bootstrap_host(worker: str, incarnation: str) -> str:
    """What to give SGLang as `bootstrap_host`, on both sides, for a room that `worker` prefills."""
    return Address(worker, incarnation).host


def install(settings: HandshakeSettings) -> None:
    """Put the handshake under SGLang's NIXL disaggregation in this process. Idempotent.

    Raises EngineStartError where this SGLang, or how it is set, does not fit. SGLang only logs what a plugin
    raises, so the plugin has to end the process.
    """
    from pipeline.engine.sglang.handshake.patches import apply  # imports SGLang, which takes seconds

    apply(settings)
