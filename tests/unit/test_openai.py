"""Every field of a request: what it becomes, and the error that names it when it is wrong."""

import inspect
import json
import math
from typing import Any

import msgpack
import openai
import pytest

from pipeline.errors import DeadlineExceeded, InvalidRequest, PayloadTooLarge, PipelineError, PromptTooLong
from pipeline.openai import JSON_OBJECT, IdentifiedRequest, identify, parse_request, resolve
from pipeline.refusals import UNSUPPORTED
from pipeline.request_options import choices_of
from subjects import headers, limits, names
from subjects.codec import Format, TokenIds
from subjects.messages import (
    ChatMessage,
    ChatOptions,
    EngineOptions,
    FurtherPrompt,
    OutputOptions,
    PreprocessedRequest,
    Request,
    SamplingOptions,
    StopConditions,
    Tool,
    ToolFunction,
)

SUBJECT = names.REQUESTS.of(model="m")
NOW_S = 1_790_000_000.0
TIMES = {"accepted_unix_s": NOW_S - 1, "now_unix_s": NOW_S}
VOCAB = 1000
CONTEXT_TOKENS = 100
CHAT = {"messages": [{"role": "user", "content": "hi"}]}
TEXT = {"prompt": "hi"}


def json_of(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields).encode()


def parse(fields: dict[str, Any] | bytes, message_headers: dict[str, str] | None = None) -> IdentifiedRequest:
    payload = fields if isinstance(fields, bytes) else json_of(fields)
    return parse_request(payload, message_headers or {}, SUBJECT, 7, **TIMES)


def resolved(fields: dict[str, Any] | bytes, prompt_tokens: int = 10) -> PreprocessedRequest:
    token_ids = TokenIds.of(range(prompt_tokens))
    return resolve(parse(fields), token_ids, context_len_tokens=CONTEXT_TOKENS, vocab_size=VOCAB)


def nested(levels: int) -> dict[str, Any]:
    """A schema of that many levels."""
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(levels - 1):
        schema = {"properties": {"a": schema}}
    return schema


