"""What a chat may say about tools and reasoning, and how its template hears of it."""

import json
from typing import Any

import pytest

from pipeline.chat import ChatTemplate
from pipeline.chat_options import chat_options, check_chat, template_tools, template_words
from pipeline.errors import InvalidRequest
from subjects.codec import decode
from subjects.limits import TOOLS_MAX
from subjects.messages import Request

WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "The time."}}
ASK = {"role": "user", "content": "Weather in Paris?"}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
ANSWER = {"role": "tool", "tool_call_id": "call_1", "content": "Rain"}


def asked(*messages: dict[str, Any], **fields: Any) -> Request:
    request = decode(Request, json.dumps({"messages": messages or [ASK]} | fields).encode())
    check_chat(request)
    return request


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def calling(arguments: str) -> dict[str, Any]:
    return CALLED | {"tool_calls": [CALL | {"function": {"name": "weather", "arguments": arguments}}]}


@pytest.mark.parametrize(
    ("messages", "fields", "field"),
    [
        ((ASK, {"role": "tool", "content": "Rain"}), {}, "messages.1.tool_call_id"),
        ((ASK | {"tool_call_id": "call_1"},), {}, "messages.0.tool_call_id"),
        ((ASK | {"tool_calls": [CALL]},), {}, "messages.0.tool_calls"),
        ((ASK | {"reasoning_content": "hm"},), {}, "messages.0.reasoning_content"),
        ((ASK, {"role": "assistant"}), {}, "messages.1.content"),
        ((ASK, {"role": "assistant", "content": None, "tool_calls": []}), {}, "messages.1.content"),
        ((ASK, calling("{")), {}, "messages.1.tool_calls.0.function.arguments"),
        ((ASK, calling("[]")), {}, "messages.1.tool_calls.0.function.arguments"),
        ((), {"tools": [WEATHER] * (TOOLS_MAX + 1)}, "tools"),
        ((), {"tools": [WEATHER, WEATHER]}, "tools.1.function.name"),
        ((), {"tools": [named("")]}, "tools.0.function.name"),
        (
            (),
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "thing"}}}]},
            "tools.0.function.parameters.type",
        ),
        ((), {"tool_choice": "required"}, "tool_choice"),
        ((), {"tool_choice": named("weather"), "tools": [CLOCK]}, "tool_choice"),
        ((), {"tool_choice": "required", "tools": [CLOCK], "regex": "a"}, "tool_choice"),
        ((), {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ((), {"messages": None, "prompt": "hi", "tools": [CLOCK]}, "tools"),
        ((), {"messages": None, "prompt": "hi", "reasoning_effort": "low"}, "reasoning_effort"),
    ],
)
def test_a_mistake_is_named(messages: tuple[dict[str, Any], ...], fields: dict[str, Any], field: str):
    with pytest.raises(InvalidRequest) as error:
        asked(*messages, **fields)
    assert error.value.field == field
    assert str(error.value).startswith(field)


def test_a_conversation_with_calls_passes():
    options = chat_options(asked(ASK, CALLED, ANSWER, tools=[WEATHER]))
    assert options is not None
    assert (options.tool_choice, options.calls_before) == ("auto", 1)
    assert chat_options(asked()).tool_choice == "none"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("choice", "told"),
    [
        (None, ["weather", "clock"]),
        ("auto", ["weather", "clock"]),
        ("required", ["weather", "clock"]),
        ("none", None),
        (named("clock"), ["clock"]),
    ],
)
def test_the_prompt_tells_of_the_tools_that_may_be_called(choice: Any, told: list[str] | None):
    tools = template_tools(asked(tools=[WEATHER, CLOCK], **({"tool_choice": choice} if choice else {})))
    assert (tools and [tool["function"]["name"] for tool in tools]) == told


def test_a_tool_looks_to_a_template_as_with_sglang():
    assert json.dumps(template_tools(asked(tools=[CLOCK]))) == (
        '[{"type": "function", "function": {"description": "The time.", "name": "clock", "parameters": null, '
        '"strict": false}}]'
    )


def rendered(source: str, request: Request) -> str:
    assert request.messages is not None
    return ChatTemplate(source).render(request.messages, {}, template_tools(request), template_words(request))


def test_a_template_hears_of_calls_tools_and_words():
    source = (
        "{{ tools[0].function.name }}|{{ enable_thinking }}|{{ reasoning_effort }}"
        "{% for m in messages %}|{{ m.role }}:{{ m.content }}{{ m.tool_call_id }}{{ m.reasoning_content }}"
        "{% for call in m.tool_calls %}{{ call.function.arguments.city }}{% endfor %}{% endfor %}"
    )
    thought = CALLED | {"reasoning_content": "hm"}
    request = asked(
        ASK,
        thought,
        ANSWER,
        tools=[WEATHER],
        reasoning_effort="low",
        chat_template_kwargs={"enable_thinking": False},
    )
    assert rendered(source, request) == ("weather|False|low|user:Weather in Paris?|assistant:hmParis|tool:Raincall_1")


def test_a_template_that_wants_bare_functions_gets_them():
    source = "{% for tool in tools %}{% if not tool.name %}{{ 1 / 0 }}{% endif %}{{ tool.name }}{% endfor %}"
    assert rendered(source, asked(tools=[CLOCK])) == "clock"
