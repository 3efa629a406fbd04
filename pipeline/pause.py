"""`pause` and `unpause`: a model's requests are accepted and kept, but no worker gets one.

It is JetStream's own pause of the model's decode and embed consumers (ADR-40 of nats-server 2.11), so it is the
broker's: workers may come and go meanwhile.
"""

import re
from datetime import UTC, datetime, timedelta
from typing import Final

from pipeline.bus import Bus, ConsumerState
from pipeline.errors import BrokerRefused, ConfigError, NoResponders
from pipeline.peers import addressed
from pipeline.presence import Presence
from pipeline.screen import err
from subjects import names, streams
from subjects.streams import ConsumerSpec

CONNECT_S_MAX: Final = 3.0
FOR_EVER: Final = timedelta(days=3650)
"""JetStream's pause has an end in any case."""
_SPAN: Final = re.compile(r"(\d{1,6})([smhd])")
_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def span_of(text: str) -> timedelta:
    """A span of time as `90s`, `30m`, `1h` or `2d`. Raises ConfigError."""
    found = _SPAN.fullmatch(text)
    if not found or not (span := timedelta(**{_UNITS[found[2]]: int(found[1])})) or span > FOR_EVER:
        raise ConfigError(f"--for takes a time like 90s, 30m, 1h or 2d, not {text!r}", field="for")
    return span


async def pause(url: str, model: str, span: timedelta | None) -> int:
    """Pause a model, for a time or until `unpause`; the exit code. Raises ConfigError where there is no such model."""
    until = datetime.now(UTC) + (span or FOR_EVER)
    bus = await Bus.connect(url, name="pause", timeout_s=CONNECT_S_MAX)
    try:
        await _check_known(bus, model)
        for consumer in streams.owned_consumers(model):
            await bus.ensure_consumer(consumer)
        consumers = await _consumers(bus, model)
        for consumer in consumers:
            await _pause(bus, consumer, until)
        states = [await _state(bus, consumer) for consumer in consumers]
    finally:
        await bus.close()
    waiting = sum(state.pending for state in states)
    err.print(f"{model} is {said(until.timestamp())}: {waiting} requests wait, running ones go on", markup=False)
    err.print(f"to go on sooner: sglang-nats unpause {model}", markup=False)
    return 0


async def unpause(url: str, model: str) -> int:
    """End a model's pause; the exit code. Raises ConfigError where there is no such model."""
    bus = await Bus.connect(url, name="unpause", timeout_s=CONNECT_S_MAX)
    try:
        await _check_known(bus, model)
        was_until_unix_s = await paused_until(bus, model)
        for consumer in streams.owned_consumers(model):
            await bus.ensure_consumer(consumer)
        for consumer in await _consumers(bus, model):
            await _pause(bus, consumer, None)
    finally:
        await bus.close()
    err.print(f"{model} goes on" if was_until_unix_s else f"{model} was not paused", markup=False)
    return 0


async def keep_paused(bus: Bus, model: str, worker: str) -> None:
    """Where a model is paused, a worker that comes meanwhile is paused with it; where it is not, it goes on.

    Raises ConfigError, BusUnavailable, BrokerRefused.
    """
    shared, own = streams.decode_any(model), streams.own_consumer("decode", model, worker)
    until_unix_s = (await _state(bus, shared)).paused_until_unix_s
    if until_unix_s != (await _state(bus, own)).paused_until_unix_s:
        await _pause(bus, own, datetime.fromtimestamp(until_unix_s, UTC) if until_unix_s else None)


async def paused_until(bus: Bus, model: str) -> float | None:
    """Until when a model is paused, on the Unix clock; None where it is not, or nobody has served it yet."""
    ends = []
    for consumer in streams.owned_consumers(model):
        try:
            ends.append((await _state(bus, consumer)).paused_until_unix_s or 0.0)
        except BrokerRefused:
            continue
    return max(ends, default=0.0) or None


def said(until_unix_s: float) -> str:
    """A pause in words, in the time of this machine."""
    until = datetime.fromtimestamp(until_unix_s, UTC)
    if until - datetime.now(UTC) > FOR_EVER / 2:
        return "paused until it is unpaused"
    return f"paused until {until.astimezone().isoformat(sep=' ', timespec='seconds')}"


async def _check_known(bus: Bus, model: str) -> None:
    """A misspelt name is told, and makes no consumers. Raises ConfigError."""
    try:
        await _state(bus, streams.decode_any(model))
    except BrokerRefused:
        presence = Presence(bus)
        await presence.start()
        models = sorted(presence.models())
        await presence.close()
        if names.token(model) not in models:
            known = f"there are {', '.join(models)}" if models else "no worker has registered one yet"
            raise ConfigError(f"there is no model {model!r}: {known}", field="model") from None


async def _consumers(bus: Bus, model: str) -> list[ConsumerSpec]:
    """All that there are of a model's decode workers, shared and their own."""
    return [*streams.owned_consumers(model), *await addressed(bus, [model], "decode")]


async def _state(bus: Bus, consumer: ConsumerSpec) -> ConsumerState:
    return await bus.consumer_state(consumer.stream, consumer.name)


async def _pause(bus: Bus, consumer: ConsumerSpec, until: datetime | None) -> None:
    """Pause a consumer, or let it go on."""
    body = {"pause_until": until.isoformat()} if until else None
    try:
        await bus.api(f"CONSUMER.PAUSE.{consumer.stream}.{consumer.name}", body)
    except NoResponders:
        raise ConfigError(
            "this broker cannot pause a model: it takes nats-server 2.11 or newer", field="nats"
        ) from None
