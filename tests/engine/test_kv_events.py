"""KV events of the real SGLang, at page size 1 on CPU: whose hashes they are, and that nothing gets lost unseen."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
from kv_reading import Reader, hashes_of, snapshot
from tokenizers import Tokenizer

from pipeline.block_hashes import block_hashes
from pipeline.bus import Bus
from pipeline.config import BUILTIN_MODEL
from pipeline.engine.protocol import EngineRequest
from pipeline.engine.sglang.engine import SglangEngine
from pipeline.engine.sglang.kv_events import KvEventsSettings
from pipeline.nats_server import NatsServer
from subjects.codec import NO_TOKENS, TokenIds
from subjects.messages import (
    BlocksCleared,
    SamplingOptions,
    StopConditions,
)

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]
DEADLINE_S = 30.0
MODEL, WORKER = "smollm2", "decode-0"
SYSTEM = "You are a careful assistant. Answer in one short sentence, and say so where you do not know. "


@dataclass
class Served:
    """An engine that publishes, and one who reads along from the start."""

    server: NatsServer
    bus: Bus
    engine: SglangEngine
    reader: Reader
    tokenizer: Tokenizer
    number: int = 0

    def tokens(self, text: str) -> TokenIds:
        return TokenIds.of(self.tokenizer.encode(text).ids)

    async def ask(self, prompt: TokenIds, max_tokens: int = 4) -> tuple[TokenIds, int]:
        """The output's tokens, and how many of the prompt's were cached."""
        self.number += 1
        stop = StopConditions(max_tokens=max_tokens, ignore_eos=True)
        request = EngineRequest(
            rid=f"r{self.number}", token_ids=prompt, stop=stop, sampling=SamplingOptions(temperature=0.0)
        )
        tokens, cached = NO_TOKENS, 0
        async with aclosing(self.engine.generate(request)) as outputs:
            async for output in outputs:
                tokens, cached = tokens + output.token_ids, max(cached, output.cached_tokens)
        return tokens, cached


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> AsyncIterator[Served]:
    server = NatsServer(Path(tmp_path_factory.mktemp("nats")))
    server.start()
    bus = await Bus.connect(server.url, name="reader")
    reader = await Reader.of(bus, MODEL)
    settings = KvEventsSettings(url=server.url, model=MODEL, worker=WORKER, incarnation="i1")
    engine = SglangEngine(BUILTIN_MODEL, {"max_running_requests": 8, "max_total_tokens": 512}, kv_events=settings)
    try:
        await engine.start()
        yield Served(server, bus, engine, reader, tokenizer)
    finally:
        await engine.close()
        await bus.close()
        server.kill()


async def test_stored_blocks_have_the_hashes_of_the_tokens(served: Served):
    first, second = served.tokens(SYSTEM + "What is a cat?"), served.tokens(SYSTEM + "What is a dog?")
    outputs = {}
    for prompt in (first, second):
        outputs[prompt.raw], cached = await served.ask(prompt)
    assert cached >= len(served.tokens(SYSTEM)) - 1, "the second prompt found the first one's prefix"
    wanted = set()
    for prompt in (first, second):
        wanted |= set(block_hashes(prompt + outputs[prompt.raw][:-1], 1))
    await served.reader.until(lambda: served.reader.held() == wanted)
    start = served.reader.messages[0]
    assert (start.worker, start.incarnation, start.dp_rank, start.seq, start.block_tokens) == (WORKER, "i1", 0, 1, 1)
    assert start.events == (BlocksCleared(),)
    assert served.reader.seqs() == list(range(1, len(served.reader.messages) + 1))


async def test_a_snapshot_is_what_all_events_come_to(served: Served):
    await served.ask(served.tokens("Count to twenty: one, two,"), 16)
    long = TokenIds.of(list(range(100, 500)))
    await served.ask(long)  # the pool takes 512: others have to go
    await served.reader.until(lambda: set(block_hashes(long, 1)) <= served.reader.held())
    parts = await snapshot(served.bus, WORKER)
    await served.reader.until(lambda: served.reader.messages[-1].seq >= parts[0].seq)
    assert served.reader.messages[-1].seq == parts[0].seq
    assert hashes_of(parts) == served.reader.held()
    assert len(hashes_of(parts)) <= 512


async def test_flushing_the_cache_clears_all(served: Served):
    assert (await served.engine._manager.flush_cache()).success
    await served.reader.until(lambda: not served.reader.held())
    assert served.reader.messages[-1].events[-1] == BlocksCleared()
    assert hashes_of(await snapshot(served.bus, WORKER)) == set()


async def test_no_port_is_open(served: Served):
    processes = [psutil.Process(pid) for pid in served.engine._launched.result().get_all_child_pids()]
    sockets = [socket for process in processes for socket in process.net_connections("tcp")]
    assert [socket.laddr for socket in sockets if socket.status == psutil.CONN_LISTEN] == []


async def test_a_broker_restart_leaves_a_gap_that_readers_see(served: Served):
    reader = served.reader
    await served.ask(served.tokens("Before the restart, all is well."))
    before = reader.messages[-1].seq
    served.server.kill()
    lost = served.tokens("While the broker is away, blocks are stored all the same.")
    await served.ask(lost)
    back = asyncio.Event()

    async def note() -> None:
        back.set()

    served.bus.on_reconnect(note)
    served.server.start()
    async with asyncio.timeout(DEADLINE_S):
        await back.wait()
    kept = served.tokens("Afterwards publishing goes on.")
    await served.ask(kept)
    await reader.until(lambda: set(block_hashes(kept, 1)) <= reader.held())
    assert reader.messages[-1].seq > before + 1, "an empty message tells of the outage at least"
    assert set(block_hashes(lost, 1)) <= hashes_of(await snapshot(served.bus, WORKER))
    seqs = reader.seqs()
    assert set(block_hashes(lost, 1)) <= reader.held() or seqs != list(range(1, len(seqs) + 1)), "a gap shows the loss"
