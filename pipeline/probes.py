"""`/live` and `/ready` over HTTP, from a thread that a blocked event loop cannot silence.

200 where it is so, 503 where not; either way the body is JSON with every reason. Loopback unless told otherwise: there
is no password.
"""

import json
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final

import structlog

from pipeline.errors import ConfigError
from pipeline.health import Health

REQUEST_S_MAX: Final = 5.0
JOIN_S_MAX: Final = 2.0

log = structlog.get_logger()


class Probes:
    """The HTTP server of one worker."""

    def __init__(self, worker: str, health: Callable[[], Health], host: str, port: int) -> None:
        """`health` is called from other threads. Raises ConfigError where the port cannot be had."""
        try:
            self._server = ThreadingHTTPServer((host, port), _handler(worker, health))
        except OSError as error:
            raise ConfigError(
                f"/live and /ready cannot listen on {host}:{port}: {error.strerror}", field="health.port"
            ) from None
        self._thread = threading.Thread(target=self._server.serve_forever, name="probes", daemon=True)
        self._thread.start()
        log.info("health_served", worker=worker, url=self.url)

    @property
    def url(self) -> str:
        host, port = self._server.server_address[:2]
        return f"http://{host!s}:{port}"

    def close(self) -> None:
        """Stop listening. Blocks for a moment."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(JOIN_S_MAX)


def _handler(worker: str, health: Callable[[], Health]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = REQUEST_S_MAX  # a client that says nothing holds a thread no longer

        def do_GET(self) -> None:
            now = health()
            good = {"/live": now.live, "/ready": now.ready}.get(self.path)
            if good is None:
                self.send_error(HTTPStatus.NOT_FOUND, "there are /live and /ready")
                return
            body = json.dumps({"worker": worker, **now.to_dict()}).encode() + b"\n"
            self.send_response(HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Probes come every few seconds: they are not logged."""

    return Handler
