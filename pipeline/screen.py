"""What the command line shows a person: the start of a topology, an answer as it comes, tables."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from rich.console import Console, Group
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from pipeline.local import Child, LocalTopology
from pipeline.progress import Progress
from subjects.messages import Failure, Frame, Usage

REFRESH_HZ: Final = 8
DOING_CHARS_MAX: Final = 60
PLAIN_S: Final = 5.0
"""Without a terminal a worker that is still starting is mentioned this often."""

out: Final = Console(soft_wrap=True, highlight=False)
err: Final = Console(stderr=True, soft_wrap=True, highlight=False)


class Starting:
    """The start of a topology: a live line a worker on a terminal, else a line whenever something changes."""

    def __init__(self, local: LocalTopology) -> None:
        self._local, self._started_s = local, time.monotonic()
        self._said: dict[str, str] = {}
        self._said_s = time.monotonic()

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Show the progress while the block runs; `tell` has to be called now and then without a terminal."""
        if not err.is_terminal:
            yield
            return
        with Live(console=err, refresh_per_second=REFRESH_HZ, get_renderable=self._render, transient=True):
            yield

    def tell(self) -> None:
        """Without a terminal: print what has changed since the last call."""
        if err.is_terminal:
            return
        overdue = time.monotonic() - self._said_s > PLAIN_S
        if self._local.preparing and (overdue or "" not in self._said):
            self._print(self._local.preparing)
            self._said[""], self._said_s = "said", time.monotonic()
        for child in self._local.children:
            line = f"{child.name}: {child.state}"
            if self._said.get(child.name) != line or (overdue and child.state == "starting"):
                self._print(_line(child))
                self._said[child.name], self._said_s = line, time.monotonic()

    def _print(self, line: str) -> None:
        if line:
            err.print(f"[{self._elapsed_s():5.1f} s] {line}", markup=False)

    def _elapsed_s(self) -> float:
        return time.monotonic() - self._started_s

    def _render(self) -> Group:
        rows: list[Spinner | Text] = []
        if self._local.preparing:
            rows.append(_spinner("", Text(self._local.preparing, style="yellow")))
        for child in self._local.children:
            style = "green" if child.state == "ready" else "yellow"
            line = Text(_line(child), style=style, no_wrap=True, overflow="ellipsis")
            rows.append(Text("✓ ", style=style) + line if child.state == "ready" else _spinner(child.name, line))
        return Group(*rows, Text(f"  {self._elapsed_s():.0f} s", style="dim"))


_spinners: Final[dict[str, Spinner]] = {}


def _spinner(name: str, line: Text) -> Spinner:
    """One spinner a worker, kept over redraws so that it turns."""
    spinner = _spinners.setdefault(name, Spinner("dots"))
    spinner.update(text=line)
    return spinner


def _line(child: Child) -> str:
    doing = child.doing()[:DOING_CHARS_MAX] if child.state == "starting" else ""
    return f"{child.name}: {child.state}" + (f" ({doing})" if doing else "")


@dataclass
class Answer:
    """An answer as it comes in, with its clock."""

    asked_s: float = field(default_factory=time.monotonic)
    first_s: float | None = None  # when the first token came
    last_s: float | None = None
    tokens: int = 0
    usage: Usage | None = None
    failures: list[Failure] = field(default_factory=list)
    workers: set[str] = field(default_factory=set)
    _choices: dict[int, Progress] = field(default_factory=dict)

    def add(self, frame: Frame) -> str:
        """Take a frame in; what it says: reasoning, content, and each tool call on a line of its own."""
        now_s = time.monotonic()
        if len(frame.token_ids) or frame.text:
            self.first_s, self.last_s = self.first_s or now_s, now_s
            self.tokens += len(frame.token_ids)
        if frame.error is not None:
            self.failures.append(frame.error)
        if frame.worker:
            self.workers.add(frame.worker)
        self.usage = frame.usage or self.usage
        calls = (f"\n{call.name} {call.arguments}" if call.name else call.arguments for call in frame.tool_calls)
        return frame.reasoning + frame.text + "".join(calls)

    @property
    def ttft_ms(self) -> float | None:
        return None if self.first_s is None else 1e3 * (self.first_s - self.asked_s)

    @property
    def tokens_per_s(self) -> float | None:
        """Of the tokens after the first one; None for fewer than two steps."""
        if self.first_s is None or self.last_s is None or self.last_s <= self.first_s:
            return None
        return (self.tokens - 1) / (self.last_s - self.first_s)

    def timing(self) -> str:
        """TTFT, speed and token counts in a line."""
        parts = []
        if self.ttft_ms is not None:
            parts.append(f"TTFT {self.ttft_ms:,.0f} ms")
        if self.tokens_per_s is not None:
            parts.append(f"{self.tokens_per_s:,.1f} tokens/s")
        if self.usage:
            cached = f" ({self.usage.cached_tokens} cached)" if self.usage.cached_tokens else ""
            parts.append(f"{self.usage.prompt_tokens} prompt tokens{cached}, {self.usage.completion_tokens} generated")
        return ", ".join(parts) or "no tokens"


def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table; figures, which are all but the first column's, stand to the right where they look like figures."""
    shown = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False)
    for index, head in enumerate(heads):
        figures = all(_is_figure(row[index]) for row in rows) and bool(rows)
        shown.add_column(head, justify="right" if figures else "left", overflow="fold")
    for row in rows:
        shown.add_row(*row)
    return shown


def _is_figure(cell: str) -> bool:
    return cell[:1].isdigit() or cell in {"", "-"}
