"""Decode's engine where prefill is another worker's: it offers each prompt, and decodes what comes back.

An offer is a task with a new room, for the prefill worker that ranks best for the prompt or, where none does, for any.
Whoever pulls it claims the room here first; so a cancelled or expired offer costs one message, an offer may be made
twice, and no prompt is prefilled twice. Only a granted claim starts the engine on the request: SGLang must know the
prefill worker when it allocates the pages.
"""

import asyncio
import contextlib
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Final

import msgspec
import structlog

from pipeline import metrics, tracing
from pipeline.block_hashes import salt_of
from pipeline.bus import Bus, Received
from pipeline.engine.protocol import Engine, EngineInfo, EngineOutput, EngineRequest, Reading, Room, Vitals
from pipeline.errors import (
    BusUnavailable,
    InvalidRequest,
    NoResponders,
    PipelineError,
    PrefillLost,
    WorkerGone,
    from_failure,
)
from pipeline.meeting import Meetings
from pipeline.operations import Arguments
from pipeline.placement import Places
from pipeline.presence import Presence
from subjects import names
from subjects.codec import decode, encode
from subjects.messages import Claim, Grant, Load, MetricFamily, PrefillTask, PreprocessedRequest, Refusal

OFFERS_MAX: Final = 4
"""A prompt whose prefill worker was lost this often goes back to the queue of decode tasks."""
CLAIMS_MAX: Final = 3
"""So often a prefill worker asks an owner that does not answer."""
GRANTED_MAX: Final = 4096
"""Rooms that a prefill worker remembers, for a task that comes again."""
ROOM_BITS: Final = 63

log = structlog.get_logger()


