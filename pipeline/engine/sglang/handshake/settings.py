"""Where an engine's handshake goes: set by the worker, read in every process that SGLang starts."""

import os
from collections.abc import Mapping
from typing import Final, Literal

import msgspec

from pipeline.engine.sglang import environment

ENVIRONMENT: Final = "SGLANG_NATS_HANDSHAKE"
"""Environment variable with the settings as JSON; its absence leaves SGLang's own control plane in place."""

ONE_MACHINE_ENVIRONMENT: Final = {
    "UCX_TLS": "sm,self",
    "SGLANG_DISAGGREGATION_NIXL_BACKEND_PARAMS": '{"ucx_error_handling_mode": "none"}',
}
"""For engines without a GPU that all run on one machine: NIXL moves KV through shared memory only.

Without it UCX listens on TCP, 18 ports a prefill engine, as its error handling wants a transport that notices a
dead peer. Shared memory notices it too: a write to a killed process fails at once.
"""


class HandshakeSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One engine's place on the bus. Spawned scheduler processes inherit it through the environment."""

    url: str  # of the broker, credentials included
    worker: str  # a subject token, unique among live workers
    incarnation: str  # a subject token, new at every start of the worker
    role: Literal["prefill", "decode"]

    def to_environment(self) -> dict[str, str]:
        """What to add to `os.environ` before the engine starts."""
        return {ENVIRONMENT: msgspec.json.encode(self).decode()}


def from_environment(environ: Mapping[str, str] = os.environ) -> HandshakeSettings | None:
    """The settings that the worker left, or None without a handshake on NATS. Raises EngineStartError."""
    return environment.read(environ, ENVIRONMENT, HandshakeSettings, tokens=("worker", "incarnation"))
