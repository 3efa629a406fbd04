"""What the gateway takes, as JSON schemas: made of the structs that decode it, with the limits that are checked behind
them. The tests hold each limit against the check itself, on both of its sides."""

import copy
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Final

import msgspec

from pipeline.batch import URLS
from pipeline.batches import WINDOW, BatchRequest
from pipeline.files import PURPOSES
from pipeline.http.files import ANCHOR, SECONDS
from pipeline.http.openapi.operations import Schema
from pipeline.http.responses import INPUT_ITEMS_MAX, PASSED, ROLES, TEXT_TYPES, ResponsesRequest
from subjects import limits, names
from subjects.catalogue import comments
from subjects.messages import EmbeddingRequest, Request

REF: Final = "#/components/schemas/{name}"
TOKEN: Final[Schema] = {"pattern": f"^[A-Za-z0-9_-]{{1,{names.TOKEN_CHARS_MAX}}}$"}
"""A name that can stand in a subject."""
_PENALTY: Final = {"minimum": -limits.PENALTY_MAX, "maximum": limits.PENALTY_MAX}
_RANK: Final = {"minimum": 0, "maximum": 2**31 - 1}
_GRAMMAR: Final = {"maxLength": limits.GRAMMAR_CHARS_MAX}
_LOGPROBS: Final = {"minimum": 0, "maximum": limits.TOP_LOGPROBS_MAX}
_METADATA: Final = {
    "maxProperties": limits.METADATA_MAX,
    "propertyNames": {"minLength": 1, "maxLength": limits.METADATA_KEY_CHARS_MAX},
    "additionalProperties": {"type": "string", "maxLength": limits.METADATA_VALUE_CHARS_MAX},
}

LIMITS: Final[Mapping[str, Schema]] = {
    "best_of": {"minimum": 1, "maximum": limits.CHOICES_MAX},
    "cache_salt": {"minLength": 1, "maxLength": limits.CACHE_SALT_CHARS_MAX},
    "data_parallel_rank": _RANK,
    "ebnf": _GRAMMAR,
    "frequency_penalty": _PENALTY,
    "json_schema": _GRAMMAR,
    "lora_path": {"maxLength": limits.LORA_NAME_CHARS_MAX},
    "max_completion_tokens": {"minimum": 1},
    "max_thinking_tokens": {"minimum": 0},
    "max_tokens": {"minimum": 1},
    "metadata": {"maxProperties": limits.METADATA_ENTRIES_MAX},
    "min_p": {"minimum": 0, "maximum": 1},
    "min_tokens": {"minimum": 0},
    "model": {"minLength": 1},
    "n": {"minimum": 1, "maximum": limits.CHOICES_MAX},
    "presence_penalty": _PENALTY,
    "priority": {"minimum": -limits.PRIORITY_MAX, "maximum": limits.PRIORITY_MAX},
    "regex": _GRAMMAR,
    "repetition_penalty": {"exclusiveMinimum": 0, "maximum": limits.PENALTY_MAX},
    "request_id": TOKEN,
    "routed_dp_rank": _RANK,
    "seed": {"minimum": limits.SEED_MIN, "maximum": limits.SEED_MAX},
    "session": TOKEN,
    "stop_token_ids": {"maxItems": limits.STOP_TOKEN_IDS_MAX, "items": {"type": "integer", "minimum": 0}},
    "store": {"enum": [False, None]},
    "temperature": {"minimum": 0, "maximum": limits.TEMPERATURE_MAX},
    "top_k": {"minimum": -1, "maximum": limits.TOP_K_MAX, "not": {"const": 0}},
    "top_logprobs": _LOGPROBS,
    "top_p": {"exclusiveMinimum": 0, "maximum": 1},
    "logit_bias": {
        "maxProperties": limits.LOGIT_BIAS_ENTRIES_MAX,
        "propertyNames": {"pattern": "^[0-9]{1,10}$"},
        "additionalProperties": {
            "type": "number",
            "minimum": -limits.LOGIT_BIAS_MAX,
            "maximum": limits.LOGIT_BIAS_MAX,
        },
    },
    "stop": {
        "minLength": 1,
        "maxLength": limits.STOP_STRING_CHARS_MAX,
        "maxItems": limits.STOP_STRINGS_MAX,
        "items": {"type": "string", "minLength": 1, "maxLength": limits.STOP_STRING_CHARS_MAX},
    },
}
"""Of `Request`'s fields, in JSON schema's words; a word that does not fit a value's type says nothing of it."""