@dataclass(slots=True)
class _Offer:
    """An open room: who claimed it, and what became of that."""

    claim: asyncio.Future[Claim] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    refusal: asyncio.Future[Refusal] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class DisaggregatedEngine:
    """Implements `Engine` over a decode engine and the prefill workers of its model."""

    def __init__(self, engine: Engine, bus: Bus, worker: str, model: str, presence: Presence, places: Places) -> None:
        """`places` ranks the prefill workers."""
        self._engine, self._bus, self._worker, self._model = engine, bus, worker, model
        self._presence, self._places = presence, places
        self._offers: dict[int, _Offer] = {}  # by room
        self._meetings = Meetings(bus, worker)

    async def listen(self) -> None:
        """Begin to answer claims."""
        await self._meetings.listen()
        await self._bus.subscribe(names.CLAIM.of(worker=self._worker), self._hear_claim)
        await self._bus.subscribe(names.REFUSAL.of(worker=self._worker), self._hear_refusal)

    async def start(self) -> EngineInfo:
        return await self._engine.start()

    def reading(self, request: PreprocessedRequest) -> Reading:
        return self._engine.reading(request)

    async def warm_up(self) -> None:
        """Nothing to compute alone: pairs of engines connect when they hear of each other."""

    async def died(self) -> str:
        return await self._engine.died()

    async def load(self) -> Load:
        return await self._engine.load()

    def series(self) -> Mapping[str, tuple[MetricFamily, ...]]:
        return self._engine.series()

    @property
    def suspended(self) -> str | None:
        return self._engine.suspended

    async def control(self, operation: str, arguments: Arguments) -> dict[str, Any]:
        return await self._engine.control(operation, arguments)

    def canary(self, dp_rank: int) -> EngineRequest:
        return self._engine.canary(dp_rank)

    def vitals(self) -> Vitals:
        return self._engine.vitals()

    async def close(self) -> None:
        await self._engine.close()

    async def generate(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        """See `Engine.generate`. A prefill worker lost before the first token costs a pause, not the request."""
        if request.output.prompt_logprobs:
            raise InvalidRequest(
                "echo: with logprobs, it needs an engine that prefills what it decodes: here prefill is another "
                "worker's, and log probabilities of the prompt do not come with its KV",
                field="echo",
            )
        for number in range(OFFERS_MAX):
            room, offer = secrets.randbits(ROOM_BITS), _Offer()
            self._offers[room] = offer
            started, offered_s = False, time.monotonic()
            try:
                # Only the first offer is addressed: a worker that was just lost may still rank best.
                best = None
                if number == 0:
                    best = await self._places.choose(self._model, request.token_ids, None, salt_of(request.options))
                claim = await self._claimed(request, room, offer, best)
                claimed_s = time.monotonic()
                metrics.PREFILL_CLAIM_SECONDS.observe(claimed_s - offered_s)
                meeting = self._meetings.begin(room, claim.worker)
                place = Room(number=room, prefill_worker=claim.worker, prefill_incarnation=claim.incarnation)
                work = replace(request, rid=f"{request.rid}.{number}", room=place)
                async with aclosing(_unless_refused(self._engine.generate(work), offer.refusal)) as outputs:
                    async for output in outputs:
                        if not started:
                            metrics.PREFILL_KV_SECONDS.observe(time.monotonic() - claimed_s)
                        started = True
                        yield replace(output, prefilled=meeting.prefilled()) if output.finish_reason else output
                return
            except PrefillLost as error:
                if started:
                    raise
                metrics.PREFILL_LOST.inc()
                log.warning("prefill_lost", room=room, worker=claim.worker, code=error.code, reason=str(error))
            finally:
                del self._offers[room]
        raise PrefillLost(f"{OFFERS_MAX} prefill workers were lost", size=OFFERS_MAX, limit=OFFERS_MAX)

    async def _claimed(self, request: EngineRequest, room: int, offer: _Offer, best: str | None) -> Claim:
        """Offer the prompt, and who claimed it: `best` first, and anyone once that worker is known to be down."""
        if best is not None:
            with contextlib.suppress(WorkerGone):
                async with self._presence.while_up(best):
                    await self._publish(request, room, best)
                    return await asyncio.shield(offer.claim)  # the end of the wait is not that of the offer
            log.info("prefill_offered_anew", room=room, request_id=request.request_id, worker=best)
        await self._publish(request, room, None)
        return await offer.claim

    async def _publish(self, request: EngineRequest, room: int, worker: str | None) -> None:
        task = PrefillTask(
            request_id=request.request_id,
            deadline_unix_s=request.deadline_unix_s,
            room=room,
            owner=self._worker,
            model=self._model,
            token_ids=request.token_ids,
            stop=request.stop,
            sampling=request.sampling,
            output=request.output,
            priority=request.priority,
            engine=request.options,
        )
        to_any, to_one = names.PREFILL_ANY, names.PREFILL_WORKER
        subject = to_one.of(model=self._model, worker=worker) if worker else to_any.of(model=self._model)
        await self._bus.publish_durable(
            subject,
            encode(task),
            msg_id=f"{self._worker}.{room}.{worker or ''}",  # the same room may be offered to one and then to any
            headers=tracing.outgoing(),
        )

    def _hear_claim(self, received: Received) -> None:
        claim = decode(Claim, received.payload)
        offer = self._offers.get(claim.room)
        if offer is None:
            grant = Grant(granted=False, reason="nobody waits for this room")
        elif offer.claim.done() and offer.claim.result() != claim:
            grant = Grant(granted=False, reason=f"{offer.claim.result().worker} has this room")
        else:  # again to the worker that has it: the first answer was lost
            grant = Grant(granted=True)
            if not offer.claim.done():
                offer.claim.set_result(claim)
        self._bus.spawn(self._bus.respond(received, encode(grant)))

    def _hear_refusal(self, received: Received) -> None:
        refusal = decode(Refusal, received.payload)
        offer = self._offers.get(refusal.room)
        if offer is not None and not offer.refusal.done():
            offer.refusal.set_result(refusal)


async def _unless_refused(
    outputs: AsyncIterator[EngineOutput], refusal: asyncio.Future[Refusal]
) -> AsyncIterator[EngineOutput]:
    """The outputs, broken off where prefill refuses before the first one. Raises PrefillLost, or prefill's error."""
    async with aclosing(outputs):
        first = asyncio.ensure_future(anext(outputs))
        try:
            await asyncio.wait({first, refusal}, return_when=asyncio.FIRST_COMPLETED)
            if not first.done():
                raise _refused(refusal.result())
            yield first.result()
        finally:
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
        async for output in outputs:
            yield output


def _refused(refusal: Refusal) -> PipelineError:
    if refusal.permanent:
        return from_failure(refusal.failure)
    return PrefillLost(f"prefill gave the room back: {refusal.failure.message}")


class Claims:
    """A prefill worker's side: asks owners for leave."""

    def __init__(self, bus: Bus, worker: str, incarnation: str) -> None:
        self._bus, self._worker, self._incarnation = bus, worker, incarnation
        self._granted: deque[int] = deque(maxlen=GRANTED_MAX)
        self._asked: set[int] = set()  # rooms whose owner has not answered yet

    @property
    def worker(self) -> str:
        return self._worker

    async def claim(self, task: PrefillTask) -> Room | None:
        """The room, if its owner still waits for it. Raises BusUnavailable where the owner does not answer."""
        if task.room in self._granted or task.room in self._asked:  # it was offered twice, or its ack was lost
            return None
        claim = Claim(room=task.room, worker=self._worker, incarnation=self._incarnation)
        self._asked.add(task.room)
        try:
            answer = await self._ask(names.CLAIM.of(worker=task.owner), encode(claim))
        finally:
            self._asked.discard(task.room)
        try:
            grant = decode(Grant, answer.payload)
        except msgspec.DecodeError as error:
            raise PrefillLost(f"the owner's answer to a claim cannot be read: {error}") from None
        if not grant.granted:
            log.info("claim_denied", room=task.room, request_id=task.request_id, reason=grant.reason)
            return None
        self._granted.append(task.room)
        return Room(number=task.room, prefill_worker=self._worker, prefill_incarnation=self._incarnation)

    async def _ask(self, subject: str, claim: bytes) -> Received:
        """Ask again where no answer came: it may be lost, and then the owner waits for this worker alone."""
        for _ in range(CLAIMS_MAX - 1):
            try:
                return await self._bus.request(subject, claim, headers=tracing.outgoing())
            except NoResponders:
                raise
            except BusUnavailable as error:
                log.info("claim_unanswered", subject=subject, reason=str(error))
        return await self._bus.request(subject, claim, headers=tracing.outgoing())
