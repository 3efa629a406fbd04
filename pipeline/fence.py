"""The fence around a task: what must hold whenever its worker publishes for it (docs/adr/0004).

1. The lease runs.
2. A broker that was restarted still knows that it handed the task out here: it forgets the deliveries of its last tenth
   of a second, and hands those tasks to others at once.
3. Frames that were lost with a connection have been sent again over the present one. So the log has no gap before a
   frame, and a terminal frame in the log stands behind everything before it.
4. A terminal frame is the present owner's. Each later owner writes itself down in the log before it reads it, and the
   broker refuses a terminal frame that does not name the last owner. So a frame that was under way for longer than
   its sender's lease, in a frozen broker or a parted network, ends nothing.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Final

from pipeline import provision, tracing
from pipeline.bus import Bus, Delivery
from pipeline.errors import BrokerRefused
from pipeline.jetstream import WRONG_LAST_SEQ
from pipeline.lease import Lease, LeaseLost
from pipeline.stage import Emit, begin_frames
from subjects import headers, names, streams
from subjects.codec import decode, encode
from subjects.messages import Frame, OwnedTask

FORGOTTEN_S_MAX: Final = 0.5
"""A delivery older than this at its broker's death is on the broker's disk. Measured: 0.06 to 0.09 s."""
RETURN_S_MAX: Final = 1.0
"""After a broker's death workers are back within this time, and send again what the log may have lost. Until then
nobody takes over a task that the broker may have forgotten to have handed out."""
Before = Callable[[], Awaitable[None]]
"""Awaited each time that a message is about to be sent; see `Bus.publish_durable`."""
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


class Owner:
    """Our place among the owners of a request, by which the broker takes terminal frames or refuses them."""

    def __init__(self, bus: Bus, request: OwnedTask) -> None:
        self._bus, self._request = bus, request
        self._subject = names.OWNERS.of(client=request.client, request_id=request.request_id)
        self._seq = 0  # of our word there; 0: the first owner writes none

    async def write_down(self, attempt: int, before: Before | None = None) -> int:
        """Become the last owner; the attempt, above those of all earlier ones. Raises BusUnavailable, and what
        `before` raises."""
        while True:
            last = await self._bus.last(streams.RESPONSES.name, self._subject)
            if last is not None:
                attempt = max(attempt, decode(Frame, last.payload).attempt + 1)
            word = encode(Frame(request_id=self._request.request_id, attempt=attempt, worker=self._bus.name))
            behind = tracing.outgoing() | {headers.EXPECTED_LAST_SEQ: str(last.seq if last else 0)}
            try:
                stored = await self._bus.publish_durable(self._subject, word, headers=behind, before=before)
            except BrokerRefused as refusal:
                if refusal.error_number != WRONG_LAST_SEQ:
                    raise
                continue  # another owner came in between; if it is not the last, our lease has ended
            self._seq = stored.seq
            return attempt

    async def end(self, emit: Emit, before: Before | None = None) -> None:
        """Store a terminal frame, unless the log has the choice's already. Raises LeaseLost where there is a later
        owner, BusUnavailable, and what `before` raises."""
        while True:
            owner = {headers.EXPECTED_LAST_SEQ: str(self._seq), headers.EXPECTED_LAST_SUBJECT: self._subject}
            extra = (emit.headers or {}) | owner
            try:
                await self._bus.publish_durable(
                    emit.subject, emit.payload, msg_id=emit.msg_id, headers=extra, before=before
                )
                return
            except BrokerRefused as refusal:
                if refusal.error_number != WRONG_LAST_SEQ:
                    raise
                if not self._seq or await self._bus.stored_at(streams.RESPONSES.name, self._seq):
                    raise LeaseLost from None
                self._seq = 0  # the broker's store was wiped, and all owners with it


class Fence:
    """Of one delivery."""

    def __init__(self, bus: Bus, age: BrokerAge, delivery: Delivery, lease: Lease) -> None:
        """To be made when the delivery comes."""
        self.accepted = False
        """Acked before its end: the task is nobody else's any more, whatever becomes of the lease."""
        self._bus, self._age, self._delivery, self._lease = bus, age, delivery, lease
        self._epoch = bus.epoch
        self._taken_s = time.monotonic()
        self._broker_since_unix_s: float | None = None  # where it was known before a connection was lost
        self._sent: deque[tuple[float, Emit]] = deque()
        self._owner: Owner | None = None  # where the task is a request

    async def attempt(self) -> int:
        """The delivery's number, one more where the broker may have forgotten an earlier delivery.

        Raises LeaseLost, BusUnavailable.
        """
        await self.ready()
        epoch, since_unix_s = self._epoch, await self._age.since_unix_s()
        if epoch == self._bus.epoch:
            self._broker_since_unix_s = since_unix_s
        if self._delivery.stored_unix_s >= since_unix_s:
            return self._delivery.attempt
        await self._bus.until_connected_for(RETURN_S_MAX)
        return self._delivery.attempt + 1

    async def own(self, request: OwnedTask, attempt: int) -> int:
        """Become the owner that this request's frames and ends are taken from; the attempt, above all earlier ones.

        Raises LeaseLost, BusUnavailable.
        """
        self._owner = Owner(self._bus, request)
        if attempt == 1:
            return attempt
        attempt = await self._owner.write_down(attempt, self.ready)
        for emit in begin_frames(request, attempt, self._bus.name):
            await self.publish(tracing.carried(emit))
        return attempt

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
            await self._store(emit, self.ready)
        self._note(emit)

    async def ack(self) -> None:
        """Settle the delivery. Raises LeaseLost; where the broker does not confirm it, it comes again."""
        await self._bus.ack(self._delivery, before=self.ready)

    async def nak(self, delay_s: float = 0) -> None:
        """Hand the delivery back. Raises LeaseLost: a late one would take the task from its next owner."""
        await self.ready()
        await self._bus.nak(self._delivery, delay_s)

    async def hand_over(self) -> None:
        """Let another worker go on at once, from a log that surely has every frame. Raises LeaseLost."""
        if self._sent:
            _, last = self._sent[-1]
            of = self._delivery
            msg_id = last.msg_id or f"{of.stream}.{of.stream_seq}.{of.consumer_seq}.checkpoint"
            await self._store(replace(last, msg_id=msg_id), self.ready)
        await self.nak()

    def _note(self, emit: Emit) -> None:
        now_s = time.monotonic()
        self._sent.append((now_s, emit))
        while self._sent[0][0] < now_s - RESENT_S:
            self._sent.popleft()

    async def _catch_up(self) -> None:
        """The connection is another one: send again what may be lost, and see whether the task is still ours.

        Whoever has the task by now is glad of the frames: readers may have heard some that the log did not keep.
        """
        epoch = self._bus.epoch
        for _, emit in list(self._sent):
            await self._send(emit)
        if not self.accepted and await self._forgotten():
            raise LeaseLost
        self._epoch = epoch

    async def _send(self, emit: Emit) -> None:
        if emit.msg_id is None:
            self.check_lease()
            await self._bus.publish(emit.subject, emit.payload, headers=emit.headers)
        else:
            await self._store(emit, self._still_leased)

    async def _store(self, emit: Emit, before: Before) -> None:
        """A frame that the broker confirms. Raises LeaseLost where it is a terminal one and has a later owner."""
        if self._owner is not None and emit.frame is not None and emit.frame.finish_reason:
            await self._owner.end(emit, before)
        else:
            await self._bus.publish_durable(
                emit.subject, emit.payload, msg_id=emit.msg_id, headers=emit.headers, before=before
            )

    async def _still_leased(self) -> None:
        self.check_lease()

    async def _forgotten(self) -> bool:
        """Whether the broker may have handed the task to another worker as if it had never been here.

        A task that its stream no longer has went with the broker's store: then nobody else has it either.
        """
        loss_s = self._bus.first_loss_after(self._taken_s)
        if loss_s is None or loss_s - self._taken_s > FORGOTTEN_S_MAX:
            return False
        if self._broker_since_unix_s is not None and self._broker_since_unix_s == await self._age.since_unix_s():
            return False
        stored = await self._bus.stored_at(self._delivery.stream, self._delivery.stream_seq)
        return stored is not None and stored.payload == self._delivery.payload
