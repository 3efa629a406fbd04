"""Cancellations: who asked for the end of which request. Every worker that may hold requests listens."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Final

import msgspec

from pipeline.bus import Bus, Received
from subjects import names
from subjects.codec import decode
from subjects.messages import Cancel

REMEMBERED_MAX: Final = 65_536
"""Cancelled ids kept, for a request that is still in a queue when it is cancelled."""


class Cancellations:
    """The ids of cancelled requests with their reasons, and whom to tell."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._reasons: OrderedDict[str, str] = OrderedDict()
        self._watchers: dict[str, Callable[[str], None]] = {}

    async def start(self) -> None:
        await self._bus.subscribe(names.CANCEL.any(), self._hear)

    def reason(self, request_id: str) -> str | None:
        """Why a request was cancelled; None if it was not."""
        return self._reasons.get(request_id)

    def watch(self, request_id: str, on_cancel: Callable[[str], None]) -> None:
        """Call back with the reason when the request is cancelled, until `unwatch`."""
        self._watchers[request_id] = on_cancel

    def unwatch(self, request_id: str) -> None:
        self._watchers.pop(request_id, None)

    def _hear(self, received: Received) -> None:
        parts = names.CANCEL.parse(received.subject)
        assert parts, received.subject
        request_id, reason = parts["request_id"], Cancel().reason
        if received.payload:
            try:
                reason = decode(Cancel, received.payload).reason
            except msgspec.DecodeError:
                reason = received.payload[:200].decode(errors="replace")  # `nats pub` by hand, in plain words
        self._reasons[request_id] = reason
        while len(self._reasons) > REMEMBERED_MAX:
            self._reasons.popitem(last=False)
        if on_cancel := self._watchers.get(request_id):
            on_cancel(reason)