def schema(value: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": value}}}


SCHEMA = "response_format.json_schema.schema"
MANY_TOKENS = {str(i): 1 for i in range(limits.LOGIT_BIAS_ENTRIES_MAX + 1)}

# fields beside a right prompt, field named, size, limit
WRONG = [
    ({"max_tokens": 0}, "max_tokens", 0, 1),
    ({"max_tokens": -5}, "max_tokens", -5, 1),
    ({"max_completion_tokens": 0}, "max_completion_tokens", 0, 1),
    ({"max_tokens": 91}, "max_tokens", 91, 90),
    ({"max_completion_tokens": 91}, "max_completion_tokens", 91, 90),
    ({"max_tokens": 2**80}, "max_tokens", None, 90),
    ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens", None, None),
    ({"max_tokens": "5"}, "max_tokens", None, None),
    ({"max_tokens": 5.5}, "max_tokens", None, None),
    ({"max_tokens": True}, "max_tokens", None, None),
    ({"min_tokens": -1}, "min_tokens", -1, 0),
    ({"min_tokens": 91}, "min_tokens", 91, 90),
    ({"min_tokens": 6, "max_tokens": 5}, "min_tokens", 6, 5),
    ({"n": 0}, "n", 0, 1),
    ({"n": limits.CHOICES_MAX + 1}, "n", limits.CHOICES_MAX + 1, limits.CHOICES_MAX),
    ({"n": "2"}, "n", None, None),
    ({"priority": limits.PRIORITY_MAX + 1}, "priority", limits.PRIORITY_MAX + 1, limits.PRIORITY_MAX),
    ({"priority": -limits.PRIORITY_MAX - 1}, "priority", -limits.PRIORITY_MAX - 1, -limits.PRIORITY_MAX),
    ({"session": "a b"}, "session", None, None),
    ({"session": ""}, "session", None, None),
    ({"session": "s" * 65}, "session", None, None),
    ({"temperature": -0.1}, "temperature", -0.1, 0),
    ({"temperature": 2.5}, "temperature", 2.5, 2),
    ({"temperature": "hot"}, "temperature", None, None),
    ({"temperature": 10**400}, "temperature", None, None),
    ({"top_p": 0}, "top_p", 0, 0),
    ({"top_p": 1.1}, "top_p", 1.1, 1),
    ({"top_k": 0}, "top_k", 0, 1),
    ({"top_k": -2}, "top_k", -2, 1),
    ({"top_k": 2**31}, "top_k", 2**31, 2**30),
    ({"min_p": -1}, "min_p", -1, 0),
    ({"min_p": 2}, "min_p", 2, 1),
    ({"frequency_penalty": -2.1}, "frequency_penalty", -2.1, -2),
    ({"frequency_penalty": 2.1}, "frequency_penalty", 2.1, 2),
    ({"presence_penalty": 3}, "presence_penalty", 3, 2),
    ({"repetition_penalty": 0}, "repetition_penalty", 0, 0),
    ({"repetition_penalty": 2.1}, "repetition_penalty", 2.1, 2),
    ({"seed": 2**63}, "seed", None, 2**63 - 1),
    ({"seed": 1.5}, "seed", None, None),
    ({"stop": ["x"] * 33}, "stop", 33, 32),
    ({"stop": ["x"] * 100_000}, "stop", 100_000, 32),
    ({"stop": ["a", ""]}, "stop.1", 0, 1),
    ({"stop": ""}, "stop", 0, 1),
    ({"stop": "x" * 513}, "stop", 513, 512),
    ({"stop": ["x", 5]}, "stop.1", None, None),
    ({"stop_token_ids": [1] * 257}, "stop_token_ids", 257, 256),
    ({"stop_token_ids": [5, VOCAB]}, "stop_token_ids.1", VOCAB, VOCAB - 1),
    ({"stop_token_ids": [-1]}, "stop_token_ids.0", -1, VOCAB - 1),
    ({"logit_bias": {"a": 1}}, "logit_bias.a", None, None),
    ({"logit_bias": {"-1": 1}}, "logit_bias.-1", None, None),
    ({"logit_bias": {"1.5": 1}}, "logit_bias.1.5", None, None),
    ({"logit_bias": {"\u0663": 1}}, "logit_bias.\u0663", None, None),
    ({"logit_bias": {"": 1}}, "logit_bias.", None, None),
    ({"logit_bias": {"5": 101}}, "logit_bias.5", 101, 100),
    ({"logit_bias": {"5": "much"}}, "logit_bias", None, None),
    ({"logit_bias": {str(VOCAB): 1}}, f"logit_bias.{VOCAB}", VOCAB, VOCAB - 1),
    ({"logit_bias": MANY_TOKENS}, "logit_bias", len(MANY_TOKENS), limits.LOGIT_BIAS_ENTRIES_MAX),
    ({"regex": "a" * (limits.GRAMMAR_CHARS_MAX + 1)}, "regex", 65537, 65536),
    ({"ebnf": "a" * (limits.GRAMMAR_CHARS_MAX + 1)}, "ebnf", 65537, 65536),
    ({"regex": "a", "ebnf": "b"}, "ebnf", None, None),
    ({"regex": "a", "response_format": {"type": "json_object"}}, "regex", None, None),
    ({"json_schema": "{}", "response_format": {"type": "json_object"}}, "json_schema", None, None),
    ({"json_schema": "{"}, "json_schema", 1, None),
    ({"json_schema": "5"}, "json_schema", None, None),
    ({"json_schema": "[" * 60_000}, "json_schema", 60_000, None),
    ({"response_format": {"type": "xml"}}, "response_format.type", None, None),
    ({"response_format": {}}, "response_format.type", None, None),
    ({"response_format": "json"}, "response_format", None, None),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", None, None),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, SCHEMA, None, None),
    (schema({"type": "strin"}), f"{SCHEMA}.type", None, None),
    (schema({"type": ["string", 5]}), f"{SCHEMA}.type", None, None),
    (schema({"properties": []}), f"{SCHEMA}.properties", None, None),
    (schema({"properties": {"a": 5}}), f"{SCHEMA}.properties.a", None, None),
    (schema({"properties": {"a": {"items": [{"type": 1}]}}}), f"{SCHEMA}.properties.a.items.0.type", None, None),
    (schema({"required": "a"}), f"{SCHEMA}.required", None, None),
    (schema({"required": [1]}), f"{SCHEMA}.required", None, None),
    (schema({"enum": []}), f"{SCHEMA}.enum", None, None),
    (schema({"anyOf": {"type": "string"}}), f"{SCHEMA}.anyOf", None, None),
    (schema({"anyOf": [{"type": "strin"}]}), f"{SCHEMA}.anyOf.0.type", None, None),
    (schema({"additionalProperties": "no"}), f"{SCHEMA}.additionalProperties", None, None),
    (schema({"const": "x" * 65536}), SCHEMA, 65549, 65536),
    ({"stream": "yes"}, "stream", None, None),
    ({"stream_options": {"include_usage": 5}}, "stream_options.include_usage", None, None),
    ({"stream_options": {"x": 5}}, "stream_options.x", None, None),
    ({"deadline": NOW_S + 2 * 86_400}, "deadline", NOW_S + 2 * 86_400, NOW_S - 1 + 86_400),
    ({"deadline": "soon"}, "deadline", None, None),
    ({"request_id": "a b"}, "request_id", 3, 64),
    ({"request_id": ""}, "request_id", 0, 64),
    ({"request_id": "x" * 65}, "request_id", 65, 64),
    ({"request_id": 5}, "request_id", None, None),
    ({"client": "a.b"}, "client", 3, 64),
    ({"client": ">"}, "client", 1, 64),
    ({"model": "other"}, "model", None, None),
    ({"model": ""}, "model", None, None),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", 21, 20),
    ({"top_logprobs": 5}, "top_logprobs", None, None),
    ({"logprobs": 5}, "logprobs", None, None),
    ({"user": 5}, "user", None, None),
    ({"echo": True}, "echo", None, None),
    ({"best_of": 2}, "best_of", None, None),
    ({"best_of": 2, "n": 3}, "best_of", None, None),
    ({"store": True}, "store", None, None),
    ({"service_tier": "flex"}, "service_tier", None, None),
    ({"modalities": ["text", "audio"]}, "modalities.1", None, None),
    ({"metadata": {str(i): "" for i in range(17)}}, "metadata", 17, 16),
    ({"lora_path": "p" * 257}, "lora_path", 257, 256),
    ({"model": "m:poet", "lora_path": "cook"}, "lora_path", None, None),
    ({"cache_salt": ""}, "cache_salt", 0, 1),
    ({"cache_salt": "s" * 257}, "cache_salt", 257, 256),
    ({"data_parallel_rank": -1}, "data_parallel_rank", -1, 0),
    ({"routed_dp_rank": -1}, "routed_dp_rank", -1, 0),
    ({"data_parallel_rank": 1, "routed_dp_rank": 2}, "routed_dp_rank", None, None),
    ({"max_thinking_tokens": -1}, "max_thinking_tokens", -1, 0),
    ({"functions": [{"name": "f"}]}, "functions", None, None),
    ({"nonsense": 1}, "nonsense", None, None),
]


def name_of(case: Any) -> str:
    return repr(case)[:60]


@pytest.mark.parametrize(("fields", "field", "size", "limit"), WRONG, ids=name_of)
def test_a_wrong_field_is_named_with_its_size_and_limit(fields, field, size, limit):
    with pytest.raises(InvalidRequest) as error:
        resolved(CHAT | fields)
    failure = error.value.failure()
    assert (failure.field, failure.size, failure.limit) == (field, size, limit)
    assert failure.message.startswith(f"{field}: ")
    assert len(failure.message) < 400
    assert (failure.code, failure.status) == ("invalid_request", 400)


@pytest.mark.parametrize("value", [nested(65), {"properties": {"a" * 60_000: {"type": 1}}}], ids=["deep", "long"])
def test_the_place_of_a_mistake_deep_in_a_schema_is_shortened(value):
    with pytest.raises(InvalidRequest) as error:
        parse(CHAT | schema(value))
    assert error.value.field.startswith(f"{SCHEMA}.properties.a")
    assert len(error.value.field) < 200
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "messages"),
        (CHAT | TEXT, "prompt"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages.0"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"content": "hi"}]}, "messages.0.role"),
        ({"messages": [{"role": "critic", "content": "hi"}]}, "messages.0.role"),
        ({"messages": [*CHAT["messages"], {"role": "user", "content": None}]}, "messages.1.content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "", "tool_calls": []}]}, "messages.0.tool_calls"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
        ({"messages": CHAT["messages"] * (limits.MESSAGES_MAX + 1)}, "messages"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["one", 2]}, "prompt.1"),
        ({"prompt": [1, "two"]}, "prompt.1"),
        ({"prompt": ["one", ""]}, "prompt.1"),
        ({"prompt": [[1], []]}, "prompt.1"),
        ({"prompt": [[1], [2, -1]]}, "prompt.1.1"),
        ({"prompt": [[1], [VOCAB]]}, "prompt.1.0"),
        ({"prompt": ["one"] * (limits.CHOICES_MAX + 1)}, "prompt"),
        ({"prompt": ["one", "two"], "n": limits.CHOICES_MAX}, "prompt"),
        ({"prompt": {"text": "one"}}, "prompt"),
        ({"prompt": [1, -1]}, "prompt.1"),
        ({"prompt": [1, VOCAB]}, "prompt.1"),
        ({"prompt": [1, 2**32]}, "prompt.1"),
        ({"prompt": [1, 2**70]}, "prompt.1"),
        (TEXT | {"logprobs": True}, "logprobs"),
        (TEXT | {"logprobs": 21}, "logprobs"),
        (TEXT | {"logprobs": 1, "top_logprobs": 1}, "top_logprobs"),
    ],
    ids=name_of,
)
def test_a_wrong_prompt_is_named(fields, field):
    with pytest.raises(InvalidRequest) as error:
        resolved(fields)
    assert error.value.field == field
    assert str(error.value).startswith(f"{field}: ")


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "field",
    ["temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty", "deadline"],
)
def test_messagepack_can_carry_nan_and_infinity_but_no_field_takes_them(field, number):
    with pytest.raises((InvalidRequest, DeadlineExceeded)) as error:
        parse(msgpack.packb(CHAT | {field: number}))
    assert error.value.field == field
    assert error.value.size is None, "NaN and infinities have no form in JSON"


