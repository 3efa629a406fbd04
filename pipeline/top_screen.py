"""What `top` shows: a view of the pipeline as rich tables that fit 80 columns. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.pause import said
from pipeline.presence import WorkerState
from pipeline.rates import WINDOW_S, Speed

BAR_CHARS: Final = 4
NARROW_CHARS: Final = 80
NAME_CHARS: Final = 14
"""Of a worker's or model's name in a narrow terminal; longer ones are cut in their middle."""
LINES_AROUND: Final = 17
"""Lines that are neither a model's nor a worker's."""
WORKERS_SHOWN_MIN: Final = 3
STATE_STYLES: Final = {
    "silent": "bold red",
    "unhealthy": "red",
    "draining": "yellow",
    "paused": "yellow",
    "starting": "yellow",
    "ready": "green",
}
"""Where there is no room for all workers, those that need a look come first: in this order."""
AS_MEANT: Final = frozenset({"starting", "draining", "paused"})
"""Codes of `pipeline.health` that are no trouble, and are a worker's state anyway."""
UNHEALTHY_SHOWN_MAX: Final = 4


@dataclass(frozen=True, kw_only=True)
class ModelRow:
    """A model's queues and its last seconds. None: there is no such queue, or the broker did not say."""

    model: str
    speed: Speed = field(default_factory=Speed)
    paused_until_unix_s: float | None = None  # an operator paused its queue
    asked: int | None = None  # requests that no preprocess worker has passed on
    decode_waiting: int | None = None
    decode_in_work: int | None = None
    prefill_waiting: int | None = None
    prefill_in_work: int | None = None


@dataclass(frozen=True, kw_only=True)
class View:
    """Everything that is shown at one moment."""

    url: str
    unix_s: float
    models: tuple[ModelRow, ...] = ()
    models_left_out: int = 0
    workers: tuple[WorkerState, ...] = ()
    watched_s: float = WINDOW_S  # how far back rates, percentiles and errors reach
    errors: Mapping[str, float] = field(default_factory=dict)  # by code
    redeliveries: float = 0.0
    dead_letters: int | None = None
    broker_error: str | None = None


def render(view: View, width: int = NARROW_CHARS, height: int | None = None) -> Group:
    """The view for so many columns and, where `height` is given, about so many lines."""
    chars = NAME_CHARS + max(0, width - NARROW_CHARS) // 2
    parts: list[RenderableType] = [_head(view), Text(), _speeds(view, chars), Text()]
    parts.append(_queues(view.models, chars))
    if view.models_left_out:
        parts.append(Text(f"and {view.models_left_out} more models", style="dim"))
    room = None if height is None else max(WORKERS_SHOWN_MIN, height - LINES_AROUND - 2 * max(1, len(view.models)))
    parts += [Text(), _workers(view.workers, chars, room), Text(), *_unhealthy(view.workers)]
    parts += [
        Text(f"{row.model}: {said(until)}", style="yellow") for row in view.models if (until := row.paused_until_unix_s)
    ]
    parts.append(_troubles(view))
    return Group(*parts)


def _head(view: View) -> Text:
    at = datetime.fromtimestamp(view.unix_s).astimezone().strftime("%H:%M:%S")
    ready = sum(state.ready for state in view.workers)
    head = Text("sglang-nats top", style="bold")
    head.append(f"  {view.url}  {at}  {ready} of {len(view.workers)} workers ready  ", style="not bold")
    return head.append("q quits", style="not bold dim")


def _table(words: Sequence[str], figures: Sequence[str], more: Sequence[str] = (), gap_chars: int = 2) -> Table:
    """Columns of words, then of figures, then of words again."""
    table = Table(box=None, pad_edge=False, padding=(0, gap_chars, 0, 0), header_style="bold dim")
    for head in words:
        table.add_column(head, no_wrap=True)
    for head in figures:
        table.add_column(head, no_wrap=True, justify="right")
    for head in more:
        table.add_column(head, no_wrap=True)
    return table


def _cut(name: str, chars: int) -> str:
    """A name in so many characters: its end tells workers apart as much as its beginning."""
    if len(name) <= chars:
        return name
    end = (chars - 1) // 2
    return f"{name[: chars - 1 - end]}…{name[-end:]}"


