"""The canary: whether an engine still generates, found out without harm to an engine that is only busy.

Users' tokens are proof enough. An engine that shows none, idle or with requests that wait, is given a canary on each
data-parallel rank: the smallest request, the way of all requests. One that comes back is proof of life. One that does
not is no proof of death: a long prompt may be before it. So these are the ways to be judged wedged:

| what is seen                                                      | after           |
|-------------------------------------------------------------------|-----------------|
| a process of the engine is stopped (SIGSTOP, a debugger)          | `STOPPED_S`     |
| a canary waits while its rank's main thread uses no CPU at all    | `STILL_S`       |
| a canary waits, whatever the CPU does                             | `silent_s_max`  |

From then on only a canary that comes back, or a user's token, makes it well again.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final, Literal

import structlog

from pipeline import metrics
from pipeline.engine.protocol import Engine, Vitals
from pipeline.errors import EngineDied, PipelineError

TICK_S: Final = 0.5
SILENT_S: Final = 2.0
"""An engine with requests that shows no token for this long is given a canary; no rank gets two in less.

After each that comes back it is given twice as long, up to what an idle one has: its requests wait for something else.
"""
STOPPED_S: Final = 0.9
"""Profilers stop a process too, for a moment."""
STILL_S: Final = 4.0
STALL_S: Final = 2.0
"""A tick that comes this late: this process itself stood still, and no clock of its own tells anything."""
FAILURES_MAX: Final = 2
"""So many canaries refused in a row are no accident."""

log = structlog.get_logger()


@dataclass(frozen=True)
class Verdict:
    """What is wrong with an engine."""

    code: Literal["engine_wedged", "engine_failing"]
    message: str
    stopped: bool = False  # someone stopped it: no request is to blame


@dataclass(slots=True)
class _Rank:
    """What is known of a data-parallel rank. Times are of the monotonic clock."""

    proof_s: float  # it generated something
    moved_s: float | None = None  # it used the CPU; None: that cannot be seen from here, as on another machine
    cpu_s: float = -1.0
    asked_s: float | None = None  # a canary is in it
    last_asked_s: float = 0.0
    failures: int = 0
    failure: str = ""
    patience_s: float = SILENT_S
    owes_proof: bool = False  # it was judged wedged, and has shown nothing since


class Pulse:
    """The judgement, pure: it is told what is seen and when, and says whom to ask and what to think."""

    def __init__(self, dp_size: int, *, every_s: float, silent_s_max: float, now_s: float) -> None:
        """`every_s`: between canaries of an idle engine; 0: it is never asked, and only stopped processes count."""
        self._every_s, self._silent_s_max = every_s, silent_s_max
        self._ranks = [_Rank(proof_s=now_s) for _ in range(dp_size)]
        self._vitals = Vitals(outputs=0, running=0)
        self._output_s = now_s
        self._running_s = now_s  # no process was stopped then

    def observe(self, vitals: Vitals, now_s: float) -> None:
        """Take in what can be seen from outside."""
        if vitals.outputs > self._vitals.outputs:
            self._output_s = now_s
            for rank in self._ranks:
                rank.patience_s = SILENT_S
            if len(self._ranks) == 1:  # of several, any may have sent it
                self._prove(self._ranks[0], now_s)
        for rank, cpu_s in zip(self._ranks, vitals.cpu_s, strict=False):
            if cpu_s != rank.cpu_s:
                rank.cpu_s, rank.moved_s = cpu_s, now_s
        if not vitals.stopped:
            self._running_s = now_s
        self._vitals = vitals

    def asked(self, number: int, now_s: float) -> None:
        """A canary was given to a rank."""
        rank = self._ranks[number]
        rank.asked_s = rank.last_asked_s = now_s

    def answered(self, number: int, now_s: float, failure: str | None) -> None:
        """It came back, with an error or without. A refusal also shows that the engine hears."""
        rank = self._ranks[number]
        rank.asked_s = None
        if failure is None:
            self._prove(rank, now_s)
            rank.patience_s = min(2 * rank.patience_s, max(self._every_s, SILENT_S))
        else:
            rank.failures, rank.failure = rank.failures + 1, failure

    def gave_up(self, number: int) -> None:
        """It did not come back within `silent_s_max`, and was taken back."""
        self._ranks[number].asked_s = None
        self._ranks[number].owes_proof = True

    def start_clocks(self, now_s: float) -> None:
        """This process stood still: what it did not see meanwhile counts against nobody."""
        self._running_s = now_s
        self.expect_nothing(now_s)

    def expect_nothing(self, now_s: float) -> None:
        """The engine is not to be asked now, so its silence means nothing."""
        self._output_s = now_s
        for rank in self._ranks:
            rank.proof_s = now_s
            if rank.asked_s is not None:
                rank.asked_s = now_s

    def due(self, now_s: float) -> Iterator[int]:
        """The ranks that want a canary."""
        if not self._every_s or self._vitals.stopped:
            return
        for number, rank in enumerate(self._ranks):
            if rank.asked_s is not None or now_s - rank.last_asked_s < SILENT_S:
                continue
            silent = self._vitals.running > 0 and now_s - max(rank.proof_s, self._output_s) > rank.patience_s
            if rank.owes_proof or rank.failures or silent or now_s - rank.proof_s > self._every_s:
                yield number

    def judge(self, now_s: float) -> Verdict | None:
        """What is wrong with the engine; None where nothing is."""
        if self._vitals.stopped and now_s - self._running_s > STOPPED_S:
            for rank in self._ranks:
                rank.owes_proof = bool(self._every_s)
            return Verdict("engine_wedged", f"the process {self._vitals.stopped[0]} is stopped", stopped=True)
        for number, rank in enumerate(self._ranks):
            what = f"rank {number} of the engine" if len(self._ranks) > 1 else "the engine"
            if (why := self._wedged(rank, now_s)) is not None:
                rank.owes_proof = True
                return Verdict("engine_wedged", f"{what} {why}")
            if rank.failures >= FAILURES_MAX:
                return Verdict("engine_failing", f"{what} fails its canary: {rank.failure}")
        return None

    def _wedged(self, rank: _Rank, now_s: float) -> str | None:
        if rank.asked_s is not None:
            waited_s = now_s - max(rank.asked_s, rank.proof_s)
            if waited_s > self._silent_s_max:
                return f"has not answered its canary for {waited_s:.0f} s"
            if rank.moved_s is not None and min(waited_s, now_s - rank.moved_s) > STILL_S:
                return f"stands still: a canary has waited {waited_s:.0f} s, and it used no CPU"
        return "was wedged, and has not generated anything since" if rank.owes_proof else None

    @staticmethod
    def _prove(rank: _Rank, now_s: float) -> None:
        rank.proof_s, rank.failures, rank.owes_proof = now_s, 0, False


class EngineWatch:
    """Watches one engine for as long as it lives, and says when its state changes."""

    def __init__(
        self,
        engine: Engine,
        dp_size: int,
        *,
        every_s: float,
        silent_s_max: float,
        may_ask: Callable[[], bool],
        on_change: Callable[[Verdict | None], None],
    ) -> None:
        """`may_ask`: whether the engine may be given work now; a canary would break one whose memory is released."""
        self._engine, self._may_ask, self._on_change = engine, may_ask, on_change
        self._silent_s_max = silent_s_max
        self._pulse = Pulse(dp_size, every_s=every_s, silent_s_max=silent_s_max, now_s=time.monotonic())
        self._canaries: dict[int, asyncio.Task[None]] = {}  # by rank
        self.verdict: Verdict | None = None
        """What is wrong now."""

    async def run(self) -> None:
        """Watch until the engine has died."""
        ticked_s = time.monotonic()
        try:
            while True:
                now_s = time.monotonic()
                if now_s - ticked_s > STALL_S:
                    self._pulse.start_clocks(now_s)
                ticked_s = now_s
                self._tick(now_s)
                await asyncio.sleep(TICK_S)
        except EngineDied:
            return
        finally:
            for canary in self._canaries.values():
                canary.cancel()
            await asyncio.gather(*self._canaries.values(), return_exceptions=True)

    def _tick(self, now_s: float) -> None:
        """Raises EngineDied."""
        self._pulse.observe(self._engine.vitals(), now_s)
        if not self._may_ask():
            self._pulse.expect_nothing(now_s)
        else:
            for rank in self._pulse.due(now_s):
                self._pulse.asked(rank, now_s)
                self._canaries[rank] = asyncio.create_task(self._ask(rank), name=f"canary.{rank}")
        self._set(self._pulse.judge(now_s))

    def _set(self, verdict: Verdict | None) -> None:
        before, self.verdict = self.verdict, verdict
        if (before and before.code) != (verdict and verdict.code):
            self._on_change(verdict)

    async def _ask(self, rank: int) -> None:
        """Give a rank its canary, and note what comes of it."""
        began_s, request = time.monotonic(), self._engine.canary(rank)
        outcome, failure = "answered", None
        try:
            async with asyncio.timeout(2 * self._silent_s_max), aclosing(self._engine.generate(request)) as outputs:
                async for _ in outputs:
                    pass
        except TimeoutError:
            self._pulse.gave_up(rank)
            metrics.CANARIES.labels("unanswered").inc()
            return
        except PipelineError as error:
            outcome, failure = "failed", str(error)
            log.warning("canary_failed", code=error.code, reason=failure)
        except Exception as error:  # the outermost guard of a task: a canary that broke is one that failed
            outcome, failure = "failed", repr(error)
            log.exception("canary_failed", code="internal")
        now_s = time.monotonic()
        self._pulse.answered(rank, now_s, failure)
        metrics.CANARIES.labels(outcome).inc()
        metrics.CANARY_SECONDS.observe(now_s - began_s)
