"""Leases: the right to work on a task, kept alive from a thread that a blocked event loop cannot starve.

A task's worker owns it while JetStream hears from the worker within `LEASE_S`. JetStream does not fence
acks, so each lease has a clock of its own: a worker that was frozen past it must drop the task without
a frame or an ack, for another worker has it by then.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import structlog

from pipeline.bus import Bus, Delivery
from subjects.limits import LEASE_RENEW_S, LEASE_S

MARGIN_S: Final = 0.5
"""The clock runs out this much before the broker's, for the way of a frame to the broker."""
STALL_S_MAX: Final = 30.0
"""An event loop that has not turned for this long is wedged, not busy: its leases are let go."""
_TICK_S: Final = 0.5
_START_S_MAX: Final = 10.0

log = structlog.get_logger()


class LeaseLost(Exception):
    """The task is another worker's by now."""


@dataclass(slots=True, eq=False)
class Lease:
    """One task's lease. Times are of the monotonic clock, which goes on while a process is stopped."""

    ack_subject: str
    on_lost: Callable[[], None] | None = None
    """Called on the event loop when the clock has run out and nobody has released the lease."""
    expires_s: float = field(default_factory=lambda: time.monotonic() + LEASE_S - MARGIN_S)

    @property
    def valid(self) -> bool:
        return time.monotonic() < self.expires_s


class LeaseKeeper:
    """Renews every held lease each `LEASE_RENEW_S`, from a thread with a broker connection of its own."""

    def __init__(self, url: str, name: str) -> None:
        self._url, self._name = url, name
        self._leases: set[Lease] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._ready = threading.Event()
        self._turned_s = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="leases", daemon=True)
        self._ticker: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        """Raises BusUnavailable where the thread cannot connect in time."""
        self._tick(asyncio.get_running_loop())
        self._thread.start()
        if not await asyncio.to_thread(self._ready.wait, _START_S_MAX):
            raise TimeoutError(f"the lease thread did not connect to {self._url} within {_START_S_MAX:.0f} s")

    def hold(self, delivery: Delivery, on_lost: Callable[[], None] | None = None) -> Lease:
        """Begin to keep a delivery's lease alive."""
        lease = Lease(delivery.ack_subject, on_lost)
        with self._lock:
            self._leases.add(lease)
        return lease

    def release(self, lease: Lease) -> None:
        with self._lock:
            self._leases.discard(lease)

    @property
    def loop_silent_s(self) -> float:
        """For how long the event loop has not turned; 0 before `start`. Readable from any thread."""
        return 0.0 if self._ticker is None else max(0.0, time.monotonic() - self._turned_s - _TICK_S)

    async def close(self) -> None:
        if self._ticker:
            self._ticker.cancel()
        self._stop.set()
        await asyncio.to_thread(self._thread.join, 5.0)

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        self._turned_s = time.monotonic()
        self._ticker = loop.call_later(_TICK_S, self._tick, loop)
        with self._lock:
            lost = [lease for lease in self._leases if not lease.valid]
            self._leases.difference_update(lost)
        for lease in lost:
            if lease.on_lost is not None:
                lease.on_lost()

    def _run(self) -> None:
        asyncio.run(self._renew_until_stopped())

    async def _renew_until_stopped(self) -> None:
        bus = await Bus.connect(self._url, name=f"{self._name}.leases")
        self._ready.set()
        try:
            while not await asyncio.to_thread(self._stop.wait, LEASE_RENEW_S):
                if time.monotonic() - self._turned_s < STALL_S_MAX:
                    await self._renew(bus)
                else:
                    log.error("event_loop_stalled", code="leases_let_go", in_flight=len(self._leases))
        finally:
            await bus.close()

    async def _renew(self, bus: Bus) -> None:
        """A lease is longer only once the broker has answered; one that ran out is never renewed."""
        with self._lock:
            held = [lease for lease in self._leases if lease.valid]
        if not held:
            return
        sent_s = time.monotonic()
        try:
            for lease in held:
                await bus.in_progress(lease.ack_subject)
            await bus.flush(timeout_s=LEASE_RENEW_S)
        except Exception as error:  # the outermost guard: a lease not renewed runs out, which is safe
            log.warning("leases_not_renewed", code=type(error).__name__, in_flight=len(held))
            return
        for lease in held:
            if lease.valid:  # the answer came in time, so the broker cannot have given the task away before
                lease.expires_s = sent_s + LEASE_S - MARGIN_S
