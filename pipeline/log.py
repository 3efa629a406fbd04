"""The log: one event a line on standard error, JSON for machines, coloured where a person looks on.

An event is a name in the past tense (`worker_ready`) and values under the closed set `KEYS`; a test holds every
call to it. Prompts and outputs are never logged.
"""

import logging
import sys
from typing import Any, Final, Literal

import structlog

Level = Literal["debug", "info", "warning", "error"]

KEYS: Final = frozenset(
    {
        "request_id",
        "trace_id",  # of what a task works on: pipeline.tracing binds it to every line
        "client",
        "model",
        "role",
        "stage",
        "worker",
        "subject",
        "stream",
        "stream_seq",
        "consumer",
        "attempt",
        "room",
        "code",  # a stable error code, or an exception's class name
        "reason",  # a sentence
        "url",
        "bucket",
        "in_flight",
        "duration_ms",
        "route",  # an HTTP route's template
        "status",  # of an HTTP answer
        "ttft_ms",
    }
)


_NUMBERS: Final = {name.lower(): number for name, number in logging.getLevelNamesMapping().items()}
# Without the values of locals: those are prompts and answers.
_TRACEBACKS: Final = structlog.processors.ExceptionRenderer(
    structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
)
_floor: dict[str, int] = {"level": logging.INFO}


def configure(level: Level = "info") -> None:
    """Set up the process's log, the standard library's included. Call once, before the first event."""
    person = sys.stderr.isatty()
    structlog.configure(
        processors=[
            _drop_below_level,
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([] if person else [_TRACEBACKS]),
            structlog.dev.ConsoleRenderer() if person else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(stream=sys.stderr)
    set_level(level)


def set_level(level: Level) -> Level:
    """Change the level, the standard library's included, which stays at warning or above; the level before."""
    before = logging.getLevelName(_floor["level"]).lower()
    _floor["level"] = _NUMBERS[level]
    logging.getLogger().setLevel(max(_floor["level"], logging.WARNING))
    return before


def _drop_below_level(logger: Any, method: str, event: dict[str, Any]) -> dict[str, Any]:
    """The level may change while loggers are kept, so that they cannot know it themselves."""
    if _NUMBERS.get(method, logging.ERROR) < _floor["level"]:
        raise structlog.DropEvent
    return event
