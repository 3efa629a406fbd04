"""Metrics: what is counted, how it travels, and what a scrape of several workers shows."""

import time
from collections.abc import Iterator
from urllib.request import Request, urlopen

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from pipeline import metrics, snapshots
from pipeline.bus import ConsumerState, Received, StreamState
from pipeline.metrics_page import MetricsPage
from pipeline.presence import WorkerState
from pipeline.queues import MODELS_MAX, OTHER, Queues, by_queue
from stages.telemetry import Telemetry
from subjects import names
from subjects.codec import BlockHashes, decode, encode
from subjects.limits import PAYLOAD_BYTES_MAX, PRESENCE_S
from subjects.messages import (
    BlocksCleared,
    BlocksRemoved,
    BlocksStored,
    Heartbeat,
    KvEvents,
    Load,
    MetricFamily,
    MetricSample,
    MetricsSnapshot,
    Usage,
)


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


@pytest.mark.parametrize(
    "accept",
    [
        "application/openmetrics-text;version=1.0.0;q=0.75,text/plain;version=0.0.4;q=0.5",  # Prometheus 2.42
        "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;q=0.3",  # Prometheus 3
        "*/*",
    ],
)
def test_sglangs_names_keep_their_colon_over_http(accept: str) -> None:
    registry = CollectorRegistry()
    Gauge("sglang:token_usage", "Usage.", registry=registry).set(0.5)
    page = MetricsPage(registry, "127.0.0.1", 0)
    try:
        with urlopen(Request(page.url, headers={"Accept": accept}), timeout=5) as answer:
            assert "sglang:token_usage 0.5" in answer.read().decode().splitlines()
    finally:
        page.close()


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
    consumer = ConsumerState(pending=4, ack_pending=3, redelivered=1, waiting=2, paused_until_unix_s=2e9)
    queues = Queues(
        streams={"WORK": StreamState(messages=7, bytes=70, first_seq=1, last_seq=7, consumers=1)},
        consumers={("WORK", "decode-m"): consumer},
        oldest_s={("WORK", "decode-m"): 2.5},
        depths={("decode", "m"): 7},
    )
    telemetry.refresh((WorkerState(**known, down=False), down), queues)
    page = scraped(telemetry)
    of_worker = {"role": "decode", "worker": "a", "model": "m"}
    assert one(page, "sglang_nats_worker_ready", **of_worker) == 1
    assert one(page, "sglang_nats_worker_in_flight", **of_worker) == 2
    assert one(page, "sglang_nats_engine_kv_tokens_used", **of_worker) == 70
    assert one(page, "sglang_nats_consumer_pending", stream="WORK", consumer="decode-m") == 4
    assert one(page, "sglang_nats_consumer_ack_pending", stream="WORK", consumer="decode-m") == 3
    assert one(page, "sglang_nats_consumer_paused", stream="WORK", consumer="decode-m") == 1
    assert one(page, "sglang_nats_consumer_oldest_seconds", stream="WORK", consumer="decode-m") == 2.5
    assert one(page, "sglang_nats_queue_depth", queue="decode", model="m") == 7
    assert one(page, "sglang_nats_broker_up") == 1
    assert len([name for name, _ in page if name == "sglang_nats_worker_ready"]) == 1  # not the one that is down
    telemetry.refresh((), None)  # the broker does not answer: no stale figures
    page = scraped(telemetry)
    assert one(page, "sglang_nats_queue_depth", queue="decode", model="m") is None
    assert one(page, "sglang_nats_broker_up") == 0


def test_a_lost_broker_shows_at_the_next_scrape() -> None:
    there = [True]
    telemetry = Telemetry(lambda: there[0])
    telemetry.refresh((), Queues(depths={("requests", "m"): 1}))
    assert one(scraped(telemetry), "sglang_nats_broker_up") == 1
    there[0] = False  # no refresh since: the reader waits for an answer that does not come
    page = scraped(telemetry)
    assert one(page, "sglang_nats_broker_up") == 0
    assert one(page, "sglang_nats_queue_depth", queue="requests", model="m") is None


def worker_state(worker: str, role: str = "decode", *, ready: bool = True, down: bool = False) -> WorkerState:
    beat = Heartbeat(worker=worker, role=role, incarnation="1", model="m", ready=ready)
    return WorkerState(role=role, worker=worker, card=None, heartbeat=beat, age_s=0.1, down=down)


