"""`request`, `resume`, `workers` and `streams`: ask a model, read on, and look at who is there and what waits."""

import asyncio
import contextlib
import json
import sys
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any, Final

import msgspec

from pipeline import spans
from pipeline.bus import Bus
from pipeline.client import Client
from pipeline.errors import BrokerRefused, ConfigError
from pipeline.pause import paused_until, said
from pipeline.peers import addressed
from pipeline.presence import Presence, WorkerState
from pipeline.screen import Answer, err, out, table
from pipeline.tracing import TraceContext
from subjects import names, streams
from subjects.codec import Format, encode
from subjects.messages import Frame, Request

HEARD_S: Final = 1.3
"""Long enough to hear one heartbeat of everyone."""
CONNECT_S_MAX: Final = 3.0
"""A command that only looks does not wait longer for a broker."""


async def ask(
    url: str,
    model: str | None,
    fields: dict[str, Any],
    *,
    client: str | None = None,
    as_frames: bool,
    verbose: bool = False,
    traceparent: str | None = None,
) -> int:
    """Send one request and print its answer; the exit code. Raises SetupError or Transient with a sentence."""
    rest = {"request_id": uuid.uuid4().hex} | fields
    of_file, client_of_file = rest.pop("model", None), rest.pop("client", None)
    named = model or of_file or await _only_model(url)
    async with Client.connect(url, client=client or client_of_file) as asking:
        with _client_span(named, asking.name, traceparent) as context:
            if verbose:
                err.print(
                    f"request {rest['request_id']} of client {asking.name}, trace {context.trace_id}", style="dim"
                )
            answer = await stream_answer(asking, named, rest, as_frames=as_frames, traceparent=context.traceparent)
    if verbose:
        err.print(f"its timeline: sglang-nats trace {rest['request_id']} --client {asking.name}", style="dim")
    return _told(answer)


async def embed(url: str, model: str | None, texts: list[str], dimensions: int | None) -> int:
    """Print each text's vector as a line of JSON; the exit code. Raises PipelineError with a sentence."""
    named = model or await _only_model(url)
    async with Client.connect(url) as asking:
        answer = await asking.embed(model=named, input=tuple(texts), dimensions=dimensions)
    for index, vector in enumerate(answer.vectors):
        print(json.dumps({"index": index, "embedding": vector.tolist()}))
    err.print(f"{len(texts)} vectors of {len(answer.vectors[0])}, {answer.prompt_tokens} tokens", style="dim")
    return 0


@contextlib.contextmanager
def _client_span(model: str, client: str, traceparent: str | None) -> Iterator[TraceContext]:
    """The request as its client sees it, exported where spans are; what the request's trace goes on from."""
    spans.start("client", client)
    about = {"gen_ai.operation.name": "chat", "gen_ai.provider.name": "sglang", "gen_ai.request.model": model}
    span = spans.begin(f"chat {model}", TraceContext.parse(traceparent), about, kind="client")
    try:
        yield span.context
    finally:
        span.end()
        spans.stop()


async def resume(
    url: str, request_id: str, *, client: str | None, from_token: int, choices: int, deadline_s: float, as_frames: bool
) -> int:
    """Print the rest of a request's answer; the exit code. Raises PipelineError with a sentence, e.g. OutputGone."""
    whose = client or await _only_asker(url, request_id)
    async with Client.connect(url, client=whose) as reading:
        frames = reading.resume(request_id, from_token=from_token, choices=choices, deadline=time.time() + deadline_s)
        answer = await _printed(frames, choices, as_frames=as_frames)
    return _told(answer)


async def stream_answer(
    client: Client, model: str, fields: dict[str, Any], *, as_frames: bool = False, traceparent: str | None = None
) -> Answer:
    """Send a request and print its frames as they come: one choice as a stream, several one after another.

    Raises ConfigError where `fields` are not those of a request.
    """
    try:
        choices = msgspec.convert(fields, Request).n
    except msgspec.ValidationError as error:
        raise ConfigError(f"this is no request: {error}", field="json") from None
    frames = client.generate(model=model, on_duplicate=_say_duplicate, traceparent=traceparent, **fields)
    return await _printed(frames, choices, as_frames=as_frames)


async def _printed(frames: AsyncGenerator[Frame], choices: int, *, as_frames: bool) -> Answer:
    answer = Answer()
    texts = dict.fromkeys(range(choices), "")
    async with aclosing(frames):
        async for frame in frames:
            text = answer.add(frame)
            texts[frame.choice] = texts.get(frame.choice, "") + text
            if as_frames:
                print(encode(frame, Format.JSON).decode(), flush=True)
            elif len(texts) == 1:
                print(text, end="", flush=True)
    if not as_frames and answer.tokens:
        print("" if len(texts) == 1 else "\n".join(f"[{index}] {text}" for index, text in sorted(texts.items())))
    return answer


