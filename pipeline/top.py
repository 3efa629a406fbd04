"""`top`: the pipeline at a glance, once a second: workers, queues, rates, latencies, errors.

Everything comes over NATS: heartbeats and metrics as the workers publish them, and the broker's own word on its streams
and consumers. No telemetry worker and no HTTP is needed.
"""

import asyncio
import contextlib
import os
import sys
import termios
import time
import tty
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Final

import msgspec
from rich.console import Console
from rich.live import Live

from pipeline.bus import Bus, Received
from pipeline.errors import BrokerRefused, PipelineError
from pipeline.look import looking
from pipeline.peers import all_consumers
from pipeline.presence import Presence
from pipeline.rates import Rates
from pipeline.top_screen import ModelRow, View, render
from subjects import names, streams
from subjects.codec import decode
from subjects.limits import HEARTBEAT_S, PRESENCE_S
from subjects.messages import MetricsSnapshot
from subjects.streams import ConsumerSpec

REFRESH_S: Final = 1.0
FIRST_S: Final = 2.3
"""Two snapshots of every worker, of which a rate can be told."""
MODELS_MAX: Final = 20
"""So many models, in the order of their names, are shown; each costs the broker some questions a second."""
QUIT: Final = frozenset(b"qQ")
KEYS_MAX: Final = 64


class Board:
    """What is known of the pipeline."""

    def __init__(self, bus: Bus, presence: Presence) -> None:
        self._bus, self._presence = bus, presence
        self._rates = Rates()

    async def listen(self) -> None:
        await self._bus.subscribe(names.METRICS.any(), self._hear)

    def _hear(self, received: Received) -> None:
        with contextlib.suppress(msgspec.DecodeError):  # of another release: its worker is shown, its rates are not
            self._rates.add(decode(MetricsSnapshot, received.payload), time.monotonic())

    async def view(self) -> View:
        """Everything as it stands. Where the broker does not answer, queues are left out and the view says so."""
        self._rates.forget_silent(time.monotonic(), PRESENCE_S)
        known = sorted(self._presence.models())
        models, dead, error = [], None, None
        try:
            async with asyncio.timeout(2 * REFRESH_S):
                asked = await self._bus.subjects_state(streams.REQUESTS.name, names.REQUESTS.any())
                known = sorted({*known, *(subject.rsplit(".", 1)[1] for subject in asked)})
                for model in known[:MODELS_MAX]:
                    models.append(await self._model(model, asked.get(names.REQUESTS.of(model=model), 0)))
                dead = (await self._bus.stream_state(streams.DEAD.name)).messages
        except (PipelineError, TimeoutError) as reason:
            error = f"the broker does not answer: {reason}" if str(reason) else "the broker does not answer"
            models = [ModelRow(model=model, speed=self._rates.speed(model)) for model in known[:MODELS_MAX]]
        return View(
            url=self._bus.url,
            unix_s=time.time(),
            models=tuple(models),
            models_left_out=max(0, len(known) - MODELS_MAX),
            workers=tuple(self._presence.workers()),
            watched_s=self._rates.watched_s,
            errors=self._rates.speed().errors,
            redeliveries=self._rates.speed().redeliveries,
            dead_letters=dead,
            broker_error=error,
        )

    async def _model(self, model: str, asked: int) -> ModelRow:
        """A model's queues and speed. A consumer that is not there yet has nobody to work for it."""
        waiting: dict[str, int | None] = {"decode": None, "prefill": None}
        in_work, paused_until_unix_s = dict(waiting), None
        for consumer in await self._consumers(model):
            stage = consumer.filter_subject.split(".")[1] if consumer.filter_subject else ""
            if stage not in waiting:
                continue
            try:
                state = await self._bus.consumer_state(consumer.stream, consumer.name)
            except BrokerRefused:
                continue
            waiting[stage] = (waiting[stage] or 0) + state.pending
            in_work[stage] = (in_work[stage] or 0) + state.ack_pending
            paused_until_unix_s = paused_until_unix_s or state.paused_until_unix_s
        return ModelRow(
            model=model,
            speed=self._rates.speed(model),
            paused_until_unix_s=paused_until_unix_s,
            asked=asked,
            decode_waiting=waiting["decode"],
            decode_in_work=in_work["decode"],
            prefill_waiting=waiting["prefill"],
            prefill_in_work=in_work["prefill"],
        )

    async def _consumers(self, model: str) -> Sequence[ConsumerSpec]:
        try:
            return await all_consumers(self._bus, [model])
        except BrokerRefused:  # there are no streams yet
            return ()


@contextlib.asynccontextmanager
async def watching(url: str) -> AsyncIterator[Board]:
    """A board over a connection of its own. Raises BusConnectError, BusUnavailable."""
    async with looking(url, "top") as (bus, presence):
        board = Board(bus, presence)
        await board.listen()
        yield board


async def top(url: str, once: bool) -> int:
    """Show the board until q or Ctrl-C, or once; the exit code. Where nobody looks on, frames are printed plainly."""
    console = Console(highlight=False)
    async with watching(url) as board:
        with console.status("listening for heartbeats and metrics"):
            await asyncio.sleep(FIRST_S if once else HEARTBEAT_S)
        if once:
            console.print(render(await board.view(), console.width))
        elif console.is_terminal:
            await _live(board, console)
        else:
            await _plain(board, console)
    return 0


async def _live(board: Board, console: Console) -> None:
    ended = asyncio.Event()
    with _keys(ended), Live(console=console, screen=True, auto_refresh=False) as live:
        while not ended.is_set():
            live.update(render(await board.view(), console.width, console.height), refresh=True)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), REFRESH_S)


async def _plain(board: Board, console: Console) -> None:
    while True:
        console.print(render(await board.view(), console.width))
        console.print()
        await asyncio.sleep(REFRESH_S)


@contextlib.contextmanager
def _keys(ended: asyncio.Event) -> Iterator[None]:
    """Sets `ended` when q is pressed; the terminal is as before behind the block."""
    if not sys.stdin.isatty():
        yield
        return
    before, loop = termios.tcgetattr(sys.stdin), asyncio.get_running_loop()

    def read() -> None:
        if QUIT.intersection(os.read(sys.stdin.fileno(), KEYS_MAX)):
            ended.set()

    tty.setcbreak(sys.stdin)
    loop.add_reader(sys.stdin, read)
    try:
        yield
    finally:
        loop.remove_reader(sys.stdin)
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