_CHAT: Final[Mapping[str, Schema]] = {
    "logprobs": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
    "messages": {"minItems": 1, "maxItems": limits.MESSAGES_MAX},
    "tools": {"maxItems": limits.TOOLS_MAX},
}
_ONLY_CHAT: Final = ("messages", "tools", "tool_choice", "reasoning_effort", "chat_template_kwargs", "top_logprobs")
_COMPLETION: Final[Mapping[str, Schema]] = {
    "logprobs": {"anyOf": [{"type": "integer"}, {"type": "null"}], **_LOGPROBS},
    "max_completion_tokens": {"minimum": 0, "description": "0 with `echo` only: the prompt alone"},
    "max_tokens": {"minimum": 0, "description": "0 with `echo` only: the prompt alone"},
    "prompt": {"minLength": 1, "minItems": 1},
}
_ONLY_COMPLETION: Final = ("prompt", "echo")
_EMBEDDING: Final[Mapping[str, Schema]] = {
    "dimensions": {"minimum": 1},
    "input": {"minLength": 1, "minItems": 1},
    "model": {"minLength": 1},
    "request_id": TOKEN,
}
_PART: Final[Schema] = {
    "type": "object",
    "properties": {"type": {"enum": [*TEXT_TYPES]}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_ITEM: Final[Schema] = {
    "type": "object",
    "properties": {
        "type": {"const": "message"},
        "role": {"enum": [*ROLES]},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART, "minItems": 1}]},
        **{name: {} for name in ("id", "status", "phase")},
    },
    "required": ["role", "content"],
    "additionalProperties": False,
}
_RESPONSES: Final[Mapping[str, Schema]] = {
    "background": {"enum": [False, None]},
    "input": {
        "anyOf": [
            {"type": "string"},
            {"type": "array", "items": _ITEM, "minItems": 1, "maxItems": INPUT_ITEMS_MAX},
        ]
    },
    "max_output_tokens": {"minimum": 1},
    "metadata": _METADATA,
    "model": LIMITS["model"],
    "reasoning": {"additionalProperties": {"type": "null"}},
    "temperature": LIMITS["temperature"],
    "tools": {"maxItems": 0},
    "top_logprobs": LIMITS["top_logprobs"],
    "top_p": LIMITS["top_p"],
}
_BATCH: Final[Mapping[str, Schema]] = {
    "completion_window": {
        "pattern": f"^{WINDOW.pattern}$".replace(r"\d", "[0-9]"),
        "description": "24h, or less in h, m or s",
    },
    "endpoint": {"enum": [*URLS]},
    "metadata": _METADATA,
}
_UPLOAD: Final[Schema] = {
    "type": "object",
    "properties": {
        "file": {"type": "string", "format": "binary", "description": f"1 to {limits.FILE_BYTES_MAX} bytes"},
        "purpose": {"enum": [*PURPOSES]},
        ANCHOR: {"const": "created_at"},
        SECONDS: {
            "type": "integer",
            "minimum": int(limits.FILE_KEPT_S_MIN),
            "maximum": int(limits.FILES_KEPT_S),
            "description": "with the anchor only",
        },
    },
    "required": ["file", "purpose"],
    "additionalProperties": False,
    "dependentRequired": {ANCHOR: [SECONDS], SECONDS: [ANCHOR]},
}

_TEXT_FORMAT: Final = {"type": {"enum": ["text", "json_object"]}}
_KINDS: Final[Mapping[str, Sequence[Mapping[str, Schema | None]]]] = {
    "ChatMessage": (
        {"role": {"enum": ["system", "developer", "user"]}, "content": {}}
        | dict.fromkeys(("tool_calls", "tool_call_id", "reasoning_content")),
        {"role": {"enum": ["assistant"]}, "content": {}, "tool_call_id": None},
        {
            "role": {"enum": ["assistant"]},
            "tool_calls": {"minItems": 1, "maxItems": limits.TOOLS_MAX},
            "tool_call_id": None,
        },
        {"role": {"enum": ["tool"]}, "content": {}, "tool_call_id": {"minLength": 1}}
        | dict.fromkeys(("tool_calls", "reasoning_content")),
    ),
    "ResponseFormat": (_TEXT_FORMAT, {"type": {"enum": ["json_schema"]}, "json_schema": {}}),
    "TextFormat": (_TEXT_FORMAT, {"type": {"enum": ["json_schema"]}, "name": {"minLength": 1}, "schema": {}}),
}
"""Structs of which a field's value decides which others must be there."""


