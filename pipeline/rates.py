"""Rates and percentiles over the last seconds, from the counters and histograms that workers publish. Pure.

A counter only ever grows while its process lives. So what happened in a window is the difference of two snapshots of
one process, and what happened to a model is the sum over its workers.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from pipeline.metrics import PREFIX
from subjects.messages import MetricSample, MetricsSnapshot

WINDOW_S: Final = 30.0
SNAPSHOTS_MAX: Final = 40
"""Kept of one worker: a window's, at one a second, and some more for those that come early."""
WORKERS_MAX: Final = 1024
UNFINISHED: Final = frozenset({"retried", "handed_over", "lease_lost", "unsettled"})
"""Outcomes of a task after which its request goes on elsewhere."""

Histogram = dict[float, float]
"""Observations by upper bound, cumulative, as Prometheus has them; the last bound is infinite."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What is looked at of one process's series; of two snapshots' difference as well."""

    requests: float = 0.0  # that ended
    tasks: float = 0.0  # that ended, of whichever stage
    tokens: float = 0.0
    prompt_tokens: float = 0.0
    cached_tokens: float = 0.0
    redeliveries: float = 0.0
    errors: Mapping[str, float] = field(default_factory=dict)  # by code
    ttft_s: Histogram = field(default_factory=dict)
    itl_s: Histogram = field(default_factory=dict)

    @property
    def hit_rate(self) -> float | None:
        """The share of prompt tokens whose KV was there; None where no prompt ended."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else None

    def since(self, before: "Figures") -> "Figures | None":
        """What came on top; None where the process has begun anew in between."""
        if self.tokens < before.tokens or self.requests < before.requests or self.prompt_tokens < before.prompt_tokens:
            return None
        return _combined(self, before, -1.0)

    def __add__(self, other: "Figures") -> "Figures":
        return _combined(self, other, 1.0)


def _combined(one: Figures, other: Figures, sign: float) -> Figures:
    def by_key(mine: Mapping, theirs: Mapping) -> dict:
        return {key: mine.get(key, 0.0) + sign * theirs.get(key, 0.0) for key in {**mine, **theirs}}

    return Figures(
        requests=one.requests + sign * other.requests,
        tasks=one.tasks + sign * other.tasks,
        tokens=one.tokens + sign * other.tokens,
        prompt_tokens=one.prompt_tokens + sign * other.prompt_tokens,
        cached_tokens=one.cached_tokens + sign * other.cached_tokens,
        redeliveries=one.redeliveries + sign * other.redeliveries,
        errors=by_key(one.errors, other.errors),
        ttft_s=by_key(one.ttft_s, other.ttft_s),
        itl_s=by_key(one.itl_s, other.itl_s),
    )


def figures_of(snapshot: MetricsSnapshot) -> Figures:
    """Read a worker's series; those that it does not have are nought."""
    of: dict[str, list[MetricSample]] = {}
    for sample in (sample for family in snapshot.families for sample in family.samples):
        of.setdefault(sample.name.removeprefix(f"{PREFIX}_"), []).append(sample)
    ended = [sample for sample in of.get("stage_seconds_count", ()) if sample.labels.get("outcome") not in UNFINISHED]
    return Figures(
        requests=sum(sample.value for sample in ended if sample.labels.get("stage") == "decode"),
        tasks=sum(sample.value for sample in ended),
        tokens=_total(of, "ttft_seconds_count") + _total(of, "itl_seconds_count"),
        prompt_tokens=_total(of, "prompt_tokens_total"),
        cached_tokens=_total(of, "cached_tokens_total"),
        redeliveries=_total(of, "redeliveries_total"),
        errors={sample.labels.get("code", ""): sample.value for sample in of.get("errors_total", ())},
        ttft_s=_histogram(of.get("ttft_seconds_bucket", ())),
        itl_s=_histogram(of.get("itl_seconds_bucket", ())),
    )


def _total(of: Mapping[str, Iterable[MetricSample]], name: str) -> float:
    return sum(sample.value for sample in of.get(name, ()))


def _histogram(samples: Iterable[MetricSample]) -> Histogram:
    found: Histogram = {}
    for sample in samples:
        bound = float(sample.labels["le"])
        found[bound] = found.get(bound, 0.0) + sample.value
    return found


