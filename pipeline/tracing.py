"""The trace that a request belongs to: a W3C `traceparent`, carried from message to message.

A task's context is a context variable, so that whatever its stage and its engine publish, log or wait for belongs to
its trace without being told. A header that is missing or malformed starts a new trace, as W3C's Trace Context has it.
Whoever exports spans (pipeline.spans) puts its own span into the header that it sends on; else it goes on as it came.
`tracestate` does not travel.
"""

import hashlib
import re
import secrets
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Final

from pipeline.stage import Emit
from subjects import headers

_FORM: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.ASCII)
_VERSION: Final = "00"
_INVALID_VERSION: Final = "ff"
_SAMPLED: Final = "01"


@dataclass(frozen=True, slots=True)
class TraceContext:
    """Which trace, and which span of it is the sender's. Lower-case hexadecimal, never all zeros."""

    trace_id: str  # 32 digits
    span_id: str  # 16 digits
    flags: str = _SAMPLED  # 2 digits; bit 0: the sender may have recorded it

    @classmethod
    def new(cls) -> "TraceContext":
        """A trace of its own, to be recorded by whoever exports spans."""
        return cls(secrets.token_hex(16), secrets.token_hex(8))

    @classmethod
    def parse(cls, text: str | None) -> "TraceContext | None":
        """None where the header is missing or malformed: then a new trace begins.

        A later version than ours may have more fields behind a dash; they are left out.
        """
        match = _FORM.fullmatch(text or "")
        if match is None:
            return None
        version, trace_id, span_id, flags, more = match.groups()
        wrong = version == _INVALID_VERSION or (version == _VERSION and more)
        return None if wrong or not (int(trace_id, 16) and int(span_id, 16)) else cls(trace_id, span_id, flags)

    @classmethod
    def of(cls, message_headers: Mapping[str, str] | None, origin: str) -> "TraceContext":
        """A message's context; of one without, a function of `origin`, so that a redelivery stays in its trace."""
        if found := cls.parse((message_headers or {}).get(headers.TRACEPARENT)):
            return found
        digest = hashlib.blake2b(origin.encode(), digest_size=24).hexdigest()
        return cls(digest[:32], digest[32:])

    @property
    def traceparent(self) -> str:
        return f"{_VERSION}-{self.trace_id}-{self.span_id}-{self.flags}"


current: Final[ContextVar[TraceContext | None]] = ContextVar("trace", default=None)
"""The context of what this asyncio task works on."""


def outgoing() -> dict[str, str]:
    """The header of a message that is sent for what this asyncio task works on; empty outside of any."""
    context = current.get()
    return {headers.TRACEPARENT: context.traceparent} if context else {}


def carried(emit: Emit) -> Emit:
    """An emit with the task's context. A frame has it where it begins or ends an attempt: those between them are many,
    and a header would cost each of them more than its tokens do (docs/operations.md)."""
    if emit.frame is not None and not emit.frame.worker and emit.msg_id is None:
        return emit
    return replace(emit, headers=outgoing() | (emit.headers or {}))