def test_a_model_that_lost_its_last_worker_counts_none() -> None:
    """An alert needs the 0: a series that ends would end the alert with it."""
    telemetry = Telemetry()
    telemetry.refresh((worker_state("a", ready=False),), Queues())  # its engine loads for the first time: no alarm
    assert one(scraped(telemetry), "sglang_nats_model_workers_ready", model="m", role="decode") is None
    telemetry.refresh((worker_state("a"), worker_state("b"), worker_state("t", "telemetry")), Queues())
    assert one(scraped(telemetry), "sglang_nats_model_workers_ready", model="m", role="decode") == 2
    telemetry.refresh((worker_state("a", down=True),), Queues())
    page = scraped(telemetry)
    assert one(page, "sglang_nats_model_workers_ready", model="m", role="decode") == 0
    assert len([name for name, _ in page if name == "sglang_nats_model_workers_ready"]) == 1


def test_the_models_of_queues_are_bounded() -> None:
    """Anyone may publish a request to a subject of a model that does not exist."""
    asked = {names.REQUESTS.of(model=f"m{number:04}"): 2 for number in range(MODELS_MAX + 10)}
    worked = {names.DECODE_ANY.of(model="m0001"): 3, names.DECODE_WORKER.of(model="m0001", worker="w"): 4}
    depths = by_queue(asked | worked)
    assert depths["decode", "m0001"] == 7
    assert depths["requests", "m0001"] == 2
    assert depths["requests", OTHER] == 20
    assert len({model for _, model in depths}) == MODELS_MAX + 1


def test_kv_events_are_counted_by_tier_until_their_worker_is_gone() -> None:
    telemetry = Telemetry()
    events = (
        BlocksStored(hashes=BlockHashes.of([1, 2, 3])),
        BlocksStored(hashes=BlockHashes.of([4]), tier="host"),
        BlocksRemoved(hashes=BlockHashes.of([1])),
        BlocksCleared(),
    )
    message = KvEvents(worker="a", incarnation="1", seq=1, block_tokens=16, events=events)
    subject = names.KV_EVENTS.of(model="m", worker="a")
    for _ in range(2):
        telemetry.hear_kv(Received(subject, encode(message), None, ""))
    telemetry.refresh((worker_state("a"),), Queues())
    page = scraped(telemetry)
    name, of = "sglang_nats_kv_event_blocks_total", {"model": "m", "worker": "a"}
    assert one(page, name, event="stored", tier="gpu", **of) == 6
    assert one(page, name, event="stored", tier="host", **of) == 2
    assert one(page, name, event="removed", tier="gpu", **of) == 2
    assert one(page, name, event="cleared", tier="", **of) == 2
    telemetry.refresh((worker_state("b"),), Queues())
    assert one(scraped(telemetry), name, event="cleared", tier="", **of) is None


def test_processes_of_one_engine_share_a_page_and_are_added_up() -> None:
    """SGLang's data-parallel ranks count some series under the same labels."""
    telemetry = Telemetry()
    own = MetricFamily(name="x", help="X.", type="counter", samples=(MetricSample(name="x", labels={}, value=1),))
    for process, value_ in (("", 1), ("scheduler 0", 2), ("scheduler 1", 3)):
        sample = MetricSample(name="sglang:n", labels={"dp_rank": "0"}, value=value_)
        family = MetricFamily(name="sglang:n", help="N.", type="counter", samples=(sample,))
        families = (own,) if not process else (family,)
        telemetry.hear(received(MetricsSnapshot(worker="a", role="decode", process=process, families=families)))
    telemetry.refresh((), Queues())
    page = scraped(telemetry)
    assert one(page, "sglang:n", role="decode", worker="a", dp_rank="0") == 5
    assert one(page, "x", role="decode", worker="a") == 1


def test_a_process_with_too_many_samples_leaves_whole_families_out_and_says_so() -> None:
    def family(name: str, count: int) -> MetricFamily:
        samples = tuple(MetricSample(name=name, labels={"i": str(i)}, value=1) for i in range(count))
        return MetricFamily(name=name, help="X.", type="gauge", samples=samples)

    kept = metrics.bounded([family("a", 10), family("b", metrics.SAMPLES_MAX), family("c", 5)])
    assert [one_.name for one_ in kept] == ["a", "c", "sglang_nats_process_samples_left_out"]
    assert kept[-1].samples[0].value == metrics.SAMPLES_MAX
    assert metrics.bounded([family("a", 10)]) == (family("a", 10),)


def test_what_is_malformed_is_counted() -> None:
    telemetry = Telemetry()
    telemetry.hear(Received(names.METRICS.of(role="decode", worker="a"), b"\xc1", None, ""))
    telemetry.refresh((), None)
    assert one(scraped(telemetry), "sglang_nats_snapshots_malformed") == 1


def test_the_page_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "SAMPLES_A_SNAPSHOT_MAX", 3)
    monkeypatch.setattr(snapshots, "SAMPLES_MAX", 4)
    monkeypatch.setattr(snapshots, "SNAPSHOTS_MAX", 2)
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
