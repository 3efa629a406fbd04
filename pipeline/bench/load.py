"""Send a plan's requests and see what becomes of them: closed loop, or at the times at which they are due."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from pipeline.bench.measure import distribution, gaps_s
from pipeline.bench.plan import Work
from pipeline.bench.result import Generator, Seen, Settings
from pipeline.bench.targets import Record, Target

LAG_S: Final = 0.02
"""How often the event loop is looked at."""
IN_FLIGHT_MAX: Final = 20_000
"""An open loop that finds so many unanswered sends no more until some are: they are counted as failed."""
NOT_SENT: Final = "not_sent"


@dataclass
class Run:
    """A run as it goes on. Times are of `time.perf_counter`, and `seen` has them since `began_s`."""

    total: int
    began_s: float = 0.0
    seen: list[Seen] = field(default_factory=list)  # that have ended
    itl_s: list[float] = field(default_factory=list)  # of answers that ended well
    in_flight: int = 0
    in_flight_max: int = 0
    cut_off: int = 0  # requests that were in flight when the run was ended
    output_tokens: int = 0
    failed: int = 0
    lags_s: list[float] = field(default_factory=list)
    cpu_s: float = 0.0
    wall_s: float = 0.0

    def generator(self, settings: Settings) -> Generator:
        """How we fared."""
        behind = [seen.sent_s - seen.due_s for seen in self.seen if seen.code != NOT_SENT]
        return Generator(
            cpu_share=self.cpu_s / self.wall_s if self.wall_s else 0.0,
            loop_lag_ms=distribution(1e3 * lag_s for lag_s in self.lags_s),
            schedule_lag_ms=None if settings.arrivals == "closed" else distribution(1e3 * late_s for late_s in behind),
            in_flight_max=self.in_flight_max,
        )


async def drive(run: Run, works: Sequence[Work], target: Target, settings: Settings, stop: asyncio.Event) -> None:
    """Send everything and wait for the answers, or until `stop` is set; what is in flight then does not count."""
    run.began_s, cpu_from_s = time.perf_counter(), time.process_time()
    lag = asyncio.create_task(_watch_lag(run))
    sending = asyncio.create_task(
        _closed(run, works, target, settings) if settings.arrivals == "closed" else _open(run, works, target)
    )
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((sending, stopped), return_when=asyncio.FIRST_COMPLETED)
    finally:
        run.cpu_s, run.wall_s = time.process_time() - cpu_from_s, time.perf_counter() - run.began_s
        for task in (lag, stopped, sending):
            task.cancel()
        await asyncio.wait((lag, stopped, sending))
    if not sending.cancelled():
        sending.result()


async def _closed(run: Run, works: Sequence[Work], target: Target, settings: Settings) -> None:
    """So many users, each with one request at a time."""
    assert settings.concurrency is not None
    left = iter(works)
    async with asyncio.TaskGroup() as users:
        for _ in range(min(settings.concurrency, len(works))):
            users.create_task(_user(run, left, target, settings.issue_s_max))


async def _user(run: Run, left: Iterator[Work], target: Target, issue_s_max: float) -> None:
    for work in left:
        now_s = time.perf_counter() - run.began_s
        if now_s > issue_s_max:
            return
        await _one(run, work, now_s, target)


async def _open(run: Run, works: Sequence[Work], target: Target) -> None:
    """Each request when it is due, whatever became of those before it."""
    async with asyncio.TaskGroup() as requests:
        for work in works:
            assert work.due_s is not None
            wait_s = run.began_s + work.due_s - time.perf_counter()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            if run.in_flight >= IN_FLIGHT_MAX:
                now_s = time.perf_counter() - run.began_s
                run.failed += 1
                run.seen.append(
                    Seen(index=work.index, due_s=work.due_s, sent_s=now_s, end_s=now_s, code=NOT_SENT, status=0)
                )
                continue
            requests.create_task(_one(run, work, work.due_s, target))


async def _one(run: Run, work: Work, due_s: float, target: Target) -> None:
    record = Record()
    run.in_flight += 1
    run.in_flight_max = max(run.in_flight_max, run.in_flight)
    sent_s = time.perf_counter()
    try:
        await target.ask(work, record)
    except asyncio.CancelledError:
        run.cut_off += 1
        raise
    finally:
        run.in_flight -= 1
    _note(run, work, record, due_s, sent_s)


def _note(run: Run, work: Work, record: Record, due_s: float, sent_s: float) -> None:
    arrivals_s, began_s = record.arrivals_s, run.began_s
    run.seen.append(
        Seen(
            index=work.index,
            due_s=due_s,
            sent_s=sent_s - began_s,
            first_s=arrivals_s[0] - began_s if arrivals_s else None,
            last_s=arrivals_s[-1] - began_s if arrivals_s else None,
            end_s=time.perf_counter() - began_s,
            chunks=len(arrivals_s),
            prompt_tokens=record.prompt_tokens,
            cached_tokens=record.cached_tokens,
            output_tokens=record.tokens,
            code=record.code,
            status=record.status,
        )
    )
    run.output_tokens += record.tokens
    if record.code:
        run.failed += 1
    else:
        run.itl_s += gaps_s(arrivals_s)


async def _watch_lag(run: Run) -> None:
    """How late the event loop comes to a timer."""
    while True:
        due_s = time.perf_counter() + LAG_S
        await asyncio.sleep(LAG_S)
        run.lags_s.append(max(0.0, time.perf_counter() - due_s))
