"""SGLang's bootstrap server without HTTP: rows in a key-value bucket, answered from a local copy.

SGLang's own handlers check and answer (`CommonKVBootstrapServer._handle_route_put` and `_handle_route_get`), so
that a release may add fields to a row without a change here.
"""

import json
import logging
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import parse_qsl, urlsplit

import msgspec
from aiohttp import web
from sglang.srt.disaggregation.common.conn import CommonKVBootstrapServer

from pipeline.engine.sglang.handshake.postbox import Postbox
from pipeline.errors import PipelineError

ROWS_MAX: Final = 10_000
"""Of one worker; its oldest rooms are forgotten beyond it. The bucket keeps a row for its ttl."""
ROOM_KEY: Final = "room-"
"""Begins the last token of a key that says which data-parallel rank prefills a room."""
PREFILL_ROUTE: Final = {
    "prefill_dp_rank": "-1", "prefill_cp_rank": "-1", "target_tp_rank": "-1", "target_pp_rank": "-1",
}  # fmt: skip
"""The query with which SGLang asks for a worker's topology."""

logger = logging.getLogger(__name__)


class SilentBootstrapServer(CommonKVBootstrapServer):
    """Stands where SGLang starts its HTTP server on prefill; listens on nothing."""

    def run(self) -> None:
        """Start no thread."""

    def close(self) -> None:
        """Nothing was started."""


@dataclass(frozen=True)
class _Request:
    """As much of an aiohttp request as SGLang's handlers read."""

    body: dict[str, Any] = field(default_factory=dict)
    query: dict[str, str] = field(default_factory=dict)

    async def json(self) -> dict[str, Any]:
        return self.body


@dataclass(frozen=True)
class Answer:
    """As much of a `requests` response as SGLang's clients read."""

    status_code: int
    text: str

    def json(self) -> Any:
        return json.loads(self.text)


def _finish(handling: Coroutine[Any, Any, web.Response]) -> Answer:
    """Run a handler that waits for nothing."""
    try:
        handling.send(None)
    except StopIteration as end:
        return Answer(end.value.status, end.value.text)
    raise RuntimeError("SGLang's bootstrap handler waits for something; it was expected to answer at once")


class RouteBook:
    """This process's copy of the routes bucket. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows: dict[str, dict[str, bytes]] = {}  # host -> key -> row
        self._servers: dict[str, SilentBootstrapServer] = {}

    def change(self, key: str, row: bytes | None) -> str:
        """Take over a row put or deleted (None); returns the host concerned, "<worker>.<incarnation>"."""
        host = key.rpartition(".")[0]
        with self._lock:
            rows = self._rows.setdefault(host, {})
            rows.pop(key, None)
            if row is not None:
                rows[key] = row
                _drop_oldest_rooms(rows)
            if not rows:
                del self._rows[host]
            self._servers.pop(host, None)
        return host

    def hosts(self) -> frozenset[str]:
        with self._lock:
            return frozenset(host for host, rows in self._rows.items() if rows)

    def addresses(self, host: str) -> tuple[tuple[str, int], ...]:
        """SGLang's (host, port) of each registered rank of a worker."""
        with self._lock:
            rows = [json.loads(row) for key, row in self._rows.get(host, {}).items() if not _of_room(key)]
        return tuple((row["rank_ip"], int(row["rank_port"])) for row in rows)

    def ready(self, host: str) -> bool:
        """True where every rank of the worker has registered."""
        return self.route(host, PREFILL_ROUTE).status_code == HTTPStatus.OK

    def route(self, host: str, query: dict[str, str]) -> Answer:
        with self._lock:
            return _finish(self._server(host)._handle_route_get(_Request(query=query)))

    def dp_ranks(self, host: str, rooms: list[int]) -> Answer:
        with self._lock:
            return _finish(self._server(host)._handle_query_dp_ranks(_Request({"bootstrap_rooms": rooms})))

    def _server(self, host: str) -> SilentBootstrapServer:
        """SGLang's table of a worker's rows, made anew after a change, as it counts each put as one more rank."""
        server = self._servers.get(host)
        if server is None:
            server = self._servers[host] = SilentBootstrapServer("", 0)
            for key, row in self._rows.get(host, {}).items():
                put = server._handle_register_dp_rank if _of_room(key) else server._handle_route_put
                answer = _finish(put(_Request(json.loads(row))))
                if answer.status_code != HTTPStatus.OK:
                    logger.error("route %s was refused: %s", key, answer.text)
        return server


def _of_room(key: str) -> bool:
    return key.rpartition(".")[2].startswith(ROOM_KEY)


def _drop_oldest_rooms(rows: dict[str, bytes]) -> None:
    while len(rows) > ROWS_MAX:
        del rows[next(key for key in rows if _of_room(key))]


class RouteRequests:
    """Stands in for the `requests` module in SGLang's disaggregation code; opens no connection."""

    def __init__(self, postbox: Callable[[], Postbox], book: RouteBook) -> None:
        """`postbox` is asked at a request, as SGLang's modules are changed before there is one."""
        self._postbox, self._book = postbox, book

    def Session(self) -> "RouteRequests":
        """As `requests.Session`."""
        return self

    def get(self, url: str, **_: Any) -> Answer:
        parts = urlsplit(url)
        if parts.path != "/route":
            return Answer(HTTPStatus.NOT_FOUND, f"no {parts.path} on the bus")
        return self._book.route(parts.netloc.rpartition(":")[0], dict(parse_qsl(parts.query)))

    def put(self, url: str, *, json: dict[str, Any], **_: Any) -> Answer:
        """This rank's registration."""
        return self._put(str(self._postbox().address), json, keep=True)

    def post(self, url: str, *, json: dict[str, Any], **_: Any) -> Answer:
        parts = urlsplit(url)
        if parts.path == "/query_dp_ranks":
            return self._book.dp_ranks(parts.netloc.rpartition(":")[0], json["bootstrap_rooms"])
        if parts.path == "/register_dp_rank":
            key = f"{self._postbox().address.host}.{ROOM_KEY}{json['bootstrap_room']}"
            return self._put(key, json, keep=False)
        return Answer(HTTPStatus.NOT_FOUND, f"no {parts.path} on the bus")

    def _put(self, key: str, row: dict[str, Any], *, keep: bool) -> Answer:
        try:
            self._postbox().put_row(key, msgspec.json.encode(row), keep=keep)
        except (PipelineError, TimeoutError) as error:
            return Answer(HTTPStatus.SERVICE_UNAVAILABLE, str(error))
        return Answer(HTTPStatus.OK, "OK")
