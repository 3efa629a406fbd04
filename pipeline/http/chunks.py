"""An answer as server-sent events in OpenAI's form. Pure: frames in, bytes out.

Each event's id is a cursor: what its reader has, and all that the rest of the answer needs to look the same. So any
gateway can go on with a stream that another one began, from the log of frames alone.
"""

import re
from dataclasses import dataclass, replace
from typing import Any, Final
from urllib.parse import quote, unquote

import msgspec

from pipeline.completion import Completion, answer_id, error_body, logprobs_body, usage_body
from pipeline.errors import InvalidRequest, from_failure
from subjects.limits import CHOICES_MAX
from subjects.messages import Failure, Frame, ToolCallDelta

DONE: Final = b"data: [DONE]\n\n"
KEEP_ALIVE: Final = b": keep-alive\n\n"
_CURSOR: Final = re.compile(
    r"(chat|text)(?:\*(\d{1,2}))?(\+usage)?/(\d{1,12})/(\d{1,9}e?(?:\.\d{1,9}e?)*)/(.*)", re.ASCII
)
CURSOR_CHARS_MAX: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """What a stream's reader has.

    >>> str(Cursor.parse("chat+usage/1700000000/12.7e/smollm2"))
    'chat+usage/1700000000/12.7e/smollm2'
    """

    chat: bool = True
    include_usage: bool = False
    created_unix_s: int = 0
    model: str = ""
    prompts: int = 1
    seen: tuple[tuple[int, bool], ...] = ((0, False),)
    """Of each choice: how many tokens its reader has, and whether it has the end too."""

    @classmethod
    def parse(cls, text: str) -> "Cursor":
        """From an event's id. Raises InvalidRequest."""
        found = _CURSOR.fullmatch(text) if len(text) <= CURSOR_CHARS_MAX else None
        counts = found[5].split(".") if found else ()
        if found is None or len(counts) > CHOICES_MAX:
            raise InvalidRequest("Last-Event-ID: is no id of a stream's event", field="Last-Event-ID")
        return cls(
            chat=found[1] == "chat",
            include_usage=found[3] is not None,
            created_unix_s=int(found[4]),
            model=unquote(found[6]),
            prompts=max(1, int(found[2] or 1)),
            seen=tuple((int(count.removesuffix("e")), count.endswith("e")) for count in counts),
        )

    def __str__(self) -> str:
        """One line of ASCII."""
        several = f"*{self.prompts}" if self.prompts > 1 else ""
        kind = ("chat" if self.chat else "text") + several + ("+usage" if self.include_usage else "")
        counts = ".".join(f"{tokens}{'e' if ended else ''}" for tokens, ended in self.seen)
        return f"{kind}/{self.created_unix_s}/{counts}/{quote(self.model)}"

    @property
    def from_token(self) -> int:
        """From here on some choice's tokens are missing."""
        return min(tokens for tokens, _ in self.seen)

    def of(self, choice: int) -> tuple[int, bool]:
        return self.seen[choice] if choice < len(self.seen) else (0, False)

    def after(self, choice: int, tokens: int, ended: bool) -> "Cursor":
        """With so much of a choice; one that was not known of is added."""
        seen = [*self.seen, *((0, False),) * (choice + 1 - len(self.seen))]
        seen[choice] = (tokens, ended)
        return replace(self, seen=tuple(seen))


def _delta(text: str, parsed: dict[str, Any], *, first: bool) -> dict[str, Any]:
    """What a chat's event adds; without content where it is all reasoning and tool calls."""
    content: dict[str, Any] = {} if parsed and not text else {"content": text}
    if first:
        return {"role": "assistant", "content": None, **content, **parsed}
    return content | parsed


def _parsed(frame: Frame) -> dict[str, Any]:
    parsed: dict[str, Any] = {}
    if frame.reasoning:
        parsed["reasoning_content"] = frame.reasoning
    if frame.tool_calls:
        parsed["tool_calls"] = [_call(delta) for delta in frame.tool_calls]
    return parsed


def _call(delta: ToolCallDelta) -> dict[str, Any]:
    """Its first piece has the id and the name."""
    if delta.name is None:
        return {"index": delta.index, "function": {"arguments": delta.arguments}}
    function = {"name": delta.name, "arguments": delta.arguments}
    return {"index": delta.index, "id": delta.id, "type": "function", "function": function}


class Chunks:
    """Turns a request's frames into events, from a cursor on."""

    def __init__(self, request_id: str, cursor: Cursor) -> None:
        self._id, self._cursor = answer_id(request_id, cursor.chat), cursor
        self._ends = Completion(request_id, cursor.model, cursor.chat, len(cursor.seen), cursor.prompts)

    def event(self, frame: Frame) -> bytes:
        """A frame's event; empty where it brings its reader nothing new. Raises a failed request's error."""
        if frame.error is not None:
            raise from_failure(frame.error)
        if frame.finish_reason:
            self._ends.add(frame)
        tokens, ended = self._cursor.of(frame.choice)
        count = len(frame.token_ids)
        had = min(count, max(0, tokens - frame.index))
        said_nothing = not (frame.text or frame.reasoning or frame.tool_calls)
        nothing = not frame.finish_reason and said_nothing and had == count
        if ended or nothing or (had and had == count and not frame.finish_reason):
            return b""
        positions = (frame.logprobs or ())[had:]
        text = "" if had and had == count else frame.text
        if frame.echo is not None and not tokens:  # a reader that has tokens has the prompt too
            text, positions = frame.echo.text + text, (*(frame.echo.logprobs or ()), *positions)
        self._cursor = self._cursor.after(frame.choice, frame.index + count, frame.finish_reason is not None)
        if self._cursor.chat:
            parsed = {} if had and had == count else _parsed(frame)
            said: dict[str, Any] = {"delta": _delta(text, parsed, first=not tokens)}
        else:
            said = {"text": text}
        chunk = {
            "index": frame.choice,
            **said,
            "logprobs": logprobs_body(positions, self._cursor.chat),
            "finish_reason": frame.finish_reason,
        }
        return self._event([chunk], {"usage": None} if self._cursor.include_usage else {})

    def end(self) -> bytes:
        """What comes after all choices' ends."""
        if not self._cursor.include_usage:
            return DONE
        return self._event([], {"usage": usage_body(self._ends.usage())}) + DONE

    def failed(self, failure: Failure) -> bytes:
        """The event that ends a stream in an error."""
        return b"data: %s\n\n" % msgspec.json.encode(error_body(failure))

    def _event(self, choices: list[dict[str, Any]], more: dict[str, Any]) -> bytes:
        body = {
            "id": self._id,
            "object": "chat.completion.chunk" if self._cursor.chat else "text_completion",
            "created": self._cursor.created_unix_s,
            "model": self._cursor.model,
            "choices": choices,
            **more,
        }
        return b"id: %s\ndata: %s\n\n" % (str(self._cursor).encode(), msgspec.json.encode(body))
