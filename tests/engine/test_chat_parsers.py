"""An engine that was started with parsers: SGLang's grammars and its parsers fit each other."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from pipeline.chat import ChatTokenizer
from pipeline.config import BUILTIN_MODEL
from pipeline.engine.protocol import EngineInfo
from pipeline.engine.sglang.engine import SglangEngine
from pipeline.models import prepare_model
from pipeline.progress import Progress
from pipeline.stage import Task
from stages.decode import decode
from subjects.codec import decode as read
from subjects.messages import (
    ChatMessage,
    ChatOptions,
    Frame,
    NamedFunction,
    NamedTool,
    OutputOptions,
    PreprocessedRequest,
    SamplingOptions,
    StopConditions,
    Tool,
    ToolFunction,
)
from tests.engine.one_process.test_tools import SCHEMA, Log

pytestmark = [pytest.mark.engine, pytest.mark.full, pytest.mark.asyncio(loop_scope="module")]
TOOL = Tool(function=ToolFunction(name="weather", parameters=SCHEMA, strict=True))
WEATHER = NamedTool(function=NamedFunction(name="weather"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def started() -> AsyncIterator[tuple[SglangEngine, EngineInfo]]:
    settings = {"max_total_tokens": 2048, "reasoning_parser": "qwen3", "tool_call_parser": "qwen"}
    engine = SglangEngine(BUILTIN_MODEL, settings)
    try:
        yield engine, await engine.start()
    finally:
        await engine.close()


async def answer(engine: SglangEngine, request_id: str, chat: ChatOptions, *, stream: bool = True) -> Progress:
    tokenizer = ChatTokenizer.load(prepare_model(BUILTIN_MODEL))
    text = tokenizer.render([ChatMessage(role="user", content="What is the weather in Paris?")])
    request = PreprocessedRequest(
        request_id=request_id,
        client="c",
        model="m",
        token_ids=tokenizer.encode(text, add_special_tokens=False),
        stop=StopConditions(max_tokens=40),
        sampling=SamplingOptions(temperature=0.0),
        output=OutputOptions(stream=stream),
        chat=chat,
    )
    progress = Progress()
    task = Task(payload=request, subject="s", stream_seq=1)
    async for emit in decode.run(task, engine=engine, responses=Log(Progress()), worker="w"):
        assert progress.add(read(Frame, emit.payload))
    return progress


async def test_its_card_names_the_parsers(started: tuple[SglangEngine, EngineInfo]):
    assert (started[1].reasoning_parser, started[1].tool_call_parser) == ("qwen3", "qwen")


async def test_what_it_thinks_is_reasoning_unless_it_is_told_otherwise(started: tuple[SglangEngine, EngineInfo]):
    thought = await answer(started[0], "thinks", ChatOptions())
    assert thought.reasoning and not thought.text
    said = await answer(started[0], "says", ChatOptions(chat_template_kwargs={"enable_thinking": False}))
    together = await answer(started[0], "both", ChatOptions(separate_reasoning=False))
    assert (said.text, said.reasoning) == (thought.reasoning, "") == (together.text, together.reasoning)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_named_tool_is_called_in_the_models_own_format(started: tuple[SglangEngine, EngineInfo], stream: bool):
    chat = ChatOptions(tools=(TOOL,), tool_choice=WEATHER, chat_template_kwargs={"enable_thinking": False})
    called = await answer(started[0], f"calls-{stream}", chat, stream=stream)
    (call,) = called.tool_calls.values()
    assert (call.name, call.arguments) in [("weather", '{"city": "Paris"}'), ("weather", '{"city": "Rome"}')]
    assert called.end is not None  # at its limit: this small model does not end after the call
    assert not called.text.strip() and "<tool_call>" not in called.text


async def test_a_model_that_thinks_may_think_before_its_call(started: tuple[SglangEngine, EngineInfo]):
    """The grammar holds only from the end of the reasoning on, to which this small model never comes."""
    thought = await answer(started[0], "thinks-first", ChatOptions(tools=(TOOL,), tool_choice=WEATHER))
    assert thought.reasoning and not thought.tool_calls
