"""Health follows from facts; the canary's judgement follows from what is seen and when."""

from itertools import pairwise

import pytest

from pipeline.canary import SILENT_S, STILL_S, STOPPED_S, Pulse, Verdict
from pipeline.engine.protocol import Vitals
from pipeline.health import Facts, Health, assess
from pipeline.lease import STALL_S_MAX

WEDGED = Verdict("engine_wedged", "the engine stands still")
EVERY_S, SILENT_S_MAX, TICK_S = 10.0, 60.0, 0.5


@pytest.mark.parametrize(
    ("facts", "codes", "live", "ready"),
    [
        (Facts(), [], True, True),
        (Facts(started=False), ["starting"], True, False),
        (Facts(started=False, draining=True), ["draining"], True, False),
        (Facts(paused=("operator",)), ["paused"], True, False),
        (Facts(paused=("engine",)), [], True, True),  # the engine's own reason stands elsewhere
        (Facts(broker_lost_s=3.0), ["broker_lost"], True, False),
        (Facts(full=("100 of 100 wait",)), ["queue_full"], True, True),
        (Facts(engine=WEDGED, paused=("engine",)), ["engine_wedged"], True, False),
        (Facts(engine=Verdict("engine_failing", "no")), ["engine_failing"], True, False),
        (Facts(loop_silent_s=6.0), ["event_loop_blocked"], True, False),
        (Facts(loop_silent_s=STALL_S_MAX + 1), ["event_loop_blocked"], False, False),
        (Facts(engine_death="killed", draining=True), ["engine_died", "draining"], False, False),
        (Facts(broker_lost_s=0.1, engine=WEDGED), ["broker_lost", "engine_wedged"], True, False),
    ],
)
def test_health_follows_from_the_facts(facts: Facts, codes: list[str], live: bool, ready: bool) -> None:
    health = assess(facts)
    assert [reason.code for reason in health.reasons] == codes
    assert (health.live, health.ready, health.healthy) == (live, ready, not codes)
    assert Health.from_dict(health.to_dict()) == health


class Scene:
    """An engine of which only signs are seen, and a clock that is turned by hand."""

    def __init__(self, dp_size: int = 1, every_s: float = EVERY_S) -> None:
        self.now_s = 1000.0
        self.pulse = Pulse(dp_size, every_s=every_s, silent_s_max=SILENT_S_MAX, now_s=self.now_s)
        self.outputs, self.running, self.stopped = 0, 0, ()
        self.cpu_s = [0.0] * dp_size
        self.asked: list[int] = []

    def tick(self, seconds: float, *, computes: tuple[int, ...] = (), tokens: int = 0) -> Verdict | None:
        """Time goes by in ticks; `computes`: ranks that use the CPU; `tokens` come out at every tick."""
        verdict = None
        for _ in range(round(seconds / TICK_S)):
            self.now_s += TICK_S
            self.outputs += tokens
            for rank in computes:
                self.cpu_s[rank] += TICK_S
            vitals = Vitals(outputs=self.outputs, running=self.running, stopped=self.stopped, cpu_s=tuple(self.cpu_s))
            self.pulse.observe(vitals, self.now_s)
            for rank in self.pulse.due(self.now_s):
                self.pulse.asked(rank, self.now_s)
                self.asked.append(rank)
            verdict = self.pulse.judge(self.now_s)
        return verdict

    def answer(self, rank: int = 0, failure: str | None = None) -> None:
        self.pulse.answered(rank, self.now_s, failure)


def test_an_idle_engine_is_asked_now_and_then() -> None:
    scene = Scene()
    assert scene.tick(EVERY_S) is None
    assert scene.asked == []
    scene.tick(TICK_S)
    assert scene.asked == [0]
    scene.answer()
    scene.tick(EVERY_S)
    assert scene.asked == [0]


def test_an_engine_that_emits_tokens_is_never_asked() -> None:
    scene = Scene()
    scene.running = 3
    assert scene.tick(10 * EVERY_S, tokens=1) is None
    assert scene.asked == []


def test_a_silent_engine_with_requests_is_asked_soon() -> None:
    scene = Scene()
    scene.running = 1
    scene.tick(SILENT_S + TICK_S)
    assert scene.asked == [0]


def test_an_engine_whose_requests_wait_for_another_is_asked_less_and_less() -> None:
    scene = Scene()
    scene.running = 1
    asked_s = []
    while len(asked_s) < 4:
        scene.tick(TICK_S, computes=(0,))
        if len(scene.asked) > len(asked_s):
            asked_s.append(scene.now_s)
            scene.answer()
    assert [later - sooner - TICK_S for sooner, later in pairwise(asked_s)] == [2 * SILENT_S, 4 * SILENT_S, EVERY_S]


def test_an_engine_that_uses_no_cpu_while_a_canary_waits_is_wedged() -> None:
    scene = Scene()
    scene.running = 1
    assert scene.tick(SILENT_S + STILL_S) is None
    verdict = scene.tick(2 * TICK_S)
    assert verdict is not None
    assert (verdict.code, "used no CPU" in verdict.message, verdict.stopped) == ("engine_wedged", True, False)


