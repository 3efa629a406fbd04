"""Metrics: what is counted, how it travels, and what a scrape of several workers shows."""

import time
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from pipeline import metrics
from pipeline.bus import ConsumerState, Received, StreamState
from pipeline.presence import WorkerState
from stages import telemetry as stage
from stages.telemetry import Broker, Telemetry
from subjects import names
from subjects.codec import decode, encode
from subjects.limits import PAYLOAD_BYTES_MAX, PRESENCE_S
from subjects.messages import Heartbeat, Load, MetricFamily, MetricSample, MetricsSnapshot, Usage


def value(name: str, **labels: str) -> float:
    return metrics.REGISTRY.get_sample_value(f"{metrics.PREFIX}_{name}", labels) or 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The seconds that both clocks show, in a list of one."""
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    yield now


def test_token_clock_times_the_first_token_and_those_after_it(clock: list[float]) -> None:
    before = {name: value(name) for name in ("ttft_seconds_sum", "ttft_seconds_count", "itl_seconds_count")}
    itl_before = value("itl_seconds_sum")
    tokens = metrics.TokenClock(accepted_unix_s=999.5)
    tokens.tick(0)  # no token yet
    tokens.tick(1)
    clock[0] += 0.3
    tokens.tick(3)
    assert value("ttft_seconds_sum") - before["ttft_seconds_sum"] == pytest.approx(0.5)
    assert value("ttft_seconds_count") - before["ttft_seconds_count"] == 1
    assert value("itl_seconds_count") - before["itl_seconds_count"] == 3
    assert value("itl_seconds_sum") - itl_before == pytest.approx(0.3)


def test_token_clock_does_not_invent_a_ttft(clock: list[float]) -> None:
    count, total = value("ttft_seconds_count"), value("ttft_seconds_sum")
    metrics.TokenClock(accepted_unix_s=0).tick(1)
    assert value("ttft_seconds_count") == count
    metrics.TokenClock(accepted_unix_s=clock[0] + 60).tick(1)  # the broker's clock is ahead of ours
    assert (value("ttft_seconds_count"), value("ttft_seconds_sum")) == (count + 1, total)


def test_usage_is_counted() -> None:
    before = [value(f"{name}_tokens_total") for name in ("prompt", "cached", "completion")]
    metrics.count_usage(Usage(prompt_tokens=10, completion_tokens=5, cached_tokens=4))
    after = [value(f"{name}_tokens_total") for name in ("prompt", "cached", "completion")]
    assert [end - start for start, end in zip(before, after, strict=True)] == [10, 4, 5]


def test_a_snapshot_fits_its_subject_many_times_over() -> None:
    for code in range(50):
        metrics.ERRORS.labels(f"code_{code}").inc(0)
    snapshot = MetricsSnapshot(worker="w", role="decode", families=metrics.snapshot())
    payload = encode(snapshot)
    assert decode(MetricsSnapshot, payload) == snapshot
    assert len(payload) < PAYLOAD_BYTES_MAX / 10
    assert not [s for family in snapshot.families for s in family.samples if s.name.endswith("_created")]


# --- telemetry: several workers under one page ------------------------------------------------------


def received(snapshot: MetricsSnapshot) -> Received:
    return Received(names.METRICS.of(role=snapshot.role, worker=snapshot.worker), encode(snapshot), None, "")


def snapshot_of(worker: str, tokens: int) -> MetricsSnapshot:
    registry = CollectorRegistry()
    Counter("tokens", "Tokens.", namespace="t", registry=registry).inc(tokens)
    Gauge("in_flight", "Tasks.", ("stage",), namespace="t", registry=registry).labels("decode").set(tokens)
    return MetricsSnapshot(worker=worker, role="decode", model="m", families=metrics.snapshot(registry))


def scraped(telemetry: Telemetry) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """The page as Prometheus reads it: value by name and labels."""
    registry = CollectorRegistry()
    registry.register(telemetry)
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def one(page: dict[tuple[str, frozenset[tuple[str, str]]], float], name: str, **labels: str) -> float | None:
    return page.get((name, frozenset(labels.items())))


def test_two_workers_share_a_family_and_keep_their_labels() -> None:
    telemetry = Telemetry()
    telemetry.hear(received(snapshot_of("a", 3)))
    telemetry.hear(received(snapshot_of("b", 5)))
    telemetry.hear(received(snapshot_of("a", 4)))  # the newer one counts
    telemetry.refresh((), None)
    page = scraped(telemetry)
    assert one(page, "t_tokens_total", role="decode", worker="a", model="m") == 4
    assert one(page, "t_tokens_total", role="decode", worker="b", model="m") == 5
    assert one(page, "t_in_flight", role="decode", worker="b", model="m", stage="decode") == 5


def test_a_silent_worker_leaves_the_page(clock: list[float]) -> None:
    telemetry = Telemetry()
    telemetry.hear(received(snapshot_of("gone", 1)))
    clock[0] += PRESENCE_S
    telemetry.hear(received(snapshot_of("here", 1)))
    telemetry.refresh((), None)
    assert {snapshot.worker for snapshot in telemetry.snapshots} == {"gone", "here"}
    clock[0] += 0.1
    telemetry.refresh((), None)
    assert {snapshot.worker for snapshot in telemetry.snapshots} == {"here"}


def test_heartbeats_and_queues_are_on_the_page() -> None:
    telemetry = Telemetry()
    beat = Heartbeat(
        worker="a",
        role="decode",
        incarnation="1",
        model="m",
        ready=True,
        slots=8,
        in_flight=2,
        load=Load(running=2, waiting=1, kv_tokens_used=70, kv_tokens=100),
    )
    known = {"role": "decode", "worker": "a", "card": None, "heartbeat": beat, "age_s": 0.1}
    down = WorkerState(role="decode", worker="b", card=None, heartbeat=beat, age_s=9.0, down=True)
    broker = Broker(
        streams={"WORK": StreamState(messages=7, bytes=70, first_seq=1, last_seq=7, consumers=1)},
        consumers={("WORK", "decode-m"): ConsumerState(pending=4, ack_pending=3, redelivered=1, waiting=2)},
        queued={"a.b": 7},
    )
    telemetry.refresh((WorkerState(**known, down=False), down), broker)
    page = scraped(telemetry)
    of_worker = {"role": "decode", "worker": "a", "model": "m"}
    assert one(page, "sglang_nats_worker_ready", **of_worker) == 1
    assert one(page, "sglang_nats_worker_in_flight", **of_worker) == 2
    assert one(page, "sglang_nats_engine_kv_tokens_used", **of_worker) == 70
    assert one(page, "sglang_nats_consumer_pending", stream="WORK", consumer="decode-m") == 4
    assert one(page, "sglang_nats_consumer_ack_pending", stream="WORK", consumer="decode-m") == 3
    assert one(page, "sglang_nats_queue_depth", subject="a.b") == 7
    assert len([name for name, _ in page if name == "sglang_nats_worker_ready"]) == 1  # not the one that is down
    telemetry.refresh((), None)  # the broker does not answer: no stale figures
    assert one(scraped(telemetry), "sglang_nats_queue_depth", subject="a.b") is None


def test_what_is_malformed_is_counted() -> None:
    telemetry = Telemetry()
    telemetry.hear(Received(names.METRICS.of(role="decode", worker="a"), b"\xc1", None, ""))
    telemetry.refresh((), None)
    assert one(scraped(telemetry), "sglang_nats_snapshots_malformed") == 1


def test_the_page_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "SAMPLES_A_WORKER_MAX", 3)
    monkeypatch.setattr(stage, "SAMPLES_MAX", 4)
    monkeypatch.setattr(stage, "WORKERS_MAX", 2)
    samples = tuple(MetricSample(name="x", labels={"i": str(i)}, value=1) for i in range(10))
    family = MetricFamily(name="x", help="X.", type="gauge", samples=samples)
    telemetry = Telemetry()
    for name in ("a", "b", "c"):
        telemetry.hear(received(MetricsSnapshot(worker=name, role="decode", families=(family,))))
    telemetry.refresh((), None)
    page = scraped(telemetry)
    assert len([name for name, _ in page if name == "x"]) == 4
    assert one(page, "sglang_nats_samples_left_out") == 16  # of the two workers that are shown


def test_a_name_with_two_types_keeps_the_first() -> None:
    sample = MetricSample(name="x", labels={}, value=1)
    of = {"a": "gauge", "b": "counter"}
    telemetry = Telemetry()
    for worker, kind in of.items():
        family = MetricFamily(name="x", help="X.", type=kind, samples=(sample,))
        telemetry.hear(received(MetricsSnapshot(worker=worker, role="decode", families=(family,))))
    telemetry.refresh((), None)
    page = scraped(telemetry)
    assert one(page, "x", role="decode", worker="a") == 1
    assert one(page, "sglang_nats_samples_left_out") == 1