def _speeds(view: View, chars: int) -> Table:
    heads = ("Req/s", "Tok/s", "TTFT ms p50", "p95", "ITL ms p50", "p95", "Hits")
    table = _table([f"Last {view.watched_s:.0f} s"], heads)
    for row in view.models:
        speed = row.speed
        table.add_row(
            Text(_cut(row.model, chars), style="cyan"),
            _rate(speed.requests_per_s),
            _rate(speed.tokens_per_s),
            *(_ms(s) for s in (speed.ttft_s_p50, speed.ttft_s_p95, speed.itl_s_p50, speed.itl_s_p95)),
            "-" if speed.hit_rate is None else f"{speed.hit_rate:.0%}",
        )
    return table


def _queues(models: Iterable[ModelRow], chars: int) -> Table:
    table = _table(["Queues"], ("Asked", "Decode waits", "in work", "Prefill waits", "in work"))
    for row in models:
        counts = (row.asked, row.decode_waiting, row.decode_in_work, row.prefill_waiting, row.prefill_in_work)
        table.add_row(
            Text(_cut(row.model, chars), style="cyan"), *("-" if count is None else f"{count:,}" for count in counts)
        )
    return table


def _workers(workers: Sequence[WorkerState], chars: int, room: int | None) -> Group:
    table = _table(("Worker", "Role", "Model", "State"), ("Tasks", "Run", "Wait"), ("KV use",), gap_chars=1)
    shown = list(workers)
    if room is not None and len(shown) > room:
        shown = sorted(shown, key=lambda state: list(STATE_STYLES).index(state_word(state)))[: room - 1]
    for state in shown:
        table.add_row(*_worker(state, chars))
    left_out = len(workers) - len(shown)
    return Group(table, *([Text(f"and {left_out} more workers", style="dim")] if left_out else []))


def state_word(state: WorkerState) -> str:
    """One of `STATE_STYLES`."""
    beat = state.heartbeat
    if state.down or beat is None:
        return "silent"
    if beat.draining or beat.ready:
        return "draining" if beat.draining else "ready"
    return "paused" if beat.paused else "unhealthy" if wrong(state) else "starting"


def wrong(state: WorkerState) -> list[str]:
    """Codes of what is wrong with a worker; one that serves all the same may have some."""
    return [code for code in state.heartbeat.unhealthy if code not in AS_MEANT] if state.heartbeat else []


def _worker(state: WorkerState, chars: int) -> tuple[RenderableType, ...]:
    beat, word = state.heartbeat, state_word(state)
    named = (_cut(state.worker, chars), state.role)
    if beat is None:
        return (*named, "-", Text(word, style=STATE_STYLES[word]), "-", "-", "-", "-")
    load, engine = beat.load, bool(beat.load.kv_tokens)
    return (
        *named,
        _cut(beat.model or "-", chars),
        Text(word, style=STATE_STYLES[word]),
        f"{beat.in_flight}/{beat.slots}" if beat.slots else str(beat.in_flight),
        str(load.running) if engine else "-",
        str(load.waiting) if engine else "-",
        _bar(load.kv_tokens_used / load.kv_tokens) if engine else Text("-"),
    )


def _bar(share: float) -> Text:
    """A share as a bar and a figure; red where little is left."""
    full = min(BAR_CHARS, round(share * BAR_CHARS))
    style = "red" if share > 0.9 else "yellow" if share > 0.7 else "green"
    return Text("▇" * full, style=style) + Text("▇" * (BAR_CHARS - full), style="dim") + Text(f" {share:4.0%}")


def _unhealthy(workers: Sequence[WorkerState]) -> list[Text]:
    """What is wrong, a line a worker."""
    told = [Text(f"{state.worker}: {', '.join(wrong(state))}", style="red") for state in workers if wrong(state)]
    more = [Text(f"and {len(told) - UNHEALTHY_SHOWN_MAX} more unhealthy workers", style="red")]
    return told[:UNHEALTHY_SHOWN_MAX] + (more if len(told) > UNHEALTHY_SHOWN_MAX else [])


def _troubles(view: View) -> Text:
    if view.broker_error:
        return Text(view.broker_error, style="bold red")
    counts = ", ".join(f"{code} {count:.0f}" for code, count in sorted(view.errors.items())) or "none"
    line = Text(f"Errors in {view.watched_s:.0f} s ") + Text(counts, style="red" if view.errors else "green")
    line += Text("   Came again ") + Text(f"{view.redeliveries:.0f}", style="yellow" if view.redeliveries else "green")
    dead = "-" if view.dead_letters is None else f"{view.dead_letters:,}"
    return line + Text("   Dead letters ") + Text(dead, style="red" if view.dead_letters else "green")


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{1e3 * seconds:,.1f}" if seconds < 0.1 else f"{1e3 * seconds:,.0f}"
