"""SGLang behind the pipeline's Engine protocol."""

import asyncio
import os
import secrets
import signal
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Final

import structlog

from pipeline.engine.protocol import (
    CANARY,
    EmbeddingBatch,
    EngineInfo,
    EngineOutput,
    EngineRequest,
    Reading,
    Room,
    Vitals,
)
from pipeline.engine.sglang import launch, outputs, pooling, requests, series, vitals
from pipeline.engine.sglang.handshake import HandshakeSettings
from pipeline.engine.sglang.kv_events import KvEventsSettings
from pipeline.engine.sglang.operations import Operations
from pipeline.engine.sglang.parsers import ChatParsers
from pipeline.errors import (
    EngineDied,
    EngineFailed,
    EngineStartError,
    EngineSuspended,
    InvalidRequest,
    NotSupported,
    PipelineError,
)
from pipeline.models import prepare_model
from pipeline.operations import Arguments
from subjects.codec import NO_TOKENS, TokenIds, Vector
from subjects.messages import (
    Embedding,
    Load,
    MetricFamily,
    PreprocessedRequest,
    SamplingOptions,
    StopConditions,
)

INFO_S_MAX: Final = 60.0
"""How long a started scheduler may take to answer its first question."""
CLOSE_S_MAX: Final = 30.0
WARM_UP_TOKENS: Final = 16
WARM_UP_S_MAX: Final = 120.0
CANARY_PREFILL_TOKENS: Final = 4
"""As many as SGLang's own warm-up of a prefill server sends."""
_DISAGGREGATION: Final = {"null": "aggregated", "prefill": "prefill", "decode": "decode"}
log = structlog.get_logger()


