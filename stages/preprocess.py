"""Preprocess: from an OpenAI request to a tokenized, validated task for decode, or to the errors that end it."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from typing import Final, Protocol

from pipeline import embeddings
from pipeline.block_hashes import salt_of
from pipeline.chat import LoadedModel
from pipeline.errors import DeadlineExceeded, PayloadTooLarge, PipelineError
from pipeline.expiry import Sweeper
from pipeline.front_door import FrontDoor
from pipeline.openai import IdentifiedRequest, identify, is_embedding, parse_request, resolve
from pipeline.placement import Placements, Places
from pipeline.request_options import session_of
from pipeline.served import EMBEDS, GENERATES, ServedModels
from pipeline.stage import Emit, Task, emit_frame, emit_work, stage
from pipeline.tokenizer_files import TokenizerCache
from pipeline.worker import Worker
from subjects import names, streams
from subjects.codec import TokenIds
from subjects.limits import PAYLOAD_BYTES_MAX
from subjects.messages import Frame, PreprocessedRequest, Request, Role, Timing

INLINE_BYTES_MAX: Final = 4096
"""A payload up to this size is tokenized on the event loop: about 1 ms, less than two hops between threads cost
under load. A longer one goes to a thread, so that leases and other requests do not wait for it."""


SLOTS_DEFAULT: Final = 256
"""Requests at once, those that wait for a model's first worker among them."""


class Models(Protocol):
    """The models that this worker knows of."""

    async def ready(self, model: str, until_unix_s: float, role: Role = GENERATES) -> LoadedModel:
        """The model, once a worker of the role that serves it has registered.

        Raises UnknownModel for a name that was neither declared nor registered, InvalidRequest for one that only
        workers of another role serve, DeadlineExceeded where no worker of a known model is there by `until_unix_s`,
        and ModelUnavailable where its tokenizer cannot be had.
        """
        ...


def answer(task: Task[bytes], error: PipelineError) -> Iterable[Emit]:
    """The terminal error frame of each choice that has none yet; a malformed request has one choice."""
    identity = identify(task.payload, task.headers, task.stream_seq)
    failure = error.failure()
    for choice in range(identity.choices):
        if choice in task.ended:
            continue
        frame = Frame(
            request_id=identity.request_id,
            choice=choice,
            finish_reason="abort" if failure.code == "cancelled" else "error",
            error=failure,
            timing=Timing(accepted_unix_s=task.stored_unix_s),
        )
        yield emit_frame(identity.client, identity.request_id, frame, identity.reply_format)


@stage(name="preprocess", takes=bytes, answer=answer)
async def preprocess(task: Task[bytes], models: Models, places: Places) -> AsyncIterator[Emit]:
    """One task for decode. A redelivery gives the same task under the same id, which JetStream drops.

    Raises Permanent for a request that cannot become a task.
    """
    work = _embedding_work(task, models) if is_embedding(task.payload) else _work(task, models, places)
    yield await work


async def _work(task: Task[bytes], models: Models, places: Places) -> Emit:
    now_unix_s = time.time()
    identified = parse_request(
        task.payload,
        task.headers,
        task.subject,
        task.stream_seq,
        accepted_unix_s=task.stored_unix_s or now_unix_s,
        now_unix_s=now_unix_s,
    )
    model = await models.ready(identified.model, identified.deadline_unix_s)
    if len(task.payload) <= INLINE_BYTES_MAX:
        prompts = tokenize(identified.request, model)
    else:
        prompts = await asyncio.to_thread(tokenize, identified.request, model)
    request = _resolved(identified, prompts, model)
    return _emit(request, await _address(request, session_of(identified.request), places))


def tokenize(request: Request, model: LoadedModel) -> tuple[TokenIds, ...]:
    """Each prompt, u32[num_prompt_tokens]. Raises InvalidRequest where the chat template refuses the messages."""
    return model.tokenize_all(request)


async def _embedding_work(task: Task[bytes], models: Models) -> Emit:
    """Inputs go to whichever embedding worker takes them: they have no prefix that one of them would know."""
    now_unix_s = time.time()
    envelope = embeddings.parse(
        task.payload,
        task.headers,
        task.subject,
        task.stream_seq,
        accepted_unix_s=task.stored_unix_s or now_unix_s,
        now_unix_s=now_unix_s,
    )
    model = await models.ready(envelope.model, envelope.deadline_unix_s, EMBEDS)
    given = embeddings.inputs_in(envelope.request)
    if len(task.payload) <= INLINE_BYTES_MAX:
        inputs = model.tokenize_inputs(given)
    else:
        inputs = await asyncio.to_thread(model.tokenize_inputs, given)
    work = embeddings.resolve(
        envelope,
        inputs,
        context_len_tokens=model.context_len_tokens,
        vocab_size=model.tokenizer.vocab_size,
        embedding=model.embedding,
        now_unix_s=time.time(),
    )
    emit = emit_work(names.EMBED_ANY.of(model=work.model), work, msg_id=f"{work.client}.{work.request_id}")
    embeddings.check_task_size(emit.payload, work.choices)
    return emit


def _resolved(identified: IdentifiedRequest, prompts: tuple[TokenIds, ...], model: LoadedModel) -> PreprocessedRequest:
    if identified.deadline_unix_s <= time.time():
        raise DeadlineExceeded("deadline: passed while the request was tokenized", field="deadline")
    return resolve(
        identified,
        *prompts,
        context_len_tokens=model.context_len_tokens,
        vocab_size=model.tokenizer.vocab_size,
        echo=model.prompt_texts(identified.request) if identified.request.echo else (),
    )


async def _address(request: PreprocessedRequest, session: str | None, places: Places) -> str:
    """The task's subject. One with a priority goes to whoever takes it first: classes are kept over all workers."""
    if request.priority:
        return names.decode_tasks(request.priority).of(model=request.model)
    worker = await places.choose(request.model, request.token_ids, session, salt_of(request.engine))
    if worker is None:
        return names.decode_tasks(request.priority).of(model=request.model)
    return names.DECODE_WORKER.of(model=request.model, worker=worker)


def _emit(request: PreprocessedRequest, subject: str) -> Emit:
    emit = emit_work(subject, request, msg_id=f"{request.client}.{request.request_id}")
    if len(emit.payload) > PAYLOAD_BYTES_MAX:
        raise PayloadTooLarge(
            f"prompt: its {len(request.token_ids)} tokens make a task of {len(emit.payload)} bytes; "
            f"a subject carries at most {PAYLOAD_BYTES_MAX}",
            field="prompt",
            size=len(emit.payload),
            limit=PAYLOAD_BYTES_MAX,
        )
    return emit


async def serve(worker: Worker) -> None:
    """Load the declared models' tokenizers, and preprocess requests until the worker drains; end what expires.

    Beside that it is a front door for who asks without HTTP.
    """
    models = ServedModels(worker.presence, worker.settings.models, TokenizerCache(worker.bus))
    await models.load_declared()
    slots = worker.settings.slots or SLOTS_DEFAULT
    places = Placements(worker.bus, worker.presence, worker.settings.routing)
    door = FrontDoor(worker.bus, worker.presence, worker.name, worker.incarnation)
    async with asyncio.TaskGroup() as group:
        group.create_task(door.serve(worker.until_drained()), name="front_door")
        sweeping = group.create_task(Sweeper(worker.bus, worker.responses).run(), name="sweeper")
        await worker.run(preprocess.bind(models=models, places=places), [streams.PREPROCESS], slots=slots)
        sweeping.cancel()
    await places.close()
