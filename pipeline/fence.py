"""The fence around a task: what must hold whenever its worker publishes for it (docs/adr/0004).

1. The lease runs.
2. A broker that was restarted still knows that it handed the task out here: it forgets the deliveries of its last tenth
   of a second, and hands those tasks to others at once.
3. Frames that were lost with a connection have been sent again over the present one. So the log has no gap before a
   frame, and a terminal frame in the log stands behind everything before it.
"""

import asyncio
import time
from collections import deque
from typing import Final

from pipeline import provision
from pipeline.bus import Bus, Delivery
from pipeline.lease import Lease, LeaseLost
from pipeline.stage import Emit
from subjects import streams

FORGOTTEN_S_MAX: Final = 1.0
"""A delivery older than this at its broker's death is on the broker's disk. Measured: 0.06 to 0.09 s."""
RESENT_S: Final = 30.0
"""Frames this old have been read by the broker: a connection on which nothing moves lives for 15 s at most."""


class BrokerAge:
    """Since when the broker remembers deliveries, asked once for each connection."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._known: tuple[int, float] | None = None  # epoch, since
        self._lock = asyncio.Lock()

    async def since_unix_s(self) -> float:
        """Its memory streams are as old as it is, by its own clock; a cluster's outlive one server, as its consumers'
        states do. Raises BusUnavailable, ProvisionError."""
        if self._known is None or self._known[0] != self._bus.epoch:
            async with self._lock:
                if self._known is None or self._known[0] != self._bus.epoch:
                    epoch = self._bus.epoch
                    await self._bus.ensure_bucket(streams.CARDS)
                    state = await self._bus.stream_state(provision.bucket_stream(streams.CARDS.name))
                    self._known = epoch, state.created_unix_s
        return self._known[1]


class Fence:
    """Of one delivery."""

    def __init__(self, bus: Bus, age: BrokerAge, delivery: Delivery, lease: Lease) -> None:
        """To be made when the delivery comes."""
        self.accepted = False
        """Acked before its end: the task is nobody else's any more, whatever becomes of the lease."""
        self._bus, self._age, self._delivery, self._lease = bus, age, delivery, lease
        self._epoch = bus.epoch
        self._taken_s = time.monotonic()
        self._broker_since_unix_s: float | None = None
        self._sent: deque[tuple[float, Emit]] = deque()

    async def attempt(self) -> int:
        """The delivery's number, one more where the broker may have forgotten an earlier delivery."""
        self._broker_since_unix_s = await self._age.since_unix_s()
        return self._delivery.attempt + (self._delivery.stored_unix_s < self._broker_since_unix_s)

    def check_lease(self) -> None:
        """Raises LeaseLost."""
        if not (self._lease.valid or self.accepted):
            raise LeaseLost

    async def ready(self) -> None:
        """Wait until the worker may publish, an outage long if need be. Raises LeaseLost, BusUnavailable."""
        while True:
            await self._bus.until_connected()
            self.check_lease()
            if self._epoch == self._bus.epoch:
                return
            await self._catch_up()

    async def publish(self, emit: Emit) -> None:
        """Send a frame of the task, behind all that were sent before it. Raises LeaseLost, BusUnavailable."""
        if emit.msg_id is None:
            await self.ready()
            await self._send(emit)
        else:
            await self._bus.publish_durable(
                emit.subject, emit.payload, msg_id=emit.msg_id, headers=emit.headers, before=self.ready
            )
        self._note(emit)

    async def checkpoint(self) -> None:
        """Have it confirmed that the log has every frame, for the next owner. Raises LeaseLost, BusUnavailable."""
        if self._sent:
            _, last = self._sent[-1]
            msg_id = f"{self._delivery.stream}.{self._delivery.stream_seq}.{self._delivery.consumer_seq}.checkpoint"
            await self._bus.publish_durable(last.subject, last.payload, msg_id=msg_id, before=self.ready)

    def _note(self, emit: Emit) -> None:
        now_s = time.monotonic()
        self._sent.append((now_s, emit))
        while self._sent[0][0] < now_s - RESENT_S:
            self._sent.popleft()

    async def _catch_up(self) -> None:
        """The connection is another one: see whether the task is still ours, and send again what may be lost."""
        epoch = self._bus.epoch
        if not self.accepted and await self._forgotten():
            raise LeaseLost
        for _, emit in self._sent:
            await self._send(emit)
        self._epoch = epoch

    async def _send(self, emit: Emit) -> None:
        if emit.msg_id is None:
            await self._bus.publish(emit.subject, emit.payload, headers=emit.headers)
        else:
            await self._bus.publish_durable(emit.subject, emit.payload, msg_id=emit.msg_id, headers=emit.headers)

    async def _forgotten(self) -> bool:
        """Whether the broker may have handed the task to another worker as if it had never been here.

        A task that its stream no longer has went with the broker's store: then nobody else has it either.
        """
        loss_s = self._bus.first_loss_after(self._taken_s)
        if loss_s is None or loss_s - self._taken_s > FORGOTTEN_S_MAX:
            return False
        if await self._age.since_unix_s() == self._broker_since_unix_s:
            return False
        stored = await self._bus.stored_at(self._delivery.stream, self._delivery.stream_seq)
        return stored is not None and stored.payload == self._delivery.payload