def test_a_bias_of_nan_is_refused():
    with pytest.raises(InvalidRequest) as error:
        parse(msgpack.packb(CHAT | {"logit_bias": {"5": math.nan}}))
    assert error.value.field == "logit_bias.5"


def test_a_schema_with_nan_or_binary_values_is_refused():
    for value in (math.nan, b"binary", msgpack.ExtType(5, b""), msgpack.Timestamp(1), {(1, 2): 3}):
        with pytest.raises(InvalidRequest) as error:
            parse(msgpack.packb(CHAT | schema({"const": value})))
        assert error.value.field == SCHEMA


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_field_that_is_not_served_yet_is_refused_by_name_with_the_reason(name):
    with pytest.raises(InvalidRequest) as error:
        parse(CHAT | {name: 1})
    assert error.value.field == name
    assert UNSUPPORTED[name] in str(error.value)


def test_no_field_is_both_served_and_refused():
    taken = {*Request.__struct_fields__, *ChatMessage.__struct_fields__}
    assert not taken & UNSUPPORTED.keys()


def test_a_misspelt_field_is_answered_with_the_right_name():
    with pytest.raises(InvalidRequest, match="did you mean `temperature`"):
        parse(CHAT | {"temprature": 1})


def test_null_counts_as_not_given():
    nulls = dict.fromkeys(Request.__struct_fields__) | {"tools": None, "parallel_tool_calls": None}
    assert resolved(nulls | CHAT) == resolved(CHAT)
    with pytest.raises(InvalidRequest) as error:
        parse(CHAT | {"tools": None, "n": "x"})
    assert error.value.field == "n"


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"hello",
        b"[1, 2]",
        b'"text"',
        b"\xef\xbb\xbf{}",
        b"{",
        b"{}}",
        b'{"prompt": "x",}',
        b"{'prompt': 'x'}",
        b'{"user": "\xff"}',
        b'{"temperature": NaN, "prompt": "x"}',
        b'{"a":' * 100_000,
        b'{"messages":' + b"[" * 100_000,
        b"\xc1",
        b"\x81",
        b"\x81\xa6prompt",
        b"\x81\xa4user\xa2\xff\xfe",
        b"\x92\x01\x02",
        b"\x80\x80",
        b"\xdf\xff\xff\xff\xff",
        b"\x81" * 100_000,
        msgpack.packb({1: 2}),
        msgpack.packb({b"prompt": "x"}),
    ],
    ids=lambda payload: repr(payload[:20]),
)
def test_a_payload_that_cannot_be_read_is_refused(payload):
    with pytest.raises(InvalidRequest) as error:
        parse(payload)
    assert len(str(error.value)) < 400
    identity = identify(payload, {}, 7)
    assert (identity.request_id, identity.client, identity.choices) == ("7", "anonymous", 1)


