"""SGLang's parsers as the owner of a request uses them: whole, in pieces, and taken over at any place."""

from typing import Any

import pytest

from pipeline.engine.sglang import cpu_platform

cpu_platform.prepare()
from pipeline.engine.protocol import EngineOutput, Parsed  # noqa: E402
from pipeline.engine.sglang.parsers import (  # noqa: E402
    SglangParser,
    _Ids,
    call_parser,
    pieces_of,
    reasoning_parser,
    sglang_request,
)
from pipeline.errors import InvalidRequest  # noqa: E402
from pipeline.progress import Progress  # noqa: E402
from pipeline.said import Said, joined  # noqa: E402
from subjects.codec import TokenIds  # noqa: E402
from subjects.messages import (  # noqa: E402
    ChatOptions,
    Frame,
    NamedFunction,
    NamedTool,
    Tool,
    ToolChoice,
    ToolFunction,
)

pytestmark = pytest.mark.engine

TOOLS = (
    Tool(function=ToolFunction(name="weather", parameters={"type": "object"})),
    Tool(function=ToolFunction(name="clock", parameters={"type": "object"})),
)
THOUGHT = "They <ask>.\nSo {look}."
ARGUMENTS = '{"city": "北京 [Bei\\"jing]", "days": [1, 22, 333], "in": {"unit": "°C"}}'
CALLS = (
    '<tool_call>\n{"name": "weather", "arguments": ' + ARGUMENTS + "}\n</tool_call>\n"
    '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
)
AS_ARRAY = '[{"name": "weather", "parameters": ' + ARGUMENTS + '}, {"name": "clock", "parameters": {}}]'
WEATHER_AND_CLOCK = [("weather", ARGUMENTS), ("clock", "{}")]
NAMED = NamedTool(function=NamedFunction(name="weather"))
CASES: dict[str, tuple[str | None, str | None, ToolChoice, str, tuple[str, str, list[tuple[str, str]]]]] = {
    # name: (reasoning parser, tool-call parser, choice, output, (reasoning, content, calls))
    "content": ("deepseek-r1", "qwen25", "auto", "</think>It is < 5 °C.", ("", "It is < 5 °C.", [])),
    "reasoning": ("deepseek-r1", None, "none", f"{THOUGHT}</think>Rain.", (THOUGHT, "Rain.", [])),
    "only reasoning": ("deepseek-r1", "qwen25", "auto", THOUGHT, (THOUGHT, "", [])),
    "tags": ("qwen3", None, "none", f"<think>{THOUGHT}</think>Rain.", (THOUGHT, "Rain.", [])),
    "calls": (None, "qwen25", "auto", CALLS, ("", "", WEATHER_AND_CLOCK)),
    "text first": (None, "qwen25", "auto", f"Let me look. {CALLS}", ("", "Let me look. ", WEATHER_AND_CLOCK)),
    "hermes": (None, "hermes", "auto", f"Look: {CALLS}", ("", "Look: ", WEATHER_AND_CLOCK)),
    "both": ("deepseek-r1", "qwen25", "auto", f"{THOUGHT}</think>{CALLS}", (THOUGHT, "", WEATHER_AND_CLOCK)),
    "required": (None, None, "required", AS_ARRAY, ("", "", WEATHER_AND_CLOCK)),
    "named": (None, None, NAMED, f"[{AS_ARRAY[1:].split('}, ')[0]}}}]", ("", "", WEATHER_AND_CLOCK[:1])),
    "required, spaced": (None, None, "required", AS_ARRAY.replace("}, {", "} ,\n {"), ("", "", WEATHER_AND_CLOCK)),
    "required, native": (None, "qwen25", "required", CALLS, ("", "", WEATHER_AND_CLOCK)),
}
Result = tuple[str, str, list[tuple[str, str]]]


