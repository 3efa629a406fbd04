"""`trace`: one request's timeline, from what the streams still have of it.

Nothing is asked of any worker: the request's frames and their owners' words stand in RESPONSES with the times at which
the broker stored them, the terminal frame says when its owner came how far (`subjects.messages.Timing`), and what
waits, failed, was cancelled or given up stands in the other streams.
"""

import contextlib
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar

import msgspec
from rich.markup import escape

from pipeline.bus import Bus, StoredMessage
from pipeline.errors import ConfigError
from pipeline.openai import identify
from pipeline.screen import err, out, table
from pipeline.tracing import TraceContext
from subjects import headers, names, streams
from subjects.codec import decode
from subjects.messages import Cancel, DeadLetter, Failure, Frame, Message, OwnedTask, PrefillTask, Timing

CONNECT_S_MAX: Final = 3.0
SCANNED_MAX: Final = 20_000
"""So many messages of a stream that is not ordered by request are looked through, from its newest on."""
BYTES_MAX: Final = 64 * 1024 * 1024
"""A queue of more bytes than this is not looked through."""
GAP_S: Final = 1.0
"""A silence between two frames of one owner that is worth a line."""
MESSAGE_CHARS_MAX: Final = 100

V = TypeVar("V")
M = TypeVar("M", bound=Message)


@dataclass(frozen=True, slots=True)
class Stored(Generic[V]):
    """A message, and when the broker stored it."""

    unix_s: float
    value: V
    seq: int = 0
    where: str = ""  # its subject, or the stage
    trace_id: str | None = None