def test_two_megabytes_are_refused_with_size_and_limit_and_still_identified():
    payload = json_of(CHAT | {"request_id": "big", "client": "me", "user": "x" * 2**21})
    with pytest.raises(PayloadTooLarge) as error:
        parse(payload)
    assert (error.value.size, error.value.limit) == (len(payload), limits.PAYLOAD_BYTES_MAX)
    identity = identify(payload, {}, 7)
    assert (identity.request_id, identity.client) == ("big", "me")


def test_a_million_stop_strings_are_too_large_a_payload():
    with pytest.raises(PayloadTooLarge):
        parse(msgpack.packb(CHAT | {"stop": ["x"] * 10**6}))


# --- identity ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("payload", "message_headers", "expected"),
    [
        (b"{}", {}, ("7", "anonymous", 1)),
        (b"{}", {headers.MSG_ID: "h", headers.CLIENT: "c"}, ("h", "c", 1)),
        (b'{"request_id":"p","client":"q","n":3}', {headers.MSG_ID: "h", headers.CLIENT: "c"}, ("p", "q", 3)),
        (b'{"request_id":"p q","client":"*"}', {headers.MSG_ID: "h", headers.CLIENT: "c"}, ("h", "c", 1)),
        (b'{"request_id":5,"client":[],"n":"3"}', {headers.MSG_ID: "a.b", headers.CLIENT: ""}, ("7", "anonymous", 1)),
        (b'{"n":1000000000}', {}, ("7", "anonymous", 1)),
        (b'{"n":true}', {}, ("7", "anonymous", 1)),
        (b'{"n":-1}', {}, ("7", "anonymous", 1)),
        (b'{"request_id":"p","client":"q","n":2,"messages":[,]}', {}, ("p", "q", 2)),
        (b'{"request_id":"p", "messages": [{"role": "us', {headers.CLIENT: "c"}, ("p", "c", 1)),
        (b'{"request_id":"p","nonsense":1}', {}, ("p", "anonymous", 1)),
        (msgpack.packb({"request_id": "p", "temperature": "x", "n": 2}), {}, ("p", "anonymous", 2)),
        (msgpack.packb({"request_id": b"p"}), {}, ("7", "anonymous", 1)),
    ],
    ids=name_of,
)
def test_identity_is_recovered_as_far_as_it_goes(payload, message_headers, expected):
    identity = identify(payload, message_headers, 7)
    assert (identity.request_id, identity.client, identity.choices) == expected


