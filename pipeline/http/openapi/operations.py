"""Routes that say what they take and what they answer. A route cannot be made without, so none is left out."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp

from pipeline.errors import PipelineError

Schema = dict[str, Any]
"""A JSON schema (2020-12), or another part of the document."""
JSON: Final = "application/json"
EVENTS: Final = "text/event-stream"
FORM: Final = "multipart/form-data"


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """What a client must know of one method of one path."""

    name: str  # unique; OpenAI's own where it has the operation
    tag: str
    summary: str
    body: str | None = None  # a schema of `bodies`
    body_media: str = JSON
    parameters: Sequence[Schema] = ()  # of the query and the header; those of the path are the route's
    answer: Any = None  # the type of its JSON; None where it has none
    events: tuple[Any, ...] = ()  # the types of the JSON in a stream's events; none where it never streams
    media: tuple[str, ...] = ()  # what else comes with 200
    statuses: Mapping[int, str] | None = None  # of answers with `answer`; None: 200
    headers: tuple[str, ...] = ()  # that every whole answer and every stream has
    raises: tuple[type[PipelineError], ...] = ()
    leads_to: tuple[tuple[str, str], ...] = ()  # operations that take the answer's id, and as which variable
    keyed: bool = True  # needs an API key where there are keys


class Documented(Route):
    """A route of the document."""

    def __init__(
        self,
        path: str,
        endpoint: Callable[[Request], Awaitable[Response]],
        operation: Operation,
        *,
        methods: Sequence[str] = ("GET",),
    ) -> None:
        super().__init__(path, endpoint, methods=[*methods])
        self.operation = operation


class Undocumented(Route):
    """A route that only says why nothing is there: in no document."""


class DocumentedMount(Mount):
    """A folder of the document: GET of any path below it."""

    def __init__(self, path: str, app: ASGIApp, operation: Operation) -> None:
        super().__init__(path, app)
        self.operation = operation
