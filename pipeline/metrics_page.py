"""The `/metrics` page over HTTP."""

import socket
import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

Wsgi = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]
READ_S_MAX: Final = 10.0
"""A client that is silent for so long in a request is cut off."""


def text_page(registry: CollectorRegistry) -> Wsgi:
    """The page, in Prometheus' text format whatever the client would rather have.

    In OpenMetrics prometheus_client writes `sglang_token_usage` for `sglang:token_usage`, unless the client asks it not
    to, and Prometheus before 3.0 does not ask.
    """
    page = make_wsgi_app(registry)

    def as_text(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        return page({key: value for key, value in environ.items() if key != "HTTP_ACCEPT"}, start_response)

    return as_text


class MetricsPage:
    """Serves a registry in threads, from the making of it until `close`."""

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        """`port` 0: a free one. Raises OSError where the address is not to be had."""
        kind = _Server6 if ":" in host else _Server
        self._server = make_server(host, port, text_page(registry), kind, _Handler)
        self._host = f"[{host}]" if ":" in host else host
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics-page", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://{self._host}:{self._server.server_port}/metrics"

    def close(self) -> None:
        """Blocks until the server's thread has ended."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = READ_S_MAX

    def log_message(self, format: str, *args: Any) -> None:
        """A scrape is no event."""
