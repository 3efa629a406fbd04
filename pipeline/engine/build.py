"""From settings to an engine. The adapters are imported only when chosen: SGLang's takes seconds."""

from pipeline.config import WorkerSettings
from pipeline.engine.protocol import Engine
from pipeline.errors import ConfigError


def build_engine(settings: WorkerSettings) -> Engine:
    """The engine that the settings name, not yet started."""
    if settings.engine == "simulated":
        from pipeline.engine.simulated import SimulatedEngine

        return SimulatedEngine(settings.simulated)
    if not settings.model_path:
        raise ConfigError("the SGLang engine needs a model: give --model-path PATH", field="model_path")
    from pipeline.engine.sglang.engine import SglangEngine

    return SglangEngine(settings.model_path, settings.sglang)