@pytest.mark.parametrize(
    ("payload", "form"),
    [
        (json_of(CHAT), Format.JSON),
        (b"  \n" + json_of(CHAT), Format.JSON),
        (msgpack.packb(CHAT), Format.MSGPACK),
        (b"\xde\x00\x01broken", Format.MSGPACK),
        (b"typed by hand", Format.JSON),
        (b"", Format.JSON),
    ],
)
def test_the_answer_has_the_requests_format(payload, form):
    assert identify(payload, {}, 7).reply_format is form


def test_a_right_request_has_the_identity_that_a_wrong_one_would_have():
    fields = CHAT | {"request_id": "p", "n": 2}
    message_headers = {headers.CLIENT: "c", headers.MSG_ID: "h"}
    for payload in (json_of(fields), msgpack.packb(fields)):
        assert parse(payload, message_headers).identity == identify(payload, message_headers, 7)


@pytest.mark.parametrize(("header", "value"), [(headers.MSG_ID, "a.b"), (headers.CLIENT, "a b"), (headers.CLIENT, "")])
def test_a_header_that_cannot_stand_in_a_subject_is_named(header, value):
    with pytest.raises(InvalidRequest) as error:
        parse(CHAT, {header: value})
    assert (error.value.field, error.value.size, error.value.limit) == (header, len(value), 64)
    parse(CHAT | {"request_id": "p", "client": "q"}, {header: value})


# --- deadlines ---------------------------------------------------------------------------------------


def test_the_deadline_is_the_payloads_else_the_headers_else_the_default():
    assert parse(CHAT).deadline_unix_s == NOW_S - 1 + limits.REQUEST_S_DEFAULT
    assert parse(CHAT, {headers.DEADLINE: f"{NOW_S + 5.5}"}).deadline_unix_s == NOW_S + 5.5
    both = parse(CHAT | {"deadline": NOW_S + 3}, {headers.DEADLINE: f"{NOW_S + 5.5}"})
    assert both.deadline_unix_s == NOW_S + 3


