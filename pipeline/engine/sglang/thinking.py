"""Whether a chat's output begins with reasoning. Pure: needs no SGLang.

After `OpenAIServingChat._get_reasoning_from_request` of SGLang 0.5.21 (srt/entrypoints/openai/serving_chat.py), which
cannot be imported without packages that nothing else here needs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from subjects.messages import ChatOptions

KEEP_SPECIAL_TOKENS: Final = frozenset({"apertus2509", "kimi_k3", "inkling", "muse"})
"""Reasoning parsers that look for special tokens in the text."""
MODELS_KEEP_SPECIAL_TOKENS: Final = frozenset({"gpt_oss", "gemma4", "gemma4_unified"})
_NO_EFFORT: Final = ("none", "no_think")


@dataclass(frozen=True, kw_only=True)
class Thinking:
    """What is known of a model's reasoning."""

    parser: str | None  # the name of SGLang's reasoning parser
    default: str = "always"  # when the parser takes a model to think, where its template does not tell
    toggle: Any = None  # SGLang's ReasoningToggleConfig, read off the template; None: the template does not tell
    always: bool = False  # by the template
    model_type: str = ""

    def on(self, chat: ChatOptions) -> bool:
        """Whether the model will think."""
        words, effort = chat.chat_template_kwargs, chat.reasoning_effort
        if self.parser is None:
            return False
        match self.parser:
            case "iquest_q1":
                said = [words[name] for name in ("thinking", "enable_thinking") if words.get(name) is not None]
                return any(said) or not said
            case "minimax-m3":
                return words.get("thinking_mode") == "enabled"
            case "hunyuan":
                by_effort = self.toggle is not None and self.toggle.special_case == "hunyuan_effort"
                return effort not in _NO_EFFORT and (by_effort or effort is not None)
        if self.toggle is None:
            return _by_default(self.default, words, effort)
        if self.toggle.special_case in ("always", "mistral"):
            return _by_default(self.toggle.special_case, words, effort)
        if self.toggle.toggle_param is None or self.toggle.default_enabled is None:
            return False
        said = words.get(self.toggle.toggle_param)
        return said is not False if self.toggle.default_enabled else said is True

    def forced(self, chat: ChatOptions) -> bool:
        """Whether the output is reasoning from its first character on."""
        return self.always or self.on(chat)

    def keeps_special_tokens(self, chat: ChatOptions) -> bool:
        """Whether the parsers need the special tokens in the text."""
        if self.parser == "mistral":
            return chat.reasoning_effort not in (None, "none")
        return self.parser in KEEP_SPECIAL_TOKENS or self.model_type in MODELS_KEEP_SPECIAL_TOKENS


def _by_default(mode: str, words: Mapping[str, Any], effort: str | None) -> bool:
    match mode:
        case "always":
            return True
        case "mistral":
            return effort not in (None, "none")
        case "thinking" | "enable_thinking":
            return words.get(mode) is not False
        case "explicit_thinking" | "explicit_enable_thinking":
            return words.get(mode.removeprefix("explicit_")) is True
    return False