def parser_of(case: str) -> SglangParser:
    reasoning, calls, choice, *_ = CASES[case]
    asked = sglang_request(ChatOptions(tools=TOOLS, tool_choice=choice))
    return SglangParser(
        reasoning_parser(reasoning, asked, None, reasoning == "deepseek-r1") if reasoning else None,
        None if choice == "none" else call_parser(calls, asked, None),
        pieces_of(["<tool_call>", "</tool_call>"]),
        _Ids("r", 0, calls, 0),
    )


def result(progress: Progress) -> Result:
    calls = [progress.tool_calls[index] for index in sorted(progress.tool_calls)]
    assert all(call.id for call in calls)
    assert len({call.id for call in calls}) == len(calls)
    # A new line between two calls is the model's, and SGLang leaves it in the content.
    return progress.reasoning, progress.text.rstrip("\n"), [(call.name or "", call.arguments) for call in calls]


def own(case: str, pieces: list[str], log: Progress, *, last: bool) -> None:
    """What an owner does: each piece, one token, is parsed and logged as a frame; the last is an end."""
    said = Said(parser_of(case), log)
    for number, piece in enumerate(pieces):
        ends = last and number == len(pieces) - 1
        output = EngineOutput(token_ids=TokenIds.of([5]), text=piece, finish_reason="stop" if ends else None)
        parsed = said.read(output)
        frame = Frame(
            request_id="r",
            index=len(log.token_ids),
            token_ids=output.token_ids,
            text=parsed.text,
            reasoning=parsed.reasoning,
            tool_calls=parsed.tool_calls,
            raw=piece,
            finish_reason=said.finish(output.finish_reason),
        )
        assert log.add(frame)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length", [1, 3, 10_000])
def test_the_same_however_it_is_cut(case: str, length: int):
    text, expected = CASES[case][3:]
    log = Progress()
    own(case, [text[start : start + length] for start in range(0, len(text), length)], log, last=True)
    assert result(log) == expected
    assert log.end is not None
    assert log.end.finish_reason == ("tool_calls" if expected[2] else "stop")


@pytest.mark.parametrize("case", CASES)
def test_an_owner_that_takes_over_anywhere_goes_on(case: str):
    text, expected = CASES[case][3:]
    for cut in range(1, len(text)):
        log = Progress()
        own(case, [text[start : min(start + 5, cut)] for start in range(0, cut, 5)], log, last=False)
        own(case, [text[cut:]], log, last=True)
        assert result(log) == expected, cut


def test_the_end_of_a_cut_call_is_released():
    """SGLang's server closes the arguments that it has understood so far."""
    parser = parser_of("calls")
    parsed = joined([parser.feed('<tool_call>\n{"name": "weather", "arguments": {"city": "Par'), parser.end()])
    (call,) = parsed.tool_calls
    assert (call.name, parsed.text) == ("weather", "")


def test_whoever_owns_a_request_gives_its_calls_the_same_ids():
    ids = [parser_of("calls").feed(CALLS).tool_calls[0].id for _ in range(2)]
    assert ids[0] == ids[1]
    assert (ids[0] or "").startswith("call_")
    assert _Ids("r", 0, "kimi_k2", 2).of(1, "weather") == "functions.weather:3"
    assert _Ids("r", 0, None, 0).of(0, "f") != _Ids("r", 1, None, 0).of(0, "f")


def test_what_breaks_the_parser_is_content():
    class Broken:
        def feed(self, text: str) -> tuple[str, list[Any]]:
            raise KeyError(text)

    parser = SglangParser(None, Broken(), pieces_of(()), _Ids("r", 0, None, 0))
    assert joined([parser.feed("It is"), parser.feed(" 5."), parser.end()]) == Parsed(text="It is 5.")


def test_an_effort_that_sglang_does_not_know_is_refused():
    with pytest.raises(InvalidRequest) as error:
        sglang_request(ChatOptions(reasoning_effort="enormous"))
    assert error.value.field == "reasoning_effort"
