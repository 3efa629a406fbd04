"""The log of frames that each request has published so far, read back by whoever goes on with it."""

from typing import Final, Protocol

from pipeline.bus import Bus
from pipeline.progress import History
from subjects import names, streams
from subjects.codec import decode
from subjects.messages import Frame, OwnedTask

READ_S_MAX: Final = 5.0


class ResponseLog(Protocol):
    """Where a request's frames so far can be read."""

    async def history(self, request: OwnedTask) -> History: ...


class StreamLog:
    """The log as the RESPONSES stream keeps it."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def history(self, request: OwnedTask) -> History:
        """Every frame that the stream still has. Raises BusUnavailable."""
        subject = names.RESPONSES.of(client=request.client, request_id=request.request_id)
        history = History()
        async for stored in self._bus.read(streams.RESPONSES.name, subject, timeout_s=READ_S_MAX):
            frame = decode(Frame, stored.payload)
            history.of(frame.choice).add(frame)
        return history
