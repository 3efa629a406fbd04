"""Rates and percentiles of a window, from real series of `pipeline.metrics`."""

import math

import pytest

from pipeline import metrics
from pipeline.rates import SNAPSHOTS_MAX, WINDOW_S, WORKERS_MAX, Figures, Rates, Window, figures_of, quantile
from subjects.messages import MetricFamily, MetricsSnapshot, Usage


def snapshot(worker: str = "d0", model: str = "m") -> MetricsSnapshot:
    return MetricsSnapshot(worker=worker, role="decode", model=model, families=metrics.snapshot())


def test_figures_are_read_from_the_series_that_workers_publish():
    before = figures_of(snapshot())
    clock = metrics.TokenClock(accepted_unix_s=1.0)
    clock.tick(1)
    clock.tick(4)
    metrics.count_usage(Usage(prompt_tokens=10, completion_tokens=5, cached_tokens=4))
    for outcome in ("done", "engine_failed", "retried", "lease_lost"):
        metrics.STAGE_SECONDS.labels("decode", outcome).observe(0.1)
    metrics.STAGE_SECONDS.labels("preprocess", "done").observe(0.1)
    metrics.ERRORS.labels("engine_failed").inc()
    metrics.REDELIVERIES.labels("decode").inc()
    came = figures_of(snapshot()).since(before)
    assert (came.requests, came.tokens, came.redeliveries) == (2, 5, 1)
    assert came.hit_rate == 0.4
    assert came.errors["engine_failed"] == 1
    assert (max(came.ttft_s.values()), max(came.itl_s.values())) == (1, 4)
    assert quantile(came.ttft_s, 0.5) == 300, "beyond the last finite bound"


@pytest.mark.parametrize(
    ("q", "value"), [(0.25, 0.5), (0.5, 1.0), (0.75, 1.5), (1.0, 2.0)]
)  # two observations up to 1, two up to 2
def test_a_quantile_is_linear_inside_its_bucket(q, value):
    assert quantile({1.0: 2.0, 2.0: 4.0, 4.0: 4.0, math.inf: 4.0}, q) == value


def test_nothing_observed_has_no_quantile():
    assert quantile({}, 0.5) is quantile({1.0: 0.0, math.inf: 0.0}, 0.5) is None


def test_a_window_forgets_what_is_old_and_all_of_a_process_that_began_anew():
    window = Window()
    for second in range(100):
        window.add(float(second), Figures(tokens=10.0 * second))
    assert window.change() == (Figures(tokens=10.0 * WINDOW_S), WINDOW_S)
    window.add(100.0, Figures(tokens=3.0))
    assert window.change() == (Figures(), 0.0)
    window.add(101.0, Figures(tokens=5.0))
    assert window.change()[0].tokens == 2.0
    for early in range(10 * SNAPSHOTS_MAX):
        window.add(101.0 + early / 1000, Figures(tokens=5.0))
    assert len(window._kept) == SNAPSHOTS_MAX


def test_a_model_s_speed_is_the_sum_over_its_workers_and_silent_ones_are_forgotten():
    rates = Rates()

    def tell(worker: str, model: str, now_s: float) -> None:
        rates.add(MetricsSnapshot(worker=worker, role="decode", model=model, families=metrics.snapshot()), now_s)

    for worker, model in (("d0", "a"), ("d1", "a"), ("d2", "b")):
        tell(worker, model, 0.0)
    metrics.TTFT_SECONDS.observe(0.15)
    for worker, model in (("d0", "a"), ("d1", "a"), ("d2", "b")):
        tell(worker, model, 2.0)
    assert rates.speed("a").tokens_per_s == pytest.approx(2 / 2.0)
    assert rates.speed("b").tokens_per_s == pytest.approx(1 / 2.0)
    assert rates.speed().tokens_per_s == pytest.approx(3 / 2.0)
    assert rates.speed("a").ttft_s_p50 == pytest.approx(0.15, abs=0.05)
    assert rates.speed("c").tokens_per_s is None
    tell("d0", "a", 6.0)
    rates.forget_silent(6.0, silence_s=3.0)
    assert rates.speed("b").tokens_per_s is None
    for number in range(2 * WORKERS_MAX):
        rates.add(MetricsSnapshot(worker=f"w{number}", role="decode", families=metrics.snapshot()[:1]), 6.0)
    assert len(rates._windows) == WORKERS_MAX


def test_an_engine_s_own_series_leave_its_worker_s_window_alone():
    rates = Rates()
    rates.add(snapshot(), 0.0)
    metrics.TTFT_SECONDS.observe(0.1)
    family = MetricFamily(name="sglang:num_running_reqs", help="h", type="gauge", samples=())
    rates.add(MetricsSnapshot(worker="d0", role="decode", model="m", process="s", families=(family,)), 1.0)
    rates.add(snapshot(), 2.0)
    assert rates.speed("m").tokens_per_s == 0.5
