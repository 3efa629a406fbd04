"""SGLang's own parsers of tool calls and reasoning, as its HTTP server applies them (openai/serving_chat.py).

They are fed token by token as it were, however long the engine's steps are: given much at once, SGLang's detectors
lose text before a call, or a call's arguments. So an answer reads the same whole, in pieces, and continued by another
worker.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import structlog
from msgspec.structs import replace

from pipeline.chat_options import is_forced
from pipeline.engine.protocol import Parsed, Reading
from pipeline.engine.sglang.thinking import Thinking
from pipeline.errors import InvalidRequest
from pipeline.said import joined
from subjects.messages import ChatOptions, NamedTool, PreprocessedRequest, SamplingOptions, ToolCallDelta

CALL_ID_CHARS: Final = 24
"""Of the random part of a tool call's id, in SGLang."""
log = structlog.get_logger()


@dataclass(frozen=True)
class ChatParsers:
    """How the started engine's model says that it calls a tool, or thinks."""

    tool_call: str | None  # the name of SGLang's parser
    thinking: Thinking
    tokenizer: Any
    pieces: re.Pattern[str]

    @classmethod
    def of_engine(cls, engine: Any, state: Mapping[str, Any]) -> "ChatParsers":
        """Of a started `sglang.Engine`; `state`: a scheduler's, with the settings as they were resolved."""
        from sglang.srt.parser.reasoning_parser import ReasoningParser

        manager, templates = engine.tokenizer_manager, engine.template_manager
        tokenizer = manager.tokenizer
        reasoning = _resolved(state["reasoning_parser"], templates.suggested_reasoning_parser)
        thinking = Thinking(parser=reasoning)
        if reasoning is not None:
            thinking = Thinking(
                parser=reasoning,
                default=ReasoningParser(reasoning, tokenizer=tokenizer).detector.reasoning_default,
                toggle=templates.reasoning_config,
                always=templates.force_reasoning,
                model_type=manager.model_config.hf_config.model_type,
            )
        return cls(
            tool_call=_resolved(state["tool_call_parser"], templates.suggested_tool_call_parser),
            thinking=thinking,
            tokenizer=tokenizer,
            pieces=pieces_of(tokenizer.get_added_vocab() if tokenizer is not None else ()),
        )

    @property
    def reasoning(self) -> str | None:
        """The name of SGLang's parser."""
        return self.thinking.parser

    def reading(self, request: PreprocessedRequest) -> Reading:
        """See `Engine.reading`."""
        chat = request.chat
        if chat is None:
            return Reading(request=request)
        asked = sglang_request(chat)
        with_tools = bool(chat.tools) and chat.tool_choice != "none"
        sampling = replace(request.sampling, require_reasoning=self.thinking.on(chat))
        if with_tools and not _has_grammar(sampling):
            sampling = self._constrained(sampling, chat, asked)
        output = request.output
        if with_tools or self.thinking.keeps_special_tokens(chat):
            output = replace(output, skip_special_tokens=False)
        prepared = replace(request, sampling=sampling, output=output)
        reasons = bool(self.reasoning) and chat.separate_reasoning
        calls = with_tools and (bool(self.tool_call) or is_forced(chat.tool_choice))
        if not reasons and not calls:
            return Reading(request=prepared)

        def parser(choice: int) -> SglangParser:
            return SglangParser(
                reasoning_parser(self.reasoning, asked, self.tokenizer, self.thinking.forced(chat))
                if reasons and self.reasoning
                else None,
                call_parser(self.tool_call, asked, self.tokenizer) if calls else None,
                self.pieces,
                _Ids(request.request_id, choice, self.tool_call, chat.calls_before),
            )

        return Reading(request=prepared, parser=parser)

    def _constrained(self, sampling: SamplingOptions, chat: ChatOptions, asked: Any) -> SamplingOptions:
        """With the grammar of its tools, where there is one: a call that must be made, or a strict tool."""
        found = self._constraint(chat, asked)
        if found is None:
            return sampling
        kind, value = found
        match kind:
            case "json_schema":
                return replace(sampling, json_schema=json.dumps(value))
            case "structural_tag":
                return replace(sampling, structural_tag=json.dumps(value.model_dump(by_alias=True)))
            case "full_assistant_ebnf":
                return replace(sampling, ebnf=value, ebnf_full_assistant=True)
        raise InvalidRequest(f"tool_choice: SGLang wants a {kind} for it, which is not passed on", field="tool_choice")

    def _constraint(self, chat: ChatOptions, asked: Any) -> tuple[str, Any] | None:
        from sglang.srt.function_call.function_call_parser import FunctionCallParser
        from sglang.srt.function_call.utils import get_json_schema_constraint

        found, natively = None, False
        if self.tool_call:
            parser = FunctionCallParser(asked.tools, self.tool_call, tokenizer=self.tokenizer)
            natively = parser.detector.parses_required_natively()
            found = parser.get_structure_constraint(
                asked.tool_choice, parallel_tool_calls=chat.parallel_tool_calls, thinking_mode=False
            )
            if found and found[0] == "full_assistant_ebnf":  # of all the output, reasoning and calls
                found = parser.get_structure_constraint(
                    asked.tool_choice,
                    parallel_tool_calls=chat.parallel_tool_calls,
                    thinking_mode=chat.chat_template_kwargs.get("enable_thinking") is not False,
                )
        if found is not None or natively or not is_forced(chat.tool_choice):
            return found
        try:
            schema = get_json_schema_constraint(
                asked.tools, asked.tool_choice, parallel_tool_calls=chat.parallel_tool_calls
            )
        except ValueError as error:  # tools that define one name differently
            raise InvalidRequest(f"tools: {error}", field="tools") from error
        return ("json_schema", schema)


