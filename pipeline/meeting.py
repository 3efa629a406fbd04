"""What becomes of the rooms that a decode worker's prompts are prefilled in, read off the handshake on the bus."""

import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from pipeline import spans, tracing
from pipeline.bus import Bus, Received
from pipeline.engine.protocol import Prefilled
from pipeline.engine.sglang.handshake import describe
from pipeline.tracing import TraceContext
from subjects import headers, names

REMEMBERED_MAX: Final = 4096
"""Rooms; word of one that has been forgotten is not heard. It comes a moment after the first token at the latest."""


@dataclass(slots=True)
class Meeting:
    """One room, from the claim on."""

    trace: TraceContext
    worker: str  # the prefill worker
    claimed_unix_s: float
    named: bool = False  # prefill knows the destination pages
    landed_unix_s: float | None = None  # the last rank's KV was written

    def prefilled(self) -> Prefilled:
        return Prefilled(worker=self.worker, claimed_unix_s=self.claimed_unix_s, kv_landed_unix_s=self.landed_unix_s)


class Meetings:
    """Of one decode worker."""

    def __init__(self, bus: Bus, worker: str) -> None:
        self._bus, self._worker = bus, worker
        self._by_room: OrderedDict[str, Meeting] = OrderedDict()

    async def listen(self) -> None:
        """Begin to hear SGLang's handshake; simulated engines have none."""
        await self._bus.subscribe(names.BOOTSTRAP.any(worker=self._worker), self._hear)

    def begin(self, room: int, prefill_worker: str) -> Meeting:
        """A claim was granted just now, to be used for what this asyncio task works on."""
        trace = tracing.current.get() or TraceContext.new()
        meeting = self._by_room[str(room)] = Meeting(trace, prefill_worker, time.time())
        while len(self._by_room) > REMEMBERED_MAX:
            self._by_room.popitem(last=False)
        return meeting

    def _hear(self, received: Received) -> None:
        line = describe(received)
        meeting = self._by_room.get(line.room) if line else None
        if line is None or meeting is None:
            return
        now_unix_s, of = time.time(), {"sglang_nats.prefill_worker": meeting.worker}
        if line.operation == "receipt" and not meeting.named:
            meeting.named = True
            spans.record("handshake", meeting.trace, meeting.claimed_unix_s, now_unix_s, of)
        elif line.operation == "status success":
            meeting.landed_unix_s = now_unix_s
            write_us = (received.headers or {}).get(headers.HANDSHAKE_WRITE_US, "")
            wrote_s = int(write_us) / 1e6 if write_us.isdigit() else 0.0
            of |= {"sglang_nats.kv_bytes": line.kv_bytes, "sglang_nats.kv_pages": line.pages}
            spans.record("transfer", meeting.trace, now_unix_s - wrote_s, now_unix_s, of)
