"""Parsed output on its way to a client: through an owner's frames, over a change of owners, into OpenAI's bodies."""

import json
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from pipeline.chat_options import chat_options
from pipeline.completion import Completion
from pipeline.config import SimulatedSettings
from pipeline.engine.protocol import EngineOutput, Parsed, Reading
from pipeline.engine.simulated import SimulatedEngine, expected_tokens, text_of
from pipeline.errors import InvalidRequest
from pipeline.http.chunks import Chunks, Cursor
from pipeline.progress import Progress
from pipeline.said import Said, joined
from pipeline.screen import Answer
from pipeline.stage import Task
from stages.decode import decode
from subjects.codec import TokenIds
from subjects.codec import decode as read
from subjects.messages import (
    Frame,
    OutputOptions,
    PreprocessedRequest,
    Request,
    StopConditions,
    Tool,
    ToolCallDelta,
    ToolFunction,
)

PROMPT = TokenIds.of([5, 6, 7])
LENGTH = 20
TEXT = "".join(text_of(token) for token in expected_tokens(PROMPT, LENGTH))
THOUGHT, CONTENT, ARGUMENTS = TEXT[:20], TEXT[20:40], TEXT[40:]


class ByLength:
    """The first 20 characters are reasoning, the next 20 content, the rest arguments; two are always held back."""

    def __init__(self, choice: int) -> None:
        self._choice, self._text, self._told = choice, "", 0

    def feed(self, text: str) -> Parsed:
        self._text += text
        return self._up_to(len(self._text) - 2)

    def end(self) -> Parsed:
        return self._up_to(len(self._text))

    def _up_to(self, end: int) -> Parsed:
        pieces = [self._one(place) for place in range(self._told, end)]
        self._told = max(end, self._told)
        return joined(pieces)

    def _one(self, place: int) -> Parsed:
        char = self._text[place]
        if place < 20:
            return Parsed(reasoning=char)
        if place < 40:
            return Parsed(text=char)
        named = {"id": f"call_{self._choice}", "name": "weather"} if place == 40 else {}
        return Parsed(tool_calls=(ToolCallDelta(index=0, arguments=char, **named),))


class Parsing(SimulatedEngine):
    def reading(self, request: PreprocessedRequest) -> Reading:
        return Reading(request=request, parser=ByLength)


class Log:
    """A log that holds what the first worker got out."""

    def __init__(self, so_far: Progress) -> None:
        self.so_far = so_far

    async def history(self, _: PreprocessedRequest):
        return self

    def of(self, choice: int) -> Progress:
        return self.so_far


async def frames_of(so_far: Progress, *, stream: bool = True, attempt: int = 1) -> list[Frame]:
    engine = Parsing(SimulatedSettings(ttft_ms=0, itl_ms=1))
    await engine.start()
    request = PreprocessedRequest(
        request_id="r",
        client="c",
        model="m",
        token_ids=PROMPT,
        stop=StopConditions(max_tokens=LENGTH, ignore_eos=True),
        output=OutputOptions(stream=stream),
    )
    task = Task(payload=request, subject="s", stream_seq=1, attempt=attempt)
    emits = [emit async for emit in decode.run(task, engine=engine, responses=Log(so_far), worker="w")]
    await engine.close()
    return [read(Frame, emit.payload) for emit in emits]


def of(progress: Progress) -> tuple[str, str, str | None, str | None, str]:
    (call,) = progress.tool_calls.values()
    return progress.reasoning, progress.text, call.id, call.name, call.arguments


WHOLE = (THOUGHT, CONTENT, "call_0", "weather", ARGUMENTS)


@pytest.mark.parametrize("stream", [True, False])
async def test_frames_say_what_the_parser_made_of_them(stream: bool):
    frames, progress = await frames_of(Progress(), stream=stream), Progress()
    assert all(progress.add(frame) for frame in frames)
    assert of(progress) == WHOLE
    assert (len(frames) > 1) is stream


async def test_whoever_takes_over_goes_on_in_the_middle():
    first = await frames_of(Progress())
    for cut in range(len(first)):
        progress = Progress()
        for frame in first[:cut]:
            assert progress.add(frame)
        rest = await frames_of(progress, attempt=2)
        for frame in rest:
            assert progress.add(frame)
        assert of(progress) == WHOLE, cut
        named = [call for frame in (*first[:cut], *rest) for call in frame.tool_calls if call.name]
        assert len(named) == 1, cut


async def test_the_gateways_chunks_make_the_message():
    frames = await frames_of(Progress())
    frames[-1] = msgspec.structs.replace(frames[-1], finish_reason="tool_calls")
    chunks, whole = Chunks("r", Cursor(model="m")), Completion("r", "m", chat=True)
    deltas = []
    for frame in frames:
        whole.add(frame)
        deltas.append(json.loads(chunks.event(frame).split(b"data: ")[1])["choices"][0]["delta"])
    choice = whole.body(0)["choices"][0]
    call = {"id": "call_0", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
    assert choice["message"] == {
        "role": "assistant",
        "content": CONTENT,
        "refusal": None,
        "annotations": [],
        "reasoning_content": THOUGHT,
        "tool_calls": [call],
    }
    assert choice["finish_reason"] == "tool_calls"
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == THOUGHT
    assert "".join(delta.get("content") or "" for delta in deltas) == CONTENT
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert (calls[0]["id"], calls[0]["function"]["name"], calls[0]["type"]) == ("call_0", "weather", "function")
    assert all("id" not in call and call["index"] == 0 for call in calls[1:])
    assert "".join(call["function"]["arguments"] for call in calls) == ARGUMENTS


def test_only_calls_leave_no_content():
    call = ToolCallDelta(index=0, id="call_1", name="clock", arguments="{}")
    frame = Frame(request_id="r", token_ids=TokenIds.of([1]), tool_calls=(call,), finish_reason="tool_calls")
    whole = Completion("r", "m", chat=True)
    whole.add(frame)
    assert whole.body(0)["choices"][0]["message"]["content"] is None
    delta = json.loads(Chunks("r", Cursor(model="m")).event(frame).split(b"data: ")[1])["choices"][0]["delta"]
    assert (delta["role"], delta["content"]) == ("assistant", None)
    assert Answer().add(frame) == "\nclock {}"


def test_the_end_says_whether_tools_are_called():
    said = Said(ByLength(0), Progress())
    last = EngineOutput(token_ids=TokenIds.of([1]), text=TEXT[:40], finish_reason="stop")
    said.read(last)
    assert said.finish("stop") == "stop"
    said.read(replace(last, text="{}", finish_reason=None))
    said.read(replace(last, text="", finish_reason="stop"))
    assert (said.finish("stop"), said.finish("length"), said.finish(None)) == ("tool_calls", "length", None)


async def test_the_simulated_engine_calls_no_tools():
    tool: Any = Tool(function=ToolFunction(name="clock"))
    asked = Request(messages=(), tools=(tool,), tool_choice="required")
    request = PreprocessedRequest(
        request_id="r",
        client="c",
        model="m",
        token_ids=PROMPT,
        stop=StopConditions(max_tokens=5),
        chat=chat_options(asked),
    )
    with pytest.raises(InvalidRequest, match="simulated") as error:
        SimulatedEngine(SimulatedSettings()).reading(request)
    assert error.value.field == "tool_choice"