@dataclass
class Found:
    """All that the streams have of one request."""

    request_id: str
    client: str | None  # None: only dead letters tell of it
    frames: list[Stored[Frame]] = field(default_factory=list)
    owners: list[Stored[Frame]] = field(default_factory=list)
    asked: Stored[None] | None = None  # it waits for preprocess
    work: list[Stored[OwnedTask]] = field(default_factory=list)  # it waits for its owner, or is there
    prompts: list[Stored[PrefillTask]] = field(default_factory=list)  # offered to prefill
    failures: list[Stored[Failure]] = field(default_factory=list)
    cancels: list[Stored[Cancel]] = field(default_factory=list)
    letters: list[Stored[DeadLetter]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """What the streams do not tell, as sentences."""

    @property
    def trace_id(self) -> str | None:
        of = (*self.frames, *self.owners, *self.work, *self.prompts, *([self.asked] if self.asked else []))
        return next((one.trace_id for one in of if one.trace_id), None)


@dataclass(frozen=True, order=True, slots=True)
class Event:
    """A line of the timeline."""

    unix_s: float
    rank: int  # among events of one time
    what: str
    where: str = ""
    detail: str = ""


# --- what the streams have -----------------------------------------------------------------------------


class Search:
    """Looks for one request in every stream."""

    def __init__(self, bus: Bus, request_id: str) -> None:
        self._bus, self._request_id = bus, request_id

    async def find(self, client: str | None) -> Found:
        """Raises ConfigError where nothing, or two clients' requests of this id, are found; BusUnavailable."""
        missing: list[str] = []
        waiting = [one async for one in self._waiting(missing)]
        clients = {asker for asker, _ in waiting if asker} | await self._answered()
        letters = [letter async for letter in self._letters()]
        found = Found(self._request_id, self._one_of(clients, client, bool(letters)), letters=letters, missing=missing)
        for asker, one in waiting:
            if asker in (found.client, None):
                _take_waiting(found, one)
        await self._read_log(found)
        found.cancels = [one async for one in self._all(streams.CANCELS, self._of(names.CANCEL), Cancel)]
        found.failures = [one async for one in self._failures(found.trace_id)]
        return found

    def _of(self, subject: names.Subject) -> str:
        return subject.any(request_id=self._request_id)

    def _one_of(self, clients: set[str], wanted: str | None, dead: bool) -> str | None:
        if wanted is not None and (wanted in clients or dead):
            return wanted
        if len(clients) == 1 and wanted is None:
            return next(iter(clients))
        if not clients and not dead:
            raise ConfigError(
                f"no stream has anything of request {self._request_id}: it was never accepted, or it ended longer ago "
                "than frames are kept (responses_kept_s)",
                field="request_id",
            )
        if not clients:
            return None
        of = f"there are requests {self._request_id} of {', '.join(sorted(clients))}"
        raise ConfigError(f"say whose it is with --client NAME: {of}", field="client")

    async def _answered(self) -> set[str]:
        """The clients that frames of this id went to."""
        found = set()
        for kind in (names.RESPONSES, names.OWNERS):
            of = await self._bus.subjects_state(streams.RESPONSES.name, self._of(kind))
            found |= {parts["client"] for subject in of if (parts := kind.parse(subject))}
        return found

    async def _waiting(self, missing: list[str]) -> AsyncIterator[tuple[str | None, Stored[Any]]]:
        """What the two queues hold of it, each with its client; a prompt for prefill does not say whose it is."""
        for queue in (streams.REQUESTS, streams.WORK):
            state = await self._bus.stream_state(queue.name)
            if state.messages > SCANNED_MAX or state.bytes > BYTES_MAX:
                missing.append(f"{queue.name} holds {state.messages:,} messages: too many to look through for it")
                continue
            for subject in queue.subjects:
                kind = next(kind for kind in names.ALL if kind.any() == subject)
                async for one in self._bus.read(queue.name, subject):
                    if found := self._is_of_it(kind.payload, one):
                        yield found

    def _is_of_it(self, payload: str, one: StoredMessage) -> tuple[str | None, Stored[Any]] | None:
        if payload == "Request":
            identity = identify(one.payload, one.headers or {}, one.seq)
            return (identity.client, _stored(one, None)) if identity.request_id == self._request_id else None
        work = decode(PrefillTask if payload == "PrefillTask" else OwnedTask, one.payload)
        if work.request_id != self._request_id:
            return None
        return (work.client if isinstance(work, OwnedTask) else None, _stored(one, work))

    async def _read_log(self, found: Found) -> None:
        if found.client is None:
            return
        parts = {"client": found.client, "request_id": self._request_id}
        found.frames = [one async for one in self._all(streams.RESPONSES, names.RESPONSES.of(**parts), Frame)]
        found.owners = [one async for one in self._all(streams.RESPONSES, names.OWNERS.of(**parts), Frame)]

    async def _all(self, stream: streams.StreamSpec, subject: str, kind: type[M]) -> AsyncIterator[Stored[M]]:
        """The messages on a subject of this request."""
        async for one in self._bus.read(stream.name, subject):
            yield _stored(one, decode(kind, one.payload))

    async def _newest(self, stream: streams.StreamSpec, subject: str) -> AsyncIterator[StoredMessage]:
        """The newest messages of a stream whose subjects do not name requests, at most `SCANNED_MAX`."""
        from_seq = (await self._bus.stream_state(stream.name)).last_seq - SCANNED_MAX
        async for one in self._bus.read(stream.name, subject, from_seq=max(1, from_seq)):
            yield one

    async def _failures(self, trace_id: str | None) -> AsyncIterator[Stored[Failure]]:
        """By the request's id, or, of a payload that nobody could read, by its trace."""
        async for one in self._newest(streams.FAILED, names.FAILED.any()):
            of, stored = (one.headers or {}).get(headers.REQUEST), _stored(one, None)
            if of == self._request_id or (of is None and trace_id is not None and stored.trace_id == trace_id):
                stage = (names.FAILED.parse(one.subject) or {}).get("stage", "")
                yield Stored(stored.unix_s, decode(Failure, one.payload), one.seq, stage, stored.trace_id)

    async def _letters(self) -> AsyncIterator[Stored[DeadLetter]]:
        async for one in self._newest(streams.DEAD, names.DEAD.any()):
            letter = decode(DeadLetter, one.payload)
            of = letter.request_id or identify(letter.payload, letter.headers, letter.stream_seq).request_id
            if of == self._request_id:
                yield _stored(one, letter)


def _take_waiting(found: Found, one: Stored[Any]) -> None:
    if isinstance(one.value, OwnedTask):
        found.work.append(one)
    elif isinstance(one.value, PrefillTask):
        found.prompts.append(one)
    else:
        found.asked = one


def _stored(message: StoredMessage, value: V) -> Stored[V]:
    context = TraceContext.parse((message.headers or {}).get(headers.TRACEPARENT))
    return Stored(message.stored_unix_s, value, message.seq, message.subject, context and context.trace_id)


# --- the timeline --------------------------------------------------------------------------------------


def timeline(found: Found) -> list[Event]:
    """What happened, in order."""
    events = [*_waits(found), *_interruptions(found)]
    choices = sorted({frame.value.choice for frame in found.frames})
    timed = next((frame.value.timing for frame in reversed(found.frames) if frame.value.timing), None)
    events += _hops(found, timed)
    for choice in choices:
        of = f"choice {choice}: " if len(choices) > 1 else ""
        frames = [frame for frame in found.frames if frame.value.choice == choice]
        events += [_named(event, of) for event in _answer(frames)]
    return sorted(events)


def _named(event: Event, of: str) -> Event:
    return Event(event.unix_s, event.rank, of + event.what, event.where, event.detail)


def _hops(found: Found, timed: Timing | None) -> Iterator[Event]:
    """From acceptance to the owner that ended it, as the queues and the terminal frame tell."""
    accepted_unix_s = timed.accepted_unix_s if timed else 0.0
    preprocessed_unix_s = timed.preprocessed_unix_s if timed else 0.0
    for work in found.work:
        accepted_unix_s = accepted_unix_s or work.value.accepted_unix_s
        preprocessed_unix_s = preprocessed_unix_s or work.unix_s
    if accepted_unix_s and not found.asked:
        yield Event(accepted_unix_s, 0, "accepted", streams.REQUESTS.name, "passed on since")
    if preprocessed_unix_s:
        yield Event(preprocessed_unix_s, 1, "preprocessed", streams.WORK.name)
    if timed is None or not timed.started_unix_s:
        return
    last = next(frame.value for frame in reversed(found.frames) if frame.value.timing)
    yield Event(timed.started_unix_s, 3, "started", last.worker or "", f"attempt {last.attempt}")
    if timed.prefill_claimed_unix_s:
        yield Event(timed.prefill_claimed_unix_s, 3, "prefill claimed", timed.prefill_worker or "")
    if timed.kv_landed_unix_s:
        yield Event(timed.kv_landed_unix_s, 4, "KV landed", last.worker or "", f"from {timed.prefill_worker}")


def _waits(found: Found) -> Iterator[Event]:
    """What stands in a queue now."""
    if found.asked:
        yield Event(
            found.asked.unix_s, 0, "accepted", streams.REQUESTS.name, f"in the queue still: {found.asked.where}"
        )
    ended = bool(found.frames) and found.frames[-1].value.finish_reason is not None
    for work in found.work:
        detail = "its last owner has not settled it yet" if ended else f"waits or is worked on: {work.where}"
        queue = work.where.split(".")[1]
        yield Event(work.unix_s, 2, f"in the queue for {queue}", streams.WORK.name, detail)
    for prompt in found.prompts:
        detail = f"room {prompt.value.room} waits for a claim: {prompt.where}"
        yield Event(prompt.unix_s, 3, "prefill offered", prompt.value.owner, detail)


def _interruptions(found: Found) -> Iterator[Event]:
    """New owners, failures, cancellations, letters."""
    for word in found.owners:
        yield Event(word.unix_s, 2, "taken over", word.value.worker or "", f"attempt {word.value.attempt}")
    for failure in found.failures:
        message = failure.value.message[:MESSAGE_CHARS_MAX]
        yield Event(failure.unix_s, 5, f"{failure.where} failed", "", f"{failure.value.code}: {message}")
    for cancel in found.cancels:
        yield Event(cancel.unix_s, 5, "cancelled", "", cancel.value.reason)
    for letter in found.letters:
        of = letter.value
        detail = f"letter {letter.seq}: {of.error.code} after {of.attempts} deliveries"
        yield Event(letter.unix_s, 6, f"given up by {of.stage}", streams.DEAD.name, detail)


def _answer(frames: list[Stored[Frame]]) -> Iterator[Event]:
    """One choice's frames: each attempt's first token, its pace, the silences between, and the end."""
    before: Stored[Frame] | None = None
    attempts: dict[int, list[Stored[Frame]]] = {}
    for frame in frames:
        if before and frame.unix_s - before.unix_s > GAP_S:
            yield Event(before.unix_s, 8, "silence", "", f"{1e3 * (frame.unix_s - before.unix_s):,.0f} ms")
        before = frame
        if frame.value.token_ids or frame.value.text or frame.value.finish_reason:
            attempts.setdefault(frame.value.attempt, []).append(frame)
    for attempt, of in sorted(attempts.items()):
        yield from _attempt(attempt, of)


def _attempt(attempt: int, frames: list[Stored[Frame]]) -> Iterator[Event]:
    worker = next((frame.value.worker for frame in frames if frame.value.worker), "")
    last = frames[-1].value
    first_unix_s = next((frame.unix_s for frame in frames if frame.value.token_ids or frame.value.text), None)
    in_one_piece = len(frames) == 1  # not streamed: only its owner knows when the first token came
    if in_one_piece and last.timing and last.timing.first_token_unix_s:
        first_unix_s = last.timing.first_token_unix_s
    tokens = sum(len(frame.value.token_ids) for frame in frames)
    if first_unix_s is not None:
        yield Event(first_unix_s, 6, "first token", worker, f"attempt {attempt}" if attempt > 1 else "")
    pace = _pace(tokens, None if in_one_piece else first_unix_s, frames[-1].unix_s)
    if not last.finish_reason:
        yield Event(frames[-1].unix_s, 7, "last frame so far", worker, f"attempt {attempt}: {pace}")
        return
    yield Event(frames[-1].unix_s, 9, f"ended: {last.finish_reason}", last.worker or "", _end(last, pace))


def _end(last: Frame, pace: str) -> str:
    parts = [pace]
    if last.usage:
        cached = f" ({last.usage.cached_tokens} cached)" if last.usage.cached_tokens else ""
        parts.append(f"{last.usage.prompt_tokens} prompt tokens{cached}, {last.usage.completion_tokens} in all")
    if last.error:
        parts = [f"{last.error.code}: {last.error.message[:MESSAGE_CHARS_MAX]}"]
    return "; ".join(parts)


def _pace(tokens: int, first_unix_s: float | None, last_unix_s: float) -> str:
    """Tokens, and those after the first one a second."""
    took_s = last_unix_s - first_unix_s if first_unix_s else 0.0
    return f"{tokens:,} tokens" + (f", {(tokens - 1) / took_s:,.1f}/s" if tokens > 1 and took_s > 0 else "")


def gone(found: Found) -> list[str]:
    """What the streams do not have, as sentences."""
    said = list(found.missing)
    frames = [frame.value for frame in found.frames]
    if not frames:
        said.append("RESPONSES has no frame of it: none came yet, or they are older than responses_kept_s")
    for choice in sorted({frame.choice for frame in frames}):
        first = next((frame for frame in frames if frame.choice == choice and frame.token_ids), None)
        if first is not None and first.index and not found.owners:
            said.append(f"RESPONSES no longer has tokens 0 to {first.index - 1} of choice {choice}")
    if not found.asked and not found.work and not any(frame.timing for frame in frames):
        said.append(
            "when it was accepted and preprocessed: the queues have passed it on, and no terminal frame says so"
        )
    return said


# --- what a person sees --------------------------------------------------------------------------------


def render(found: Found) -> Iterable[str | object]:
    """The timeline as a heading, a table in milliseconds since the first event, and what is missing."""
    events = timeline(found)
    trace = f", trace {found.trace_id}" if found.trace_id else ""
    whose = f" of client {found.client}" if found.client else ""
    yield escape(f"Request {found.request_id}{whose}{trace}")
    if events:
        zero_unix_s = events[0].unix_s
        rows = [
            (f"{1e3 * (event.unix_s - zero_unix_s):,.1f}", event.what, event.where or "-", event.detail)
            for event in events
        ]
        yield table("", ("ms", "What", "Where", ""), rows)
    for sentence in gone(found):
        yield escape(f"not known: {sentence}")


async def show(url: str, request_id: str, client: str | None) -> int:
    """Print a request's timeline; the exit code. Raises ConfigError where there is nothing of it."""
    bus = await Bus.connect(url, name="trace", timeout_s=CONNECT_S_MAX)
    with contextlib.ExitStack() as waiting:
        waiting.enter_context(err.status("reading the streams"))
        try:
            found = await Search(bus, request_id).find(client)
        except msgspec.DecodeError as error:
            raise ConfigError(f"a message of another release cannot be read: {error}", field="request_id") from None
        finally:
            await bus.close()
    for part in render(found):
        out.print(part)
    return 0