def _told(answer: Answer) -> int:
    """Say how an answer ended, on standard error; the exit code."""
    for failure in answer.failures:
        print(f"sglang-nats: {failure.code}: {failure.message}", file=sys.stderr)
    if answer.tokens:
        err.print(answer.timing(), style="dim")
    return 1 if answer.failures else 0


def _say_duplicate(request_id: str) -> None:
    err.print(f"request {request_id} was accepted before: it does not run again, this is its answer", style="dim")


async def _only_asker(url: str, request_id: str) -> str:
    """The client that a request's answer goes to. Raises ConfigError where there are none or several."""
    async with looking(url) as (bus, _):
        found = await bus.subjects_state(streams.RESPONSES.name, names.RESPONSES.any(request_id=request_id))
    whose = sorted(parts["client"] for subject in found if (parts := names.RESPONSES.parse(subject)))
    if len(whose) == 1:
        return whose[0]
    why = f"there are answers to {', '.join(whose)}" if whose else "the log has nothing of it"
    raise ConfigError(f"say whose request {request_id} is with --client NAME: {why}", field="client")


async def _only_model(url: str) -> str:
    async with looking(url) as (_, presence):
        return only_model(presence)


def only_model(presence: Presence) -> str:
    """The model that is served where only one is. Raises ConfigError where there are none or several."""
    models = sorted(presence.models())
    if len(models) == 1:
        return models[0]
    found = f"there are {', '.join(models)}" if models else "no worker has registered one yet"
    raise ConfigError(f"say which model with --model NAME: {found}", field="model")


async def show_workers(url: str) -> None:
    """Print a table of the workers that are heard of."""
    with err.status("listening for heartbeats"):
        async with looking(url) as (bus, presence):
            await asyncio.sleep(HEARD_S)
            states = presence.workers()
            served = {model for state in states if (model := _served(state))}
            pauses = {model: await paused_until(bus, model) for model in served}
    rows = []
    for state in states:
        beat, card = state.heartbeat, state.card
        if beat is None:
            continue
        wrong = ", ".join(beat.unhealthy) or "starting"
        takes = "draining" if beat.draining else "ready" if beat.ready else wrong
        if (until_unix_s := pauses.get(_served(state))) and takes == "ready":
            takes = said(until_unix_s)
        kv = f"{beat.load.kv_tokens_used:,}/{beat.load.kv_tokens:,}" if beat.load.kv_tokens else "-"
        slots = f"{beat.in_flight}/{beat.slots}" if beat.slots else str(beat.in_flight)
        rows.append((beat.worker, beat.role, beat.model or "-", takes, slots, kv, card.engine if card else "-"))
    heads = ("Worker", "Role", "Model", "State", "In flight", "KV tokens", "Engine")
    out.print(table("", heads, sorted(rows)) if rows else "no worker is up")


def _served(state: WorkerState) -> str | None:
    """The model whose requests a worker takes from the queues that can be paused."""
    return state.heartbeat.model if state.heartbeat and state.role in ("decode", "embed") else None


async def show_streams(url: str) -> None:
    """Print a table of the streams and one of their consumers."""
    async with looking(url) as (bus, presence):
        rows = [await _stream_row(bus, spec) for spec in streams.STREAMS]
        specs = [*streams.all_consumers(presence.models()), *await addressed(bus)]
        readers = [await _consumer_row(bus, spec) for spec in specs]
    out.print(table("Streams", ("Stream", "Messages", "Bytes", "Consumers", "Holds"), rows))
    out.print()
    heads = ("Consumer", "Stream", "Waiting", "In work", "Came again", "Open pulls", "State")
    out.print(table("Consumers", heads, readers))


async def _stream_row(bus: Bus, spec: streams.StreamSpec) -> tuple[str, ...]:
    try:
        state = await bus.stream_state(spec.name)
    except BrokerRefused:
        return (spec.name, "missing", "-", "-", spec.about)
    return (spec.name, f"{state.messages:,}", f"{state.bytes:,}", str(state.consumers), spec.about)


async def _consumer_row(bus: Bus, spec: streams.ConsumerSpec) -> tuple[str, ...]:
    try:
        state = await bus.consumer_state(spec.stream, spec.name)
    except BrokerRefused:
        return (spec.name, spec.stream, "missing", "-", "-", "-", "-")
    figures = (state.pending, state.ack_pending, state.redelivered, state.waiting)
    paused = said(state.paused_until_unix_s) if state.paused_until_unix_s else "-"
    return (spec.name, spec.stream, *(f"{figure:,}" for figure in figures), paused)


@contextlib.asynccontextmanager
async def looking(url: str, name: str = "cli") -> AsyncIterator[tuple[Bus, Presence]]:
    """A connection of this name and the presence seen through it, closed in any case."""
    bus = await Bus.connect(url, name=name, timeout_s=CONNECT_S_MAX)
    try:
        presence = Presence(bus)
        await presence.start()
        try:
            yield bus, presence
        finally:
            await presence.close()
    finally:
        await bus.close()
