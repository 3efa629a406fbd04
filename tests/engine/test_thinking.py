"""Which chats make a model think, as SGLang 0.5.21's server has it."""

from dataclasses import dataclass
from typing import Any

import pytest

from pipeline.engine.sglang.thinking import Thinking
from subjects.messages import ChatOptions


@dataclass(frozen=True)
class Toggle:
    """SGLang's ReasoningToggleConfig."""

    toggle_param: str | None = None
    default_enabled: bool | None = None
    special_case: str | None = None


ON = Toggle("enable_thinking", True)
OFF = Toggle("thinking", False)


@pytest.mark.parametrize(
    ("parser", "default", "toggle", "words", "effort", "thinks"),
    [
        (None, "always", None, {}, None, False),
        ("deepseek-r1", "always", None, {}, None, True),
        ("qwen3", "enable_thinking", None, {}, None, True),
        ("qwen3", "enable_thinking", None, {"enable_thinking": False}, None, False),
        ("deepseek-v3", "explicit_thinking", None, {}, None, False),
        ("deepseek-v3", "explicit_thinking", None, {"thinking": True}, None, True),
        ("qwen3", "always", ON, {}, None, True),
        ("qwen3", "always", ON, {"enable_thinking": False}, None, False),
        ("deepseek-v3", "always", OFF, {}, None, False),
        ("deepseek-v3", "always", OFF, {"thinking": True}, None, True),
        ("qwen3", "always", Toggle(), {}, None, False),
        ("gpt-oss", "thinking", Toggle(special_case="always"), {}, None, True),
        ("mistral", "always", Toggle(special_case="mistral"), {}, None, False),
        ("mistral", "mistral", None, {}, "high", True),
        ("minimax-m3", "always", None, {"thinking_mode": "enabled"}, None, True),
        ("hunyuan", "always", None, {}, None, False),
        ("hunyuan", "always", Toggle(special_case="hunyuan_effort"), {}, None, True),
        ("hunyuan", "always", None, {}, "no_think", False),
        ("iquest_q1", "always", None, {}, None, True),
        ("iquest_q1", "always", None, {"thinking": False}, None, False),
    ],
)
def test_thinking(parser: Any, default: str, toggle: Any, words: dict[str, Any], effort: str | None, thinks: bool):
    chat = ChatOptions(chat_template_kwargs=words, reasoning_effort=effort)
    assert Thinking(parser=parser, default=default, toggle=toggle).on(chat) is thinks
    assert Thinking(parser=parser, default=default, toggle=toggle, always=True).forced(chat)


@pytest.mark.parametrize(
    ("parser", "model_type", "effort", "kept"),
    [
        ("deepseek-r1", "llama", None, False),
        ("apertus2509", "apertus", None, True),
        ("gpt-oss", "gpt_oss", None, True),
        ("mistral", "mistral", None, False),
        ("mistral", "mistral", "high", True),
    ],
)
def test_special_tokens_stay_where_the_parser_needs_them(parser: str, model_type: str, effort: str | None, kept: bool):
    thinking = Thinking(parser=parser, model_type=model_type)
    assert thinking.keeps_special_tokens(ChatOptions(reasoning_effort=effort)) is kept
