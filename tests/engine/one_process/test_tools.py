"""A tool that must be called is called, whatever the model: a grammar sees to it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from pipeline.progress import Progress
from pipeline.stage import Task
from stages.decode import decode
from subjects.codec import decode as read
from subjects.messages import (
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

if TYPE_CHECKING:
    from tests.engine.one_process.conftest import StartedEngine

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]
PROMPT = "<|im_start|>user\nWhat is the weather in Paris?<|im_end|>\n<|im_start|>assistant\n"
CITY = {"type": "string", "enum": ["Paris", "Rome"]}
SCHEMA = {"type": "object", "properties": {"city": CITY}, "required": ["city"], "additionalProperties": False}
TOOLS = (
    Tool(function=ToolFunction(name="clock", parameters={"type": "object", "properties": {}})),
    Tool(function=ToolFunction(name="weather", parameters=SCHEMA)),
)


class Log:
    """What another worker has said already."""

    def __init__(self, so_far: Progress) -> None:
        self.so_far = so_far

    async def history(self, _: PreprocessedRequest) -> Log:
        return self

    def of(self, choice: int) -> Progress:
        return self.so_far


async def frames_of(sglang: StartedEngine, so_far: Progress, attempt: int = 1) -> list[Frame]:
    request = PreprocessedRequest(
        request_id="tools",
        client="c",
        model="m",
        token_ids=sglang.tokens(PROMPT),
        stop=StopConditions(max_tokens=60),
        sampling=SamplingOptions(temperature=0.0),
        output=OutputOptions(),
        chat=ChatOptions(
            tools=TOOLS,
            tool_choice=NamedTool(function=NamedFunction(name="weather")),
            parallel_tool_calls=False,
        ),
    )
    task = Task(payload=request, subject="s", stream_seq=1, attempt=attempt)
    emits = decode.run(task, engine=sglang.engine, responses=Log(so_far), worker="w")
    return [read(Frame, emit.payload) async for emit in emits]


def call_of(progress: Progress) -> tuple[str | None, str | None, str]:
    (call,) = progress.tool_calls.values()
    return call.id, call.name, call.arguments


async def test_a_named_tool_is_called_and_the_next_owner_ends_the_call(sglang: StartedEngine):
    assert (sglang.info.reasoning_parser, sglang.info.tool_call_parser) == (None, None)  # SmolLM2 has neither
    first, whole = await frames_of(sglang, Progress()), Progress()
    assert all(whole.add(frame) for frame in first)
    identity, name, arguments = call_of(whole)
    assert name == "weather" and json.loads(arguments)["city"] in ("Paris", "Rome")
    assert (identity or "").startswith("call_") and not whole.text
    assert whole.end is not None and whole.end.finish_reason == "tool_calls"
    cut = next(number for number, frame in enumerate(first) if frame.tool_calls) + 1
    resumed = Progress()
    for frame in first[:cut]:
        resumed.add(frame)
    assert call_of(resumed)[1] == "weather"
    for frame in await frames_of(sglang, resumed, attempt=2):
        assert resumed.add(frame)
    assert call_of(resumed) == call_of(whole)
    assert resumed.token_ids == whole.token_ids
