"""What a body says, as a value, and lists with pages, as OpenAI's API has them."""

from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request

from pipeline.errors import InvalidRequest, NotFound
from pipeline.refusals import refusal

T = TypeVar("T")


def read_json(body: bytes, kind: type[T]) -> T:
    """Raises InvalidRequest naming the field."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise refusal(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}", size=len(body)) from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deep", size=len(body)) from None


def page(request: Request, bodies: Sequence[dict[str, Any]], *, limit: int, limit_max: int) -> dict[str, Any]:
    """The part of a list that the query's `after` and `limit` ask for. Raises InvalidRequest, NotFound.

    `limit`: for a query that names none.
    """
    query = request.query_params
    if (text := query.get("limit")) is not None:
        limit = int(text) if text.isascii() and text.isdecimal() and len(text) <= 9 else 0
        if not 1 <= limit <= limit_max:
            raise InvalidRequest(f"limit: must be 1 to {limit_max}", field="limit", limit=limit_max)
    begin = 0
    if (after := query.get("after")) is not None:
        places = [place for place, body in enumerate(bodies) if body["id"] == after]
        if not places:
            raise NotFound(f"after: {after[:64]!r} is not in this list", field="after")
        begin = places[0] + 1
    shown = bodies[begin : begin + limit]
    return {
        "object": "list",
        "data": list(shown),
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": begin + limit < len(bodies),
    }
