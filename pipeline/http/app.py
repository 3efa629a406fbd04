"""The routes of OpenAI's API, as one ASGI application over a pipeline."""

import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final

import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Route

from pipeline.bus import Bus
from pipeline.client import check_token
from pipeline.completion import Completion, error_body
from pipeline.config import GatewaySettings
from pipeline.errors import BusUnavailable, PipelineError, UnknownModel, from_failure
from pipeline.health import Health
from pipeline.http import visits
from pipeline.http.accounts import Account, Accounts
from pipeline.http.asked import Asked, parse_body
from pipeline.http.bodies import REQUEST_ID, json_response, read_body
from pipeline.http.chunks import Chunks, Cursor
from pipeline.http.embeddings import Embedder
from pipeline.http.exchange import EventStream, Exchange, events, first_frames, while_there
from pipeline.http.openapi import described
from pipeline.http.openapi.document import document
from pipeline.http.openapi.operations import Documented
from pipeline.presence import Presence
from pipeline.served import EMBEDS, GENERATES
from subjects import names
from subjects.messages import Failure

CLIENT_GONE: Final = 499
OWNER: Final = "sglang-nats"

log = structlog.get_logger()


class Gateway:
    """What answers each route."""

    def __init__(
        self,
        bus: Bus,
        presence: Presence,
        accounts: Accounts,
        settings: GatewaySettings,
        health: Callable[[], Health],
        draining: Callable[[], bool],
    ) -> None:
        self._bus, self._presence, self._accounts = bus, presence, accounts
        self._settings, self._health, self._draining = settings, health, draining
        self.embed = Embedder(accounts, settings).embed
        self._document: dict[str, Any] | None = None

    async def chat(self, request: Request) -> Response:
        return await self._generate(request, chat=True)

    async def complete(self, request: Request) -> Response:
        return await self._generate(request, chat=False)

    async def stream(self, request: Request) -> Response:
        """The rest of an answer, from the log: whichever gateway began it. Leaving it does not cancel the request."""
        account = await self._account(request)
        request_id = request.path_params["request_id"]
        check_token("request_id", request_id)
        last = request.headers.get("last-event-id") or request.query_params.get("last_event_id")
        cursor = Cursor.parse(last) if last else Cursor(created_unix_s=int(time.time()))
        frames = account.client.resume(request_id, from_token=cursor.from_token, choices=len(cursor.seen))
        visit = visits.current()
        visit.model, visit.request_id = cursor.model or None, request_id
        account.begin()
        exchange = Exchange(frames, lambda _: account.end())
        return await ended_on_error(exchange, self._streamed(request, exchange, request_id, cursor))

    async def models(self, request: Request) -> Response:
        await self._account(request)
        return json_response({"object": "list", "data": [*self._models().values()]})

    async def model(self, request: Request) -> Response:
        await self._account(request)
        name = request.path_params["model"]
        for model in self._models().values():
            if name in (model["id"], names.token(model["id"])):  # on NATS it has the second name
                return json_response(model)
        raise UnknownModel(f"model: no worker serves {name[:120]!r}", field="model")

    async def live(self, _: Request) -> Response:
        now = self._health()
        return json_response(now.to_dict(), 200 if now.live else 503)

    async def ready(self, _: Request) -> Response:
        now = self._health()
        return json_response(now.to_dict() | {"models": sorted(self._models())}, 200 if now.ready else 503)

    async def openapi(self, request: Request) -> Response:
        """All routes of this gateway, this one too, as OpenAPI has it."""
        if self._document is None:
            self._document = document(request.app.routes, keyed=not self._accounts.open)
        return json_response(self._document)

    async def _account(self, request: Request) -> Account:
        return await self._accounts.of(request.headers.get("authorization"))

    def _models(self) -> dict[str, dict[str, Any]]:
        """Every model that a worker has registered, as OpenAI's API gives it."""
        models: dict[str, dict[str, Any]] = {}
        for state in self._presence.workers():
            if state.role not in (GENERATES, EMBEDS) or state.down or not state.registered or state.card is None:
                continue
            card = state.card
            model = {
                "id": card.served_name or card.model,
                "object": "model",
                "created": int(card.started_unix_s),
                "owned_by": OWNER,
            }
            models.setdefault(card.model, model | {"max_model_len": card.context_len_tokens})
        return models

    async def _generate(self, request: Request, *, chat: bool) -> Response:
        """Publish a request and answer it, whole or as a stream. A client that leaves cancels it."""
        account = await self._account(request)
        body = await read_body(request, self._settings.body_bytes_max)
        asked = parse_body(body, chat=chat, client=account.client.name, request_s=self._settings.request_s)
        visit = visits.current()
        visit.model, visit.request_id = asked.model, asked.request_id
        account.begin()
        exchange = self.begun(account, asked, request.headers.get("traceparent"))
        if asked.stream:
            answer = self._streamed(request, exchange, asked.request_id, asked.cursor())
        else:
            answer = _whole(request, exchange, asked)
        return await ended_on_error(exchange, answer)

    def sampling(self, model: str) -> Mapping[str, float]:
        """A model's own temperature and top_p, of those that it has."""
        cards = [state.card for state in self._presence.workers() if state.registered and state.card is not None]
        return next((card.sampling for card in cards if card.model == names.token(model)), {})

    def begun(self, account: Account, asked: Asked, traceparent: str | None) -> Exchange:
        """A request on its way, counted in by the account: whatever ends the exchange early cancels it."""
        client = account.client
        frames = client.run(
            asked.model,
            asked.payload,
            asked.request_id,
            asked.choices,
            deadline_unix_s=asked.deadline_unix_s,
            traceparent=traceparent,
        )

        def end(done: bool) -> None:
            account.end()
            if not done and not self._draining():  # whoever is cut off then can read on at another gateway
                self._bus.spawn(client.cancel(asked.request_id))

        return Exchange(frames, end)

    async def _streamed(self, request: Request, exchange: Exchange, request_id: str, cursor: Cursor) -> Response:
        patience_s, chunks = self._settings.keep_alive_s, Chunks(request_id, cursor)
        frames = await while_there(request, first_frames(exchange, patience_s))
        begun = b"".join(map(chunks.event, frames or ()))
        headers = {REQUEST_ID: request_id}
        return EventStream(exchange, events(exchange, chunks, begun, frames, patience_s), headers)


