"""The document: each route of an application, as it says itself."""

import re
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from typing import Any, Final

import msgspec
from starlette.routing import BaseRoute

from pipeline.errors import PipelineError, Unauthorized
from pipeline.http.bodies import REQUEST_ID
from pipeline.http.openapi import answers, bodies
from pipeline.http.openapi.operations import EVENTS, JSON, Documented, DocumentedMount, Operation, Schema, Undocumented

OPENAPI: Final = "3.1.0"
ABOUT: Final = (
    "OpenAI's API in front of an SGLang pipeline on NATS. A field is taken, or refused with a 400 that names it and "
    "says why; none is dropped in silence. A field that is null counts as not given. A stream that has begun ends in "
    "`data: [DONE]`, or in an event with an error; a silence is filled with comments. A request that was accepted "
    "survives the death of any worker, and its stream can be read on at any gateway."
)
BEARER: Final = "apiKey"
_RETRY_AFTER: Final = "Retry-After"
_HEADERS: Final[dict[str, Schema]] = {
    REQUEST_ID: {"description": "The request's id, to resume it under.", "required": True},
    _RETRY_AFTER: {"description": "Seconds.", "required": True},
    "WWW-Authenticate": {"description": "Bearer.", "required": True},
}
_TYPES: Final[dict[str, Schema]] = {
    REQUEST_ID: bodies.TOKEN | {"type": "string"},
    _RETRY_AFTER: {"type": "integer", "minimum": 1},
    "WWW-Authenticate": {"const": "Bearer"},
}
_VARIABLE: Final = re.compile(r"\{(\w+)(?::\w+)?\}")
_VARIABLES: Final[dict[str, Schema]] = {
    "seq": {"type": "integer", "minimum": 1},
    "request_id": bodies.TOKEN | {"type": "string"},
}


def document(routes: Iterable[BaseRoute], *, keyed: bool) -> dict[str, Any]:
    """OpenAPI 3.1 of all `routes`. `keyed`: clients need an API key. Raises TypeError for a route that says nothing."""
    operations = [*_operations(routes)]
    types = [kind for *_, one in operations for kind in (one.answer, *one.events) if kind is not None]
    made, parts = msgspec.json.schema_components([answers.Error, *types], ref_template=bodies.REF)
    schemas = dict(zip(types, made[1:], strict=True))
    paths: dict[str, Any] = {}
    for path, variables, method, operation in operations:
        paths.setdefault(path, {"parameters": variables} if variables else {})[method] = _operation(
            operation, schemas, keyed=keyed and operation.keyed
        )
    components: dict[str, Any] = {"schemas": bodies.schemas() | parts}
    if keyed:
        components["securitySchemes"] = {BEARER: {"type": "http", "scheme": "bearer"}}
    info = {"title": "sglang-nats", "version": version("sglang-nats"), "description": ABOUT}
    return {"openapi": OPENAPI, "info": info, "paths": paths, "components": components}


def _operations(routes: Iterable[BaseRoute]) -> Iterator[tuple[str, list[Schema], str, Operation]]:
    """Path, its variables, method and operation."""
    for route in routes:
        if isinstance(route, DocumentedMount):
            yield route.path + "/{path}", [_variable("path")], "get", route.operation
        elif isinstance(route, Documented):
            variables = [_variable(name) for name in _VARIABLE.findall(route.path)]
            for method in sorted((route.methods or set()) - {"HEAD"}):
                yield _VARIABLE.sub(r"{\1}", route.path), variables, method.lower(), route.operation
        elif not isinstance(route, Undocumented):
            raise TypeError(f"{route} is in no document")


def _variable(name: str) -> Schema:
    schema = _VARIABLES.get(name, {"type": "string", "minLength": 1})
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _operation(operation: Operation, schemas: dict[Any, Schema], *, keyed: bool) -> Schema:
    told: dict[str, Any] = {
        "operationId": operation.name,
        "tags": [operation.tag],
        "summary": operation.summary,
        "responses": _answers(operation, schemas) | _errors(operation, keyed=keyed),
    }
    if operation.parameters:
        told["parameters"] = [*operation.parameters]
    if operation.body is not None:
        schema = {"$ref": bodies.REF.format(name=operation.body)}
        told["requestBody"] = {"required": True, "content": {operation.body_media: {"schema": schema}}}
    if keyed:
        told["security"] = [{BEARER: []}]
    return told


def _answers(operation: Operation, schemas: dict[Any, Schema]) -> dict[str, Schema]:
    content: dict[str, Schema] = {media: {} for media in operation.media}
    if operation.answer is not None:
        content[JSON] = {"schema": schemas[operation.answer]}
    if operation.events:
        content[EVENTS] = {"schema": _event([schemas[kind] for kind in operation.events])}
    told: dict[str, Any] = {}
    for status, about in (operation.statuses or {200: "The answer."}).items():
        told[str(status)] = {"description": about}
        if content:
            told[str(status)]["content"] = content
        if operation.headers:
            told[str(status)]["headers"] = _headers(operation.headers)
        if operation.leads_to:
            told[str(status)]["links"] = {
                name: {"operationId": name, "parameters": {variable: "$response.body#/id"}}
                for name, variable in operation.leads_to
            }
    return told


def _event(kinds: list[Schema]) -> Schema:
    """A server-sent event with JSON of one of the kinds, or an error. OpenAPI 3.2 calls it the `itemSchema`."""
    error = {"$ref": bodies.REF.format(name="Error")}
    data = {
        "type": "string",
        "if": {"const": "[DONE]"},
        "else": {"contentMediaType": JSON, "contentSchema": {"anyOf": [*kinds, error]}},
    }
    text = {"type": "string"}
    return {
        "type": "object",
        "description": "One of the stream's events.",
        "properties": {"id": text, "event": text, "data": data},
        "required": ["data"],
    }


def _errors(operation: Operation, *, keyed: bool) -> dict[str, Schema]:
    """By status; each with the codes that it can have."""
    raised = {*operation.raises, PipelineError, *((Unauthorized,) if keyed else ())}
    told: dict[str, Any] = {}
    for status in sorted({kind.status for kind in raised}):
        codes = sorted(kind.code for kind in raised if kind.status == status)
        told[str(status)] = {
            "description": f"`code`: {', '.join(codes)}",
            "content": {JSON: {"schema": {"$ref": bodies.REF.format(name="Error")}}},
        }
        if status in (429, 503):
            told[str(status)]["headers"] = _headers((_RETRY_AFTER,))
        elif status == Unauthorized.status:
            told[str(status)]["headers"] = _headers(("WWW-Authenticate",))
    return told


def _headers(names: Sequence[str]) -> dict[str, Schema]:
    return {name: _HEADERS[name] | {"schema": _TYPES[name]} for name in names}
