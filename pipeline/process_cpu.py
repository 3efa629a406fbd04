"""What processes cost in CPU time, from /proc (Linux): a process, and all that it started. See proc(5).

An engine is processes that its worker started: without them a worker's own CPU time says little.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

DESCENDANTS_MAX: Final = 1_000
PROC: Final = Path("/proc")


def own_cpu_s(pid: int) -> float:
    """CPU seconds of one process, its threads included. Raises OSError where there is no such process."""
    user, system, _, _ = _ticks(pid)
    return (user + system) / _ticks_a_second()


def descendants_cpu_s(pid: int) -> float:
    """CPU seconds of what a process started, and of what those started, living and waited for.

    It grows for ever but for a child that nobody waits for. Raises OSError where there is no such process.
    """
    _, _, *waited_for = _ticks(pid)
    ticks = sum(waited_for)
    for each in _descendants(pid):
        with suppress(OSError):  # it has ended just now
            ticks += sum(_ticks(each))
    return ticks / _ticks_a_second()


class DescendantsCollector(Collector):
    """This process's descendants as a series; nothing where there is no /proc."""

    def __init__(self, name: str) -> None:
        self._name = name

    def collect(self) -> Iterator[CounterMetricFamily]:
        with suppress(OSError):
            about = "CPU seconds of all processes that the worker has started: those of its engine."
            yield CounterMetricFamily(self._name, about, value=descendants_cpu_s(os.getpid()))


def _ticks_a_second() -> int:
    return os.sysconf("SC_CLK_TCK")


def _ticks(pid: int) -> tuple[int, int, int, int]:
    """Of a process: user and system time, and both of the children that it has waited for."""
    text = (PROC / str(pid) / "stat").read_text()
    fields = text.rpartition(")")[2].split()  # from the third on: the second may hold spaces
    user, system, waited_user, waited_system = map(int, fields[11:15])
    return user, system, waited_user, waited_system


def _descendants(pid: int) -> Iterator[int]:
    waiting, seen = [pid], 0
    while waiting and seen < DESCENDANTS_MAX:
        with suppress(OSError):  # it has ended, or this kernel does not tell children
            for task in (PROC / str(waiting.pop()) / "task").iterdir():
                for child in map(int, (task / "children").read_text().split()):
                    seen += 1
                    waiting.append(child)
                    yield child