def quantile(histogram: Histogram, q: float) -> float | None:
    """The value below which a share `q` of the observations lies, as Prometheus' histogram_quantile reckons it.

    Linear inside a bucket; beyond the last finite bound it is that bound. None where nothing was observed.

    >>> quantile({1.0: 2.0, 2.0: 4.0, math.inf: 4.0}, 0.75)
    1.5
    """
    total = max(histogram.values(), default=0.0)
    if not total:
        return None
    wanted, below, lower = q * total, 0.0, 0.0
    for bound, count in sorted(histogram.items()):
        if count >= wanted:
            if math.isinf(bound):
                return lower
            return lower + (bound - lower) * (wanted - below) / (count - below) if count > below else bound
        below, lower = count, bound
    return lower


class Window:
    """The last `WINDOW_S` of one worker's snapshots. Times are of the monotonic clock."""

    def __init__(self) -> None:
        self._kept: deque[tuple[float, Figures]] = deque(maxlen=SNAPSHOTS_MAX)

    def add(self, now_s: float, figures: Figures) -> None:
        """Take a snapshot in; of a process that began anew, nothing older stays."""
        if self._kept and figures.since(self._kept[-1][1]) is None:
            self._kept.clear()
        self._kept.append((now_s, figures))
        while self._kept[0][0] < now_s - WINDOW_S:
            self._kept.popleft()

    @property
    def heard_s(self) -> float:
        return self._kept[-1][0] if self._kept else -math.inf

    def change(self) -> tuple[Figures, float]:
        """What happened in the window, and how many seconds that is: 0 with fewer than two snapshots."""
        if len(self._kept) < 2:
            return Figures(), 0.0
        (began_s, before), (ended_s, after) = self._kept[0], self._kept[-1]
        return after.since(before) or Figures(), ended_s - began_s


@dataclass(frozen=True)
class Speed:
    """A model's or a worker's last seconds. None where nothing was observed."""

    requests_per_s: float | None = None
    tasks_per_s: float | None = None
    tokens_per_s: float | None = None
    hit_rate: float | None = None
    ttft_s_p50: float | None = None
    ttft_s_p95: float | None = None
    itl_s_p50: float | None = None
    itl_s_p95: float | None = None
    errors: Mapping[str, float] = field(default_factory=dict)
    redeliveries: float = 0.0


class Rates:
    """The windows of all workers."""

    def __init__(self) -> None:
        self._windows: dict[tuple[str, str], tuple[str | None, Window]] = {}  # by role and worker, with the model

    def add(self, snapshot: MetricsSnapshot, now_s: float) -> None:
        """Take a worker's snapshot in; a new worker beyond `WORKERS_MAX` is left out.

        Its engine's processes send their own, with none of our series.
        """
        if snapshot.process:
            return
        key = (snapshot.role, snapshot.worker)
        if key in self._windows or len(self._windows) < WORKERS_MAX:
            _, window = self._windows.setdefault(key, (snapshot.model, Window()))
            window.add(now_s, figures_of(snapshot))

    def forget_silent(self, now_s: float, silence_s: float) -> None:
        """Drop the workers that have not been heard of for so long."""
        for key, (_, window) in list(self._windows.items()):
            if now_s - window.heard_s > silence_s:
                del self._windows[key]

    @property
    def watched_s(self) -> float:
        """How far back the windows reach."""
        return max((window.change()[1] for _, window in self._windows.values()), default=0.0)

    def speed(self, model: str | None = None) -> Speed:
        """Of one model's workers; None: of all, preprocess workers too."""
        return _speed(window for of, window in self._windows.values() if model in (None, of))

    def speed_of(self, role: str, worker: str) -> Speed:
        """Of one worker."""
        known = self._windows.get((role, worker))
        return _speed([known[1]] if known else [])


def _speed(windows: Iterable[Window]) -> Speed:
    """The sum over workers."""
    total, per_s = Figures(), [0.0, 0.0, 0.0]
    measured = False
    for window in windows:
        change, seconds = window.change()
        if not seconds:
            continue
        measured, total = True, total + change
        counts = (change.requests, change.tasks, change.tokens)
        per_s = [sum_per_s + count / seconds for sum_per_s, count in zip(per_s, counts, strict=True)]
    if not measured:
        return Speed()
    return Speed(
        requests_per_s=per_s[0],
        tasks_per_s=per_s[1],
        tokens_per_s=per_s[2],
        hit_rate=total.hit_rate,
        ttft_s_p50=quantile(total.ttft_s, 0.5),
        ttft_s_p95=quantile(total.ttft_s, 0.95),
        itl_s_p50=quantile(total.itl_s, 0.5),
        itl_s_p95=quantile(total.itl_s, 0.95),
        errors={code: count for code, count in total.errors.items() if count},
        redeliveries=total.redeliveries,
    )
