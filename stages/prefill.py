"""Prefill: run one prompt and hand its KV to the decode worker that owns the request."""

from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing

import structlog

from pipeline.engine.disaggregated import Claims
from pipeline.engine.protocol import Engine, EngineRequest
from pipeline.errors import BusUnavailable, NoResponders, Permanent, PipelineError, WorkerGone
from pipeline.peers import Peers
from pipeline.presence import Presence
from pipeline.stage import ACCEPTED, Emit, Task, stage
from pipeline.worker import Worker
from subjects import names, streams
from subjects.codec import encode
from subjects.messages import PrefillTask, Refusal

log = structlog.get_logger()


def answer(task: Task[PrefillTask], error: PipelineError) -> Iterable[Emit]:
    """The owner answers the client; here it only learns that the room comes to nothing."""
    refusal = Refusal(room=task.payload.room, failure=error.failure(), permanent=isinstance(error, Permanent))
    yield Emit(subject=names.REFUSAL.of(worker=task.payload.owner), payload=encode(refusal))


@stage(name="prefill", takes=PrefillTask, answer=answer)
async def prefill(task: Task[PrefillTask], engine: Engine, claims: Claims, presence: Presence) -> AsyncIterator[Emit]:
    """Claim the room first: a cancelled, expired or already claimed room costs one message.

    From the claim on the owner watches over the room, so the task itself is done: a redelivery could only be
    denied.
    """
    work = task.payload
    try:
        room = await claims.claim(work)
    except NoResponders:
        log.info("owner_gone", room=work.room, request_id=work.request_id, worker=work.owner)
        return
    except BusUnavailable as error:  # the owner may have granted it, and then waits for this worker alone
        for emit in answer(task, error):
            yield emit
        raise
    if room is None:
        return
    yield ACCEPTED
    request = EngineRequest(
        rid=f"{work.request_id}.{work.room}",
        token_ids=work.token_ids,
        stop=work.stop,
        sampling=work.sampling,
        output=work.output,
        request_id=work.request_id,
        deadline_unix_s=work.deadline_unix_s,
        priority=work.priority,
        room=room,
        options=work.engine,
    )
    try:
        async with presence.while_up(work.owner), aclosing(engine.generate(request)) as outputs:
            async for _ in outputs:  # the first token goes to decode with the KV
                pass
    except WorkerGone:  # it may not even have named its pages, for which the engine would wait
        log.info("owner_gone", room=work.room, request_id=work.request_id, worker=work.owner)


async def serve(worker: Worker) -> None:
    """Start the engine, publish the model card, and take prompts until the worker drains."""
    engine = await worker.start_engine()
    consumers = streams.prefill_takes(worker.model, worker.name)
    for consumer in consumers:
        await worker.bus.ensure_consumer(consumer)
    await worker.publish_card()
    claims = Claims(worker.bus, worker.name, worker.incarnation)
    bound = prefill.bind(engine=engine, claims=claims, presence=worker.presence)
    peers = Peers(worker.bus, worker.presence, "prefill", worker.model, worker.name)
    await worker.run(bound, consumers, slots=worker.slots, others=peers)
