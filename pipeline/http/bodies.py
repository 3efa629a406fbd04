"""Bodies of HTTP requests and answers."""

from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from pipeline.errors import PayloadTooLarge

DISCARDED_BYTES_MAX: Final = 16 * 1024 * 1024
"""So much of a body that is too large is read, for its sender to hear the answer."""
REQUEST_ID: Final = "X-Request-Id"


async def read_body(request: Request, bytes_max: int) -> bytes:
    """Raises PayloadTooLarge."""
    body, size = bytearray(), 0
    async for part in request.stream():
        size += len(part)
        if size <= bytes_max:
            body += part
        elif size > DISCARDED_BYTES_MAX:
            break
    if size > bytes_max:
        raise PayloadTooLarge(f"the body has more than {bytes_max} bytes", size=size, limit=bytes_max)
    return bytes(body)


def json_response(body: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")
