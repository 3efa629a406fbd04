"""An engine that computes nothing: tokens that any test can foretell, at a settable pace.

For capacity planning, fault tests and measuring the pipeline itself; never for a claim about SGLang.

A token is a function of the seed and of every token before it, and of nothing else. So a request that is
resumed from prompt + emitted tokens, on another worker, goes on as the first one would have.

Disaggregated, prefill takes the time to the first token and decode the rest; they meet on the bus, as SGLang's engines
do. Where prompts are prefilled there is a cache of KV blocks: a prompt that begins like an earlier one has less to
prefill, and what becomes of the blocks is published as SGLang's engines do.
"""

import asyncio
import contextlib
import hashlib
import heapq
import math
import secrets
from array import array
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Final

import msgspec

from pipeline.block_hashes import TOKEN_BYTES, block_hashes, salt_of
from pipeline.bus import Bus
from pipeline.chat_options import is_forced
from pipeline.config import SimulatedSettings
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
from pipeline.engine.simulated_cache import PrefixCache
from pipeline.engine.simulated_rooms import KvFetcher, PrefillRooms
from pipeline.errors import Busy, EngineDied, EngineSuspended, InvalidRequest, NotSupported
from pipeline.kv_publisher import KvPublisher, KvRank
from pipeline.operations import Arguments
from subjects.codec import NO_TOKENS, TokenIds, Vector
from subjects.messages import (
    BlocksCleared,
    Embedding,
    FinishReason,
    KvEvent,
    Load,
    MetricFamily,
    PositionLogprobs,
    PreprocessedRequest,
    StopConditions,
    TokenLogprob,
)

VOCAB_TOKENS: Final = 32_000
EOS_TOKEN: Final = 2
"""The end of an output, unless the request ignores it; every other token is 3 or more."""
STEP_S: Final = 0.005
"""What becomes of KV blocks within this time is published as one message, as with a step of a real engine."""
TICK_S: Final = 0.001
"""The resolution of the pace."""
_BOS_TOKEN: Final = 1
_FIRST_TOKEN: Final = 3


class History:
    """The tokens of a sequence so far, as a running hash from which the next one follows.

    One in `eos_after_tokens` tokens is the end, where that is not 0: a function of the history too, since a
    resumed request no longer knows where its prompt ended.
    """

    def __init__(self, tokens: TokenIds, seed: int = 0, eos_after_tokens: int = 0) -> None:
        self._hash = hashlib.blake2b(b"%d\0" % seed + tokens.raw, digest_size=16)
        self._eos_after_tokens = eos_after_tokens

    def next(self) -> int:
        """The token that follows; not yet part of the history."""
        digest = self._hash.digest()
        if self._eos_after_tokens and int.from_bytes(digest[8:], "little") % self._eos_after_tokens == 0:
            return EOS_TOKEN
        return _FIRST_TOKEN + int.from_bytes(digest[:8], "little") % (VOCAB_TOKENS - _FIRST_TOKEN)

    def append(self, token: int) -> None:
        self._hash.update(token.to_bytes(4, "little"))


def expected_token(history: TokenIds, seed: int = 0, eos_after_tokens: int = 0) -> int:
    """The token that follows prompt + emitted tokens, whoever computes it."""
    return History(history, seed, eos_after_tokens).next()


def expected_tokens(prompt: TokenIds, count: int, seed: int = 0) -> TokenIds:
    """The first `count` tokens of an output that nothing ends earlier: u32[count]."""
    history, tokens = History(prompt, seed), []
    for _ in range(count):
        tokens.append(history.next())
        history.append(tokens[-1])
    return TokenIds.of(tokens)


def expected_vector(tokens: TokenIds, dimensions: int, of: int, seed: int = 0) -> Vector:
    """An input's vector, f32[dimensions] of unit length: the beginning of one of `of` dimensions, drawn from a hash."""
    drawn = array("H", hashlib.shake_256(b"%d\0" % seed + tokens.raw).digest(2 * of))
    cut = [number - 32_767.5 for number in drawn[:dimensions]]
    length = math.hypot(*cut)
    return Vector.of(number / length for number in cut)


def text_of(token: int) -> str:
    """A token as text; the end of an output has none."""
    return "" if token == EOS_TOKEN else f" t{token}"


