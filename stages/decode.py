"""Decode: own a request from its first token to its last frame.

A task that comes again (its first worker died, or handed it over) goes on from the prompt and the tokens
that the log already holds, so that the client sees one stream.
"""

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator
from contextlib import aclosing

from msgspec.structs import replace

from pipeline import metrics
from pipeline.engine.disaggregated import DisaggregatedEngine
from pipeline.engine.protocol import Engine, EngineOutput, EngineRequest, Parsed, Reading
from pipeline.pause import keep_paused
from pipeline.peers import Peers
from pipeline.placement import Placements
from pipeline.progress import Progress
from pipeline.responses import ResponseLog
from pipeline.resumption import Seam, plan
from pipeline.said import Said, joined
from pipeline.stage import Emit, Task, answer_owned, emit_frame, stage
from pipeline.worker import Worker
from subjects import streams
from subjects.codec import NO_TOKENS
from subjects.messages import Echo, Frame, PreprocessedRequest, Timing, Usage

FRAMES_AHEAD_MAX = 16
"""Frames of one choice that wait while another's are published."""


@stage(name="decode", takes=PreprocessedRequest, answer=answer_owned)
async def decode(
    task: Task[PreprocessedRequest], engine: Engine, responses: ResponseLog, worker: str
) -> AsyncIterator[Emit]:
    """Generate every choice and stream its frames; the order among choices is whatever comes first."""
    reading = engine.reading(task.payload)
    request = reading.request
    task = dataclasses.replace(task, payload=request)
    history = await responses.history(request) if task.attempt > 1 else None
    outputs = []
    for choice in range(request.choices):
        so_far = history.of(choice) if history else Progress()
        if so_far.end:
            task.ended.add(choice)
        else:
            said = await _reader(reading, choice, so_far)
            outputs.append(_choice(task, choice, so_far, engine, worker, said))
    frames = outputs[0] if len(outputs) == 1 else _merge(outputs)
    async with aclosing(frames):
        async for frame in frames:
            yield emit_frame(request.client, request.request_id, frame, request.reply_format)


async def _reader(reading: Reading, choice: int, so_far: Progress) -> Said:
    """Reads a choice's outputs. To parse again what is said already may take seconds: a thread does it."""
    parser = reading.parser(choice) if reading.parser else None
    if parser is not None and so_far.raw:
        return await asyncio.to_thread(Said, parser, so_far)
    return Said(parser, so_far)


async def _choice(
    task: Task[PreprocessedRequest], choice: int, so_far: Progress, engine: Engine, worker: str, said: Said
) -> AsyncIterator[Frame]:
    """One choice's frames. Without streaming it is one frame that holds everything."""
    request = _of_prompt(task.payload, choice)
    steps = _Steps(task, request, choice, so_far, worker, said)
    prompt_logprobs = request.output.prompt_logprobs and not so_far.echoed
    if len(so_far.token_ids) >= request.stop.max_tokens and not prompt_logprobs:
        yield steps.frame(EngineOutput(token_ids=NO_TOKENS, finish_reason="length"))
        return
    how = plan(request, so_far)
    seam = Seam(request, so_far, how)
    work = EngineRequest(
        rid=f"{request.request_id}.{choice}.{task.attempt}",
        token_ids=how.token_ids,
        stop=replace(how.stop, max_tokens=max(1, how.stop.max_tokens)),
        sampling=how.sampling,
        output=replace(request.output, prompt_logprobs=prompt_logprobs),
        request_id=request.request_id,
        deadline_unix_s=request.deadline_unix_s,
        priority=request.priority,
        dp_rank=request.dp_rank,
        options=request.engine,
    )
    async with aclosing(engine.generate(work)) as outputs:
        async for output in outputs:
            new = seam.output(output) if request.stop.max_tokens else _without_output(output)
            frame = steps.frame(new) if new else None
            if frame is not None:
                yield frame
                if frame.finish_reason:
                    return


def _of_prompt(request: PreprocessedRequest, choice: int) -> PreprocessedRequest:
    """The request as if it had the choice's prompt alone."""
    number = choice * (1 + len(request.further)) // request.choices
    if not number:
        return request
    own = request.further[number - 1]
    stop = replace(request.stop, max_tokens=own.max_tokens)
    return replace(request, token_ids=own.token_ids, stop=stop, echo=own.echo)


def _without_output(output: EngineOutput) -> EngineOutput:
    """The one step of a request for its prompt's logprobs alone: engines make a token where they compute those."""
    return EngineOutput(
        token_ids=NO_TOKENS,
        finish_reason="length",
        cached_tokens=output.cached_tokens,
        prompt_logprobs=output.prompt_logprobs,
    )


