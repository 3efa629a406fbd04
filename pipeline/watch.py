"""`watch`: what passes between workers as a line each, live."""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import msgspec

from pipeline.bus import Bus, Received
from pipeline.engine.sglang.handshake import BootstrapLine, describe
from pipeline.screen import err
from subjects import names
from subjects.codec import decode
from subjects.messages import BlocksCleared, BlocksRemoved, BlocksStored, Claim, KvEvent, KvEvents, Refusal
from subjects.names import Subject


@dataclass(frozen=True)
class View:
    """What can be watched."""

    subjects: tuple[Subject, ...]
    line_of: Callable[[Received], str | None]
    hint: str


def handshake_line(received: Received) -> str | None:
    """A message on a bootstrap subject as a line: room, from, to, operation, pages, bytes, microseconds."""
    if to := names.CLAIM.parse(received.subject):
        claim = decode(Claim, received.payload)
        return str(_plain(claim.room, f"{claim.worker}.{claim.incarnation}", to["worker"], "claim"))
    if to := names.REFUSAL.parse(received.subject):
        refusal = decode(Refusal, received.payload)
        return str(_plain(refusal.room, "", to["worker"], f"refusal {refusal.failure.code}"))
    line = describe(received)
    return str(line) if line else None


def kv_line(received: Received) -> str | None:
    """A message of KV events as a line: worker, rank, number, and for each tier the blocks stored and removed."""
    said = decode(KvEvents, received.payload)
    tiers = dict.fromkeys(event.tier for event in said.events if isinstance(event, BlocksStored | BlocksRemoved))
    changes = [_change(tier, said.events, said.block_tokens) for tier in tiers]
    if any(isinstance(event, BlocksCleared) for event in said.events):
        changes.insert(0, "all cleared")
    if not said.events:
        changes = ["nothing; messages before it may be lost"]
    source = f"{said.worker}.{said.incarnation}"
    return f"{source:<32} dp{said.dp_rank} {said.seq:>8}  {'; '.join(changes)}"


def _change(tier: str, events: Iterable[KvEvent], block_tokens: int) -> str:
    stored = sum(len(event.hashes) for event in events if isinstance(event, BlocksStored) and event.tier == tier)
    removed = sum(len(event.hashes) for event in events if isinstance(event, BlocksRemoved) and event.tier == tier)
    tokens = f"({(stored - removed) * block_tokens:+} tokens)"
    return f"{tier:<4} +{stored} -{removed} blocks {tokens}"


def _plain(room: int, sender: str, to: str, operation: str) -> BootstrapLine:
    return BootstrapLine(room=str(room), sender=sender, to=to, operation=operation)


BOOTSTRAP = View(
    (names.CLAIM, names.REFUSAL, names.BOOTSTRAP),
    handshake_line,
    "watching handshakes; Ctrl-C ends it. Send a request to a disaggregated model to see one.",
)
KV = View((names.KV_EVENTS,), kv_line, "watching KV blocks; Ctrl-C ends it. Send a request to see some stored.")


async def watch(view: View, url: str) -> None:
    """Print lines until cancelled. Raises BusConnectError."""
    bus = await Bus.connect(url, name="watch")

    def show(received: Received) -> None:
        try:
            line = view.line_of(received)
        except msgspec.DecodeError as error:
            line = f"{received.subject}: not readable: {error}"
        if line:
            print(line, flush=True)

    try:
        for subject in view.subjects:
            await bus.subscribe(subject.any(), show)
        err.print(view.hint, style="dim")
        await asyncio.Event().wait()
    finally:
        await bus.close()