@cache
def schemas() -> dict[str, Schema]:
    """Each body's schema by its name, and those that they refer to."""
    kinds = (Request, EmbeddingRequest, ResponsesRequest, BatchRequest)
    _, parts = msgspec.json.schema_components(kinds, ref_template=REF)
    request, embedding, responses, batch = (parts.pop(kind.__name__) for kind in kinds)
    _describe(request, Request)
    _describe(embedding, EmbeddingRequest)
    for schema in (request, embedding):
        _allow_nulls(schema)
    _limit(request, LIMITS)
    chat, completion = copy.deepcopy(request), request
    responses["properties"] |= {name: copy.deepcopy(chat["properties"][name]) for name in PASSED}
    bodies = {
        "ChatCompletionRequest": _body(chat, _CHAT, ("model", "messages"), without=_ONLY_COMPLETION),
        "CompletionRequest": _body(completion, _COMPLETION, ("model", "prompt"), without=_ONLY_CHAT),
        "EmbeddingRequest": _body(embedding, _EMBEDDING, ("model", "input")),
        "ResponsesRequest": _body(responses, _RESPONSES, ("model", "input")),
        "BatchRequest": _body(batch, _BATCH, ("input_file_id", "endpoint", "completion_window")),
        "FileUpload": _UPLOAD,
        "Nothing": {"description": "It is not read. That it must be said to be JSON keeps other sites' forms out."},
    }
    for name, kinds_of in _KINDS.items():
        parts[name] = _one_of(parts[name], kinds_of)
    return _tidied(bodies | parts)


def _one_of(schema: Schema, kinds: Sequence[Mapping[str, Schema | None]]) -> Schema:
    """A struct's schema as one for each of its kinds: a field is narrowed and required, or, with None, null at most."""
    told = []
    for kind in kinds:
        one = copy.deepcopy(schema)
        for name, words in kind.items():
            if words is None:
                one["properties"][name] = {"type": "null"}
            else:
                _disallow_null(one["properties"][name])
                one["properties"][name] |= words
        one["required"] = [name for name, words in kind.items() if words is not None]
        told.append(one)
    return {"description": schema.get("description", ""), "anyOf": told}


def _body(schema: Schema, limited: Mapping[str, Schema], required: tuple[str, ...], *, without: Any = ()) -> Schema:
    for name in without:
        del schema["properties"][name]
    _limit(schema, limited)
    schema["required"] = [*required]
    for name in required:
        _disallow_null(schema["properties"][name])
    del schema["title"], schema["description"]
    return schema


def _limit(schema: Schema, limited: Mapping[str, Schema]) -> None:
    for name, words in limited.items():
        schema["properties"][name] |= words


def _describe(schema: Schema, kind: type[msgspec.Struct]) -> None:
    """By the comment behind each field in the source."""
    for name, about in comments(kind).items():
        schema["properties"][name]["description"] = about


def _allow_nulls(schema: Schema) -> None:
    """As OpenAI's API has it, a field that is null counts as not given."""
    for name, field in schema["properties"].items():
        if "type" in field and name not in schema.get("required", ()):
            field["anyOf"] = [{"type": field.pop("type")}, {"type": "null"}]


def _disallow_null(field: Schema) -> None:
    field["anyOf"] = [kind for kind in field.get("anyOf", [{}]) if kind != {"type": "null"}]
    if len(field["anyOf"]) == 1:
        field |= field.pop("anyOf")[0]
    field.pop("default", None)


def _tidied(value: Any) -> Any:
    """Without null defaults, which say nothing, and the titles that repeat a name."""
    if isinstance(value, list):
        return [_tidied(one) for one in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _tidied(one)
        for key, one in value.items()
        if not (key == "default" and one is None) and not (key == "title" and isinstance(one, str))
    }
