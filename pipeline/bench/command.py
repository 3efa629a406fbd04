"""`bench` and `bench compare`: a load from its settings to its files."""

import asyncio
import contextlib
import gc
import os
import platform
import signal
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit, urlunsplit

import msgspec
import uvloop
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pipeline.bench import plots, report, targets
from pipeline.bench import result as results
from pipeline.bench.load import Run, drive
from pipeline.bench.measure import doubts, summarize
from pipeline.bench.observe import Observer, observing
from pipeline.bench.plan import plan, warmup
from pipeline.bench.result import Machine, Result, Settings, Slo
from pipeline.bench.targets import HttpTarget, Target
from pipeline.errors import ConfigError
from pipeline.look import looking, only_model
from pipeline.screen import PLAIN_S, err, out, table

TICK_S: Final = 0.2
KEY_VARIABLE: Final = "OPENAI_API_KEY"
SHAREGPT_SPAN: Final = (4, 1024)
"""Longer and shorter turns are left out of a ShareGPT load by others too (vLLM's and SGLang's benchmarks)."""
SLO_LIMITS: Final = ("ttft", "tpot", "e2e")


def span_of(text: str, field: str) -> tuple[int, int]:
    """`128`, or `64:256` for a number between them. Raises ConfigError.

    >>> span_of("64:256", "input")
    (64, 256)
    """
    low, colon, high = text.partition(":")
    try:
        found = int(low), int(high if colon else low)
    except ValueError:
        found = (0, 0)
    if not 1 <= found[0] <= found[1]:
        raise ConfigError(f"--{field} takes a length as 128, or a span of lengths as 64:256, not {text!r}", field=field)
    return found


def spans_of(prompt: str, answer: str, *, sharegpt: bool) -> tuple[tuple[int, int], tuple[int, int]]:
    """The lengths of prompts and of answers, or the limits at which ShareGPT's are cut. Raises ConfigError."""
    if sharegpt:
        return SHAREGPT_SPAN, SHAREGPT_SPAN
    return span_of(prompt, "input"), span_of(answer, "output")


def slo_of(text: str | None) -> Slo:
    """From `ttft=200,tpot=20,e2e=2000`, any of them, in ms. Raises ConfigError."""
    limits = {}
    for part in text.split(",") if text else ():
        name, _, limit = part.partition("=")
        try:
            limits[f"{name}_ms"] = float(limit)
        except ValueError:
            name = ""
        if name not in SLO_LIMITS:
            raise ConfigError(f"--slo takes ms as ttft=200,tpot=20,e2e=2000, any of them, not {part!r}", field="slo")
    return Slo(**limits)


def pids_of(given: Mapping[str, str]) -> dict[str, int]:
    """Raises ConfigError."""
    for name, text in given.items():
        if not text.isdigit():
            raise ConfigError(f"--pid takes NAME=PID, not {name}={text}", field="pid")
    return {name: int(text) for name, text in given.items()}


def check(settings: Settings) -> None:
    """Raises ConfigError where settings do not go together."""
    if settings.chat and settings.unit == "tokens":
        raise ConfigError("a chat's messages are words: leave out --chat or --tokens", field="chat")
    if settings.arrivals in ("poisson", "fixed") and not settings.rate_per_s:
        raise ConfigError("an open loop needs --rate", field="rate")


def run(
    settings: Settings,
    *,
    nats: str | None,
    trace: Path | None,
    pids: Mapping[str, int],
    label: str | None,
    file: Path | None,
    plots_folder: Path | None,
) -> int:
    """Do a run, print it and leave its files; the exit code: 1 where no request ended well. Raises PipelineError.

    `nats`: the broker; without it a run over HTTP looks at no worker.
    """
    check(settings)
    done = uvloop.run(measured(settings, nats, trace, pids, label))
    shown = [tuple(row.cells()) for row in report.rows([done])]
    out.print(table("", (done.label, ""), shown))
    for doubt in done.warnings:
        err.print(f"doubtful: {doubt}", style="yellow", markup=False)
    if done.summary.codes:
        err.print(f"errors: {', '.join(f'{code} {count}' for code, count in done.summary.codes.items())}", markup=False)
    path = file or Path(f"bench-{time.strftime('%Y%m%d-%H%M%S')}.json")
    results.write(done, path)
    err.print(f"written: {path}; side by side with another: sglang-nats bench compare OTHER.json {path}", markup=False)
    if plots_folder is not None:
        _draw([done], plots_folder)
    return 0 if done.summary.ok else 1


def compare(files: Sequence[Path], plots_folder: Path | None) -> int:
    """Print runs side by side, as ratios to the first. Raises ConfigError."""
    read = [results.read(path) for path in files]
    labels = [each.label for each in read]
    read = [
        msgspec.structs.replace(each, label=path.stem) if labels.count(each.label) > 1 else each
        for each, path in zip(read, files, strict=True)
    ]
    print(report.markdown(read))
    if plots_folder is not None:
        _draw(read, plots_folder)
    return 0