class _Steps:
    """Turns an engine's outputs for one choice into frames, and keeps count."""

    def __init__(
        self,
        task: Task[PreprocessedRequest],
        request: PreprocessedRequest,
        choice: int,
        so_far: Progress,
        worker: str,
        said: Said,
    ) -> None:
        """`request`: with the choice's own prompt."""
        self._request, self._attempt = request, task.attempt
        self._choice, self._index, self._worker = choice, len(so_far.token_ids), worker
        text = None if so_far.echoed else request.echo
        self._echo = None if text is None else Echo(text=text)  # until it is sent
        self._started = False
        self._held: list[EngineOutput] = []  # without streaming: all outputs until the last
        self._said, self._heard = said, list[Parsed]()  # what they say
        self._clock = metrics.TokenClock(task.payload.accepted_unix_s)
        self._timing = Timing(
            accepted_unix_s=task.payload.accepted_unix_s,
            preprocessed_unix_s=task.stored_unix_s,
            started_unix_s=time.time(),
        )

    def frame(self, output: EngineOutput) -> Frame | None:
        self._clock.tick(len(output.token_ids))
        if output.token_ids and self._timing.first_token_unix_s is None:
            self._timing = replace(self._timing, first_token_unix_s=time.time())
        if self._echo is not None and output.prompt_logprobs is not None:
            self._echo = replace(self._echo, logprobs=output.prompt_logprobs)
        self._heard.append(self._said.read(output))
        if not self._request.output.stream:
            self._held.append(output)
            if output.finish_reason is None:
                return None
            output = _joined(self._held)
        index, last = self._index, output.finish_reason is not None
        said, self._heard = joined(self._heard), []
        finish_reason = self._said.finish(output.finish_reason)
        self._index += len(output.token_ids)
        frame = Frame(
            request_id=self._request.request_id,
            choice=self._choice,
            attempt=self._attempt,
            index=index,
            token_ids=output.token_ids,
            text=said.text,
            logprobs=output.logprobs,
            finish_reason=finish_reason,
            matched_stop=None if finish_reason == "tool_calls" else output.matched_stop,
            usage=self._usage(output) if last else None,
            worker=self._worker if last or not self._started else None,
            timing=self._timed(output) if last else None,
            echo=self._echo,
            reasoning=said.reasoning,
            tool_calls=said.tool_calls,
            raw=None if last or output.text == said.text else output.text,
        )
        self._started, self._echo = True, None
        return frame

    def _timed(self, last: EngineOutput) -> Timing:
        timing = replace(self._timing, ended_unix_s=time.time())
        if (prefilled := last.prefilled) is None:
            return timing
        return replace(
            timing,
            prefill_worker=prefilled.worker,
            prefill_claimed_unix_s=prefilled.claimed_unix_s,
            kv_landed_unix_s=prefilled.kv_landed_unix_s,
        )

    def _usage(self, last: EngineOutput) -> Usage:
        usage = Usage(
            prompt_tokens=len(self._request.token_ids),
            completion_tokens=self._index,
            cached_tokens=min(last.cached_tokens, len(self._request.token_ids)),
        )
        metrics.count_usage(usage)
        return usage


def _joined(outputs: list[EngineOutput]) -> EngineOutput:
    """Many steps as one."""
    last = outputs[-1]
    with_logprobs = [output.logprobs for output in outputs if output.logprobs is not None]
    return EngineOutput(
        token_ids=sum((output.token_ids for output in outputs), NO_TOKENS),
        text="".join(output.text for output in outputs),
        logprobs=tuple(position for positions in with_logprobs for position in positions) or None,
        finish_reason=last.finish_reason,
        matched_stop=last.matched_stop,
        cached_tokens=last.cached_tokens,
        prefilled=last.prefilled,
    )


async def _merge(iterators: list[AsyncIterator[Frame]]) -> AsyncIterator[Frame]:
    """All iterators' frames as they come. The first failure ends the others and is raised."""
    queue: asyncio.Queue[Frame | Exception | None] = asyncio.Queue(FRAMES_AHEAD_MAX * max(1, len(iterators)))

    async def pump(iterator: AsyncIterator[Frame]) -> None:
        async with aclosing(iterator) as frames:
            async for frame in frames:
                await queue.put(frame)

    async def pump_all() -> None:
        end = None
        try:
            async with asyncio.TaskGroup() as group:
                for iterator in iterators:
                    group.create_task(pump(iterator))
        except ExceptionGroup as failures:
            end = failures.exceptions[0]
        await queue.put(end)

    pumps = asyncio.create_task(pump_all())
    try:
        while (item := await queue.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        pumps.cancel()
        await asyncio.gather(pumps, return_exceptions=True)


async def serve(worker: Worker) -> None:
    """Start the engine, publish the model card, and own requests until the worker drains."""
    engine = await worker.start_engine()
    model = worker.model
    consumers = streams.decode_takes(model, worker.name)
    for consumer in consumers:
        await worker.bus.ensure_consumer(consumer)
    await keep_paused(worker.bus, model, worker.name)
    places = Placements(worker.bus, worker.presence, worker.settings.routing, "prefill")
    if worker.disaggregated:
        engine = DisaggregatedEngine(engine, worker.bus, worker.name, model, worker.presence, places)
        await engine.listen()
    await worker.publish_card()
    bound = decode.bind(engine=engine, responses=worker.responses, worker=worker.name)
    peers = Peers(worker.bus, worker.presence, "decode", model, worker.name)
    await worker.run(bound, consumers, slots=worker.slots, others=peers)
    await places.close()