class SglangEngine:
    """Implements `pipeline.engine.protocol.Engine` with SGLang in this process and its children.

    One engine a process. `server_args` are SGLang's own fields; see `server_args.resolve`.
    """

    def __init__(
        self,
        model_path: str,
        server_args: Mapping[str, Any],
        handshake: HandshakeSettings | None = None,
        kv_events: KvEventsSettings | None = None,
    ) -> None:
        """`handshake`: with disaggregation, this engine's place on the bus. `kv_events`: to publish them."""
        self._model_path, self._handshake, self._kv_events = model_path, handshake, kv_events
        self._server_args = dict(server_args)
        # SGLang's children die with the thread that started them: it must live as long as they.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sglang-launch")
        self._launched: asyncio.Future[Any] | None = None  # a sglang.Engine
        self._given_up = threading.Event()
        self._others: frozenset[int] = frozenset()  # ids of children that are not SGLang's
        self._manager: Any = None  # SGLang's TokenizerManager
        self._reading: asyncio.Task[None] | None = None  # its loop over what SGLang's processes send
        self._inlet = series.Inlet()
        self._sampling = _Sampling()
        self._folder = ""  # where the model lies, once prepared
        self._operations: Operations | None = None  # of the started engine
        self._parsers: ChatParsers | None = None  # likewise
        self._priority_sign = 0  # 0: this engine was started without priorities
        self._ends_thinking = False
        self._streams: dict[str, _Stream] = {}  # by rid
        self._outputs = 0  # chunks that SGLang has sent for users' requests
        self._processes: tuple[vitals.EngineProcess, ...] = ()
        self._death: asyncio.Future[str] | None = None  # why nothing can be generated any more
        self._previous_sigquit: Any = None

    async def start(self) -> EngineInfo:
        """Load the model; the event loop stays free meanwhile. Raises ConfigError or EngineStartError."""
        loop = asyncio.get_running_loop()
        self._death = loop.create_future()
        self._watch_for_death(loop)
        self._others = launch.children()
        self._inlet.listen()
        self._launched = loop.run_in_executor(self._thread, self._launch)
        launched = await asyncio.shield(self._launched)
        self._manager = launched.tokenizer_manager
        self._inlet.adopt()
        self._read_outputs(loop)
        async with asyncio.timeout(INFO_S_MAX):
            (state, *_) = await self._manager.get_internal_state()
        self._check_kind()
        self._sampling = _Sampling.of(self._manager.model_config, state)
        self._operations = Operations(self._manager, self._folder)
        if not self._embeds and (self._handshake is None or self._handshake.role != "prefill"):
            self._parsers = await asyncio.to_thread(ChatParsers.of_engine, launched, state)
        self._processes = await asyncio.to_thread(vitals.engine_processes, launch.children() - self._others)
        if state["enable_priority_scheduling"]:
            self._priority_sign = -1 if state["schedule_low_priority_values_first"] else 1
        self._ends_thinking = bool(state["enable_strict_thinking"] and state["reasoning_parser"])
        return self._info(state)

    async def generate(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        """See `Engine.generate`."""
        self._refuse_if_out_of_work()
        if self._embeds:
            await self.embed(EmbeddingBatch(rid=request.rid, inputs=(request.token_ids,)))
            yield EngineOutput(token_ids=NO_TOKENS, finish_reason="stop")
            return
        from sglang.srt.managers.io_struct import GenerateReqInput

        defaults = self._sampling.defaults(request.sampling)
        self._refuse_thinking_budget(request)
        words = requests.arguments(
            request, defaults, self._priority_sign, salted="cache_salt" in GenerateReqInput.__dataclass_fields__
        )
        stream = self._begun(request.rid, GenerateReqInput(**words))
        prompt_logprobs = request.output.prompt_logprobs
        try:
            while True:
                output = outputs.step(
                    await stream.next(),
                    logprobs=request.output.logprobs,
                    top_logprobs=request.output.top_logprobs,
                    prompt_logprobs=prompt_logprobs,
                    piece_of=self._piece_of,
                )
                yield output
                prompt_logprobs = False
                if output.finish_reason is not None:
                    return
        finally:
            del self._streams[request.rid]
            await stream.close()

    async def embed(self, batch: EmbeddingBatch) -> tuple[Vector, ...]:
        """See `Engine.embed`. SGLang puts what waits into one forward pass, up to its max_prefill_tokens."""
        self._refuse_if_out_of_work()
        if not self._embeds:
            raise NotSupported("this engine generates and does not embed")
        from sglang.srt.managers.io_struct import EmbeddingReqInput

        rids = [f"{batch.rid}.{place}" for place in range(len(batch.inputs))]
        streams: list[_Stream] = []
        try:
            for rid, tokens in zip(rids, batch.inputs, strict=True):
                given = EmbeddingReqInput(rid=rid, input_ids=tokens.tolist(), dimensions=batch.dimensions)
                streams.append(self._begun(rid, given))
            return tuple([outputs.vector(await stream.next()) for stream in streams])
        finally:
            for rid, _ in zip(rids, streams, strict=False):
                del self._streams[rid]
            await asyncio.gather(*(stream.close() for stream in streams))

    def _begun(self, rid: str, given: Any) -> "_Stream":
        """Give SGLang a request; its caller takes it out of `_streams`. Raises InvalidRequest."""
        if rid in self._streams:
            raise InvalidRequest(f"the engine already has a request {rid!r}", field="rid")
        chunks = self._manager.generate_request(given, None)
        stream = self._streams[rid] = _Stream(chunks if rid.startswith(CANARY) else self._counted(chunks))
        return stream

    def _refuse_thinking_budget(self, request: EngineRequest) -> None:
        """SGLang drops it in silence where it does not know where the model's thinking ends."""
        if request.options.max_thinking_tokens is not None and not self._ends_thinking:
            raise InvalidRequest(
                "max_thinking_tokens: this engine was started without SGLang's --reasoning-parser and "
                "--enable-strict-thinking",
                field="max_thinking_tokens",
            )

    def reading(self, request: PreprocessedRequest) -> Reading:
        """See `Engine.reading`. Raises EngineDied before the start."""
        if self._parsers is None:
            raise EngineDied("the engine is not started")
        return self._parsers.reading(request)

    async def warm_up(self) -> None:
        """Prefill one prompt: SGLang's kernels compile and its pools are touched at the first. Then keep the garbage
        collector of each of SGLang's processes off what was loaded.

        A decode engine alone has nothing to prefill, and a prefill engine hands the KV to nobody (SGLang's fake peer).
        Raises EngineDied, and EngineStartError where it takes too long.
        """
        mode = self._handshake.role if self._handshake else None
        if mode != "decode":
            await self._prefill_once(mode)
        await self._manager.freeze_gc()

    async def _prefill_once(self, mode: str | None) -> None:
        from sglang.srt.managers.io_struct import GenerateReqInput

        prompt = [self._first_token] * WARM_UP_TOKENS
        given = GenerateReqInput(
            input_ids=prompt,
            sampling_params={"max_new_tokens": 1, "temperature": 0, "ignore_eos": True},
            bootstrap_host=requests.FAKE_BOOTSTRAP_HOST if mode else None,
            bootstrap_room=0 if mode else None,
        )

        async def prefill() -> None:
            if self._embeds:
                await self.embed(EmbeddingBatch(rid=f"{CANARY}warm-up", inputs=(TokenIds.of(prompt),)))
                return
            async for _ in self._manager.generate_request(given, None):
                pass

        try:
            async with asyncio.timeout(WARM_UP_S_MAX):
                await self._unless_dead(prefill(), "its warm-up")
        except TimeoutError:
            raise EngineStartError(
                f"SGLang has not prefilled {WARM_UP_TOKENS} tokens within {WARM_UP_S_MAX:g} s", limit=WARM_UP_S_MAX
            ) from None

    def canary(self, dp_rank: int) -> EngineRequest:
        """See `Engine.canary`. With disaggregation its KV comes from, or goes to, SGLang's fake peer.

        Decode counts the token that prefill would have sent: only a second one takes a forward pass.
        """
        mode = self._handshake.role if self._handshake else None
        return EngineRequest(
            rid=f"{CANARY}{dp_rank}-{secrets.token_hex(4)}",
            token_ids=TokenIds.of([self._first_token] * (CANARY_PREFILL_TOKENS if mode == "prefill" else 1)),
            stop=StopConditions(max_tokens=2 if mode == "decode" else 1, ignore_eos=True),
            sampling=SamplingOptions(temperature=0.0),
            room=Room(number=dp_rank, prefill_worker="", prefill_incarnation="") if mode else None,
            dp_rank=dp_rank,
        )

    def vitals(self) -> Vitals:
        """See `Engine.vitals`."""
        self._refuse_if_dead()
        stopped, cpu_s = vitals.read(self._processes)
        running = sum(not rid.startswith(CANARY) for rid in self._streams)
        return Vitals(outputs=self._outputs, running=running, stopped=stopped, cpu_s=cpu_s)

    async def load(self) -> Load:
        """What SGLang's schedulers reported last; they do so at every step."""
        self._refuse_if_dead()
        loads = await self._manager.get_loads()
        return Load(
            running=sum(one.num_running_reqs for one in loads),
            waiting=sum(one.num_waiting_reqs for one in loads),
            kv_tokens_used=sum(one.num_used_tokens for one in loads),
            kv_tokens=sum(one.max_total_num_tokens for one in loads),
            waiting_prefill_tokens=sum(one.num_waiting_uncached_tokens for one in loads),
            generated_tokens_per_s=sum(one.gen_throughput for one in loads),
            cached_share=sum(one.cache_hit_rate for one in loads) / max(1, len(loads)),
        )

    def series(self) -> Mapping[str, tuple[MetricFamily, ...]]:
        """SGLang's Prometheus series, under their own names; see `pipeline.engine.sglang.series`."""
        return self._inlet.current()

    @property
    def suspended(self) -> str | None:
        """See `Engine.suspended`."""
        return self._operations.suspended if self._operations else None

    async def control(self, operation: str, arguments: Arguments) -> dict[str, Any]:
        """See `Engine.control`."""
        self._refuse_if_dead()
        assert self._operations is not None
        return await self._unless_dead(self._operations.run(operation, arguments), operation)

    async def _unless_dead(self, work: Coroutine[Any, Any, Any], doing: str) -> Any:
        """The work's result. Raises EngineDied where the engine dies first: SGLang would wait for ever."""
        assert self._death is not None
        running = asyncio.create_task(work, name=doing)
        try:
            await asyncio.wait({running, self._death}, return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                raise EngineDied(f"the engine died in {doing}: {self._death.result()}")
            return running.result()
        finally:
            running.cancel()

    async def died(self) -> str:
        """Wait until nothing can be generated any more, be it for a crash or for `close`; the reason."""
        assert self._death is not None, "the engine is started first"
        return await asyncio.shield(self._death)

    async def close(self) -> None:
        """End SGLang's processes. Also while `start` is at work, which then fails."""
        self._die("the engine was closed")
        self._given_up.set()
        await asyncio.gather(*(stream.close() for stream in self._streams.values()))
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait({self._reading})
        if self._launched is not None:
            await self._end_processes(self._launched)
            self._launched = None
        self._inlet.close()
        if self._previous_sigquit is not None and _in_main_thread():
            signal.signal(signal.SIGQUIT, self._previous_sigquit)
            self._previous_sigquit = None
        self._thread.shutdown(wait=False)

    @property
    def _embeds(self) -> bool:
        return not self._manager.is_generation

    def _check_kind(self) -> None:
        """Raises EngineStartError for a model that can only embed where it was to generate."""
        if self._embeds and not self._server_args.get("is_embedding"):
            raise EngineStartError(
                f"{self._model_path} makes embeddings and generates nothing: start it with `sglang-nats embed`"
            )

    @property
    def _first_token(self) -> int:
        """What a prompt begins with: BOS, else EOS where the model has no BOS, else the first of the vocabulary."""
        tokenizer = self._manager.tokenizer
        known = (tokenizer.bos_token_id, tokenizer.eos_token_id) if tokenizer is not None else ()
        return next((token for token in known if token is not None), 0)

    def _piece_of(self, token_id: int) -> str | None:
        tokenizer = self._manager.tokenizer
        return tokenizer.convert_ids_to_tokens(token_id) if tokenizer is not None else None

    async def _counted(self, chunks: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[dict[str, Any], None]:
        async with aclosing(chunks):
            async for chunk in chunks:
                self._outputs += 1
                yield chunk

    def _launch(self) -> Any:
        """Runs in the engine's own thread."""
        path = prepare_model(self._model_path)
        self._folder = str(path)
        pooling.announce(path if self._server_args.get("is_embedding") else None)
        if self._handshake is not None:
            os.environ.update(self._handshake.to_environment())  # SGLang's processes inherit it
        return launch.launch(str(path), self._server_args, self._given_up, self._inlet.outlet, self._kv_events)

    def _read_outputs(self, loop: asyncio.AbstractEventLoop) -> None:
        """What SGLang's `auto_create_handle_loop` does at the first request, and no more.

        Its handlers for SIGTERM and SIGQUIT would take the place of the worker's, and it would end this process
        where the loop fails.
        """
        self._manager.event_loop = loop
        self._reading = asyncio.create_task(self._manager.handle_loop(), name="sglang-outputs")

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled():
                self._die(f"SGLang's output loop failed: {task.exception()!r}")

        self._reading.add_done_callback(ended)

    def _watch_for_death(self, loop: asyncio.AbstractEventLoop) -> None:
        """SGLang's processes, and its watchdog over them, tell of a death by SIGQUIT to this process."""
        if not _in_main_thread():
            return  # signals are the main thread's; a death then ends the process, as signals do

        def on_sigquit(signum: int, frame: Any) -> None:
            loop.call_soon_threadsafe(self._die, "a process of SGLang ended; its log says why")

        self._previous_sigquit = signal.signal(signal.SIGQUIT, on_sigquit)

    def _die(self, reason: str) -> None:
        """Fail what is being generated, and all that comes. The first reason counts."""
        if self._death is None or self._death.done():
            return
        self._death.set_result(reason)
        if self._streams:
            log.error("engine_died", reason=reason, in_flight=len(self._streams))
        for stream in self._streams.values():
            stream.fail(EngineDied(reason))

    def _refuse_if_out_of_work(self) -> None:
        self._refuse_if_dead()
        if self.suspended:
            raise EngineSuspended(f"the engine is suspended: {self.suspended}")

    def _refuse_if_dead(self) -> None:
        if self._death is None or self._manager is None:
            raise EngineDied("the engine is not started")
        if self._death.done():
            raise EngineDied(self._death.result())

    async def _end_processes(self, launched: asyncio.Future[Any]) -> None:
        """Kill SGLang's processes, those included that a start in progress makes meanwhile."""
        deadline_s = asyncio.get_running_loop().time() + CLOSE_S_MAX
        while not launched.done() and asyncio.get_running_loop().time() < deadline_s:
            await asyncio.to_thread(launch.kill, launch.children() - self._others)
            await asyncio.wait({launched}, timeout=0.2)
        if launched.done() and not launched.cancelled() and launched.exception() is None:
            launch.disconnect(launched.result())
            await asyncio.to_thread(launch.end, launched.result())
        await asyncio.to_thread(launch.kill, launch.children() - self._others)

    def _info(self, state: Mapping[str, Any]) -> EngineInfo:
        """From a scheduler's resolved settings and measured capacities."""
        kv_tokens = state["memory_usage"]["token_capacity"]
        dp_size = state["dp_size"]
        return EngineInfo(
            name=f"sglang {version('sglang')}",
            model_path=self._model_path,
            context_len_tokens=min(self._manager.context_len, kv_tokens),
            max_running_requests=state["effective_max_running_requests_per_dp"] * dp_size,
            max_prefill_tokens=state["max_prefill_tokens"],
            kv_blocks=kv_tokens // state["page_size"] * dp_size,
            kv_block_tokens=state["page_size"],
            disaggregation=_DISAGGREGATION[state["disaggregation_mode"]],
            dp_size=dp_size,
            tp_size=state["tp_size"],
            reasoning_parser=self._parsers.reasoning if self._parsers else None,
            tool_call_parser=self._parsers.tool_call if self._parsers else None,
            sampling=self._sampling.stated(self._manager.preferred_sampling_params or {}),
            embedding=self._embedding() if self._embeds else None,
            tokenizer_path=state["tokenizer_path"],
            tokenizer_revision=state["revision"],
        )

    def _embedding(self) -> Embedding:
        """As SGLang checks it at each request (TokenizerManager._validate_for_matryoshka_dim)."""
        model = self._manager.model_config
        return Embedding(
            dimensions=model.hidden_size,
            matryoshka=bool(model.is_matryoshka),
            matryoshka_dimensions=tuple(model.matryoshka_dimensions or ()),
        )


@dataclass(frozen=True)
class _Sampling:
    """How the started engine samples."""

    model: Mapping[str, Any] = field(default_factory=dict)  # the model's own parameters, in SGLang's words
    on_cpu: bool = False  # seeds go the way of `cpu_sampling`
    deterministic: bool = False  # seeds go SGLang's own way

    @classmethod
    def of(cls, model_config: Any, state: Mapping[str, Any]) -> "_Sampling":
        own = model_config.get_default_sampling_params()
        return cls(
            model={name: value for name, value in own.items() if value is not None},
            on_cpu=state["device"] == "cpu",
            deterministic=state["enable_deterministic_inference"],
        )

    def stated(self, preferred: Mapping[str, Any]) -> dict[str, float]:
        """For the card; `preferred` is SGLang's preferred_sampling_params, which give way to the model's own."""
        known = {**preferred, **self.model}
        return {name: float(known[name]) for name in ("temperature", "top_p") if name in known}

    def defaults(self, wanted: SamplingOptions) -> dict[str, Any]:
        """What a request leaves open. Raises InvalidRequest for what SGLang would drop in silence or die of."""
        if self.on_cpu:
            return dict(self.model)
        if self.deterministic:
            if wanted.min_p or self.model.get("min_p"):
                raise InvalidRequest(
                    "this engine runs deterministically, and then SGLang takes no min_p", field="min_p"
                )
            # SGLang would give every request without a seed the same one.
            return dict(self.model) | {"sampling_seed": secrets.randbits(63)}
        if wanted.seed is not None:
            raise InvalidRequest(
                "this engine takes no seed: start it with SGLang's enable_deterministic_inference", field="seed"
            )
        return dict(self.model)


class _Stream:
    """One request's chunks, read by a task of its own, so that a death of the engine reaches a waiting reader."""

    def __init__(self, chunks: AsyncGenerator[dict[str, Any], None]) -> None:
        self._chunks: asyncio.Queue[dict[str, Any] | PipelineError] = asyncio.Queue()  # at most max_tokens
        self._task = asyncio.create_task(self._read(chunks))

    async def next(self) -> dict[str, Any]:
        """The next chunk. Raises InvalidRequest where SGLang refuses the request, EngineFailed where it broke."""
        chunk = await self._chunks.get()
        if isinstance(chunk, PipelineError):
            raise chunk
        return chunk

    def fail(self, error: PipelineError) -> None:
        self._chunks.put_nowait(error)

    async def close(self) -> None:
        """Stop reading; SGLang then aborts the request and frees its KV, unless it has ended."""
        self._task.cancel()
        await asyncio.wait({self._task})

    async def _read(self, chunks: AsyncGenerator[dict[str, Any], None]) -> None:
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    self._chunks.put_nowait(chunk)
            self.fail(EngineFailed("SGLang ended the output without saying why"))
        except ValueError as error:  # what SGLang raises for a request that it does not take
            self.fail(requests.refusal(str(error)))
        except Exception as error:  # the guard around foreign code: the reader must not wait for ever
            log.exception("generate_failed", code=type(error).__name__)
            self.fail(EngineFailed(f"SGLang failed: {error!r}"))


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
