"""The wire is plain MessagePack and plain JSON: decoders that are not ours read it, and we read theirs."""

import json
from pathlib import Path
from typing import Any

import msgpack
import pytest

from subjects import messages
from subjects.codec import Format, TokenIds, decode, encode
from subjects.messages import ChatMessage, Frame, Message, PreprocessedRequest, Request, StopConditions, TextContent

SAMPLES = sorted((Path(__file__).parents[1] / "golden").glob("*/*.msgpack"))


def is_plain(value: Any) -> bool:
    """True for what every MessagePack library knows: no extension types, no keys but text."""
    if isinstance(value, dict):
        return all(isinstance(name, str) and is_plain(part) for name, part in value.items())
    if isinstance(value, list):
        return all(map(is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | bytes)


@pytest.mark.parametrize("file", SAMPLES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_another_decoder_reads_our_bytes_and_we_read_its(file):
    kind: type[Message] = vars(messages)[file.stem]
    payload = file.read_bytes()
    plain = msgpack.unpackb(payload, strict_map_key=True)
    assert isinstance(plain, dict)
    assert is_plain(plain)
    assert plain.keys() <= {*kind.__struct_encode_fields__, "type"}
    assert decode(kind, msgpack.packb(plain)) == decode(kind, payload)


@pytest.mark.parametrize("file", SAMPLES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_both_formats_hold_the_same_message(file):
    kind: type[Message] = vars(messages)[file.stem]
    as_json = file.with_suffix(".json").read_bytes()
    assert isinstance(json.loads(as_json), dict)
    assert decode(kind, as_json) == decode(kind, file.read_bytes())


def test_there_are_samples():
    assert SAMPLES


def test_a_task_field_by_field():
    request = PreprocessedRequest(
        request_id="r",
        client="c",
        model="m",
        token_ids=TokenIds.of([1, 258, 49151]),
        stop=StopConditions(max_tokens=5, stop=("x",)),
        deadline_unix_s=5.5,
    )
    assert msgpack.unpackb(encode(request)) == {
        "request_id": "r",
        "client": "c",
        "model": "m",
        "token_ids": b"\x01\x00\x00\x00\x02\x01\x00\x00\xff\xbf\x00\x00",
        "stop": {"max_tokens": 5, "stop": ["x"]},
        "deadline_unix_s": 5.5,
    }


def test_in_json_token_ids_are_numbers():
    frame = Frame(request_id="r", token_ids=TokenIds.of([1, 258]), text="é")
    assert json.loads(encode(frame, Format.JSON)) == {"request_id": "r", "token_ids": [1, 258], "text": "é"}


def test_token_ids_as_numbers_are_read_from_messagepack_too():
    theirs = msgpack.packb({"request_id": "r", "token_ids": [1, 258]})
    assert decode(Frame, theirs) == Frame(request_id="r", token_ids=TokenIds.of([1, 258]))


def test_a_request_packed_by_another_library():
    theirs = msgpack.packb(
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "n": 2, "temperature": 1}
    )
    assert decode(Request, theirs) == Request(
        messages=(ChatMessage(role="user", content=(TextContent(text="hi"),)),), n=2, temperature=1.0
    )


def test_what_is_at_its_default_is_not_sent_except_usage():
    assert msgpack.unpackb(encode(Frame(request_id="r"))) == {"request_id": "r"}
    usage = messages.Usage(prompt_tokens=1, completion_tokens=2)
    assert msgpack.unpackb(encode(usage)) == {"prompt_tokens": 1, "completion_tokens": 2, "cached_tokens": 0}