async def ended_on_error(exchange: Exchange, answer: Awaitable[Response]) -> Response:
    """The answer. Where there is none, nothing of its request goes on; a stream ends its exchange itself."""
    try:
        response = await answer
    except BaseException:
        exchange.end()
        raise
    if not isinstance(response, EventStream):
        exchange.end()
    return response


async def _whole(request: Request, exchange: Exchange, asked: Asked) -> Response:
    """The answer in one piece. Raises the error of a choice that failed."""
    completion = Completion(asked.request_id, asked.model, asked.chat, asked.choices, asked.prompts)
    while frames := await while_there(request, exchange.take()):
        for frame in frames:
            completion.add(frame)
    if completion.failure is not None:
        raise from_failure(completion.failure)
    return json_response(completion.body(time.time()), headers={REQUEST_ID: asked.request_id})


def _failed(failure: Failure) -> Response:
    headers = {}
    if failure.status in (429, 503):
        headers["Retry-After"] = str(math.ceil(failure.retry_after_s or 1))
    if failure.status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    return json_response(error_body(failure), failure.status, headers)


async def _on_pipeline_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, PipelineError)
    visits.current().code = error.code
    if isinstance(error, BusUnavailable):
        log.warning("request_not_answered", code=error.code, reason=str(error))
    return _failed(error.failure())


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    phrase = HTTPStatus(error.status_code).phrase
    code = phrase.lower().replace(" ", "_")
    message = f"{request.method} {request.url.path[:120]}: {phrase}"
    response = _failed(Failure(code=code, message=message, status=error.status_code))
    response.headers.update(error.headers or {})
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        response.headers["Allow"] = ", ".join(_methods(request))
    return response


def _methods(request: Request) -> list[str]:
    """What the path of a request can be asked with, whichever of its routes has it."""
    found: set[str] = set()
    scope = request.scope | {"path_params": {}, "root_path": request.scope.get("app_root_path", "")}
    for route in request.app.routes:
        if route.matches(scope)[0] is not Match.NONE:
            found |= (route.methods or set()) if isinstance(route, Route) else {"GET", "HEAD"}
    return sorted(found)


async def _on_bug(_: Request, error: Exception) -> Response:
    return _failed(Failure(code="internal", message="the gateway failed; its log says why", status=500))


async def _on_leave(_: Request, error: Exception) -> Response:
    """Nobody reads it."""
    return Response(status_code=CLIENT_GONE)


def make_app(gateway: Gateway, cors_origins: tuple[str, ...], more: Sequence[BaseRoute] = ()) -> Starlette:
    """The application, with `more` routes. No page of another origin may ask, but those of `cors_origins`."""
    cors = Middleware(
        CORSMiddleware,
        allow_origins=cors_origins,
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["Authorization", "Content-Type", "Last-Event-ID", "traceparent"],
        expose_headers=[REQUEST_ID, "Retry-After"],
    )
    return Starlette(
        routes=[
            Documented("/v1/chat/completions", gateway.chat, described.CHAT, methods=["POST"]),
            Documented("/v1/completions", gateway.complete, described.COMPLETE, methods=["POST"]),
            Documented("/v1/embeddings", gateway.embed, described.EMBED, methods=["POST"]),
            Documented("/v1/models", gateway.models, described.LIST_MODELS),
            Documented("/v1/models/{model:path}", gateway.model, described.MODEL),
            Documented("/v1/streams/{request_id}", gateway.stream, described.RESUME),
            Documented("/health", gateway.live, described.LIVE),
            Documented("/ready", gateway.ready, described.READY),
            Documented("/openapi.json", gateway.openapi, described.DOCUMENT),
            *more,
        ],
        middleware=[cors] if cors_origins else [],
        exception_handlers={
            PipelineError: _on_pipeline_error,
            HTTPException: _on_http_error,
            ClientDisconnect: _on_leave,
            Exception: _on_bug,
        },
    )
