"""The web console under /console: its pages, and the JSON that they show.

The pages are plain files (`console/`), which the browser runs as they are. What they show comes from `/console/api/`,
which other sites' pages cannot ask and which needs an API key where there are keys. No page may run a script, load a
style or be framed but from here, and none of ours makes HTML of a string.
"""

import asyncio
import contextlib
import ipaddress
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import msgspec
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Match
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from pipeline.bus import Bus
from pipeline.client import check_token
from pipeline.completion import error_body
from pipeline.config import GatewaySettings
from pipeline.dead import DeadLetters, as_json
from pipeline.errors import BusUnavailable, ConfigError, InvalidRequest, NotFound, NotPermitted
from pipeline.http.accounts import Accounts
from pipeline.http.openapi import described
from pipeline.http.openapi.operations import Documented, DocumentedMount
from pipeline.http.overview import Overview
from pipeline.phases import phases
from pipeline.presence import Presence
from pipeline.trace import Search, gone, timeline
from subjects.messages import DeadLetter, Failure

PAGES: Final = Path(__file__).parent / "console"
API: Final = "/console/api"
SEQ_CHARS_MAX: Final = 19
LOOK_S_MAX: Final = 10.0
"""A timeline or a page of letters is read from the streams within this time."""
LOOKS_MAX: Final = 2
"""So many are read at once: each goes through thousands of messages."""
LETTERS_MAX: Final = 200
"""The newest letters are listed."""
MESSAGE_CHARS_MAX: Final = 500
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
"""No inline script or style, nothing from elsewhere, and no way from a string to HTML."""
HEADERS: Final = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}

Answer = Callable[[Request], Awaitable[Response]]
T = TypeVar("T")


@contextlib.asynccontextmanager
async def console_routes(
    bus: Bus, presence: Presence, accounts: Accounts, settings: GatewaySettings, draining: Callable[[], bool]
) -> AsyncIterator[list[BaseRoute]]:
    """The console's routes while the block runs; none where it is off. Raises ConfigError where nobody may use it."""
    if not settings.console:
        yield []
        return
    if not accounts.open and not settings.console_clients:
        raise ConfigError(
            "the console shows every client's requests: name in gateway.console_clients whose API keys open it",
            field="gateway.console_clients",
        )
    overview = Overview(bus, presence, ended=draining)
    console = Console(bus, accounts, settings.console_clients, overview)
    try:
        yield console.routes()
    finally:
        await overview.close()


class Console:
    """What answers `/console/api/`."""

    def __init__(self, bus: Bus, accounts: Accounts, clients: tuple[str, ...], overview: Overview) -> None:
        """`clients`: whose keys open it, where there are keys."""
        self._bus, self._accounts, self._clients, self._overview = bus, accounts, frozenset(clients), overview
        self._letters = DeadLetters(bus)
        self._looking = asyncio.Semaphore(LOOKS_MAX)

    def routes(self) -> list[BaseRoute]:
        """In full, for the gateway's series and log to tell them apart."""
        return [
            Documented("/console", _to_the_pages, described.TO_THE_PAGES),
            Documented(f"{API}/session", self._guarded(self.session), described.SESSION),
            Documented(f"{API}/state", self._guarded(self.state), described.STATES),
            Documented(f"{API}/trace/{{request_id}}", self._guarded(self.trace), described.TIMELINE),
            Documented(f"{API}/dead", self._guarded(self.letters), described.LETTERS),
            Documented(f"{API}/dead/{{seq}}", self._guarded(self.letter), described.LETTER),
            Documented(f"{API}/dead/{{seq}}/retry", self._guarded(self.retry), described.RETRY, methods=["POST"]),
            Documented(f"{API}/dead/{{seq}}/drop", self._guarded(self.drop), described.DROP, methods=["POST"]),
            _PagesMount("/console", _Pages(directory=PAGES, html=True), described.PAGES),
        ]

    async def session(self, _: Request) -> Response:
        """Whether a key is good, or needed at all."""
        return _json({"open": self._accounts.open})

    async def state(self, _: Request) -> Response:
        """Server-sent events: `pipeline.http.overview.Now` about once a second, until the gateway stops."""
        self._overview.begin()
        return _States(self._overview)

    async def trace(self, request: Request) -> Response:
        """One request's timeline; 404 where the streams have nothing of it, or of several clients' requests."""
        request_id, client = request.path_params["request_id"], request.query_params.get("client") or None
        check_token("request_id", request_id)
        try:
            found = await self._looked_up(lambda: Search(self._bus, request_id).find(client))
        except ConfigError as error:
            return _not_found(str(error))
        return _json(
            {
                "request_id": found.request_id,
                "client": found.client,
                "trace_id": found.trace_id,
                "now_unix_s": time.time(),
                "events": timeline(found),
                "phases": phases(found),
                "missing": gone(found),
            }
        )

    async def letters(self, _: Request) -> Response:
        """The newest dead letters, newest first, without their payloads."""
        letters = await self._looked_up(lambda: self._letters.newest(LETTERS_MAX))
        return _json({"letters": [_summary(seq, letter) for seq, letter in reversed(letters.items())]})

    async def letter(self, request: Request) -> Response:
        try:
            letter = await self._looked_up(lambda: self._letters.one(_seq(request)))
        except ConfigError as error:
            return _not_found(str(error))
        return _json(json.loads(as_json(letter)))

    async def retry(self, request: Request) -> Response:
        """Publish a letter's work again and remove the letter; whose request it is now."""
        try:
            client, request_id = await self._letters.retry(_seq(request))
        except ConfigError as error:
            return _not_found(str(error))
        return _json({"client": client, "request_id": request_id})

    async def drop(self, request: Request) -> Response:
        seq = _seq(request)
        try:
            await self._letters.one(seq)
        except ConfigError as error:
            return _not_found(str(error))
        await self._letters.drop(seq)
        return _json({"dropped": seq})

    def _guarded(self, answer: Answer) -> Answer:
        """For our own pages, and for whoever may use the console. Raises NotPermitted, Unauthorized."""

        async def guarded(request: Request) -> Response:
            refuse_other_sites(request.headers)
            if self._accounts.open:
                refuse_rebound_names(request.headers)
            else:
                account = await self._accounts.of(request.headers.get("authorization"))
                if account.client.name not in self._clients:
                    raise NotPermitted("this API key does not open the console", field="Authorization")
            if request.method == "POST" and request.headers.get("content-type") != "application/json":
                raise InvalidRequest("Content-Type: must be application/json", field="Content-Type")
            response = await answer(request)
            response.headers["Cache-Control"] = "no-store"
            response.headers["X-Content-Type-Options"] = "nosniff"
            return response

        return guarded

    async def _looked_up(self, look: Callable[[], Awaitable[T]]) -> T:
        """What is read from the streams. Raises BusUnavailable where that takes too long."""
        try:
            async with asyncio.timeout(LOOK_S_MAX):
                async with self._looking:
                    return await look()
        except TimeoutError:
            raise BusUnavailable(f"the streams could not be read within {LOOK_S_MAX:g} s") from None
        except msgspec.DecodeError as error:
            raise BusUnavailable(f"a message of another release cannot be read: {error}") from None


