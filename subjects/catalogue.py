"""Renders docs/subjects.md from the declarations: subjects, streams, consumers, buckets, headers, messages."""

import ast
import inspect
import io
import tokenize
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import pairwise
from types import ModuleType
from typing import Any, Final

import msgspec

from subjects import headers, limits, messages, names, streams
from subjects.codec import BlockHashes, TokenIds, Vector

_PACKED: Final[dict[type, str]] = {TokenIds: "token ids", BlockHashes: "block hashes", Vector: "vector"}
_HEAD: Final = """\
# Subjects, streams and messages

<!-- Written by `just subjects` from the package `subjects`; a test fails while the two differ. -->

Everything that travels between the parts of sglang-nats. Variable parts of a subject stand in braces; names are
made safe tokens (`meta-llama/Llama-3.1-8B` becomes `meta-llama-Llama-3-1-8B`). Payloads are MessagePack; a request
in JSON is answered in JSON. Token ids, block hashes and vectors are little-endian u32, i64 and f32 bytes in
MessagePack and numbers in JSON."""


def render() -> str:
    """The whole page as Markdown."""
    buckets = (_buckets(), _object_buckets())
    sections = (_HEAD, _subjects(), _streams(), _consumers(), *buckets, _headers(), _limits(), _messages())
    return "\n\n".join(sections) + "\n"


def _subjects() -> str:
    rows = [
        (f"`{subject.template}`", subject.flow, subject.kind, _message_link(subject.payload), subject.about)
        for subject in names.ALL
    ]
    return "## Subjects\n\n" + _table(("Subject", "From -> to", "Kind", "Payload", "What for"), rows)


def _streams() -> str:
    rows = [
        (
            f"`{stream.name}`",
            "<br>".join(f"`{subject}`" for subject in stream.subjects),
            f"{stream.retention}, {stream.storage}",
            f"discard {stream.discard}",
            _limits_of(stream),
            stream.about,
        )
        for stream in streams.STREAMS
    ]
    return "## Streams\n\n" + _table(("Stream", "Captures", "Keeps", "When full", "Limits", "What for"), rows)


def _limits_of(stream: streams.StreamSpec) -> str:
    parts = [_bytes(stream.max_bytes), f"{_bytes(stream.max_msg_bytes)} a message"]
    if stream.max_msgs_per_subject:
        parts.append(f"{stream.max_msgs_per_subject:,} messages a subject")
    if stream.max_age_s:
        parts.append(f"{stream.max_age_s:g} s")
    parts.append(f"duplicates known for {stream.duplicate_window_s:g} s")
    return ", ".join(parts)


def _consumers() -> str:
    of_model = (
        *streams.decode_takes("MODEL", "WORKER"),
        *streams.prefill_takes("MODEL", "WORKER"),
        streams.embed_any("MODEL"),
    )
    rows = [
        (
            f"`{spec.name}`",
            f"`{spec.stream}`",
            f"`{spec.filter_subject}`" if spec.filter_subject else "everything",
            f"{spec.ack_wait_s:g} s",
            str(spec.max_deliver),
        )
        for spec in (*streams.CONSUMERS, *of_model)
    ]
    heads = ("Consumer", "Stream", "Takes", "Lease (ack_wait)", "Deliveries at most")
    return "## Consumers\n\nDurable pull consumers with explicit acks.\n\n" + _table(heads, rows)


def _buckets() -> str:
    rows = [
        (f"`{bucket.name}`", bucket.storage, f"{bucket.ttl_s:g} s" if bucket.ttl_s else "for ever", bucket.about)
        for bucket in streams.BUCKETS
        if isinstance(bucket, streams.BucketSpec)
    ]
    return "## Key-value buckets\n\n" + _table(("Bucket", "Storage", "Values live", "What for"), rows)


def _object_buckets() -> str:
    rows = [
        (
            f"`{bucket.name}`",
            bucket.storage,
            f"{bucket.ttl_s:g} s",
            f"{_bytes(bucket.max_bytes)}, {_bytes(bucket.object_bytes_max)} an object",
            bucket.about,
        )
        for bucket in streams.BUCKETS
        if isinstance(bucket, streams.ObjectBucketSpec)
    ]
    heads = ("Bucket", "Storage", "Objects live", "Limits", "What for")
    return "## Object buckets\n\nAs `nats object` and every client has them.\n\n" + _table(heads, rows)