def test_a_long_prompt_is_not_a_wedge() -> None:
    scene = Scene()
    scene.running = 1
    assert scene.tick(SILENT_S_MAX, computes=(0,)) is None
    assert scene.asked == [0]  # it waits behind the prompt, and is given once
    assert scene.tick(TICK_S, computes=(0,), tokens=1) is None
    assert scene.tick(SILENT_S_MAX - 1, computes=(0,)) is None


def test_an_engine_that_computes_for_ever_is_wedged() -> None:
    scene = Scene()
    scene.running = 1
    verdict = scene.tick(SILENT_S + SILENT_S_MAX + 2 * TICK_S, computes=(0,))
    assert verdict is not None
    assert "has not answered its canary for 60 s" in verdict.message


def test_a_stopped_process_is_a_wedge_until_a_canary_comes_back() -> None:
    scene = Scene()
    scene.stopped = ("sglang::scheduler",)
    verdict = scene.tick(STOPPED_S + TICK_S)
    assert verdict == Verdict("engine_wedged", "the process sglang::scheduler is stopped", stopped=True)
    assert scene.asked == []
    scene.stopped = ()
    verdict = scene.tick(TICK_S)
    assert verdict is not None
    assert scene.asked == [0]
    scene.answer()
    assert scene.tick(TICK_S) is None


def test_a_process_that_a_profiler_stops_for_a_moment_is_no_wedge() -> None:
    scene = Scene()
    for _ in range(4):
        scene.stopped = ("sglang::scheduler",)
        assert scene.tick(TICK_S) is None
        scene.stopped = ()
        assert scene.tick(TICK_S) is None


def test_one_rank_of_two_can_be_wedged_while_the_other_works() -> None:
    scene = Scene(dp_size=2)
    scene.running = 4
    scene.tick(EVERY_S + TICK_S, computes=(0, 1), tokens=1)
    assert scene.asked == [0, 1]  # a token may be of either
    scene.answer(0)
    verdict = scene.tick(STILL_S + TICK_S, computes=(0,), tokens=1)
    assert verdict is not None
    assert verdict.message.startswith("rank 1 of the engine stands still")
    scene.answer(1)
    assert scene.tick(TICK_S, computes=(0,), tokens=1) is None


def test_a_rank_of_another_machine_is_judged_by_its_canary_alone() -> None:
    scene = Scene(dp_size=2)
    scene.cpu_s = [0.0]
    scene.tick(EVERY_S + TICK_S, computes=(0,))
    scene.answer(0)
    assert scene.tick(5 * STILL_S, computes=(0,)) is None
    scene.answer(0)
    verdict = scene.tick(SILENT_S_MAX, computes=(0,))
    assert verdict is not None
    assert "rank 1 of the engine has not answered its canary" in verdict.message


def test_a_paused_engine_is_not_asked_and_still_seen_to_be_stopped() -> None:
    scene = Scene()
    for _ in range(100):
        scene.pulse.expect_nothing(scene.now_s)
        assert scene.tick(TICK_S) is None
    scene.stopped = ("sglang::scheduler",)
    for _ in range(3):
        scene.pulse.expect_nothing(scene.now_s)
        verdict = scene.tick(TICK_S)
    assert verdict is not None
    assert scene.asked == []


def test_two_refused_canaries_make_a_failing_engine() -> None:
    scene = Scene()
    scene.tick(EVERY_S + TICK_S)
    scene.answer(failure="CUDA error")
    assert scene.tick(SILENT_S) is None
    assert scene.asked == [0, 0]
    scene.answer(failure="CUDA error")
    assert scene.tick(TICK_S) == Verdict("engine_failing", "the engine fails its canary: CUDA error")
    scene.tick(SILENT_S)
    scene.answer()
    assert scene.tick(TICK_S) is None


def test_canaries_do_not_come_faster_than_their_rate() -> None:
    scene = Scene()
    scene.running = 1
    for _ in range(60):
        if scene.tick(TICK_S, computes=(0,)) is None and len(scene.asked) > 0:
            scene.answer(failure="full")
    assert len(scene.asked) <= 30 / SILENT_S


def test_what_this_process_slept_through_is_not_held_against_the_engine() -> None:
    scene = Scene()
    scene.running = 1
    scene.tick(SILENT_S + TICK_S)
    scene.now_s += 1000
    scene.pulse.start_clocks(scene.now_s)
    assert scene.tick(TICK_S) is None


def test_without_canaries_only_a_stopped_process_counts() -> None:
    scene = Scene(every_s=0)
    scene.running = 1
    assert scene.tick(3 * SILENT_S_MAX) is None
    scene.stopped = ("sglang::scheduler",)
    assert scene.tick(STOPPED_S + TICK_S) is not None
    scene.stopped = ()
    assert scene.tick(TICK_S) is None
    assert scene.asked == []