class _PagesMount(DocumentedMount):
    """Everything below but the API, whose routes say themselves what they are not asked with."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        return (Match.NONE, {}) if scope["path"].startswith(f"{API}/") else super().matches(scope)


class _Pages(StaticFiles):
    """The files, with what browsers must know of them."""

    def file_response(self, full_path: str | os.PathLike[str], *args: Any, **options: Any) -> Response:
        response = super().file_response(full_path, *args, **options)
        response.headers.update(HEADERS)
        return response


class _States(StreamingResponse):
    """The moments as server-sent events; its viewer is counted out with it, whoever ends it."""

    media_type = "text/event-stream"

    def __init__(self, overview: Overview) -> None:
        super().__init__(_events(overview), headers={"X-Accel-Buffering": "no"})
        self._overview = overview

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._overview.end()


async def _events(overview: Overview) -> AsyncIterator[bytes]:
    async for state in overview.states():
        yield b"data: %s\n\n" % state


def refuse_other_sites(headers: Headers) -> None:
    """Raise NotPermitted for what another site's page has a browser ask.

    As Go's CrossOriginProtection: the browser's own word, else the page's origin; what says neither is no browser.
    """
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None:
        other = site not in ("same-origin", "none")
    else:
        other = origin is not None and urlsplit(origin).netloc != headers.get("host")
    if other:
        raise NotPermitted("pages of other sites may not use the console", field="Origin")


def refuse_rebound_names(headers: Headers) -> None:
    """Raise NotPermitted where a name leads here that anybody may own: its pages would pass for ours (DNS rebinding).

    An address or a name without a dot is nobody else's. Where keys are needed, such a page has none.
    """
    host = urlsplit(f"//{headers.get('host', '')}").hostname or ""
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(host)
        return
    if "." in host and not host.endswith(".localhost"):
        raise NotPermitted(
            f"the console of a gateway without API keys answers under an IP address or localhost, not {host[:80]!r}",
            field="Host",
        )


def _seq(request: Request) -> int:
    """The letter that a path names. Raises NotFound for what is no number of one."""
    text = request.path_params["seq"]
    if not (text.isascii() and text.isdecimal() and len(text) <= SEQ_CHARS_MAX):
        raise NotFound(f"there is no dead letter {text[:SEQ_CHARS_MAX]!r}", field="seq")
    return int(text)


def _summary(seq: int, letter: DeadLetter) -> dict[str, Any]:
    return {
        "seq": seq,
        "died_unix_s": letter.died_unix_s,
        "stage": letter.stage,
        "subject": letter.subject,
        "request_id": letter.request_id,
        "attempts": letter.attempts,
        "code": letter.error.code,
        "message": letter.error.message[:MESSAGE_CHARS_MAX],
    }


async def _to_the_pages(_: Request) -> Response:
    """With the slash that their relative addresses need; relative itself, for whatever stands before us."""
    return RedirectResponse("console/")


def _not_found(message: str) -> Response:
    return _json(error_body(Failure(code="not_found", message=message, status=404)), 404)


def _json(body: dict[str, Any], status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status, media_type="application/json")
