"""`cancel` and `drain`: end one request, or let a worker finish and go."""

import asyncio
import contextlib
import time
from typing import Any, Final

from pipeline.bus import Bus, Received
from pipeline.errors import ConfigError, NoResponders, from_failure
from pipeline.runner import DRAIN_S
from pipeline.screen import err
from subjects import limits, names, streams
from subjects.codec import decode, encode
from subjects.messages import Cancel, ControlReply, ControlRequest, Frame

CONNECT_S_MAX: Final = 3.0
ENDED_S_MAX: Final = 2.0
"""A worker that holds a request ends it within this time."""
GONE_S_MAX: Final = DRAIN_S + 15.0
LOOK_S: Final = 0.1


async def cancel(url: str, request_id: str, reason: str) -> int:
    """Cancel a request and say what came of it; the exit code, 1 where it had ended already. Raises BusUnavailable."""
    if not names.is_token(request_id):
        raise ConfigError(f"{request_id!r} is no request id", field="request_id")
    bus = await Bus.connect(url, name="cancel", timeout_s=CONNECT_S_MAX)
    try:
        ended: asyncio.Future[Frame] = asyncio.get_running_loop().create_future()
        answers = names.RESPONSES.any(request_id=request_id)
        await bus.subscribe(answers, lambda received: _note_end(received, ended))
        await bus.flush()
        stored = [decode(Frame, message.payload) async for message in bus.read(streams.RESPONSES.name, answers)]
        if any(frame.finish_reason for frame in stored):
            err.print(f"request {request_id} has ended already", markup=False)
            return 1
        await bus.publish_durable(names.CANCEL.of(request_id=request_id), encode(Cancel(reason=reason)))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ENDED_S_MAX):
                frame = await ended
                err.print(f"request {request_id} has ended: {frame.finish_reason}", markup=False)
                return 0
        err.print(
            f"no worker holds request {request_id}; one that takes it within {limits.CANCELS_KEPT_S:g} s ends it",
            markup=False,
        )
        return 0
    finally:
        await bus.close()


def _note_end(received: Received, ended: asyncio.Future[Frame]) -> None:
    frame = decode(Frame, received.payload)
    if frame.finish_reason and not ended.done():
        ended.set_result(frame)


async def drain(url: str, worker: str) -> int:
    """Have a worker take no more work, and wait until it has finished or handed over what it has; the exit code.

    Raises ConfigError where no such worker is up.
    """
    bus = await Bus.connect(url, name="drain", timeout_s=CONNECT_S_MAX)
    try:
        asked = await command(bus, worker, "drain")
        with err.status(f"{worker} drains"):
            gone = await _until_gone(bus, worker, asked.result)
    finally:
        await bus.close()
    if gone:
        err.print(f"{worker} has finished and ended", markup=False)
        return 0
    err.print(f"{worker} takes no more work, but has not ended within {GONE_S_MAX:g} s", markup=False)
    return 1


async def command(bus: Bus, worker: str, operation: str) -> ControlReply:
    """Ask a worker for an operation. Raises ConfigError where nobody is called so, and the worker's own error."""
    try:
        received = await bus.request(names.CONTROL.of(worker=worker, operation=operation), encode(ControlRequest()))
    except NoResponders:
        raise ConfigError(
            f"no worker is called {worker!r}; `sglang-nats workers` lists those that are up", field="worker"
        ) from None
    reply = decode(ControlReply, received.payload)
    if reply.error:
        raise from_failure(reply.error)
    return reply


async def _until_gone(bus: Bus, worker: str, asked: dict[str, Any]) -> bool:
    """Whether the process that was asked ends in time; one that was started again under its name is another."""
    deadline_s = time.monotonic() + GONE_S_MAX
    while time.monotonic() < deadline_s:
        try:
            if (await command(bus, worker, "ping")).result["incarnation"] != asked["incarnation"]:
                return True
        except ConfigError:
            return True
        await asyncio.sleep(LOOK_S)
    return False
