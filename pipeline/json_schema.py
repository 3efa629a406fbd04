"""Is this a JSON schema at all? Found here, a mistake is an error with a path instead of a failed grammar."""

import json
from typing import Any, Final

from pipeline.errors import InvalidRequest
from subjects.limits import GRAMMAR_CHARS_MAX, SCHEMA_DEPTH_MAX

PLACE_CHARS_MAX: Final = 160
"""The longest dotted path to a place in a schema that an error repeats."""

_TYPES: Final = frozenset({"null", "boolean", "integer", "number", "string", "array", "object"})
_ONE_SCHEMA: Final = (
    "additionalItems",
    "additionalProperties",
    "contains",
    "else",
    "if",
    "items",
    "not",
    "propertyNames",
    "then",
    "unevaluatedItems",
    "unevaluatedProperties",
)
_NAMED_SCHEMAS: Final = ("$defs", "definitions", "dependentSchemas", "patternProperties", "properties")
_LISTED_SCHEMAS: Final = ("allOf", "anyOf", "oneOf", "prefixItems")


def schema_text(schema: Any, field: str) -> str:
    """The schema as JSON text, for the engine's grammar. Raises InvalidRequest naming the place below `field`."""
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise _wrong(field, f"has no form in JSON: {error}") from None
    check_length(text, field)  # before the schema's parts: they are looked at on the event loop
    check_schema(schema, field)
    return text


def check_schema_text(text: str, field: str) -> str:
    """The text, where it is a JSON schema. Raises InvalidRequest."""
    check_length(text, field)
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _wrong(field, f"not JSON: {error}", size=len(text)) from None
    check_schema(schema, field)
    return text


def check_length(text: str, field: str) -> str:
    """A grammar of any kind, not longer than engines compile in good time."""
    if len(text) > GRAMMAR_CHARS_MAX:
        raise InvalidRequest(
            f"{field}: {len(text)} characters; at most {GRAMMAR_CHARS_MAX} are allowed",
            field=field,
            size=len(text),
            limit=GRAMMAR_CHARS_MAX,
        )
    return text


def check_schema(schema: Any, field: str, depth: int = 1) -> None:
    """The keywords that hold schemas hold schemas, and types are types. Raises InvalidRequest.

    What else a schema says (lengths, patterns, references) is the grammar compiler's to accept or refuse.
    """
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise _wrong(field, "expected a schema: an object, true or false")
    if depth > SCHEMA_DEPTH_MAX:
        raise _wrong(field, f"nested more than {SCHEMA_DEPTH_MAX} levels deep", size=depth, limit=SCHEMA_DEPTH_MAX)
    _check_words(schema, field)
    for keyword in _ONE_SCHEMA:
        if keyword in schema:
            _check_one_or_list(schema[keyword], f"{field}.{keyword}", depth + 1)
    for keyword in _NAMED_SCHEMAS:
        if keyword in schema:
            for name, part in _object(schema[keyword], f"{field}.{keyword}").items():
                check_schema(part, f"{field}.{keyword}.{name}", depth + 1)
    for keyword in _LISTED_SCHEMAS:
        if keyword in schema:
            for index, part in enumerate(_list(schema[keyword], f"{field}.{keyword}")):
                check_schema(part, f"{field}.{keyword}.{index}", depth + 1)


def _check_words(schema: dict[str, Any], field: str) -> None:
    """`type`, `required` and `enum`."""
    types = schema.get("type", [])
    for word in types if isinstance(types, list) else [types]:
        if not isinstance(word, str) or word not in _TYPES:
            raise _wrong(f"{field}.type", f"expected one of {', '.join(sorted(_TYPES))}")
    if not all(isinstance(name, str) for name in _list(schema.get("required", []), f"{field}.required")):
        raise _wrong(f"{field}.required", "expected a list of names")
    if "enum" in schema and not _list(schema["enum"], f"{field}.enum"):
        raise _wrong(f"{field}.enum", "expected at least one value")


def _check_one_or_list(value: Any, field: str, depth: int) -> None:
    """A schema; `items` was a list of them before draft 2020-12."""
    if field.endswith(".items") and isinstance(value, list):
        for index, part in enumerate(value):
            check_schema(part, f"{field}.{index}", depth)
    else:
        check_schema(value, field, depth)


def _object(value: Any, field: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(field, "expected an object")
    return value


def _list(value: Any, field: str) -> list[Any]:
    if not isinstance(value, list):
        raise _wrong(field, "expected a list")
    return value


def _wrong(field: str, what: str, *, size: int | None = None, limit: int | None = None) -> InvalidRequest:
    """The place is shortened in the middle: a schema can be deep, and its names long."""
    if len(field) > PLACE_CHARS_MAX:
        half = PLACE_CHARS_MAX // 2
        field = f"{field[:half]}...{field[-half:]}"
    return InvalidRequest(f"{field}: {what}", field=field, size=size, limit=limit)
