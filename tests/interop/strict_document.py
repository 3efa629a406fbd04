"""The gateway's OpenAPI document without room for a field of an answer that it does not name."""

from typing import Any

from pipeline.http.openapi import bodies


def strict(document: dict[str, Any]) -> dict[str, Any]:
    """Clients must bear with fields that are new to them, so the document itself leaves room; a test must not."""
    schemas = {
        name: schema if name in bodies.schemas() else _closed(schema)
        for name, schema in document["components"]["schemas"].items()
    }
    return document | {"components": document["components"] | {"schemas": schemas}}


def _closed(value: Any) -> Any:
    if isinstance(value, list):
        return [_closed(one) for one in value]
    if not isinstance(value, dict):
        return value
    strict = {"additionalProperties": False} if "properties" in value and "additionalProperties" not in value else {}
    return {key: _closed(one) for key, one in value.items()} | strict
