"""`watch bootstrap`: every handshake between prefill and decode as a line, live."""

import asyncio

import msgspec

from pipeline.bus import Bus, Received
from pipeline.engine.sglang.handshake import BootstrapLine, describe
from pipeline.screen import err
from subjects import names
from subjects.codec import decode
from subjects.messages import Claim, Refusal

HINT = "watching handshakes; Ctrl-C ends it. Send a request to a disaggregated model to see one."


def line_of(received: Received) -> str | None:
    """A message on a bootstrap subject as a line: room, from, to, operation, pages, bytes, microseconds."""
    if to := names.CLAIM.parse(received.subject):
        claim = decode(Claim, received.payload)
        return str(_plain(claim.room, f"{claim.worker}.{claim.incarnation}", to["worker"], "claim"))
    if to := names.REFUSAL.parse(received.subject):
        refusal = decode(Refusal, received.payload)
        return str(_plain(refusal.room, "", to["worker"], f"refusal {refusal.failure.code}"))
    line = describe(received)
    return str(line) if line else None


def _plain(room: int, sender: str, to: str, operation: str) -> BootstrapLine:
    return BootstrapLine(room=str(room), sender=sender, to=to, operation=operation)


async def watch_bootstrap(url: str) -> None:
    """Print handshakes until cancelled. Raises BusConnectError."""
    bus = await Bus.connect(url, name="watch")

    def show(received: Received) -> None:
        try:
            line = line_of(received)
        except msgspec.DecodeError as error:
            line = f"{received.subject}: not readable: {error}"
        if line:
            print(line, flush=True)

    try:
        for subject in (names.CLAIM, names.REFUSAL, names.BOOTSTRAP):
            await bus.subscribe(subject.any(), show)
        err.print(HINT, style="dim")
        await asyncio.Event().wait()
    finally:
        await bus.close()
