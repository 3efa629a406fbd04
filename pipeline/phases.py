"""A request's way as stretches of time, for whoever draws it. Pure; `pipeline.trace` finds what it is made of."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from pipeline.trace import Found, Stored
from subjects.messages import Frame, Timing


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """What a request did, or waited for, from one moment to another."""

    kind: str  # queue, preprocess, prefill, decode or gap
    what: str
    where: str = ""  # a worker
    begin_unix_s: float
    end_unix_s: float | None = None  # None: it still does


def phases(found: Found) -> list[Phase]:
    """All phases in the order of their beginnings. The times are by the broker's clock, and by decode workers'."""
    frames = [frame for frame in found.frames if frame.value.token_ids or frame.value.finish_reason]
    timed = next((frame.value.timing for frame in reversed(frames) if frame.value.timing), None)
    found_phases = [*_before_decode(found, timed, bool(frames))]
    if timed is not None:
        found_phases += _until_first_token(timed, frames)
    for choice in sorted({frame.value.choice for frame in frames}):
        found_phases += _decoding(found, [frame for frame in frames if frame.value.choice == choice])
    return sorted(found_phases, key=lambda phase: phase.begin_unix_s)


def _phase(kind: str, what: str, begin_unix_s: float, end_unix_s: float | None, where: str = "") -> Iterator[Phase]:
    """A phase whose beginning is known. Two machines' clocks may say that it ended before: it then took no time."""
    if begin_unix_s:
        end = None if end_unix_s is None else max(begin_unix_s, end_unix_s)
        yield Phase(kind=kind, what=what, where=where, begin_unix_s=begin_unix_s, end_unix_s=end)


def _before_decode(found: Found, timed: Timing | None, begun: bool) -> Iterator[Phase]:
    """Until a decode worker has it, as the terminal frame tells, or the queues where there is none yet."""
    if found.asked:
        yield from _phase("queue", "waits for preprocess", found.asked.unix_s, None)
    if timed is not None:
        yield from _phase("preprocess", "queue and preprocess", timed.accepted_unix_s, timed.preprocessed_unix_s)
        if not found.owners:  # else `started` is a later owner's
            yield from _phase("queue", "waits for decode", timed.preprocessed_unix_s, timed.started_unix_s or None)
        return
    for work in found.work:
        yield from _phase("preprocess", "queue and preprocess", work.value.accepted_unix_s, work.unix_s)
        if not begun:
            yield from _phase("queue", "waits for decode, or its first token", work.unix_s, None)


def _until_first_token(timed: Timing, frames: list[Stored[Frame]]) -> Iterator[Phase]:
    """The last owner's way to its first token, its prefill worker's part included."""
    last = next(frame.value for frame in reversed(frames) if frame.value.timing)
    mine = [frame.unix_s for frame in frames if frame.value.attempt == last.attempt]
    first_unix_s = timed.first_token_unix_s or (mine[0] if mine else None)
    owner, prefill = last.worker or "", timed.prefill_worker or ""
    begin_unix_s = timed.started_unix_s
    if timed.prefill_claimed_unix_s:
        yield from _phase("queue", "waits for prefill", begin_unix_s, timed.prefill_claimed_unix_s)
        landed_unix_s = timed.kv_landed_unix_s or first_unix_s
        yield from _phase("prefill", "prefill and KV transfer", timed.prefill_claimed_unix_s, landed_unix_s, prefill)
        begin_unix_s = landed_unix_s or 0.0
    yield from _phase("prefill", "first token", begin_unix_s, first_unix_s, owner)


def _decoding(found: Found, frames: list[Stored[Frame]]) -> Iterator[Phase]:
    """One choice's output, owner by owner, with what lay between two owners."""
    attempts: dict[int, list[Stored[Frame]]] = {}
    for frame in frames:
        attempts.setdefault(frame.value.attempt, []).append(frame)
    for attempt, of in sorted(attempts.items()):
        timing, worker = of[-1].value.timing, next((one.value.worker for one in of if one.value.worker), "")
        in_one_piece = len(of) == 1 and timing is not None
        begin_unix_s = timing.first_token_unix_s if in_one_piece and timing else None
        more = f", attempt {attempt}" if attempt > 1 else ""
        lasts = attempt == max(attempts) and frames[-1].value.finish_reason is None
        end_unix_s = None if lasts else of[-1].unix_s
        yield from _phase("decode", f"decode{more}", begin_unix_s or of[0].unix_s, end_unix_s, worker or "")
    for before, after in pairwise(sorted(attempts)):
        lost_unix_s, back_unix_s = attempts[before][-1].unix_s, attempts[after][0].unix_s
        word = next((word for word in found.owners if word.value.attempt == after), None)
        if word is None:
            yield from _phase("gap", "no owner", lost_unix_s, back_unix_s)
        else:
            yield from _phase("gap", "no owner", lost_unix_s, word.unix_s)
            yield from _phase("queue", "taken over", word.unix_s, back_unix_s, word.value.worker or "")
