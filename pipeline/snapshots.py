"""Many processes' metrics snapshots as one set of Prometheus families."""

from collections.abc import Iterable
from typing import Final

from prometheus_client.core import Metric
from prometheus_client.samples import Sample

from subjects.limits import PRESENCE_S
from subjects.messages import MetricFamily, MetricsSnapshot

SNAPSHOTS_MAX: Final = 4096
"""Processes of workers and their engines whose snapshots are kept."""
SAMPLES_A_SNAPSHOT_MAX: Final = 5_000
SAMPLES_MAX: Final = 200_000
"""More would be too much for a scrape."""


class Snapshots:
    """The last snapshot of every process that is still heard of. `now_s` is of the monotonic clock."""

    def __init__(self) -> None:
        self._by_process: dict[tuple[str, str, str], tuple[MetricsSnapshot, float]] = {}

    def add(self, snapshot: MetricsSnapshot, now_s: float) -> None:
        """Take a process's snapshot in; a new process beyond `SNAPSHOTS_MAX` is left out."""
        key = (snapshot.role, snapshot.worker, snapshot.process)
        if key in self._by_process or len(self._by_process) < SNAPSHOTS_MAX:
            self._by_process[key] = (snapshot, now_s)

    def forget_silent(self, now_s: float) -> None:
        """Drop the processes not heard of for `PRESENCE_S`: their series end instead of standing still."""
        for key, (_, heard_s) in list(self._by_process.items()):
            if now_s - heard_s > PRESENCE_S:
                del self._by_process[key]

    def current(self) -> tuple[MetricsSnapshot, ...]:
        return tuple(snapshot for snapshot, _ in self._by_process.values())


def merged(snapshots: Iterable[MetricsSnapshot]) -> tuple[list[Metric], int]:
    """The families, each once, with `role`, `worker` and `model` on every sample; and how many samples were left out.

    A family that two workers declare with different types keeps the first one's: Prometheus takes a name only once.
    """
    merging = _Merging()
    for snapshot in snapshots:
        merging.add(snapshot)
    return list(merging.families.values()), merging.left_out


class _Merging:
    """Families in the making."""

    def __init__(self) -> None:
        self.families: dict[str, Metric] = {}
        self.left_out = 0
        self._places: dict[tuple[str, frozenset[tuple[str, str]]], int] = {}  # of a sample in its family

    def add(self, snapshot: MetricsSnapshot) -> None:
        labels = {"role": snapshot.role, "worker": snapshot.worker}
        if snapshot.model:
            labels["model"] = snapshot.model
        count = 0
        for family in snapshot.families:
            metric = self.families.setdefault(family.name, Metric(family.name, family.help, family.type))
            room = max(0, min(SAMPLES_A_SNAPSHOT_MAX - count, SAMPLES_MAX - len(self._places)))
            taken = min(len(family.samples), room) if metric.type == family.type else 0
            self._take(metric, family, taken, labels)
            self.left_out += len(family.samples) - taken
            count += taken

    def _take(self, metric: Metric, family: MetricFamily, count: int, more: dict[str, str]) -> None:
        """Processes of one engine that count the same thing under the same labels are added up."""
        for sample in family.samples[:count]:
            labels = sample.labels | more
            key = (sample.name, frozenset(labels.items()))
            place = self._places.setdefault(key, len(metric.samples))
            if place < len(metric.samples):
                value = metric.samples[place].value + sample.value
                metric.samples[place] = Sample(sample.name, labels, value)
            else:
                metric.samples.append(Sample(sample.name, labels, sample.value))
