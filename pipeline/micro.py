"""A micro service as NATS tools know it (NATS ADR-32): found, described and counted through `$SRV.>`.

By our own hand: nats-py's own service is lost where the bus has to begin with a new client, and has a
subscription for each endpoint, so that a request for an unknown one gets no answer at all (docs/adr/0008).
"""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from pipeline.bus import Bus, Received
from subjects import headers, names

_TYPES: Final = {verb: f"io.nats.micro.v1.{verb.lower()}_response" for verb in ("PING", "INFO", "STATS")}
_SEMVER: Final = re.compile(r"\d+\.\d+\.\d+")
ERROR_CHARS_MAX: Final = 512


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """One operation that the service answers to."""

    name: str
    subject: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    queue_group: str = ""  # empty: each instance has subjects of its own


@dataclass(slots=True)
class _Count:
    requests: int = 0
    errors: int = 0
    processing_ns: int = 0
    last_error: str = ""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """One instance of a service. `name` and `id` are subject tokens; instances of one kind share the name."""

    name: str
    id: str
    version: str
    description: str
    metadata: Mapping[str, str]


class MicroService:
    """Answers for a service on `$SRV.PING`, `INFO` and `STATS`; the endpoints themselves are its owner's."""

    def __init__(self, bus: Bus, identity: Identity, endpoints: Callable[[], Sequence[Endpoint]]) -> None:
        """`endpoints` is asked each time: a worker without its engine can do less."""
        self._bus, self._identity, self._endpoints = bus, identity, endpoints
        self._started = datetime.now(UTC)
        self._counts: dict[str, _Count] = {}  # by endpoint

    async def start(self) -> None:
        """Begin to be found: by anyone's question, by one for the name, and by one for this instance."""
        name = self._identity.name
        for verb in _TYPES:
            for suffix in ("", f".{name}", f".{name}.{self._identity.id}"):
                await self._bus.subscribe(f"{names.SRV}.{verb}{suffix}", self._hear)

    def count(self, endpoint: str, started_s: float, error: str = "") -> None:
        """Note a request down that came at `started_s` on the monotonic clock."""
        count = self._counts.setdefault(endpoint, _Count())
        count.requests += 1
        count.processing_ns += int(1e9 * (time.monotonic() - started_s))
        if error:
            count.errors += 1
            count.last_error = error[:ERROR_CHARS_MAX]

    def _hear(self, received: Received) -> None:
        verb = received.subject.split(".")[1]
        self._bus.spawn(self._bus.respond(received, msgspec.json.encode(self._answer(verb))))

    def _answer(self, verb: str) -> dict[str, Any]:
        identity = self._identity
        answer: dict[str, Any] = {
            "type": _TYPES[verb],
            "name": identity.name,
            "id": identity.id,
            "version": version.group() if (version := _SEMVER.match(identity.version)) else "0.0.0",
            "metadata": dict(identity.metadata),
        }
        if verb == "INFO":
            answer["description"] = identity.description
            answer["endpoints"] = [_described(endpoint) for endpoint in self._endpoints()]
        elif verb == "STATS":
            answer["started"] = self._started.isoformat(timespec="milliseconds").replace("+00:00", "Z")
            answer["endpoints"] = [self._counted(endpoint) for endpoint in self._endpoints()]
        return answer

    def _counted(self, endpoint: Endpoint) -> dict[str, Any]:
        count = self._counts.get(endpoint.name, _Count())
        return {
            "name": endpoint.name,
            "subject": endpoint.subject,
            "queue_group": endpoint.queue_group,
            "num_requests": count.requests,
            "num_errors": count.errors,
            "last_error": count.last_error,
            "processing_time": count.processing_ns,
            "average_processing_time": count.processing_ns // max(count.requests, 1),
        }


def _described(endpoint: Endpoint) -> dict[str, Any]:
    return {
        "name": endpoint.name,
        "subject": endpoint.subject,
        "queue_group": endpoint.queue_group,
        "metadata": dict(endpoint.metadata),
    }


def error_headers(message: str, status: int) -> dict[str, str]:
    """What marks an answer as an error for NATS tools; headers have no line breaks."""
    return {
        headers.SERVICE_ERROR: " ".join(message.split())[:ERROR_CHARS_MAX],
        headers.SERVICE_ERROR_CODE: str(status),
    }