@pytest.mark.parametrize("deadline", [NOW_S, NOW_S - 10, 0, -1e300])
def test_a_deadline_in_the_past_is_exceeded(deadline):
    with pytest.raises(DeadlineExceeded) as error:
        parse(CHAT | {"deadline": deadline})
    assert (error.value.field, error.value.limit) == ("deadline", NOW_S)


@pytest.mark.parametrize("text", ["soon", "", "nan", "inf", "1e400"])
def test_a_deadline_header_must_be_a_time(text):
    with pytest.raises(InvalidRequest) as error:
        parse(CHAT, {headers.DEADLINE: text})
    assert error.value.field == headers.DEADLINE


def test_a_reader_is_an_inbox():
    assert parse(CHAT).reader is None
    assert parse(CHAT, {headers.READER: "_INBOX_me.1a.r"}).reader == "_INBOX_me.1a.r"


@pytest.mark.parametrize(
    "reader", ["", "me", "sglang.control.w.drain", "_INBOX.a.>", "_INBOX.*", "_INBOX." + "x" * 122]
)
def test_a_reader_that_is_no_inbox_is_refused(reader):
    with pytest.raises(InvalidRequest) as error:
        parse(CHAT, {headers.READER: reader})
    assert (error.value.field, error.value.size, error.value.limit) == (headers.READER, len(reader), 128)


# --- what a right request becomes --------------------------------------------------------------------


def test_defaults_are_left_to_the_engine():
    request = resolved(CHAT)
    assert request == PreprocessedRequest(
        request_id="7",
        client="anonymous",
        model="m",
        token_ids=TokenIds.of(range(10)),
        stop=StopConditions(max_tokens=90),
        sampling=SamplingOptions(),
        output=OutputOptions(stream=False),
        deadline_unix_s=NOW_S - 1 + 600,
        reply_format=Format.JSON,
        accepted_unix_s=NOW_S - 1,
        chat=ChatOptions(),
    )


TOOL = Tool(function=ToolFunction(name="weather", parameters={"type": "object"}, strict=True))
EVERY_FIELD = {
    "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}], "name": "eve"}],
    "model": "m",
    "request_id": "r",
    "client": "c",
    "deadline": NOW_S + 9,
    "stream": True,
    "stream_options": {"include_usage": True},
    "max_completion_tokens": 50,
    "min_tokens": 3,
    "n": 4,
    "stop": ["a", "b"],
    "stop_token_ids": [5, 6],
    "ignore_eos": True,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 40,
    "min_p": 0.1,
    "frequency_penalty": -1.5,
    "presence_penalty": 1.5,
    "repetition_penalty": 1.1,
    "seed": -5,
    "logit_bias": {"007": -100, "8": 0.5},
    "logprobs": True,
    "top_logprobs": 3,
    "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}},
    "skip_special_tokens": False,
    "no_stop_trim": True,
    "user": "u",
    "tools": [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}, "strict": True}}],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "reasoning_effort": "low",
    "separate_reasoning": False,
    "stream_reasoning": False,
    "chat_template_kwargs": {"enable_thinking": True},
}


@pytest.mark.parametrize("pack", [json_of, msgpack.packb])
def test_every_field_reaches_the_engine(pack):
    request = resolved(pack(EVERY_FIELD))
    assert request == PreprocessedRequest(
        request_id="r",
        client="c",
        model="m",
        token_ids=TokenIds.of(range(10)),
        stop=StopConditions(max_tokens=50, min_tokens=3, stop=("a", "b"), stop_token_ids=(5, 6), ignore_eos=True),
        sampling=SamplingOptions(
            temperature=0.5,
            top_p=0.9,
            top_k=40,
            min_p=0.1,
            frequency_penalty=-1.5,
            presence_penalty=1.5,
            repetition_penalty=1.1,
            seed=-5,
            logit_bias={"7": -100.0, "8": 0.5},
            json_schema='{"type": "object"}',
        ),
        output=OutputOptions(stream=True, logprobs=True, top_logprobs=3, skip_special_tokens=False, no_stop_trim=True),
        choices=4,
        deadline_unix_s=NOW_S + 9,
        reply_format=Format.JSON if pack is json_of else Format.MSGPACK,
        accepted_unix_s=NOW_S - 1,
        chat=ChatOptions(
            tools=(TOOL,),
            parallel_tool_calls=False,
            tool_choice="auto",
            reasoning_effort="low",
            separate_reasoning=False,
            stream_reasoning=False,
            chat_template_kwargs={"enable_thinking": True},
        ),
    )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": {"type": "json_object"}}, SamplingOptions(json_schema=JSON_OBJECT)),
        ({"response_format": {"type": "text"}}, SamplingOptions()),
        ({"json_schema": '{"type":"string"}'}, SamplingOptions(json_schema='{"type":"string"}')),
        ({"regex": "[a-z]+"}, SamplingOptions(regex="[a-z]+")),
        ({"ebnf": 'root ::= "a"'}, SamplingOptions(ebnf='root ::= "a"')),
        ({"regex": "", "ebnf": "", "json_schema": ""}, SamplingOptions()),
        ({"regex": "", "response_format": {"type": "json_object"}}, SamplingOptions(json_schema=JSON_OBJECT)),
        (schema(True), None),
        (schema(nested(64)), SamplingOptions(json_schema=json.dumps(nested(64)))),
        (schema({"title": "é"}), SamplingOptions(json_schema='{"title": "é"}')),
        ({"top_k": -1}, SamplingOptions(top_k=-1)),
        ({"logit_bias": {}}, SamplingOptions()),
        ({"temperature": 0}, SamplingOptions(temperature=0.0)),
    ],
    ids=name_of,
)
def test_sampling_fields(fields, expected):
    if expected is None:
        with pytest.raises(InvalidRequest):
            parse(CHAT | fields)
    else:
        assert parse(CHAT | fields).sampling == expected


