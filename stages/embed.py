"""Embed: own an embedding request until each of its inputs has its vector.

A task that comes again goes on with the inputs that the log has no vector of.
"""

import time
from collections.abc import AsyncIterator, Sequence
from typing import Final

from pipeline import metrics
from pipeline.engine.protocol import EmbeddingBatch, Engine
from pipeline.errors import ConfigError, PayloadTooLarge
from pipeline.responses import ResponseLog
from pipeline.stage import Emit, Task, answer_owned, emit_frame, stage
from pipeline.worker import Worker
from subjects import streams
from subjects.codec import Vector
from subjects.limits import PAYLOAD_BYTES_MAX
from subjects.messages import EmbeddingTask, Frame, Timing, Usage

BATCH_INPUTS_MAX: Final = 64
"""So many inputs of one request are in the engine at once: others' single questions wait for no more than these."""


@stage(name="embed", takes=EmbeddingTask, answer=answer_owned)
async def embed(task: Task[EmbeddingTask], engine: Engine, responses: ResponseLog, worker: str) -> AsyncIterator[Emit]:
    """One terminal frame for each input, batch by batch."""
    request = task.payload
    steps = _Ends(task, worker)
    choices = await _open(task, responses)
    for start in range(0, len(choices), BATCH_INPUTS_MAX):
        batch = choices[start : start + BATCH_INPUTS_MAX]
        work = EmbeddingBatch(
            rid=f"{request.request_id}.{task.attempt}.{start}",
            inputs=tuple(request.inputs[choice] for choice in batch),
            dimensions=request.dimensions,
        )
        for choice, vector in zip(batch, await engine.embed(work), strict=True):
            yield steps.emit(choice, vector)


async def _open(task: Task[EmbeddingTask], responses: ResponseLog) -> Sequence[int]:
    """The inputs that have no end yet."""
    choices = range(len(task.payload.inputs))
    if task.attempt > 1:
        history = await responses.history(task.payload)
        task.ended.update(choice for choice in choices if history.of(choice).end)
    return [choice for choice in choices if choice not in task.ended]


class _Ends:
    """Turns vectors into terminal frames."""

    def __init__(self, task: Task[EmbeddingTask], worker: str) -> None:
        self._request, self._attempt, self._worker = task.payload, task.attempt, worker
        self._timing = Timing(
            accepted_unix_s=task.payload.accepted_unix_s,
            preprocessed_unix_s=task.stored_unix_s,
            started_unix_s=time.time(),
        )

    def emit(self, choice: int, vector: Vector) -> Emit:
        """Raises PayloadTooLarge for a vector that no subject carries."""
        request = self._request
        usage = Usage(prompt_tokens=len(request.inputs[choice]), completion_tokens=0)
        frame = Frame(
            request_id=request.request_id,
            choice=choice,
            attempt=self._attempt,
            embedding=vector,
            finish_reason="stop",
            usage=usage,
            worker=self._worker,
            timing=self._timing,
        )
        emit = emit_frame(request.client, request.request_id, frame, request.reply_format)
        if (size := len(emit.payload)) > PAYLOAD_BYTES_MAX:
            raise PayloadTooLarge(
                f"dimensions: a vector of {len(vector)} makes a frame of {size} bytes; a subject carries at most "
                f"{PAYLOAD_BYTES_MAX}: ask for fewer, or in MessagePack",
                field="dimensions",
                size=size,
                limit=PAYLOAD_BYTES_MAX,
            )
        metrics.count_usage(usage)
        return emit


async def serve(worker: Worker) -> None:
    """Start the engine, publish the model card, and own embedding requests until the worker drains."""
    engine = await worker.start_engine()
    if worker.info is None or worker.info.embedding is None:
        raise ConfigError("this engine generates: an embed worker needs is_embedding", field="sglang.is_embedding")
    consumer = streams.embed_any(worker.model)
    await worker.bus.ensure_consumer(consumer)
    await worker.publish_card()
    bound = embed.bind(engine=engine, responses=worker.responses, worker=worker.name)
    await worker.run(bound, [consumer], slots=worker.slots)
