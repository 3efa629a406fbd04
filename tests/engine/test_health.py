"""The real engine: its canary, and its scheduler stopped in the middle of an answer. One engine for all."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

import pytest
import pytest_asyncio

from pipeline.bus import Bus
from pipeline.config import BUILTIN_MODEL, HealthSettings, WorkerSettings
from pipeline.engine.sglang.engine import SglangEngine
from pipeline.nats_server import NatsServer
from pipeline.worker import Worker
from stages.decode import serve
from subjects import names, streams
from subjects.codec import TokenIds, decode, encode
from subjects.messages import Frame, PreprocessedRequest, SamplingOptions, StopConditions

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]
MODEL = "smollm2"
START_S_MAX = 120.0
WAIT_S = 60.0  # a busy machine
NOTICED_S_MAX = 5.0
LONG_PROMPT_TOKENS = 3_000


@dataclass
class Serving:
    worker: Worker
    engine: SglangEngine
    bus: Bus

    @property
    def scheduler(self) -> int:
        return next(process.pid for process in self.engine._processes if process.dp_rank is not None)

    async def until(self, ready: bool) -> list[str]:
        async with asyncio.timeout(WAIT_S):
            while self.worker.health().ready is not ready:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        return [reason.code for reason in self.worker.health().reasons]

    @asynccontextmanager
    async def answer(self, request_id: str, token_ids: TokenIds, max_tokens: int):
        """The frames of a task that is published."""
        frames: asyncio.Queue[Frame] = asyncio.Queue()
        subject = names.RESPONSES.any(request_id=request_id)
        heard = await self.bus.subscribe(subject, lambda got: frames.put_nowait(decode(Frame, got.payload)))
        await self.bus.flush()
        request = PreprocessedRequest(
            request_id=request_id,
            client="c",
            model=MODEL,
            token_ids=token_ids,
            stop=StopConditions(max_tokens=max_tokens, ignore_eos=True),
            sampling=SamplingOptions(temperature=0.0),
        )
        await self.bus.publish_durable(names.DECODE_ANY.of(model=MODEL), encode(request), msg_id=request_id)
        yield frames
        await heard.unsubscribe()


async def tokens_of(frames: asyncio.Queue[Frame], until: int | None = None) -> dict[int, int]:
    """The tokens by index, to the end or until there are so many."""
    tokens: dict[int, int] = {}
    async with asyncio.timeout(WAIT_S):
        while until is None or len(tokens) < until:
            frame = await frames.get()
            tokens |= dict(enumerate(frame.token_ids.tolist(), frame.index))
            if frame.finish_reason:
                assert frame.error is None
                break
    return tokens


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def serving(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Serving]:
    server = NatsServer(tmp_path_factory.mktemp("nats"))
    server.start()
    settings = WorkerSettings(
        role="decode",
        worker="w1",
        nats=server.url,
        model=MODEL,
        model_path=BUILTIN_MODEL,
        sglang={"max_total_tokens": 8192, "max_running_requests": 4},
        health=HealthSettings(canary_s=3.0),
    )
    worker = Worker(settings)
    bus = await Bus.connect(server.url, name="test")
    await worker.open()
    task = asyncio.create_task(serve(worker))
    async with asyncio.timeout(START_S_MAX):
        while not worker.health().ready and not task.done():  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    try:
        assert isinstance(worker.engine, SglangEngine)
        yield Serving(worker, worker.engine, bus)
    finally:
        worker.drain()
        await asyncio.wait({task}, timeout=WAIT_S)
        await worker.close()
        await bus.close()
        server.kill()


async def test_the_canary_generates(serving: Serving):
    canary = serving.engine.canary(0)
    tokenizer = serving.engine._manager.tokenizer
    assert canary.token_ids.tolist() == [tokenizer.bos_token_id]
    assert (canary.sampling.temperature, canary.stop.max_tokens) == (0.0, 1)
    before = serving.engine.vitals()
    async with aclosing(serving.engine.generate(canary)) as outputs:
        async with asyncio.timeout(WAIT_S):
            tokens = [token async for output in outputs for token in output.token_ids.tolist()]
    assert len(tokens) == 1
    after = serving.engine.vitals()
    assert (after.outputs, after.running) == (before.outputs, 0)  # it is no sign of users' requests
    assert len(after.cpu_s) == 1
    assert after.cpu_s[0] > 0
    assert serving.engine.canary(0).rid != canary.rid


async def test_a_stopped_scheduler_is_noticed_gives_its_work_away_and_comes_back(serving: Serving):
    prompt = serving.engine._manager.tokenizer.encode("Once upon a time")
    async with serving.answer("undisturbed", TokenIds.of(prompt), 40) as frames:
        expected = await tokens_of(frames)
    async with serving.answer("stopped", TokenIds.of(prompt), 40) as frames:
        begun = await tokens_of(frames, until=5)
        began_s = time.monotonic()
        os.kill(serving.scheduler, signal.SIGSTOP)
        try:
            codes = await serving.until(ready=False)
            noticed_s = time.monotonic() - began_s
            async with asyncio.timeout(WAIT_S):
                while serving.worker._runner.in_flight:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            consumer = await serving.bus.consumer_state("WORK", streams.decode_any(MODEL).name)
        finally:
            os.kill(serving.scheduler, signal.SIGCONT)
        assert (codes, noticed_s < NOTICED_S_MAX) == (["engine_wedged"], True)
        assert (consumer.waiting, consumer.ack_pending + consumer.pending) == (0, 1)  # it asks for nothing
        woken_s = time.monotonic()
        assert await serving.until(ready=True) == []
        well_s = time.monotonic() - woken_s
        rest = await tokens_of(frames)
    assert begun | rest == expected
    print(f"noticed after {noticed_s:.2f} s, well {well_s:.2f} s after SIGCONT")


async def test_a_long_prompt_is_no_wedge(serving: Serving):
    """It takes the scheduler longer than any of the short limits, and a canary waits behind it."""
    prompt = TokenIds.of([1 + number % 1000 for number in range(LONG_PROMPT_TOKENS)])
    states: set[bool] = set()
    async with serving.answer("long", prompt, 2) as frames:
        reading = asyncio.create_task(tokens_of(frames))
        began_s = time.monotonic()
        while not reading.done():
            states.add(serving.worker.health().ready)
            await asyncio.sleep(0.05)
        assert len(await reading) == 2
    assert states == {True}
    print(f"prefilled within {time.monotonic() - began_s:.1f} s")