class SglangParser:
    """Implements `Parser` for one choice with SGLang's reasoning parser, its tool-call parser, or both."""

    def __init__(self, reasoning: Any, calls: Any, pieces: re.Pattern[str], ids: "_Ids") -> None:
        self._reasoning, self._calls, self._pieces, self._ids = reasoning, calls, pieces, ids
        self._broken = False

    def feed(self, text: str) -> Parsed:
        """See `Parser.feed`. Once SGLang's code fails, all that comes is content."""
        parts = []
        for piece in self._pieces.findall(text):
            parts.append(Parsed(text=piece) if self._broken else self._guarded(self._fed, piece))
        return joined(parts)

    def end(self) -> Parsed:
        """See `Parser.end`."""
        return Parsed() if self._broken else self._guarded(self._ended, "")

    def _guarded(self, parse: Any, piece: str) -> Parsed:
        try:
            return parse(piece)
        except Exception as error:  # the guard around foreign code that reads what a model made up
            log.exception("output_not_parsed", code=type(error).__name__)
            self._broken = True
            return Parsed(text=piece)

    def _fed(self, piece: str) -> Parsed:
        reasoning, text = self._reasoning.parse_stream_chunk(piece) if self._reasoning else ("", piece)
        return joined([Parsed(reasoning=reasoning or ""), self._called(text or "")])

    def _ended(self, _: str) -> Parsed:
        reasoning, text = self._reasoning.parse_stream_end() if self._reasoning else ("", "")
        parts = [Parsed(reasoning=reasoning or ""), self._called(text or "")]
        if self._calls is not None:
            parts += [self._parsed(*self._calls.end()), self._parsed("", self._calls.unsent())]
        return joined(parts)

    def _called(self, text: str) -> Parsed:
        if self._calls is None:
            return Parsed(text=text)
        return self._parsed(*self._calls.feed(text)) if text else Parsed()

    def _parsed(self, text: str, items: Iterable[Any]) -> Parsed:
        return Parsed(text=text, tool_calls=tuple(self._delta(item) for item in items))

    def _delta(self, item: Any) -> ToolCallDelta:
        name = item.name or None
        return ToolCallDelta(
            index=item.tool_index,
            id=self._ids.of(item.tool_index, name) if name else None,
            name=name,
            arguments=item.parameters or "",
        )


@dataclass(frozen=True)
class _Ids:
    """The ids of a choice's tool calls: whoever owns the request, they are the same."""

    request_id: str
    choice: int
    parser: str | None
    before: int  # calls in the conversation so far

    def of(self, index: int, name: str) -> str:
        match self.parser:
            case "kimi_k2":
                return f"functions.{name}:{self.before + index}"
            case "kimi_k3":
                return f"{name}:{self.before + index}"
        place = f"{self.request_id}.{self.choice}.{index}"
        return f"call_{hashlib.sha256(place.encode()).hexdigest()[:CALL_ID_CHARS]}"


