"""One engine in pytest's own process, on the session's event loop."""

from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest_asyncio
from tokenizers import Tokenizer

from pipeline.config import BUILTIN_MODEL
from pipeline.engine.protocol import EngineInfo, EngineOutput, EngineRequest
from pipeline.engine.sglang.engine import SglangEngine
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


@pytest_asyncio.fixture(scope="package", loop_scope="session")
async def sglang(tokenizer: Tokenizer) -> AsyncIterator[StartedEngine]:
    engine = SglangEngine(BUILTIN_MODEL, SETTINGS)
    try:
        yield StartedEngine(engine, await engine.start(), SETTINGS, tokenizer)
    finally:
        await engine.close()
