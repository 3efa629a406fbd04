"""`health`: every worker's own word on its health, what is missing of it, and on request a real request a model."""

import asyncio
import time
from dataclasses import dataclass
from typing import Final

from pipeline.bus import Bus
from pipeline.client import Client
from pipeline.control import command
from pipeline.errors import ConfigError, PipelineError
from pipeline.health import Health, Reason
from pipeline.look import HEARD_S, looking
from pipeline.presence import Presence, WorkerState
from pipeline.screen import err, out, table
from subjects.limits import PRESENCE_S

CANARY_S_MAX: Final = 30.0
"""A request of one token that takes longer than this is a failure."""
CANARY_PROMPT: Final = "Say yes."


@dataclass(frozen=True)
class Checked:
    """One worker, and what it said of itself or what its silence says."""

    state: WorkerState
    health: Health


async def check(url: str, worker: str | None, *, canary: bool) -> int:
    """Print the health of all workers, or of one; the exit code, 1 where any is not well. Raises SetupError."""
    with err.status("asking every worker"):
        async with looking(url, "health") as (bus, presence):
            checked = await _ask_all(bus, presence, worker)
    if not checked:
        err.print("no worker is up: `sglang-nats up` starts a whole topology here", markup=False)
        return 1
    out.print(table("", ("Worker", "Role", "Model", "Lives", "Takes work", "Reasons"), [_row(one) for one in checked]))
    for one in checked:
        for reason in one.health.reasons:
            out.print(f"{one.state.worker}: {reason.code}: {reason.message}", style="red", markup=False)
    well = all(one.health.healthy for one in checked)
    if canary:
        models = sorted({one.state.card.model for one in checked if one.state.card})
        if not models:
            err.print("no model is served, so there is no canary to send", markup=False)
        for model in models:
            well &= await _send_canary(url, model)
    return 0 if well else 1


async def _ask_all(bus: Bus, presence: Presence, worker: str | None) -> list[Checked]:
    """Raises ConfigError for a worker that nobody has heard of."""
    await asyncio.sleep(HEARD_S)
    states = [state for state in presence.workers() if worker in (None, state.worker)]
    if worker and not states:
        raise ConfigError(f"nobody has heard of a worker {worker!r}; `sglang-nats workers` lists them", field="worker")
    return list(await asyncio.gather(*(_ask(bus, state) for state in states)))


async def _ask(bus: Bus, state: WorkerState) -> Checked:
    """Its own word; where it gives none, what that means."""
    try:
        return Checked(state, Health.from_dict((await command(bus, state.worker, "health")).result))
    except PipelineError:
        heard = state.heartbeat is not None and state.age_s < PRESENCE_S
        code, sentence = ("no_answer", "it sends heartbeats, but does not answer") if heard else ("down", "it is gone")
        return Checked(state, Health(live=False, ready=False, reasons=(Reason(code, sentence),)))


def _row(checked: Checked) -> tuple[str, ...]:
    state, health = checked.state, checked.health
    beat, card = state.heartbeat, state.card
    model = (card.model if card else beat.model if beat else None) or "-"
    reasons = ", ".join(reason.code for reason in health.reasons)
    return (state.worker, state.role, model, _word(health.live), _word(health.ready), reasons or "-")


def _word(yes: bool) -> str:
    return "yes" if yes else "no"


async def _send_canary(url: str, model: str) -> bool:
    """Ask a model for one token the way a client does, and say how long it took; whether it came."""
    began_s = time.monotonic()
    fields = {
        "messages": [{"role": "user", "content": CANARY_PROMPT}],
        "max_tokens": 1,
        "temperature": 0.0,
        "deadline": time.time() + CANARY_S_MAX,
    }
    failure = "it ended without a token"
    try:
        with err.status(f"asking {model} for a token"):
            async with Client.connect(url, client="health") as client:
                async for frame in client.generate(model=model, **fields):
                    if frame.token_ids:
                        failure = ""
                    elif frame.error:
                        failure = f"{frame.error.code}: {frame.error.message}"
    except PipelineError as error:
        failure = f"{error.code}: {error}"
    if failure:
        err.print(f"{model}: the canary failed: {failure}", style="red", markup=False)
        return False
    out.print(f"{model}: a canary came back after {1e3 * (time.monotonic() - began_s):.0f} ms", style="green")
    return True