@pytest.mark.parametrize(
    ("fields", "logprobs", "top_logprobs"),
    [
        (CHAT, False, 0),
        (CHAT | {"logprobs": False}, False, 0),
        (CHAT | {"logprobs": True}, True, 0),
        (CHAT | {"logprobs": True, "top_logprobs": 20}, True, 20),
        (CHAT | {"top_logprobs": 0}, False, 0),
        (TEXT, False, 0),
        (TEXT | {"logprobs": 0}, True, 0),
        (TEXT | {"logprobs": 5}, True, 5),
    ],
)
def test_logprobs(fields, logprobs, top_logprobs):
    output = parse(fields).output
    assert (output.logprobs, output.top_logprobs) == (logprobs, top_logprobs)


def test_one_stop_string_needs_no_list():
    assert resolved(CHAT | {"stop": "x"}).stop.stop == ("x",)


def test_both_names_of_max_tokens_may_agree():
    assert resolved(CHAT | {"max_tokens": 5, "max_completion_tokens": 5}).stop.max_tokens == 5


@pytest.mark.parametrize(("prompt_tokens", "left"), [(1, 99), (98, 2), (99, 1)])
def test_the_default_of_max_tokens_is_what_the_context_leaves(prompt_tokens, left):
    assert resolved(CHAT, prompt_tokens).stop.max_tokens == left
    assert resolved(CHAT | {"max_tokens": left}, prompt_tokens).stop.max_tokens == left


@pytest.mark.parametrize("prompt_tokens", [100, 101, 5000])
@pytest.mark.parametrize(("fields", "field"), [(CHAT, "messages"), (TEXT | {"max_tokens": 1}, "prompt")])
def test_a_prompt_must_leave_one_token_of_the_context(prompt_tokens, fields, field):
    with pytest.raises(PromptTooLong) as error:
        resolved(fields, prompt_tokens)
    assert (error.value.field, error.value.size, error.value.limit) == (field, prompt_tokens, 99)


def test_a_prompt_of_no_tokens_is_refused():
    with pytest.raises(InvalidRequest) as error:
        resolved(TEXT, 0)
    assert (error.value.field, error.value.size) == ("prompt", 0)


def test_the_model_may_be_named_as_the_hub_does():
    subject = names.REQUESTS.of(model="meta-llama/Llama-3.1-8B")
    payload = json_of(CHAT | {"model": "meta-llama/Llama-3.1-8B"})
    request = parse_request(payload, {}, subject, 7, accepted_unix_s=NOW_S, now_unix_s=NOW_S)
    assert request.model == "meta-llama-Llama-3-1-8B"


def test_every_error_is_of_the_tree_and_can_travel():
    for fields, *_ in WRONG:
        with pytest.raises(PipelineError) as error:
            resolved(CHAT | fields)
        for number in (error.value.failure().size, error.value.failure().limit):
            assert number is None or math.isfinite(number)


