"""From settings to an engine. The adapters are imported only when chosen: SGLang's takes seconds."""

from typing import Any, Final

from pipeline.config import WorkerSettings
from pipeline.engine.protocol import Engine
from pipeline.errors import ConfigError
from subjects import names

EMBEDDING_ARGS: Final = {
    "is_embedding": True,
    # An encoder's state of a token follows from the whole input: of a prefix that is cached, or of a chunk, it is
    # another one, and SGLang does not see to that by itself.
    "disable_radix_cache": True,
    "chunked_prefill_size": -1,
}
"""SGLang's settings of an embedding engine, used where the user did not set the field."""


def build_engine(settings: WorkerSettings, incarnation: str) -> Engine:
    """The engine that the settings name, not yet started. `incarnation`: the worker's, for its handshakes."""
    if settings.engine == "simulated":
        from pipeline.engine.simulated import Address, SimulatedEngine

        model = None if settings.kv_events is False or settings.role == "embed" else settings.model
        address = Address(settings.nats, settings.worker, incarnation, model)
        return SimulatedEngine(settings.simulated, address, embeds=settings.role == "embed")
    if not settings.model_path:
        raise ConfigError("the SGLang engine needs a model: give --model-path PATH", field="model_path")
    from pipeline.engine.sglang.engine import SglangEngine
    from pipeline.engine.sglang.handshake import HandshakeSettings
    from pipeline.engine.sglang.kv_events import KvEventsSettings

    ours: dict[str, Any] = {}
    if settings.model:
        ours["served_model_name"] = settings.model  # what SGLang's series call the model
    if settings.role == "prefill":
        ours["disaggregation_mode"] = "prefill"
    if settings.role == "embed":
        ours |= EMBEDDING_ARGS
    given = ours | settings.sglang
    mode = given.get("disaggregation_mode", "null")
    handshake = None
    if mode in ("prefill", "decode"):
        handshake = HandshakeSettings(url=settings.nats, worker=settings.worker, incarnation=incarnation, role=mode)
    kv_events = None
    quiet = settings.kv_events is False or mode == "decode" or settings.role == "embed"  # its prompts go to anyone
    if settings.model and not quiet and "kv_events_config" not in given:
        model = names.token(settings.model)
        kv_events = KvEventsSettings(
            url=settings.nats,
            model=model,
            worker=settings.worker,
            incarnation=incarnation,
            at_any_cost=settings.kv_events is True,
        )
    return SglangEngine(settings.model_path, given, handshake, kv_events)