class StopText:
    """Text on its way out: held back while it may be the beginning of a stop string.

    >>> text = StopText((" t5 t6",), keep=False)
    >>> text.push(" t4 t5"), text.push(" t6"), text.matched
    (' t4', '', ' t5 t6')
    """

    def __init__(self, stops: tuple[str, ...], keep: bool) -> None:
        self._stops, self._keep, self._held = stops, keep, ""
        self.matched: str | None = None

    def push(self, text: str, may_stop: bool = True) -> str:
        """What can be let out now. Sets `matched` where a stop string is complete; it is let out if kept."""
        self._held += text
        if not may_stop:
            return self.flush()
        for stop in self._stops:
            at = self._held.find(stop)
            if at >= 0:
                self.matched = stop
                return self._held[: at + (len(stop) if self._keep else 0)]
        out = self._held[: len(self._held) - self._length_to_hold()]
        self._held = self._held[len(out) :]
        return out

    def flush(self) -> str:
        """All that is held back: nothing follows any more."""
        out, self._held = self._held, ""
        return out

    def _length_to_hold(self) -> int:
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest


class Writer:
    """One choice's output, token by token, until one of its stop conditions holds."""

    def __init__(self, request: EngineRequest, settings: SimulatedSettings) -> None:
        seed = settings.seed if request.sampling.seed is None else request.sampling.seed
        self._request = request
        self._history = History(request.token_ids, seed, settings.eos_after_tokens)
        self._text = StopText(request.stop.stop, request.output.no_stop_trim)
        self.num_tokens = 0

    def write(self, count: int) -> EngineOutput:
        """The next tokens, at most `count`; the last output has a finish_reason."""
        tokens: list[int] = []
        text = ""
        prompt = self._prompt_logprobs() if self._request.output.prompt_logprobs and not self.num_tokens else None
        finish: FinishReason | None = None
        matched: int | str | None = None
        while finish is None and len(tokens) < count:
            token = self._history.next()
            self._history.append(token)
            tokens.append(token)
            self.num_tokens += 1
            piece, finish, matched = self._after(token)
            text += piece
        if finish is not None and self._text.matched is None:
            text += self._text.flush()
        return EngineOutput(
            token_ids=TokenIds.of(tokens),
            text=text,
            logprobs=self._logprobs(tokens) if self._request.output.logprobs else None,
            finish_reason=finish,
            matched_stop=matched,
            prompt_logprobs=prompt,
        )

    def _after(self, token: int) -> tuple[str, FinishReason | None, int | str | None]:
        """The text that a token lets out, and whether the output ends with it, and on what."""
        stop, output = self._request.stop, self._request.output
        may_stop = self.num_tokens > stop.min_tokens
        if may_stop and (token in stop.stop_token_ids or (token == EOS_TOKEN and not stop.ignore_eos)):
            return text_of(token) if output.no_stop_trim else "", "stop", token
        piece = self._text.push(text_of(token), may_stop)
        if self._text.matched is not None:
            return piece, "stop", self._text.matched
        return piece, "length" if self.num_tokens >= stop.max_tokens else None, None

    def _logprobs(self, tokens: list[int]) -> tuple[PositionLogprobs, ...]:
        """The chosen token first, the next higher ids as alternatives, each less likely than the one before."""
        return tuple(
            PositionLogprobs(
                chosen=_logprob(token, 0),
                top=tuple(_logprob(token + rank, rank) for rank in range(self._request.output.top_logprobs)),
            )
            for token in tokens
        )

    def _prompt_logprobs(self) -> tuple[PositionLogprobs, ...]:
        """As `_logprobs`; the first token follows nothing."""
        first, *others = self._request.token_ids
        nothing = TokenLogprob(token_id=first, logprob=None, text=text_of(first))
        return (PositionLogprobs(chosen=nothing), *self._logprobs(others))


def _logprob(token: int, rank: int) -> TokenLogprob:
    return TokenLogprob(token_id=token, logprob=-0.25 - rank, text=text_of(token))


@dataclass(eq=False)
class Turn:
    """A running request's place on the wheel: how many tokens it may write by now."""

    due_s: float  # when the next token is ready, by the loop's clock
    ready: asyncio.Event = field(default_factory=asyncio.Event)  # `tokens` or `over` has changed
    tokens: int = 0
    over: bool = False  # the wheel hands it nothing more