def _draw(drawn: Sequence[Result], folder: Path) -> None:
    written = plots.draw(drawn, folder)
    err.print(f"written: {', '.join(map(str, written))}", markup=False)


async def measured(
    settings: Settings, nats: str | None, trace: Path | None, pids: Mapping[str, int], label: str | None
) -> Result:
    """Do a run. Raises PipelineError."""
    async with AsyncExitStack() as stack:
        settings, target = await _open(stack, settings, nats)
        works, first = plan(settings, trace), warmup(settings)
        observer = await stack.enter_async_context(observing(nats, pids))
        started_unix_s, going = time.time(), Run(total=len(works))
        with _interruptible() as stop:
            if first:
                closed = msgspec.structs.replace(
                    settings, arrivals="closed", concurrency=min(len(first), settings.concurrency or len(first))
                )
                async with _shown(Run(total=len(first)), "warming up") as warming:
                    await drive(warming, first, target, closed, stop)
            if not stop.is_set():
                await observer.begin()
                gc.collect()
                gc.freeze()  # the plan is large and stays: no collection is to walk it
                async with _shown(going, "asking"):
                    await drive(going, works, target, settings, stop)
                await observer.end()
    return _result(settings, going, observer, started_unix_s, label)


async def _open(stack: AsyncExitStack, settings: Settings, nats: str | None) -> tuple[Settings, Target]:
    """The settings with the model's name, and whom to ask. Raises PipelineError."""
    if settings.target == "http":
        session = await stack.enter_async_context(targets.http_session(settings.url, os.environ.get(KEY_VARIABLE)))
        model = settings.model or await targets.http_model(session, settings.url)
        settings = msgspec.structs.replace(settings, model=model)
        return msgspec.structs.replace(settings, url=_public(settings.url)), HttpTarget(session, settings)
    assert nats is not None
    model = settings.model
    if not model:
        async with looking(nats) as (_, presence):
            model = only_model(presence)
    settings = msgspec.structs.replace(settings, model=model, url=_public(nats))
    return settings, await stack.enter_async_context(targets.over_nats(nats, settings))


def _result(settings: Settings, going: Run, observer: Observer, started_unix_s: float, label: str | None) -> Result:
    generator = going.generator(settings)
    said = list(doubts(generator))
    if going.cut_off or len(going.seen) < going.total:
        left = going.total - len(going.seen) - going.cut_off
        said.append(f"ended early: {going.cut_off} requests were cut off, {left} not sent; neither is counted")
    return Result(
        label=label or f"{settings.target} {_load_of(settings)}",
        started_unix_s=started_unix_s,
        version=version("sglang-nats"),
        machine=Machine(cpus=os.cpu_count() or 1, system=platform.platform(), python=platform.python_version()),
        settings=settings,
        summary=summarize(going.seen, going.itl_s, settings.slo),
        generator=generator,
        processes=observer.processes(),
        transfers=observer.transfers(),
        warnings=tuple(said),
        requests=tuple(sorted(going.seen, key=lambda seen: seen.index)),
    )


def _load_of(settings: Settings) -> str:
    if settings.arrivals == "closed":
        return f"{settings.concurrency} at once"
    if settings.arrivals == "trace":
        return str(settings.trace)
    return f"{settings.arrivals} {settings.rate_per_s:g}/s"


def _public(url: str) -> str:
    """Without credentials."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


@contextlib.contextmanager
def _interruptible() -> Iterator[asyncio.Event]:
    """Ctrl-C sets the event; a second one ends the program."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def end() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)

    loop.add_signal_handler(signal.SIGINT, end)
    try:
        yield stop
    finally:
        loop.remove_signal_handler(signal.SIGINT)


@contextlib.asynccontextmanager
async def _shown(going: Run, doing: str) -> AsyncIterator[Run]:
    """The run's progress: a bar on a terminal, else a line now and then."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        ticker = asyncio.create_task(_tick(bar, going, doing))
        try:
            yield going
        finally:
            ticker.cancel()


async def _tick(bar: Progress, going: Run, doing: str) -> None:
    task, began_s = bar.add_task(doing, total=going.total, note=""), time.monotonic()
    said_s = began_s
    while True:
        now_s = time.monotonic()
        speed = going.output_tokens / max(now_s - began_s, 1e-3)
        failed = f", {going.failed:,} failed" if going.failed else ""
        note = f"{going.in_flight:,} in flight, {speed:,.0f} tokens/s{failed}"
        bar.update(task, completed=len(going.seen), note=note)
        if bar.disable and now_s - said_s > PLAIN_S:
            said_s = now_s
            err.print(f"{doing}: {len(going.seen):,} of {going.total:,}, {note}", markup=False)
        await asyncio.sleep(TICK_S)
