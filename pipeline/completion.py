"""OpenAI's answer body, whole, from the frames of a request: `chat.completion` or `text_completion`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from pipeline.progress import Progress
from subjects.messages import Echo, Failure, Frame, PositionLogprobs, TokenLogprob, Usage

NO_ECHO: Final = Echo(text="")
ERROR_TYPES: Final = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


@dataclass
class Completion:
    """Collects a request's frames, in any order of their choices."""

    request_id: str
    model: str
    chat: bool
    choices: int = 1
    prompts: int = 1  # each has its own choices
    _progress: dict[int, Progress] = field(default_factory=dict)
    _logprobs: dict[int, list[PositionLogprobs]] = field(default_factory=dict)
    _echo: dict[int, Echo] = field(default_factory=dict)

    def add(self, frame: Frame) -> None:
        """Take a frame in; one that brings nothing new changes nothing."""
        if self._progress.setdefault(frame.choice, Progress()).add(frame):
            self._logprobs.setdefault(frame.choice, []).extend(frame.logprobs or ())
            if frame.echo is not None:
                self._echo.setdefault(frame.choice, frame.echo)

    @property
    def whole(self) -> bool:
        """Whether every choice has ended."""
        return all(choice in self._progress and self._progress[choice].end for choice in range(self.choices))

    @property
    def failure(self) -> Failure | None:
        """Why the first choice that failed did so."""
        ends = (self._progress[choice].end for choice in sorted(self._progress))
        return next((end.error for end in ends if end and end.error), None)

    def usage(self) -> Usage:
        """Of all choices together: each prompt counts once."""
        total = Usage(prompt_tokens=0, completion_tokens=0)
        each = max(1, self.choices // self.prompts)
        for first in range(0, self.choices, each):
            ends = (self._progress[choice].end for choice in range(first, first + each) if choice in self._progress)
            parts = [end.usage for end in ends if end and end.usage]
            total = Usage(
                prompt_tokens=total.prompt_tokens + max((part.prompt_tokens for part in parts), default=0),
                completion_tokens=total.completion_tokens + sum(part.completion_tokens for part in parts),
                cached_tokens=total.cached_tokens + max((part.cached_tokens for part in parts), default=0),
            )
        return total

    def body(self, created_unix_s: float) -> dict[str, Any]:
        """The answer as OpenAI's API gives it. Needs every choice's end."""
        return {
            "id": answer_id(self.request_id, self.chat),
            "object": "chat.completion" if self.chat else "text_completion",
            "created": int(created_unix_s),
            "model": self.model,
            "choices": [self._choice(choice) for choice in range(self.choices)],
            "usage": usage_body(self.usage()),
        }

    def _choice(self, choice: int) -> dict[str, Any]:
        progress = self._progress[choice]
        assert progress.end is not None, "asked for before its end"
        echo = self._echo.get(choice, NO_ECHO)
        positions = (*(echo.logprobs or ()), *self._logprobs[choice])
        answer = {"message": _message(progress)} if self.chat else {"text": echo.text + progress.text}
        return {
            "index": choice,
            **answer,
            "logprobs": logprobs_body(positions, self.chat),
            "finish_reason": progress.end.finish_reason,
        }


def _message(progress: Progress) -> dict[str, Any]:
    """A choice as the assistant's message. As OpenAI has it, the content is null where there are but tool calls."""
    message: dict[str, Any] = {"role": "assistant", "content": progress.text, "refusal": None, "annotations": []}
    if progress.reasoning:
        message["reasoning_content"] = progress.reasoning
    if progress.tool_calls:
        message["content"] = progress.text or None
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for _, call in sorted(progress.tool_calls.items())
        ]
    return message


def answer_id(request_id: str, chat: bool) -> str:
    """The answer's `id`, of each of its chunks too."""
    return f"{'chatcmpl' if chat else 'cmpl'}-{request_id}"


def usage_body(usage: Usage) -> dict[str, Any]:
    """What an answer cost, as OpenAI's API gives it."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def logprobs_body(positions: Sequence[PositionLogprobs], chat: bool) -> dict[str, Any] | None:
    """Log probabilities as OpenAI's API gives them; None where there are none."""
    if not positions:
        return None
    return {"content": [_chat_position(position) for position in positions]} if chat else _text_positions(positions)


def error_body(failure: Failure) -> dict[str, Any]:
    """An error as OpenAI's API gives it."""
    kind = ERROR_TYPES.get(failure.status) or ("invalid_request_error" if failure.status < 500 else "server_error")
    return {"error": {"message": failure.message, "type": kind, "param": failure.field, "code": failure.code}}


def _chat_position(position: PositionLogprobs) -> dict[str, Any]:
    return _chat_token(position.chosen) | {"top_logprobs": [_chat_token(token) for token in position.top]}


def _chat_token(token: TokenLogprob) -> dict[str, Any]:
    text = _text(token)
    return {"token": text, "logprob": token.logprob, "bytes": list(token.raw or text.encode())}


def _text_positions(positions: Sequence[PositionLogprobs]) -> dict[str, Any]:
    return {
        "tokens": [_lossless(position.chosen) for position in positions],
        "token_logprobs": [position.chosen.logprob for position in positions],
        "top_logprobs": [_text_alternatives(position) for position in positions],
    }


def _text_alternatives(position: PositionLogprobs) -> dict[str, float | None] | None:
    """None for a prompt's first token, which has none."""
    if position.chosen.logprob is None:
        return None
    return {_lossless(token): token.logprob for token in position.top}


def _lossless(token: TokenLogprob) -> str:
    """A part of a character as SGLang writes it where there is no place for its bytes: each as one of Latin-1."""
    return token.raw.decode("latin-1") if token.raw else _text(token)


def _text(token: TokenLogprob) -> str:
    return token.text if token.text is not None else f"token_id:{token.token_id}"
