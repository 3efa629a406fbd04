"""What a chat says about tools and reasoning: checked, put in the form that chat templates take, and handed on to
whoever parses the output. Pure.

Dictionaries have the keys in SGLang 0.5.21's order: templates print them as they come, and the prompt's tokens, with
all the KV that is cached for them, depend on it.
"""

import json
from collections.abc import Sequence
from typing import Any, Final

from pipeline.checks import check_count
from pipeline.errors import InvalidRequest
from pipeline.json_schema import schema_text
from subjects import limits
from subjects.messages import ChatMessage, ChatOptions, NamedTool, Request, Tool, ToolCall, ToolChoice

_RESERVED: Final = ("messages", "tools", "documents", "add_generation_prompt")
"""What a template gets from the request itself."""


def check_chat(request: Request) -> None:
    """Everything about tools and reasoning that can be wrong. Raises InvalidRequest."""
    if request.messages is None:
        _refuse_without_chat(request)
        return
    for index, message in enumerate(request.messages):
        _check_message(message, f"messages.{index}")
    _check_tools(request.tools or ())
    _check_choice(request)
    for name in request.chat_template_kwargs or {}:
        if name in _RESERVED:
            field = f"chat_template_kwargs.{name}"
            raise InvalidRequest(f"{field}: the pipeline sets this itself", field=field)


def chat_options(request: Request) -> ChatOptions | None:
    """What the parsers of the output must know; None for a completion."""
    if request.messages is None:
        return None
    return ChatOptions(
        tools=request.tools or (),
        tool_choice=_choice(request),
        parallel_tool_calls=request.parallel_tool_calls,
        reasoning_effort=request.reasoning_effort,
        separate_reasoning=request.separate_reasoning,
        stream_reasoning=request.stream_reasoning,
        chat_template_kwargs=request.chat_template_kwargs or {},
        calls_before=sum(len(message.tool_calls or ()) for message in request.messages),
    )


def is_forced(choice: ToolChoice) -> bool:
    """Whether the model must call a tool."""
    return choice == "required" or isinstance(choice, NamedTool)


def template_tools(request: Request) -> list[dict[str, Any]] | None:
    """The tools that the prompt tells of: all, the named one, or none."""
    choice = _choice(request)
    named = choice.function.name if isinstance(choice, NamedTool) else None
    tools = [_plain_tool(tool) for tool in request.tools or () if named in (None, tool.function.name)]
    return tools if tools and choice != "none" else None


def template_words(request: Request) -> dict[str, Any]:
    """What else the template is told."""
    effort = {} if request.reasoning_effort is None else {"reasoning_effort": request.reasoning_effort}
    return effort | (request.chat_template_kwargs or {})


def template_calls(calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    """Earlier calls, their arguments as an object: templates print them as JSON."""
    return [
        {
            "id": call.id,
            "index": call.index,
            "function": {"name": call.function.name, "arguments": json.loads(call.function.arguments)},
            "type": call.type,
        }
        for call in calls
    ]


def _refuse_without_chat(request: Request) -> None:
    for field, value in (
        ("tools", request.tools),
        ("tool_choice", request.tool_choice),
        ("reasoning_effort", request.reasoning_effort),
        ("chat_template_kwargs", request.chat_template_kwargs),
    ):
        if value is not None:
            raise InvalidRequest(f"{field}: only with `messages`", field=field)


def _choice(request: Request) -> ToolChoice:
    """OpenAI's default: "auto" where there are tools."""
    return request.tool_choice or ("auto" if request.tools else "none")


def _plain_tool(tool: Tool) -> dict[str, Any]:
    function = tool.function
    return {
        "type": tool.type,
        "function": {
            "description": function.description,
            "name": function.name,
            "parameters": function.parameters,
            "strict": bool(function.strict),
        },
    }


def _check_message(message: ChatMessage, field: str) -> None:
    _check_of_role(message, field)
    if message.content is None and not message.tool_calls:
        raise InvalidRequest(f"{field}.content: is required without tool_calls", field=f"{field}.content")
    if message.role == "tool" and not message.tool_call_id:
        raise InvalidRequest(
            f"{field}.tool_call_id: is required: which call does it answer?", field=f"{field}.tool_call_id"
        )
    check_count(f"{field}.tool_calls", len(message.tool_calls or ()), limits.TOOLS_MAX)
    for index, call in enumerate(message.tool_calls or ()):
        _check_arguments(call.function.arguments, f"{field}.tool_calls.{index}.function.arguments")


def _check_of_role(message: ChatMessage, field: str) -> None:
    for name, value, role in (
        ("tool_calls", message.tool_calls, "assistant"),
        ("reasoning_content", message.reasoning_content, "assistant"),
        ("tool_call_id", message.tool_call_id, "tool"),
    ):
        if value is not None and message.role != role:
            place = f"{field}.{name}"
            raise InvalidRequest(f"{place}: only a message of role {role} has it", field=place)


def _check_arguments(text: str, field: str) -> None:
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{field}: not JSON: {error}", field=field) from None
    if not isinstance(arguments, dict):
        raise InvalidRequest(f"{field}: expected a JSON object as text", field=field)


def _check_tools(tools: Sequence[Tool]) -> None:
    check_count("tools", len(tools), limits.TOOLS_MAX)
    names = set()
    for index, tool in enumerate(tools):
        field = f"tools.{index}.function"
        name = tool.function.name
        check_count(f"{field}.name", len(name), limits.TOOL_NAME_CHARS_MAX, least=1, of="characters")
        if name in names:
            raise InvalidRequest(f"{field}.name: another tool has this name", field=f"{field}.name")
        names.add(name)
        if tool.function.parameters is not None:
            schema_text(tool.function.parameters, f"{field}.parameters")


def _check_choice(request: Request) -> None:
    choice = _choice(request)
    if choice in ("none", "auto"):
        return
    if not request.tools:
        raise InvalidRequest("tool_choice: there are no `tools` to choose from", field="tool_choice")
    if isinstance(choice, NamedTool) and all(choice.function.name != tool.function.name for tool in request.tools):
        raise InvalidRequest("tool_choice.function.name: none of `tools` has this name", field="tool_choice")
    form = request.response_format
    if (form is not None and form.type != "text") or request.json_schema or request.regex or request.ebnf:
        raise InvalidRequest(
            "tool_choice: a call that must be made is a grammar, and the request has another: an output has one",
            field="tool_choice",
        )