class Wheel:
    """Hands out tokens to all running requests by one timer, however many there are."""

    def __init__(self, itl_s: float) -> None:
        self._itl_s = max(itl_s, 1e-6)  # 0: the whole output as soon as the first token
        self._slots: dict[int, list[Turn]] = {}  # by tick
        self._ticks: list[int] = []  # a heap of the slots' ticks
        self._timer: asyncio.Handle | None = None
        self._timer_s = math.inf  # when it fires

    def add(self, turn: Turn) -> None:
        """Let a request have its next token at its `due_s`."""
        tick = int(turn.due_s / TICK_S) + 1
        if tick not in self._slots:
            self._slots[tick] = []
            heapq.heappush(self._ticks, tick)
        self._slots[tick].append(turn)
        self._arm()

    def stop(self) -> None:
        """End all: each request on the wheel wakes up and finds that it is over."""
        if self._timer is not None:
            self._timer.cancel()
        for turn in (turn for slot in self._slots.values() for turn in slot):
            turn.over = True
            turn.ready.set()
        self._slots.clear()
        self._ticks.clear()

    def _arm(self) -> None:
        when_s = self._ticks[0] * TICK_S
        if when_s < self._timer_s:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_s = when_s
            self._timer = asyncio.get_running_loop().call_at(when_s, self._advance)

    def _advance(self) -> None:
        """Give every request its tokens that are due; one that the loop was late for gets several at once."""
        self._timer, self._timer_s = None, math.inf
        now_s = asyncio.get_running_loop().time()
        due: list[Turn] = []
        while self._ticks and self._ticks[0] * TICK_S <= now_s:
            due += self._slots.pop(heapq.heappop(self._ticks))
        for turn in due:
            if turn.over:
                continue
            tokens = 1 + int(max(0.0, now_s - turn.due_s) / self._itl_s)
            turn.tokens += tokens
            turn.due_s += tokens * self._itl_s
            turn.ready.set()
            self.add(turn)
        if self._ticks:
            self._arm()


@dataclass(frozen=True)
class Address:
    """Under which name, and on which broker, an engine meets others."""

    nats: str
    worker: str
    incarnation: str
    model: str | None = None  # the served name, where KV events are published


