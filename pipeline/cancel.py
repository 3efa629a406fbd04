"""Cancellations: who asked for the end of which request. Every worker that may hold requests listens.

The stream CANCELS keeps them for a while, for a request that waits in a queue while no worker is up to hear.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Final

import msgspec
import structlog

from pipeline.bus import Bus, Received
from pipeline.errors import BusUnavailable
from subjects import names, streams
from subjects.codec import decode
from subjects.messages import Cancel

REMEMBERED_MAX: Final = 65_536
"""Cancelled ids kept, for a request that is still in a queue when it is cancelled."""

log = structlog.get_logger()


class Cancellations:
    """The ids of cancelled requests with their reasons, and whom to tell."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._reasons: OrderedDict[str, str] = OrderedDict()
        self._watchers: dict[str, Callable[[str], None]] = {}

    async def start(self) -> None:
        """Listen, and take in what was asked for before. Raises BusUnavailable."""
        await self._bus.subscribe(names.CANCEL.any(), self._hear)
        await self._bus.flush()
        await self._catch_up()
        self._bus.on_reconnect(self._catch_up_after_outage)

    def reason(self, request_id: str) -> str | None:
        """Why a request was cancelled; None if it was not."""
        return self._reasons.get(request_id)

    def watch(self, request_id: str, on_cancel: Callable[[str], None]) -> None:
        """Call back with the reason when the request is cancelled, until `unwatch`."""
        self._watchers[request_id] = on_cancel

    def unwatch(self, request_id: str) -> None:
        self._watchers.pop(request_id, None)

    async def _catch_up(self) -> None:
        async for stored in self._bus.read(streams.CANCELS.name, names.CANCEL.any()):
            self._note(stored.subject, stored.payload)

    async def _catch_up_after_outage(self) -> None:
        try:
            await self._catch_up()
        except BusUnavailable as error:
            log.warning("cancellations_not_read", code=error.code, reason=str(error))

    def _hear(self, received: Received) -> None:
        self._note(received.subject, received.payload)

    def _note(self, subject: str, payload: bytes) -> None:
        parts = names.CANCEL.parse(subject)
        assert parts, subject
        request_id, reason = parts["request_id"], Cancel().reason
        if payload:
            try:
                reason = decode(Cancel, payload).reason
            except msgspec.DecodeError:
                reason = payload[:200].decode(errors="replace")  # `nats pub` by hand, in plain words
        self._reasons[request_id] = reason
        while len(self._reasons) > REMEMBERED_MAX:
            self._reasons.popitem(last=False)
        if on_cancel := self._watchers.get(request_id):
            on_cancel(reason)
