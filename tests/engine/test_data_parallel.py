"""Two data-parallel ranks of the real SGLang: each runs what is sent to it and tells of its blocks; loads add up."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
from kv_reading import Reader
from tokenizers import Tokenizer

from pipeline.block_hashes import block_hashes
from pipeline.bus import Bus
from pipeline.config import BUILTIN_MODEL
from pipeline.engine.protocol import EngineInfo, EngineRequest
from pipeline.engine.sglang.engine import SglangEngine
from pipeline.engine.sglang.kv_events import KvEventsSettings
from pipeline.nats_server import NatsServer
from subjects.codec import TokenIds
from subjects.messages import BlocksStored, SamplingOptions, StopConditions

pytestmark = [pytest.mark.full, pytest.mark.engine, pytest.mark.timeout(600), pytest.mark.asyncio(loop_scope="module")]
MODEL, WORKER = "smollm2", "decode-0"
RANKS = 2
ANSWER_S_MAX = 60.0


@dataclass
class Served:
    """An engine of two ranks that publishes, and one who reads along from the start."""

    engine: SglangEngine
    info: EngineInfo
    reader: Reader
    tokenizer: Tokenizer

    async def ask(self, name: str, text: str, dp_rank: int) -> TokenIds:
        """The prompt's tokens, once they are answered."""
        prompt = TokenIds.of(self.tokenizer.encode(text).ids)
        request = EngineRequest(
            rid=name,
            token_ids=prompt,
            stop=StopConditions(max_tokens=4, ignore_eos=True),
            sampling=SamplingOptions(temperature=0.0),
            dp_rank=dp_rank,
        )
        await self.run(request)
        return prompt

    async def run(self, request: EngineRequest) -> int:
        """How many tokens were generated."""
        count = 0
        async with asyncio.timeout(ANSWER_S_MAX), aclosing(self.engine.generate(request)) as outputs:
            async for output in outputs:
                count += len(output.token_ids)
        return count

    def blocks_of(self, dp_rank: int) -> set[int]:
        """The hashes that a rank has told of."""
        told = [message for message in self.reader.messages if message.dp_rank == dp_rank]
        runs = [event for message in told for event in message.events if isinstance(event, BlocksStored)]
        return {block for run in runs for block in run.hashes}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> AsyncIterator[Served]:
    server = NatsServer(Path(tmp_path_factory.mktemp("nats")))
    server.start()
    bus = await Bus.connect(server.url, name="reader")
    reader = await Reader.of(bus, MODEL)
    settings = KvEventsSettings(url=server.url, model=MODEL, worker=WORKER, incarnation="i1")
    given = {"dp_size": RANKS, "max_running_requests": 8, "max_total_tokens": 1024}
    engine = SglangEngine(BUILTIN_MODEL, given, kv_events=settings)
    try:
        info = await engine.start()
        yield Served(engine, info, reader, tokenizer)
    finally:
        await engine.close()
        await bus.close()
        server.kill()


async def test_each_rank_tells_of_the_blocks_of_its_own_requests(served: Served):
    for rank in range(RANKS):
        prompt = await served.ask(f"rank-{rank}", f"A story about the number {rank}: " * 6, rank)
        wanted = set(block_hashes(prompt, 1))
        await served.reader.until(lambda rank=rank, wanted=wanted: wanted <= served.blocks_of(rank))
        assert not wanted <= served.blocks_of(1 - rank)


async def test_every_rank_answers_its_canary(served: Served):
    assert {process.dp_rank for process in served.engine._processes} >= set(range(RANKS))
    assert [await served.run(served.engine.canary(dp_rank)) for dp_rank in range(RANKS)] == [1] * RANKS


async def test_the_load_is_that_of_all_ranks(served: Served):
    kv_tokens_of_a_rank = served.info.kv_blocks * served.info.kv_block_tokens // RANKS
    assert (await served.engine.load()).kv_tokens == RANKS * kv_tokens_of_a_rank