def openai_parameters() -> set[str]:
    """What OpenAI's own client sends in the two bodies."""
    resources = (openai.resources.chat.AsyncCompletions, openai.resources.AsyncCompletions)
    names_of = {name for resource in resources for name in inspect.signature(resource.create).parameters}
    return names_of - {"self", "timeout", "extra_headers", "extra_query", "extra_body"}


@pytest.mark.parametrize("name", sorted(openai_parameters()))
def test_every_parameter_of_openais_client_is_taken_or_refused_with_its_reason(name):
    assert (name in Request.__struct_fields__) != (name in UNSUPPORTED)


def test_what_changes_nothing_here_is_taken():
    harmless = {
        "metadata": {"run": "7"},
        "modalities": ["text"],
        "safety_identifier": "someone",
        "service_tier": "auto",
        "store": False,
        "user": "someone",
        "best_of": 1,
    }
    assert resolved(CHAT | harmless) == resolved(CHAT)


def test_what_the_engine_must_know_reaches_it():
    asked = {"lora_path": "poet", "cache_salt": "tenant-7", "max_thinking_tokens": 0, "routed_dp_rank": 3}
    request = resolved(CHAT | asked)
    assert request.engine == EngineOptions(lora_path="poet", cache_salt="tenant-7", max_thinking_tokens=0)
    assert request.dp_rank == resolved(CHAT | {"data_parallel_rank": 3}).dp_rank == 3


def test_an_adapter_may_stand_behind_the_model():
    assert resolved(CHAT | {"model": "m:poet"}).engine.lora_path == "poet"
    assert resolved(CHAT | {"model": "m:poet", "lora_path": "poet"}).engine.lora_path == "poet"
    named = parse_request(json_of(CHAT | {"model": "a:b"}), {}, names.REQUESTS.of(model="a-b"), 7, **TIMES)
    assert (named.model, named.engine.lora_path) == ("a-b", None), "the sign is a part of this model's name"


def test_each_prompt_has_its_own_room_text_and_choices():
    identified = parse(TEXT | {"prompt": ["one", "two"], "n": 2, "echo": True, "min_tokens": 1})
    long, short = TokenIds.of(range(90)), TokenIds.of(range(4))
    request = resolve(identified, long, short, context_len_tokens=100, vocab_size=VOCAB, echo=("one", "two"))
    assert (request.choices, request.stop.max_tokens, request.echo) == (4, 10, "one")
    assert request.further == (FurtherPrompt(token_ids=short, max_tokens=96, echo="two"),)
    with pytest.raises(PromptTooLong):
        resolve(identified, short, TokenIds.of(range(100)), context_len_tokens=100, vocab_size=VOCAB)


@pytest.mark.parametrize(
    ("fields", "choices"),
    [
        ({"prompt": ["a", "b", "c"], "n": 2}, 6),
        ({"prompt": [[1], [2]]}, 2),
        ({"prompt": [1, 2, 3]}, 1),
        ({"prompt": ["a"] * 65}, 1),
        ({"prompt": "a", "n": None}, 1),
        ({"prompt": [], "n": 3}, 3),
    ],
    ids=name_of,
)
def test_who_answers_an_error_knows_how_many_choices_wait_for_it(fields, choices):
    assert identify(json_of(fields), {}, 7).choices == choices_of(fields.get("n"), fields["prompt"]) == choices


def test_logprobs_of_a_prompt_are_limited_by_what_a_frame_carries():
    asked = TEXT | {"echo": True, "logprobs": 1}
    most = limits.PROMPT_LOGPROBS_MAX // 2
    there = resolve(parse(asked), TokenIds(bytes(4 * most)), context_len_tokens=10**6, vocab_size=VOCAB)
    assert there.output.prompt_logprobs and there.output.top_logprobs == 1
    with pytest.raises(InvalidRequest) as error:
        resolve(parse(asked), TokenIds(bytes(4 * most + 4)), context_len_tokens=10**6, vocab_size=VOCAB)
    assert (error.value.field, error.value.size, error.value.limit) == ("echo", 2 * most + 2, 2 * most)
    assert not resolved(TEXT | {"logprobs": 1}).output.prompt_logprobs


def test_a_prompt_alone_may_be_asked_for_with_its_echo_only():
    assert resolved(TEXT | {"echo": True, "max_tokens": 0}).stop.max_tokens == 0
    with pytest.raises(InvalidRequest) as error:
        resolved(TEXT | {"max_tokens": 0})
    assert (error.value.field, error.value.limit) == ("max_tokens", 1)
