"""Codec round trips: token ids, and every message through both formats."""

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from subjects.codec import Format, TokenIds, decode, encode, format_of
from subjects.messages import Frame, PreprocessedRequest, Request, SamplingOptions, StopConditions

ids = st.lists(st.integers(0, 2**32 - 1), max_size=50)
tokens = ids.map(TokenIds.of)
# What JSON carries: finite numbers, and text without lone surrogates.
numbers = st.none() | st.floats(allow_nan=False, allow_infinity=False)
texts = st.text('aZ0 .-_é北\x00\u200b🧑<|{"\\', max_size=30)
forms = st.sampled_from(Format)

biases = st.none() | st.dictionaries(texts, st.just(1.5), max_size=3)
more_fields = st.dictionaries(texts, st.integers(-(2**63), 2**64 - 1), max_size=3)

frames = st.builds(
    Frame,
    request_id=texts,
    choice=st.integers(0, 63),
    attempt=st.integers(1, 20),
    index=st.integers(0, 2**31),
    token_ids=tokens,
    text=texts,
    finish_reason=st.sampled_from([None, "stop", "length", "abort", "error"]),
    matched_stop=st.none() | texts | st.integers(0, 2**31),
)
tasks = st.builds(
    PreprocessedRequest,
    request_id=texts,
    client=texts,
    model=texts,
    token_ids=tokens,
    stop=st.builds(StopConditions, max_tokens=st.integers(1, 2**31), stop=st.lists(texts, max_size=3).map(tuple)),
    sampling=st.builds(
        SamplingOptions, temperature=numbers, logit_bias=st.none() | st.dictionaries(texts, st.just(1.5))
    ),
    deadline_unix_s=numbers,
    reply_format=forms,
)


@given(ids)
def test_token_ids_come_back(values):
    held = TokenIds.of(values)
    assert held.tolist() == list(held) == values
    assert len(held) == len(values)
    assert held.raw == b"".join(value.to_bytes(4, "little") for value in values)


@given(tokens, tokens, st.integers(-60, 60), st.integers(-60, 60))
def test_token_ids_are_a_sequence(left, right, start, stop):
    both = left + right
    assert both.tolist() == left.tolist() + right.tolist()
    assert both[start:stop].tolist() == both.tolist()[start:stop]
    assert (left == right) is (left.tolist() == right.tolist())


@given(st.binary(max_size=9).filter(lambda raw: len(raw) % 4))
def test_token_ids_are_whole_words(raw):
    with pytest.raises(ValueError, match="4 bytes"):
        TokenIds(raw)


@given(st.lists(st.integers().filter(lambda value: not 0 <= value < 2**32), min_size=1, max_size=3))
def test_token_ids_out_of_range_do_not_pass(values):
    with pytest.raises(OverflowError):
        TokenIds.of(values)
    json = msgspec.json.encode({"request_id": "r", "token_ids": values})
    with pytest.raises(msgspec.ValidationError):
        decode(Frame, json)


@given(frames | tasks, forms)
def test_messages_come_back(message, form):
    payload = encode(message, form)
    assert format_of(payload) is form
    assert decode(type(message), payload) == message


@given(frames, more_fields)
def test_a_newer_releases_fields_are_ignored(frame, more):
    plain = msgspec.msgpack.decode(encode(frame)) | more
    assert decode(Frame, msgspec.msgpack.encode(plain)) == frame


@given(texts)
def test_a_request_refuses_unknown_fields(name):
    with pytest.raises(msgspec.ValidationError):
        decode(Request, msgspec.json.encode({"prompt": "x", name: 1}))


@given(st.binary(max_size=100), forms)
def test_any_bytes_decode_or_raise_an_error_that_callers_catch(payload, form):
    lead = b"{" if form is Format.JSON else b"\x81"
    try:
        frame = decode(Frame, lead + payload)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return
    assert isinstance(frame, Frame)


def test_messagepack_carries_what_json_cannot():
    assert math.isnan(decode(SamplingOptions, encode(SamplingOptions(temperature=math.nan))).temperature)
