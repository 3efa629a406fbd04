"""One HTTP request as it is counted, timed and written to the log when it ends, whatever route it was for.

What only its handler knows, the handler notes on `current()`; accounts, exchanges and error answers do so themselves.
"""

import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Final

import structlog
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline import metrics

PROBES: Final = frozenset({"/health", "/ready"})
"""Asked once a second by whoever watches: logged at debug."""
OTHER: Final = "other"
"""A route or model that is none of ours: labels are closed sets."""
MODELS_MAX: Final = 64

log = structlog.get_logger()


@dataclass(slots=True)
class Visit:
    """What is known of a request so far."""

    began_s: float = field(default_factory=time.monotonic)
    client: str | None = None
    model: str | None = None
    request_id: str | None = None
    code: str | None = None  # of the error that ended it
    status: int = 0  # 0: no answer has begun
    first_token_s: float | None = None  # monotonic, as `began_s`
    received_bytes: int = 0
    sent_bytes: int = 0

    def first_token(self) -> None:
        """A token has come; only the first one counts."""
        if self.first_token_s is None:
            self.first_token_s = time.monotonic()


_CURRENT: ContextVar[Visit | None] = ContextVar("visit", default=None)


def current() -> Visit:
    """The request that is being answered; one that nobody counts where there is none."""
    return _CURRENT.get() or Visit()


class Visits:
    """Stands in front of an application; its requests are the worker's tasks in progress."""

    def __init__(self, app: ASGIApp, serves: Callable[[str], bool]) -> None:
        """`serves`: whether a worker has registered a model of this name."""
        self._app, self._serves = app, serves
        self._models: set[str] = set()  # those with series
        self.in_progress = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        visit = Visit()
        before = _CURRENT.set(visit)
        self.in_progress += 1
        try:
            await self._app(scope, _counted_receive(visit, receive), _counted_send(visit, send))
        finally:
            self.in_progress -= 1
            _CURRENT.reset(before)
            self._end(_route_of(scope), visit)

    def _end(self, route: str, visit: Visit) -> None:
        seconds = time.monotonic() - visit.began_s
        model = self._label(visit.model)
        metrics.HTTP_REQUESTS.labels(route, str(visit.status), model).inc()
        metrics.HTTP_SECONDS.labels(route).observe(seconds)
        metrics.HTTP_RECEIVED_BYTES.labels(route).inc(visit.received_bytes)
        metrics.HTTP_SENT_BYTES.labels(route).inc(visit.sent_bytes)
        ttft_ms = None
        if visit.first_token_s is not None:
            metrics.HTTP_TTFT_SECONDS.labels(model).observe(visit.first_token_s - visit.began_s)
            ttft_ms = round(1e3 * (visit.first_token_s - visit.began_s), 1)
        known = {
            "client": visit.client,
            "request_id": visit.request_id,
            "model": visit.model and visit.model[:120],
            "code": visit.code,
            "ttft_ms": ttft_ms,
        }
        (log.debug if route in PROBES else log.info)(
            "request_answered",
            route=route,
            status=visit.status,
            duration_ms=round(1e3 * seconds, 1),
            **{key: value for key, value in known.items() if value is not None},
        )

    def _label(self, model: str | None) -> str:
        """The model where it is one that is served, or was: a client's invention gets no series."""
        if model is None:
            return ""
        if model not in self._models and len(self._models) < MODELS_MAX and self._serves(model):
            self._models.add(model)
        return model if model in self._models else OTHER


def _route_of(scope: Scope) -> str:
    """The route's template, without what a client put into it."""
    route = scope.get("route")
    return route.path if isinstance(route, Route | Mount) else OTHER


def _counted_receive(visit: Visit, receive: Receive) -> Receive:
    async def counted() -> Message:
        message = await receive()
        visit.received_bytes += len(message.get("body", b""))
        return message

    return counted


def _counted_send(visit: Visit, send: Send) -> Send:
    async def counted(message: Message) -> None:
        if message["type"] == "http.response.start":
            visit.status = message["status"]
        visit.sent_bytes += len(message.get("body", b""))
        await send(message)

    return counted
