"""What an engine's outputs say, parsed, for the frames of one choice. Pure.

An owner that takes a choice over feeds a new parser with what the model said before, which the log holds. What the
parser makes of that, the client has: as many characters of each kind are dropped as stand in the log. So the stream
goes on in the middle of a thought or of a call's arguments, without a gap or a repeat.
"""

from collections.abc import Sequence

from msgspec.structs import replace

from pipeline.engine.protocol import EngineOutput, Parsed, Parser
from pipeline.progress import Progress
from subjects.messages import FinishReason, ToolCallDelta

NOTHING = Parsed()
_ENDS_WELL = ("stop", "length")
"""After these what a parser holds back is released; an aborted output is left as it is."""


class Said:
    """Reads one choice's outputs, from where its log ends."""

    def __init__(self, parser: Parser | None, so_far: Progress) -> None:
        self._parser, self._pending = parser, NOTHING
        self._text, self._reasoning = len(so_far.text), len(so_far.reasoning)  # characters that the client has
        self._named = {index for index, call in so_far.tool_calls.items() if call.name}
        self._arguments = {index: len(call.arguments) for index, call in so_far.tool_calls.items()}
        self._calls = bool(so_far.tool_calls)
        if parser is not None and so_far.raw:
            self._pending = self._fresh(parser.feed(so_far.raw))

    def read(self, output: EngineOutput) -> Parsed:
        """What is new with an output."""
        if self._parser is None:
            return Parsed(text=output.text)
        parts = [self._pending, self._fresh(self._parser.feed(output.text))]
        if output.finish_reason in _ENDS_WELL:
            parts.append(self._fresh(self._parser.end()))
        self._pending = NOTHING
        return joined(parts)

    def finish(self, reason: FinishReason | None) -> FinishReason | None:
        """Why the choice ended, in OpenAI's words."""
        return "tool_calls" if reason == "stop" and self._calls else reason

    def _fresh(self, parsed: Parsed) -> Parsed:
        """The part that the client has not."""
        text, self._text = _cut(parsed.text, self._text)
        reasoning, self._reasoning = _cut(parsed.reasoning, self._reasoning)
        self._calls |= bool(parsed.tool_calls)
        deltas = [self._fresh_call(delta) for delta in parsed.tool_calls]
        return Parsed(text=text, reasoning=reasoning, tool_calls=tuple(delta for delta in deltas if delta))

    def _fresh_call(self, delta: ToolCallDelta) -> ToolCallDelta | None:
        arguments, self._arguments[delta.index] = _cut(delta.arguments, self._arguments.get(delta.index, 0))
        named = delta.name is not None and delta.index not in self._named
        if named:
            self._named.add(delta.index)
        elif not arguments:
            return None
        return replace(delta, id=delta.id if named else None, name=delta.name if named else None, arguments=arguments)


def joined(parts: Sequence[Parsed]) -> Parsed:
    """Many pieces as one, each tool call in one delta."""
    if len(parts) == 1 and not parts[0].tool_calls:
        return parts[0]
    text, reasoning, calls = "", "", dict[int, ToolCallDelta]()
    for part in parts:
        text += part.text
        reasoning += part.reasoning
        for delta in part.tool_calls:
            known = calls.get(delta.index)
            calls[delta.index] = delta if known is None else replace(known, arguments=known.arguments + delta.arguments)
    return Parsed(text=text, reasoning=reasoning, tool_calls=tuple(calls.values()))


def _cut(text: str, known: int) -> tuple[str, int]:
    """Without its first `known` characters; how many of those it did not have."""
    return text[known:], max(0, known - len(text))
