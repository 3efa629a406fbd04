"""Expiry: the end of requests whose deadline passes while no worker has them.

A worker ends its own requests at their deadline. What waits, be it that no worker of its model is up, that the queue is
long, that the model is paused or that the owner has died, is swept: every preprocess worker looks for it. A sweeper
becomes the request's last owner before it reads the log (`pipeline.fence.Owner`), as a worker that takes over does. So
whatever another sweeper, an earlier owner or a worker that starts right then has on its way, each choice has one end.

What it costs: each task that is not done within `WAITED_S` is read once by each preprocess worker, 30 us of it for one
of 8 kB, and asked for again at its deadline if the stream still has tasks as old.
"""

import asyncio
import contextlib
import heapq
import random
import time
from collections.abc import Iterator
from typing import Final

import msgspec
import structlog

from pipeline import metrics, tracing
from pipeline.bus import Bus, StoredMessage
from pipeline.errors import BrokerRefused, BusUnavailable, DeadlineExceeded, PipelineError
from pipeline.fence import Owner
from pipeline.lease import LeaseLost
from pipeline.responses import ResponseLog
from pipeline.stage import begin_frames, end_with_error
from pipeline.tracing import TraceContext
from subjects import names, streams
from subjects.codec import decode
from subjects.messages import OwnedTask, Work

PASS_S: Final = 1.0
GRACE_S: Final = 1.0
"""A worker that holds the request ends it itself within this time of its deadline."""
WAITED_S: Final = 2.0
"""A message that is younger is not looked at: most are gone by then."""
READ_MAX: Final = 2_048
"""So many messages are noted in one pass."""
NOTED_MAX: Final = 200_000
ENDED_MAX: Final = 256
"""So many requests are ended before the next look for new ones."""
AT_ONCE: Final = 8

log = structlog.get_logger()


class Sweeper:
    """Notes the deadline of whatever waits long, and ends it when that has passed."""

    def __init__(self, bus: Bus, responses: ResponseLog) -> None:
        self._bus, self._responses = bus, responses
        self._noted: list[tuple[float, int]] = []  # a heap of when to look, and at which message
        self._from_seq: dict[str, int] = {}  # by kind of task: the first message that has not been looked at
        self._created_unix_s = 0.0  # of the stream

    async def run(self) -> None:
        """Sweep for ever."""
        while True:
            await asyncio.sleep(PASS_S * random.uniform(0.5, 1.0))  # so that several do not go in step
            try:
                while await self.sweep():
                    pass
            except PipelineError as error:
                log.warning("sweep_failed", code=error.code, reason=str(error))
            except Exception:  # the outermost guard: the worker's own work goes on, and the next pass may succeed
                log.exception("sweep_failed", code="internal")

    async def sweep(self) -> bool:
        """Look once; whether there is more to end at once. Raises BusUnavailable."""
        state = await self._bus.stream_state(streams.WORK.name)
        another = state.created_unix_s != self._created_unix_s  # the broker's store was wiped
        if another or not state.messages or len(self._noted) >= NOTED_MAX:
            self._noted, self._created_unix_s = [], state.created_unix_s
            self._from_seq = dict.fromkeys(names.OWNED_TASKS, state.first_seq)
        if state.messages:
            for tasks in names.OWNED_TASKS:
                await self._note_waiting(tasks)
        return await self._end_expired(state.first_seq)

    async def _note_waiting(self, tasks: str) -> None:
        """Note the deadlines of messages that have waited for a while and are not noted yet."""
        young_unix_s = time.time() - WAITED_S
        first = await self._bus.next_stored(streams.WORK.name, tasks, self._from_seq[tasks])
        if first is None or first.stored_unix_s > young_unix_s:
            return
        waiting = self._bus.read(streams.WORK.name, tasks, from_seq=first.seq)
        count = 0
        async with contextlib.aclosing(waiting):
            async for stored in waiting:
                if stored.stored_unix_s > young_unix_s or count == READ_MAX:
                    return
                self._note(stored)
                self._from_seq[tasks], count = stored.seq + 1, count + 1

    def _note(self, stored: StoredMessage) -> None:
        """What cannot be read is left to the worker that takes it, and its dead letter."""
        with contextlib.suppress(msgspec.DecodeError):
            deadline_unix_s = decode(Work, stored.payload).deadline_unix_s
            if deadline_unix_s is not None:
                heapq.heappush(self._noted, (deadline_unix_s + GRACE_S, stored.seq))

    async def _end_expired(self, first_seq: int) -> bool:
        """End what is due and, by its number, may still be there; whether more is."""
        now_unix_s = time.time()
        due: list[int] = []
        while self._noted and self._noted[0][0] <= now_unix_s and len(due) < ENDED_MAX:
            _, seq = heapq.heappop(self._noted)
            if seq >= first_seq:
                due.append(seq)
        random.shuffle(due)  # two sweepers that begin together seldom meet
        left = iter(due)
        await asyncio.gather(*(self._end_each(left) for _ in range(min(AT_ONCE, len(due)))))
        return bool(self._noted and self._noted[0][0] <= now_unix_s)

    async def _end_each(self, left: Iterator[int]) -> None:
        """An asyncio task of its own: each request's trace is its context."""
        for seq in left:
            try:
                await self._end_if_expired(seq)
            except (PipelineError, LeaseLost) as error:
                log.info("expired_left", stream_seq=seq, code=type(error).__name__, reason=str(error))
                heapq.heappush(self._noted, (time.time() + GRACE_S, seq))

    async def _end_if_expired(self, seq: int) -> None:
        """End a message's request and remove the message, unless it is gone. Raises LeaseLost, BusUnavailable."""
        epoch = self._bus.epoch
        stored = await self._bus.stored_at(streams.WORK.name, seq)
        if stored is None:
            return
        request = decode(OwnedTask, stored.payload)
        if request.deadline_unix_s is None or request.deadline_unix_s + GRACE_S > time.time():
            return  # another message: the broker lost its store
        tracing.current.set(TraceContext.of(stored.headers, f"{streams.WORK.name}.{seq}.{stored.stored_unix_s}"))
        await end_expired(self._bus, self._responses, request)
        log.info("request_expired", request_id=request.request_id, client=request.client, model=request.model)
        if self._bus.epoch != epoch:
            raise BusUnavailable("the connection was lost: the message may be another one by now")
        with contextlib.suppress(BrokerRefused):  # another sweeper, or a worker's ack, was here first
            await self._bus.api(f"STREAM.MSG.DELETE.{streams.WORK.name}", {"seq": seq, "no_erase": True})


async def end_expired(bus: Bus, responses: ResponseLog, request: OwnedTask) -> None:
    """End every choice that has no end yet. Raises LeaseLost where a later owner came, BusUnavailable."""
    owner = Owner(bus, request)
    attempt = await owner.write_down(attempt=2)  # above that of a first owner, which writes nothing down
    for emit in begin_frames(request, attempt, bus.name):
        carried = tracing.carried(emit)
        await bus.publish_durable(emit.subject, emit.payload, msg_id=emit.msg_id, headers=carried.headers)
    history = await responses.history(request)
    for choice in range(request.choices):
        so_far = history.of(choice)
        if so_far.end is None:
            why = "its answer was whole" if so_far.token_ids else "a worker took the request"
            error = DeadlineExceeded(f"deadline: passed before {why}", field="deadline")
            await owner.end(tracing.carried(end_with_error(request, choice, error, attempt)))
            metrics.ERRORS.labels(error.code).inc()
