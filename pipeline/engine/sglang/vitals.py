"""Signs of life of SGLang's processes, as Linux tells them: no question to a process that may not answer.

Of a scheduler the main thread counts: it runs the event loop and the forward passes, while other threads (NIXL's,
ZMQ's) go on though the scheduler hangs. With it count the processes that it started, for it may wait for a compiler.
"""

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

_TITLE: Final = "sglang::"
"""How SGLang's processes call themselves: `sglang::scheduler_DP1_TP0`, `sglang::detokenizer`."""
_SCHEDULER: Final = re.compile(r"sglang::scheduler(?:_DP(?P<rank>\d+))?")
_STOPPED: Final = frozenset("Tt")
"""By a signal, and by a debugger."""
DESCENDANTS_MAX: Final = 64
_TICKS_A_SECOND: Final = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class EngineProcess:
    pid: int
    title: str
    dp_rank: int | None  # of a scheduler


def engine_processes(roots: Iterable[int]) -> tuple[EngineProcess, ...]:
    """SGLang's processes among these and their descendants, once they have their titles."""
    found = []
    for root in sorted(roots):
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(root)
            for each in (process, *process.children(recursive=True)):
                title = " ".join(each.cmdline()).strip()
                if title.startswith(_TITLE):
                    match = _SCHEDULER.match(title)
                    found.append(EngineProcess(each.pid, title, int(match["rank"] or 0) if match else None))
    return tuple(found)


def read(processes: Iterable[EngineProcess]) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """The titles of those that are stopped, and each rank's time on the CPU in seconds: f[dp_size].

    Only a change of the time means something: it falls when a process that a scheduler started has ended. An engine's
    process that has ended is left out: whoever watches for deaths tells of it.
    """
    stopped: list[str] = []
    cpu_s: dict[int, float] = {}
    for process in processes:
        with suppress(OSError):
            main = Path(f"/proc/{process.pid}/task/{process.pid}")
            state, ticks = _state(main)
            if state in _STOPPED:
                stopped.append(process.title)
            if process.dp_rank is not None:
                used_s = (ticks + _ticks_below(main)) / _TICKS_A_SECOND
                cpu_s[process.dp_rank] = cpu_s.get(process.dp_rank, 0.0) + used_s
    return tuple(stopped), tuple(cpu_s[rank] for rank in sorted(cpu_s))


def _state(task: Path) -> tuple[str, int]:
    """The state's letter of a thread or a process in /proc, and its time on the CPU in ticks; see proc(5).

    Raises OSError where it has ended.
    """
    fields = (task / "stat").read_text().rpartition(")")[2].split()  # from the third on: the second may hold spaces
    return fields[0], int(fields[11]) + int(fields[12])


def _ticks_below(main: Path) -> int:
    """The time on the CPU of the processes that a main thread started, and of those that they started, in ticks."""
    ticks, waiting, seen = 0, [main], 0
    while waiting and seen < DESCENDANTS_MAX:
        with suppress(OSError):  # it has ended, or this kernel does not tell children
            for pid in (waiting.pop() / "children").read_text().split():
                seen += 1
                ticks += _state(Path("/proc") / pid)[1]
                waiting.append(Path("/proc") / pid / "task" / pid)
    return ticks
