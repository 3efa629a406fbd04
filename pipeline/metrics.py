"""Every Prometheus series of a process, declared once, and their snapshot as it travels on NATS.

A process does not serve HTTP: it publishes a `MetricsSnapshot` once a second, and telemetry workers offer
all of them under one `/metrics` with the labels `role` and `worker` added. Labels here are closed sets (stages,
outcomes, error codes), never ids.
"""

import time
from collections.abc import Iterable
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from pipeline.process_cpu import DescendantsCollector
from subjects.messages import MetricFamily, MetricSample, Usage

PREFIX: Final = "sglang_nats"

REGISTRY: Final = CollectorRegistry()
ProcessCollector(namespace=PREFIX, registry=REGISTRY)
REGISTRY.register(DescendantsCollector(f"{PREFIX}_descendants_cpu_seconds"))

STAGE_SECONDS: Final = Histogram(
    "stage_seconds",
    "Time from a task's delivery to its ack, by outcome: done, retried, handed_over, dead, or an error code.",
    ("stage", "outcome"),
    namespace=PREFIX,
    registry=REGISTRY,
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
)
IN_FLIGHT: Final = Gauge("in_flight", "Tasks in progress.", ("stage",), namespace=PREFIX, registry=REGISTRY)
OLDEST_TASK_SECONDS: Final = Gauge(
    "oldest_task_seconds",
    "Since when the worker holds the lease of its oldest task in progress; 0 without one.",
    ("stage",),
    namespace=PREFIX,
    registry=REGISTRY,
)
TAKEN_OVER: Final = Counter(
    "taken_over",
    "Tasks addressed to another worker of its kind that this one, idle, took: that one had no free slot, or is away.",
    namespace=PREFIX,
    registry=REGISTRY,
)
REDELIVERIES: Final = Counter(
    "redeliveries",
    "Tasks that came again: their first worker died, froze, drained or gave them back.",
    ("stage",),
    namespace=PREFIX,
    registry=REGISTRY,
)
ERRORS: Final = Counter(
    "errors", "Terminal error frames, by error code.", ("code",), namespace=PREFIX, registry=REGISTRY
)
OVERLOADED: Final = Counter(
    "overloaded",
    "Requests that were turned away because the model's queue is full, by the process that published them.",
    ("model",),
    namespace=PREFIX,
    registry=REGISTRY,
)
TTFT_SECONDS: Final = Histogram(
    "ttft_seconds",
    "Time from the broker's acceptance of a request to a choice's first token.",
    namespace=PREFIX,
    registry=REGISTRY,
    buckets=(0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 4, 8, 15, 30, 60, 300),
)
ITL_SECONDS: Final = Histogram(
    "itl_seconds",
    "Inter-token latency: the time between one token of a choice and the next.",
    namespace=PREFIX,
    registry=REGISTRY,
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5),
)
CANARIES: Final = Counter(
    "canaries",
    "Requests that a worker gave its own engine to see that it generates: answered, failed or unanswered.",
    ("outcome",),
    namespace=PREFIX,
    registry=REGISTRY,
)
CANARY_SECONDS: Final = Histogram(
    "canary_seconds",
    "Time until a canary came back.",
    namespace=PREFIX,
    registry=REGISTRY,
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 120),
)
PROMPT_TOKENS: Final = Counter(
    "prompt_tokens", "Prompt tokens of finished choices.", namespace=PREFIX, registry=REGISTRY
)
CACHED_TOKENS: Final = Counter(
    "cached_tokens", "Those prompt tokens whose KV was already there.", namespace=PREFIX, registry=REGISTRY
)
COMPLETION_TOKENS: Final = Counter(
    "completion_tokens", "Tokens generated for finished choices.", namespace=PREFIX, registry=REGISTRY
)
PREFILL_CLAIM_SECONDS: Final = Histogram(
    "prefill_claim_seconds",
    "Decode: time from the offer of a prompt to the claim of a prefill worker, its queue included.",
    namespace=PREFIX,
    registry=REGISTRY,
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
PREFILL_KV_SECONDS: Final = Histogram(
    "prefill_kv_seconds",
    "Decode: time from a prefill worker's claim to the first token: handshake, forward pass and transfer.",
    namespace=PREFIX,
    registry=REGISTRY,
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
PREFILL_LOST: Final = Counter(
    "prefill_lost",
    "Decode: prompts that a prefill worker claimed and did not bring to an end; each is offered again.",
    namespace=PREFIX,
    registry=REGISTRY,
)

HTTP_REQUESTS: Final = Counter(
    "http_requests",
    "Gateway: HTTP requests that have ended, by route, status (0: none was sent) and model.",
    ("route", "status", "model"),
    namespace=PREFIX,
    registry=REGISTRY,
)
HTTP_SECONDS: Final = Histogram(
    "http_seconds",
    "Gateway: time from an HTTP request's head to the end of its answer, streams whole.",
    ("route",),
    namespace=PREFIX,
    registry=REGISTRY,
    buckets=(0.0025, 0.01, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
)
HTTP_TTFT_SECONDS: Final = Histogram(
    "http_ttft_seconds",
    "Gateway: time from an HTTP request's head to its answer's first token.",
    ("model",),
    namespace=PREFIX,
    registry=REGISTRY,
    buckets=(0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 4, 8, 15, 30, 60, 300),
)
HTTP_RECEIVED_BYTES: Final = Counter(
    "http_received_bytes", "Gateway: bytes of request bodies.", ("route",), namespace=PREFIX, registry=REGISTRY
)
HTTP_SENT_BYTES: Final = Counter(
    "http_sent_bytes", "Gateway: bytes of answers' bodies.", ("route",), namespace=PREFIX, registry=REGISTRY
)

ENGINE: Final = CollectorRegistry()
"""What we count inside an engine's own processes; it leaves them with the engine's series."""

HANDSHAKE_SECONDS: Final = Histogram(
    "handshake_seconds",
    "A handshake message's way from one engine to another, from sending to receiving, by both machines' clocks.",
    namespace=PREFIX,
    registry=ENGINE,
    buckets=(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5),
)
KV_TRANSFER_SECONDS: Final = Histogram(
    "kv_transfer_seconds",
    "Prefill: time from decode's transfer message to the end of the KV's write, the forward pass included.",
    namespace=PREFIX,
    registry=ENGINE,
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
KV_WRITE_SECONDS: Final = Histogram(
    "kv_write_seconds",
    "Prefill: time from handing a prompt's last KV to NIXL to the end of its write.",
    namespace=PREFIX,
    registry=ENGINE,
    buckets=(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5),
)
KV_TRANSFER_BYTES: Final = Counter(
    "kv_transfer_bytes", "Prefill: KV bytes written to decode workers.", namespace=PREFIX, registry=ENGINE
)

SAMPLES_MAX: Final = 2_000
"""Samples of one process in a snapshot, which then stays below the limit of a payload."""
LEFT_OUT: Final = f"{PREFIX}_process_samples_left_out"
LEFT_OUT_ABOUT: Final = "Samples of a process that were too many for its snapshot; only there where some were."


class TokenClock:
    """Times one choice's tokens: TTFT from the request's acceptance, then ITL from token to token."""

    def __init__(self, accepted_unix_s: float) -> None:
        """`accepted_unix_s` 0: the acceptance is not known, so TTFT is not observed."""
        self._accepted_unix_s = accepted_unix_s
        self._last_s: float | None = None

    def tick(self, num_new_tokens: int) -> None:
        """Tokens have come just now. Several at once share the time since the last ones equally."""
        if not num_new_tokens:
            return
        now_s = time.monotonic()
        if self._last_s is not None:
            self._observe(ITL_SECONDS, (now_s - self._last_s) / num_new_tokens, num_new_tokens)
        elif self._accepted_unix_s:
            # Two machines' clocks: a skew must not put a negative time into the sum.
            TTFT_SECONDS.observe(max(0.0, time.time() - self._accepted_unix_s))
        self._last_s = now_s

    @staticmethod
    def _observe(series: Histogram, seconds: float, times: int) -> None:
        for _ in range(times):
            series.observe(seconds)


def count_usage(usage: Usage) -> None:
    """Count a finished choice's tokens."""
    PROMPT_TOKENS.inc(usage.prompt_tokens)
    CACHED_TOKENS.inc(usage.cached_tokens)
    COMPLETION_TOKENS.inc(usage.completion_tokens)


def snapshot(registry: CollectorRegistry = REGISTRY) -> tuple[MetricFamily, ...]:
    """All series as they stand, for a `MetricsSnapshot`; without the `_created` times, which double its size."""
    return tuple(
        MetricFamily(
            name=family.name,
            help=family.documentation,
            type=family.type,
            samples=tuple(
                MetricSample(name=sample.name, labels=dict(sample.labels), value=sample.value)
                for sample in family.samples
                if not sample.name.endswith("_created")
            ),
        )
        for family in registry.collect()
    )


def bounded(families: Iterable[MetricFamily]) -> tuple[MetricFamily, ...]:
    """The families up to `SAMPLES_MAX` samples, whole ones only, and how many samples are missing then."""
    kept: list[MetricFamily] = []
    count = left_out = 0
    for family in families:
        if count + len(family.samples) > SAMPLES_MAX:
            left_out += len(family.samples)
        else:
            kept.append(family)
            count += len(family.samples)
    if left_out:
        sample = MetricSample(name=LEFT_OUT, labels={}, value=left_out)
        kept.append(MetricFamily(name=LEFT_OUT, help=LEFT_OUT_ABOUT, type="gauge", samples=(sample,)))
    return tuple(kept)
