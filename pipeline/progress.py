"""How far a request's output has come, for whoever reads its frames: a client, or the next owner."""

from dataclasses import dataclass, field

from subjects.codec import NO_TOKENS, TokenIds
from subjects.messages import Frame, ToolCallDelta


@dataclass(slots=True)
class CallProgress:
    """How far one tool call has come."""

    id: str | None = None
    name: str | None = None
    arguments: str = ""

    def add(self, delta: ToolCallDelta) -> None:
        self.id, self.name = self.id or delta.id, self.name or delta.name
        self.arguments += delta.arguments


@dataclass(slots=True)
class Progress:
    """How far one choice has come."""

    token_ids: TokenIds = NO_TOKENS  # u32[num_emitted_tokens], without gap or repeat
    text: str = ""
    end: Frame | None = None
    attempt: int = 0
    echoed: bool = False  # the prompt was sent back
    reasoning: str = ""
    raw: str = ""  # what the model said, before it was parsed
    tool_calls: dict[int, CallProgress] = field(default_factory=dict)  # by index

    def add(self, frame: Frame) -> Frame | None:
        """Take a frame in; gives the part of it that is new, None where nothing is.

        A frame of an older attempt, one that starts behind a gap and any after the end bring nothing new:
        their sender had lost its lease, or a later attempt repeats what is missing. So does a terminal frame of an
        older attempt: the log refuses it, but live readers hear it. Errors and aborts hold whoever says them.
        """
        have = len(self.token_ids)
        if self.end is not None:
            return None
        if frame.attempt < self.attempt and frame.finish_reason not in ("error", "abort"):
            return None
        if frame.index > have and frame.finish_reason is None:
            return None
        self.attempt = max(self.attempt, frame.attempt)
        self.echoed |= frame.echo is not None
        repeated = have - frame.index
        if repeated > 0 and not frame.finish_reason and repeated >= len(frame.token_ids):
            return None
        self.token_ids += frame.token_ids[repeated:] if repeated else frame.token_ids
        self.text += frame.text
        self.reasoning += frame.reasoning
        self.raw += frame.text if frame.raw is None else frame.raw
        for delta in frame.tool_calls:
            self.tool_calls.setdefault(delta.index, CallProgress()).add(delta)
        self.end = frame if frame.finish_reason else None
        return frame


@dataclass(slots=True)
class History:
    """How far each choice of a request has come."""

    choices: dict[int, Progress] = field(default_factory=dict)

    def of(self, choice: int) -> Progress:
        return self.choices.setdefault(choice, Progress())