def _headers() -> str:
    rows = [(f"`{name}`", about) for name, about in headers.ALL.items()]
    return "## Headers\n\n" + _table(("Header", "What for"), rows)


def _limits() -> str:
    about = _docstrings(limits)
    rows = [
        (f"`{name}`", f"{value:,g}" if isinstance(value, float) else f"{value:,}", about.get(name, ""))
        for name, value in vars(limits).items()
        if name.isupper() and isinstance(value, (int, float))
    ]
    heads = ("Limit", "Value", "Meaning")
    return "## Limits\n\nThe unit is a word of the name, or the thing counted.\n\n" + _table(heads, rows)


def _docstrings(module: ModuleType) -> dict[str, str]:
    """The string that stands behind each constant in a module's source."""
    body = ast.parse(inspect.getsource(module)).body
    return {
        first.target.id: inspect.cleandoc(second.value.value)
        for first, second in pairwise(body)
        if isinstance(first, ast.AnnAssign)
        and isinstance(first.target, ast.Name)
        and isinstance(second, ast.Expr)
        and isinstance(second.value, ast.Constant)
    }


def _messages() -> str:
    about = "unknown fields are ignored, but in `Request` and `EmbeddingRequest`."
    parts = ["## Messages", f"Fields are only ever added, with defaults; {about}"]
    for kind in _message_types():
        about = inspect.cleandoc(kind.__doc__ or "") if kind.__doc__ else ""
        rows = [
            (
                f"`{field.encode_name}`",
                f"`{_type_name(field.type)}`",
                _default(field),
                comments(kind).get(field.name, ""),
            )
            for field in msgspec.structs.fields(kind)
        ]
        parts.append(f"### {kind.__name__}")
        parts += [about] if about else []
        parts.append(_table(("Field", "Type", "Default", "Meaning"), rows) if rows else "No fields.")
    return "\n\n".join(parts)


def _message_types() -> list[type[msgspec.Struct]]:
    """Every struct of subjects.messages, in the order of its source."""
    return [
        value
        for value in vars(messages).values()
        if isinstance(value, type)
        and issubclass(value, msgspec.Struct)
        and value.__module__ == messages.__name__
        and value is not messages.Message
    ]


def _message_link(payload: str) -> str:
    known = {kind.__name__ for kind in _message_types()}
    return f"[{payload}](#{payload.lower()})" if payload in known else payload


@cache
def comments(kind: type) -> dict[str, str]:
    """The comment behind each field in the source: that is where its meaning, shape and unit stand."""
    source = inspect.getsource(kind)
    by_line = {
        piece.start[0]: piece.string.lstrip("# ")
        for piece in tokenize.generate_tokens(io.StringIO(source).readline)
        if piece.type == tokenize.COMMENT
    }
    body = ast.parse(source).body[0].body  # type: ignore[attr-defined]
    fields = [node for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    return {node.target.id: by_line[node.end_lineno] for node in fields if node.end_lineno in by_line}


def _type_name(kind: Any) -> str:
    if kind in _PACKED:
        return _PACKED[kind]
    if isinstance(kind, type) and not hasattr(kind, "__args__"):
        return "null" if kind is type(None) else kind.__name__
    text = str(kind).replace("typing.", "").replace("NoneType", "null").replace("None", "null")
    for prefix in ("subjects.messages.", "subjects.codec."):
        text = text.replace(prefix, "")
    return text


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "required"
    value = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    if isinstance(value, msgspec.Struct):
        return "its defaults"
    if type(value) in _PACKED:
        return "none"
    return f"`{msgspec.json.encode(value).decode()}`"


def _bytes(number: int) -> str:
    """A size in the largest unit that divides well."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:g} {unit}"
    return f"{number} bytes"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [_row(heads), "|" + " --- |" * len(heads), *(_row(row) for row in rows)]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
