"""An engine that cannot start says why; one that dies fails what it had; nothing is left behind."""

import asyncio
import logging
import os
import signal
from contextlib import aclosing
from pathlib import Path

import psutil
import pytest
from tokenizers import Tokenizer

from pipeline.config import BUILTIN_MODEL
from pipeline.engine.protocol import EngineRequest
from pipeline.engine.sglang import launch, processes
from pipeline.engine.sglang.engine import SglangEngine
from pipeline.errors import ConfigError, EngineDied, EngineStartError
from subjects.codec import TokenIds
from subjects.messages import StopConditions

pytestmark = pytest.mark.engine
DEATH_S_MAX = 5.0  # SGLang's watchdog looks every second


def long_request(tokenizer: Tokenizer) -> EngineRequest:
    prompt = TokenIds.of(tokenizer.encode("Once upon a time").ids)
    return EngineRequest(rid="long", token_ids=prompt, stop=StopConditions(max_tokens=2000, ignore_eos=True))


def test_last_words_are_kept_while_the_engine_starts_and_break_nothing_later(tmp_path: Path):
    """An error in SGLang's own report of a death would keep the death from the worker."""
    record = logging.makeLogRecord({"msg": "Scheduler hit an exception\nValueError: no"})
    processes._LastWords(tmp_path / "words").emit(record)
    assert (tmp_path / "words").read_text() == "ValueError: no"
    processes._LastWords(tmp_path / "gone" / "words").emit(record)


async def test_a_killed_scheduler_fails_what_runs_and_what_comes(tokenizer: Tokenizer):
    before, handler = launch.children(), signal.getsignal(signal.SIGQUIT)
    engine = SglangEngine(BUILTIN_MODEL, {"max_total_tokens": 2048, "max_running_requests": 2})
    try:
        await engine.start()
        ours = launch.children() - before
        scheduler = next(pid for pid in ours if psutil.Process(pid).name().startswith("sglang::schedul"))
        async with aclosing(engine.generate(long_request(tokenizer))) as outputs:
            await anext(outputs)
            os.kill(scheduler, signal.SIGKILL)
            with pytest.raises(EngineDied):
                async with asyncio.timeout(DEATH_S_MAX):
                    async for _ in outputs:
                        pass
        assert "ended" in await asyncio.wait_for(engine.died(), DEATH_S_MAX)
        with pytest.raises(EngineDied):
            await anext(engine.generate(long_request(tokenizer)))
        with pytest.raises(EngineDied):
            await engine.load()
    finally:
        await engine.close()
    assert launch.children() == before
    assert not any(psutil.pid_exists(pid) for pid in ours)
    assert signal.getsignal(signal.SIGQUIT) == handler
    await engine.close()
    # It holds messages for the dead: an open one would stop the interpreter when it is collected.
    assert engine._manager.send_to_scheduler.closed


async def test_a_scheduler_that_cannot_start_says_why():
    before = launch.children()
    engine = SglangEngine(
        BUILTIN_MODEL, {"max_total_tokens": 2048, "load_format": "npcache", "dtype": "float16", "quantization": "gptq"}
    )
    try:
        with pytest.raises(EngineStartError, match="SGLang cannot start ") as failed:
            await engine.start()
        assert len(str(failed.value)) < 1000
    finally:
        await engine.close()
    assert launch.children() == before


async def test_a_missing_model_is_a_sentence(tmp_path):
    engine = SglangEngine(str(tmp_path / "nothing-here"), {})
    try:
        with pytest.raises(ConfigError, match="nothing-here"):
            await engine.start()
    finally:
        await engine.close()


async def test_closing_while_it_starts_leaves_nothing():
    before = launch.children()
    engine = SglangEngine(BUILTIN_MODEL, {"max_total_tokens": 2048})
    starting = asyncio.create_task(engine.start())
    async with asyncio.timeout(60):
        while launch.children() == before and not starting.done():  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    await engine.close()
    with pytest.raises(EngineStartError):
        await starting
    assert launch.children() == before
