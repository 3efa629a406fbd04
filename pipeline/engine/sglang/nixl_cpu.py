"""NIXL between CPU engines: KV in ordinary memory, and a progress thread that sleeps.

SGLang registers KV as VRAM unless told otherwise, which UCX refuses for ordinary memory. And NIXL's Python API
asks for no pause between the rounds of UCX's progress thread, which then burns a core for ever.
"""

from typing import Any, Final

PROGRESS_THREAD_DELAY_US: Final = 500
"""With it, disaggregated decode on two cores went from 54-140 to 223 tok/s at batch 32, as fast as aggregated."""


def before_kv_manager(*_: Any, **__: Any) -> None:
    """Before SGLang makes a NIXL agent: have NIXL's classes replaced. Imports NIXL; idempotent."""
    from nixl import _api

    if _api.nixl_agent.__name__ == "CpuAgent":
        return
    _api.nixlBind.nixlAgentConfig = _sleepy(_api.nixlBind.nixlAgentConfig)
    _api.nixl_agent = _in_ordinary_memory(_api.nixl_agent)


def _sleepy(config: type) -> type:
    """nixlAgentConfig, never with a busy progress thread; `pthrDelay` is in microseconds."""

    class SleepyAgentConfig(config):
        @property
        def pthrDelay(self) -> int:
            return config.pthrDelay.__get__(self)

        @pthrDelay.setter
        def pthrDelay(self, delay_us: int) -> None:
            config.pthrDelay.__set__(self, max(delay_us, PROGRESS_THREAD_DELAY_US))

    return SleepyAgentConfig


def _in_ordinary_memory(agent: type) -> type:
    """nixl_agent for which VRAM is another name of DRAM."""

    class CpuAgent(agent):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.nixl_mems["VRAM"] = self.nixl_mems["DRAM"]

    return CpuAgent
