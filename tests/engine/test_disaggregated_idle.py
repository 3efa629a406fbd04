"""An engine on a CPU that waits for another one leaves the core to it."""

from dataclasses import dataclass

import pytest

from pipeline.engine.sglang import cpu_idle, cpu_platform


@dataclass
class Scheduler:
    """As much of SGLang's as the hook asks."""

    idle: bool

    def is_fully_idle(self) -> bool:
        return self.idle


@pytest.mark.parametrize(("idle", "slept"), [(False, [cpu_idle.PAUSE_S]), (True, [])])
def test_it_pauses_only_while_a_request_is_open(idle: bool, slept: list[float], monkeypatch: pytest.MonkeyPatch):
    naps: list[float] = []
    monkeypatch.setattr(cpu_idle.time, "sleep", naps.append)
    assert cpu_idle.pause_while_waiting("kept", Scheduler(idle)) == "kept"
    assert naps == slept


@pytest.mark.engine
def test_sglang_calls_it_where_there_is_nothing_to_run():
    cpu_platform.prepare()
    from sglang.srt.managers.scheduler import Scheduler as Real

    assert callable(Real.on_idle) and callable(Real.is_fully_idle)