class SimulatedEngine:
    """Implements `pipeline.engine.protocol.Engine` without a model; see the module's docstring."""

    def __init__(self, settings: SimulatedSettings, address: Address | None = None, *, embeds: bool = False) -> None:
        """`address`: needed with disaggregation, and for KV events. `embeds`: it embeds and does not generate."""
        self._settings, self._address, self._embeds = settings, address, embeds
        self._embedding: dict[str, EmbeddingBatch] = {}  # by rid
        self._bus: Bus | None = None
        self._rooms: PrefillRooms | None = None
        self._fetcher: KvFetcher | None = None
        self._slots = asyncio.Semaphore(settings.max_running_requests)
        self._wheel = Wheel(settings.itl_ms / 1000)
        self._running: dict[str, tuple[EngineRequest, Writer]] = {}  # by rid
        self._waiting: dict[str, int] = {}  # prompt tokens by rid
        self._outputs = 0
        self._closed = asyncio.Event()
        self._released = False
        self._cache = PrefixCache(self._kv_tokens // settings.kv_block_tokens)
        self._prefilled_s = 0.0  # when the last prompt is prefilled, by the loop's clock
        self._publisher: KvPublisher | None = None
        self._news: list[KvEvent] = []  # of this step

    async def start(self) -> EngineInfo:
        settings = self._settings
        if settings.disaggregation != "aggregated":
            await self._meet()
        if self._address is not None and self._address.model and settings.disaggregation != "decode":
            await self._announce(self._address, self._address.model)
        return EngineInfo(
            name="simulated",
            model_path="simulated",
            context_len_tokens=settings.context_len_tokens,
            max_running_requests=settings.max_running_requests,
            max_prefill_tokens=settings.context_len_tokens,
            kv_blocks=self._kv_tokens // settings.kv_block_tokens,
            kv_block_tokens=settings.kv_block_tokens,
            disaggregation=settings.disaggregation,
            embedding=Embedding(dimensions=settings.embedding_dimensions, matryoshka=True) if self._embeds else None,
        )

    async def embed(self, batch: EmbeddingBatch) -> tuple[Vector, ...]:
        """See `Engine.embed`. A batch takes as long as a first token, one place, and the time of its tokens."""
        self._refuse_batch(batch)
        self._embedding[batch.rid] = batch
        try:
            async with self._slots:
                ready_s = self._first_token_s(sum(map(len, batch.inputs)))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(ready_s):
                        await self._closed.wait()
        finally:
            del self._embedding[batch.rid]
        self._refuse_if_closed()
        self._outputs += not batch.rid.startswith(CANARY)
        whole, seed = self._settings.embedding_dimensions, self._settings.seed
        return tuple(expected_vector(tokens, batch.dimensions or whole, whole, seed) for tokens in batch.inputs)

    def _refuse_batch(self, batch: EmbeddingBatch) -> None:
        self._refuse_if_closed()
        if not self._embeds:
            raise NotSupported("this engine generates and does not embed")
        if batch.rid in self._embedding:
            raise InvalidRequest(f"the engine already has a batch {batch.rid!r}", field="rid")
        if self.suspended:
            raise EngineSuspended(f"the engine is suspended: {self.suspended}")
        limit = self._settings.context_len_tokens
        for index, tokens in enumerate(batch.inputs):
            if len(tokens) > limit:
                field = f"input.{index}"
                raise InvalidRequest(f"{field}: {len(tokens)} tokens", field=field, size=len(tokens), limit=limit)

    def _refuse_if_closed(self) -> None:
        if self._closed.is_set():
            raise EngineDied("the simulated engine was closed")

    async def _meet(self) -> None:
        assert self._address is not None, "a disaggregated engine needs an address"
        self._bus = await self._connect(self._address)
        if self._settings.disaggregation == "prefill":
            self._rooms = PrefillRooms(self._bus, self._address.worker, self._address.incarnation)
            await self._rooms.listen()
        else:
            self._fetcher = KvFetcher(self._bus)

    async def _connect(self, address: Address) -> Bus:
        return self._bus or await Bus.connect(address.nats, name=f"{address.worker}.kv")

    async def _announce(self, address: Address, model: str) -> None:
        """Begin to publish KV events; the first says that there are no blocks."""
        self._bus = await self._connect(address)
        rank = KvRank(
            model=model,
            worker=address.worker,
            incarnation=address.incarnation,
            block_tokens=self._settings.kv_block_tokens,
        )
        self._publisher = KvPublisher(self._bus, rank)
        await self._publisher.start()
        self._publisher.publish([BlocksCleared()])

    async def generate(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        """See `Engine.generate`. Waits for a free place first, in order of arrival."""
        if self._embeds:
            await self.embed(EmbeddingBatch(rid=request.rid, inputs=(request.token_ids,)))
            yield EngineOutput(token_ids=NO_TOKENS, finish_reason="stop")
            return
        self._refuse(request)
        outputs = self._in_place(request) if self._rooms is None else self._prefill(request, self._rooms)
        async with aclosing(outputs):
            async for output in outputs:
                self._outputs += not request.rid.startswith(CANARY)
                yield output

    async def _in_place(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        self._waiting[request.rid] = len(request.token_ids)
        try:
            await self._slots.acquire()
        finally:
            self._waiting.pop(request.rid, None)
        try:
            async with aclosing(self._run(request)) as outputs:
                async for output in outputs:
                    yield output
        finally:
            self._slots.release()

    async def _prefill(self, request: EngineRequest, rooms: PrefillRooms) -> AsyncIterator[EngineOutput]:
        """The first token alone, once decode has the KV."""
        assert request.room is not None, "prefill works in rooms"
        one = replace(request, stop=msgspec.structs.replace(request.stop, max_tokens=1, min_tokens=0))
        with rooms.holding(request.room.number, request.token_ids) as held:
            async with aclosing(self._in_place(one)) as outputs:
                first = await anext(outputs)
            if not request.room.loopback:
                await rooms.until_fetched(held)
        yield first

    def reading(self, request: PreprocessedRequest) -> Reading:
        """See `Engine.reading`. It has no parsers: all it says is content."""
        if request.chat is not None and is_forced(request.chat.tool_choice):
            raise InvalidRequest("tool_choice: the simulated engine calls no tools", field="tool_choice")
        return Reading(request=request)

    async def load(self) -> Load:
        used = sum(len(request.token_ids) + writer.num_tokens for request, writer in self._running.values())
        if self._rooms is not None:
            used = self._rooms.kv_tokens
        return Load(
            running=len(self._running) + sum(len(batch.inputs) for batch in self._embedding.values()),
            waiting=len(self._waiting),
            kv_tokens_used=used,
            kv_tokens=self._kv_tokens,
            waiting_prefill_tokens=sum(self._waiting.values()),
        )

    def series(self) -> Mapping[str, tuple[MetricFamily, ...]]:
        """None: it has no series of its own, and SGLang's names are for SGLang."""
        return {}

    @property
    def suspended(self) -> str | None:
        """See `Engine.suspended`."""
        return "its memory is released: resume_memory brings it back" if self._released else None

    async def control(self, operation: str, arguments: Arguments) -> dict[str, Any]:
        """See `Engine.control`. What it cannot do honestly, it refuses: it has no weights, no experts, no kernels."""
        match operation:
            case "server_info":
                return msgspec.to_builtins(self._settings)
            case "flush_cache":
                self._tell(self._cache.clear())
                return {"flushed": True}
            case "release_memory" | "resume_memory":
                release = operation == "release_memory"
                if release == self._released:
                    raise Busy(f"{operation}: its memory is {'' if release else 'not '}released")
                self._released = release
                if release:
                    self._tell(self._cache.clear())
                return {"released": ["kv_cache"] if release else []}
        raise NotSupported(f"the simulated engine cannot {operation}: it computes nothing")

    def canary(self, dp_rank: int) -> EngineRequest:
        alone = self._settings.disaggregation == "aggregated"
        return EngineRequest(
            rid=f"{CANARY}{dp_rank}-{secrets.token_hex(4)}",
            token_ids=TokenIds.of([_BOS_TOKEN]),
            stop=StopConditions(max_tokens=1),
            room=None if alone else Room(number=dp_rank, prefill_worker="", prefill_incarnation=""),
        )

    def vitals(self) -> Vitals:
        self._refuse_if_closed()
        running = sum(not rid.startswith(CANARY) for rid in (*self._running, *self._waiting, *self._embedding))
        return Vitals(outputs=self._outputs, running=running)

    async def warm_up(self) -> None:
        """Nothing to compute."""

    async def died(self) -> str:
        await self._closed.wait()
        return "the simulated engine was closed"

    async def close(self) -> None:
        self._closed.set()
        self._wheel.stop()
        if self._bus is not None:
            await self._bus.close()

    @property
    def _kv_tokens(self) -> int:
        return self._settings.kv_tokens or self._settings.context_len_tokens * self._settings.max_running_requests

    async def _run(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        writer = Writer(request, self._settings)
        turn = Turn(due_s=math.inf)
        self._running[request.rid] = (request, writer)
        outputs: list[EngineOutput] = []
        try:
            if self._fetcher is not None:
                assert request.room is not None, "disaggregated decode works in rooms"
                if not request.room.loopback:
                    await self._fetcher.fetch(request.room, request.token_ids)
                turn.due_s = asyncio.get_running_loop().time()
                written = self._paced(writer, turn)
            else:
                written = self._prefilled(request, writer, turn)
            async for output in written:
                if request.output.stream:
                    yield output
                else:
                    outputs.append(output)
            if outputs:
                yield _joined(outputs)
        finally:
            turn.over = True
            del self._running[request.rid]

    async def _prefilled(self, request: EngineRequest, writer: Writer, turn: Turn) -> AsyncIterator[EngineOutput]:
        """The whole output, from a prompt whose first blocks may be in the cache."""
        block_tokens = self._settings.kv_block_tokens
        salt = salt_of(request.options)
        hashes = block_hashes(request.token_ids, block_tokens, salt)
        # The last token is computed in any case: the next one comes of it.
        usable = (len(request.token_ids) - 1) // block_tokens
        cached_tokens = self._cache.held(hashes[:usable]) * block_tokens
        turn.due_s = self._first_token_s(len(request.token_ids) - cached_tokens)
        sequence = [request.token_ids.raw]
        async for output in self._paced(writer, turn):
            if len(sequence) == 1:
                self._keep(hashes)
            sequence.append(output.token_ids.raw)
            if output.finish_reason is None:
                yield output
            else:
                computed = TokenIds(b"".join(sequence)[:-TOKEN_BYTES])  # the last token's KV would come with the next
                self._keep(block_hashes(computed, block_tokens, salt))
                yield replace(output, cached_tokens=cached_tokens)

    def _first_token_s(self, uncached_tokens: int) -> float:
        """When a prompt that begins now has its first token, by the loop's clock: prompts are prefilled in turn."""
        now_s = asyncio.get_running_loop().time()
        self._prefilled_s = max(now_s, self._prefilled_s) + uncached_tokens * self._settings.prefill_us_per_token / 1e6
        return self._prefilled_s + self._settings.ttft_ms / 1000

    def _keep(self, hashes: list[int]) -> None:
        """Take blocks into the cache, and tell what became of it."""
        self._tell(self._cache.keep(hashes))

    def _tell(self, events: list[KvEvent]) -> None:
        """Publish what became of blocks at the end of the step."""
        if self._publisher is None or not events:
            return
        if not self._news:
            asyncio.get_running_loop().call_later(STEP_S, self._publish_news, self._publisher)
        self._news += events

    def _publish_news(self, publisher: KvPublisher) -> None:
        news, self._news = self._news, []
        publisher.publish(news)

    async def _paced(self, writer: Writer, turn: Turn) -> AsyncIterator[EngineOutput]:
        """The output as the wheel hands it out, from `turn.due_s` on."""
        self._wheel.add(turn)
        finished = False
        while not finished:
            if self._closed.is_set():
                raise EngineDied("the simulated engine was closed")
            await turn.ready.wait()
            turn.ready.clear()
            if turn.tokens:
                tokens, turn.tokens = turn.tokens, 0
                output = writer.write(tokens)
                finished = output.finish_reason is not None
                yield output

    def _refuse(self, request: EngineRequest) -> None:
        """Raise InvalidRequest for what SGLang would refuse too, and for what cannot be simulated."""
        self._refuse_if_closed()
        if request.rid in self._running or request.rid in self._waiting:
            raise InvalidRequest(f"the engine already has a request {request.rid!r}", field="rid")
        if self.suspended:
            raise EngineSuspended(f"the engine is suspended: {self.suspended}")
        size, limit = len(request.token_ids) + request.stop.max_tokens, self._settings.context_len_tokens
        if size > limit:
            raise InvalidRequest(
                f"prompt and max_tokens are {size} tokens together; the context takes {limit}",
                field="max_tokens",
                size=size,
                limit=limit,
            )
        if request.dp_rank:
            raise InvalidRequest(
                f"data_parallel_rank: {request.dp_rank} is out of range: the simulated engine has one rank",
                field="data_parallel_rank",
                size=request.dp_rank,
                limit=0,
            )
        sampling, options = request.sampling, request.options
        for name, wanted, what in (
            ("json_schema", sampling.json_schema, "grammars"),
            ("regex", sampling.regex, "grammars"),
            ("ebnf", sampling.ebnf, "grammars"),
            ("structural_tag", sampling.structural_tag, "grammars"),
            ("lora_path", options.lora_path, "adapters"),
            ("max_thinking_tokens", options.max_thinking_tokens, "thoughts"),
        ):
            if wanted is not None:
                raise InvalidRequest(f"{name}: the simulated engine has no {what}", field=name)


def _joined(outputs: list[EngineOutput]) -> EngineOutput:
    """All steps of an output as one."""
    last = outputs[-1]
    return EngineOutput(
        token_ids=TokenIds(b"".join(output.token_ids.raw for output in outputs)),
        text="".join(output.text for output in outputs),
        logprobs=tuple(one for output in outputs for one in output.logprobs or ()) if last.logprobs else None,
        finish_reason=last.finish_reason,
        matched_stop=last.matched_stop,
        cached_tokens=last.cached_tokens,
        prompt_logprobs=outputs[0].prompt_logprobs,
    )