class NativeCalls:
    """Tool calls in the model's own format."""

    def __init__(self, parser: Any) -> None:
        self._parser = parser  # a FunctionCallParser

    def feed(self, text: str) -> tuple[str, list[Any]]:
        return self._parser.parse_stream_chunk(text)

    def end(self) -> tuple[str, list[Any]]:
        """SGLang 0.5.17 has no such thing: there, what is held back stays so."""
        return self._parser.parse_stream_end() if "parse_stream_end" in vars(type(self._parser)) else ("", [])

    def unsent(self) -> list[Any]:
        return _unsent(self._parser.detector)


class JsonCalls:
    """Tool calls as the JSON array that a schema made of them; the white space between is no content."""

    def __init__(self, parser: Any, tools: list[Any]) -> None:
        self._parser, self._tools = parser, tools  # a JsonArrayParser

    def feed(self, text: str) -> tuple[str, list[Any]]:
        result = self._parser.parse_streaming_increment(text, self._tools)
        return "" if result.normal_text.isspace() else result.normal_text, result.calls

    def end(self) -> tuple[str, list[Any]]:
        return "", []

    def unsent(self) -> list[Any]:
        return _unsent(self._parser)


def _unsent(detector: Any) -> list[Any]:
    """The rest of the last call's arguments (`OpenAIServingChat._check_for_unstreamed_tool_args`)."""
    from sglang.srt.function_call.core_types import ToolCallItem

    calls, sent = detector.prev_tool_call_arr, detector.streamed_args_for_tool
    last = len(calls) - 1
    if last < 0 or last >= len(sent):
        return []
    arguments = calls[last].get("arguments", {})
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    if not text.startswith(sent[last]) or text == sent[last]:
        return []
    return [ToolCallItem(tool_index=last, parameters=text[len(sent[last]) :])]


def sglang_request(chat: ChatOptions) -> Any:
    """The options as SGLang's ChatCompletionRequest, without its conversation. Raises InvalidRequest."""
    from pydantic import ValidationError
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest

    choice = chat.tool_choice
    if isinstance(choice, NamedTool):
        choice = {"type": "function", "function": {"name": choice.function.name}}
    tools = [
        {
            "type": "function",
            "function": {
                "name": tool.function.name,
                "description": tool.function.description,
                "parameters": tool.function.parameters,
                "strict": bool(tool.function.strict),
            },
        }
        for tool in chat.tools
    ]
    try:
        return ChatCompletionRequest(
            model="",
            messages=[{"role": "user", "content": ""}],
            tools=tools or None,
            tool_choice=choice,
            parallel_tool_calls=chat.parallel_tool_calls,
            reasoning_effort=chat.reasoning_effort,
            separate_reasoning=chat.separate_reasoning,
            stream_reasoning=chat.stream_reasoning,
            chat_template_kwargs=dict(chat.chat_template_kwargs),
        )
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0]) if first["loc"] else None
        raise InvalidRequest(f"{field}: {first['msg']}", field=field) from error


def reasoning_parser(name: str, asked: Any, tokenizer: Any, forced: bool) -> Any:
    from sglang.srt.parser.reasoning_parser import ReasoningParser

    return ReasoningParser(name, asked.stream_reasoning, forced, asked, tokenizer=tokenizer)


def call_parser(name: str | None, asked: Any, tokenizer: Any) -> NativeCalls | JsonCalls:
    """For the output that `ChatParsers` asks for: in the model's format, or JSON where a schema alone forces a call."""
    from sglang.srt.function_call.function_call_parser import FunctionCallParser
    from sglang.srt.function_call.json_array_parser import JsonArrayParser

    parser = FunctionCallParser(asked.tools, name, tokenizer=tokenizer) if name else None
    if parser is None:
        return JsonCalls(JsonArrayParser(), asked.tools)
    native = parser.detector.supports_structural_tag() or parser.detector.parses_required_natively()
    if asked.tool_choice == "auto" or native:
        return NativeCalls(parser)
    return JsonCalls(JsonArrayParser(), asked.tools)


def pieces_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """What cuts a text into a model's special tokens, words, and single other characters.

    >>> pieces_of(["<|call|>"]).findall("Hi <|call|>{")
    ['Hi ', '<|call|>', '{']
    """
    special = "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True) if token)
    return re.compile((f"{special}|" if special else "") + r"[\w ]+|[^\w ]")


def _resolved(name: str | None, suggested: str | None) -> str | None:
    """A parser's name; SGLang may have left "auto" to be resolved by whoever parses."""
    return suggested if name == "auto" else name or None


def _has_grammar(sampling: SamplingOptions) -> bool:
    return bool(sampling.json_schema or sampling.regex or sampling.ebnf)
