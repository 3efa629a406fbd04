"""The real SGLang on this machine's CPU: one engine for the whole session, made on the session's event loop."""

from collections.abc import AsyncIterator
from dataclasses import dataclass

import aggregated_topology
import disaggregated_topology
import pytest
import pytest_asyncio
from aggregated_topology import Aggregated
from disaggregated_topology import FLOAT32, Disaggregated
from tokenizers import Tokenizer

from pipeline.config import BUILTIN_MODEL
from pipeline.engine.protocol import EngineInfo, EngineOutput, EngineRequest
from pipeline.engine.sglang.engine import SglangEngine
from pipeline.models import prepare_model
from subjects.codec import TokenIds

SETTINGS = {"max_running_requests": 8, "max_total_tokens": 4096}


@dataclass(frozen=True)
class StartedEngine:
    """An engine, what it said at its start, and its model's tokenizer."""

    engine: SglangEngine
    info: EngineInfo
    settings: dict[str, int]
    tokenizer: Tokenizer

    def tokens(self, text: str) -> TokenIds:
        return TokenIds.of(self.tokenizer.encode(text).ids)

    async def run(self, request: EngineRequest) -> list[EngineOutput]:
        return [output async for output in self.engine.generate(request)]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(prepare_model(BUILTIN_MODEL) / "tokenizer.json"))


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def sglang(tokenizer: Tokenizer) -> AsyncIterator[StartedEngine]:
    engine = SglangEngine(BUILTIN_MODEL, SETTINGS)
    try:
        yield StartedEngine(engine, await engine.start(), SETTINGS, tokenizer)
    finally:
        await engine.close()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def two_prefill(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Disaggregated]:
    """Two prefill workers and a decode worker, started once for all tests that need one."""
    settings = disaggregated_topology.topology(2, 1, **FLOAT32)
    async with disaggregated_topology.started(settings, tmp_path_factory.mktemp("two-prefill")) as running:
        yield running


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def two_engines(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Aggregated]:
    """Two decode workers that do all, started once for all tests that need them."""
    async with aggregated_topology.started(tmp_path_factory.mktemp("two-engines")) as running:
        yield running
