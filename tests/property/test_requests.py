"""Whatever is published as a request ends in one task for decode or in one terminal frame for each choice."""

import asyncio
import functools
import json
import time
from typing import Any

import msgpack
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.chat import ChatTokenizer, LoadedModel
from pipeline.config import BUILTIN_MODEL
from pipeline.errors import Permanent
from pipeline.models import prepare_model
from pipeline.request_options import choices_of
from pipeline.stage import Emit, Task, terminal_msg_id
from stages.preprocess import preprocess
from subjects import headers, limits, names
from subjects.codec import decode
from subjects.messages import Frame, PreprocessedRequest, Request

CONTEXT_TOKENS = 200
VALID: dict[str, Any] = {
    "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, {"role": "assistant", "content": "x"}],
    "model": "smollm2",
    "request_id": "r",
    "client": "c",
    "stream": True,
    "stream_options": {"include_usage": True},
    "max_tokens": 5,
    "min_tokens": 1,
    "n": 3,
    "stop": ["a", "b"],
    "stop_token_ids": [5],
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 40,
    "seed": 1,
    "logit_bias": {"5": 1.0},
    "logprobs": True,
    "top_logprobs": 3,
    "response_format": {
        "type": "json_schema",
        "json_schema": {"name": "s", "schema": {"type": "object", "properties": {"a": {"enum": [1]}}}},
    },
}

# Letters that matter: of names and outside, wide ones, a control, one that shows nothing, markup. All of Unicode
# would cost seconds for its tables and find no more.
texts = st.text('aZ0 .-_*>"\\é北\x00\u200b🧑<|{', max_size=12)
long_texts = texts | st.integers(60, 70).map("a".__mul__) | st.floats().map(str)
without_a_clock = settings(deadline=None)  # other processes run on these cores: a slow call says nothing
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(2**63), max_value=2**64 - 1)
    | st.floats()
    | texts
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4))
field_names = st.sampled_from(Request.__struct_fields__) | st.sampled_from(["tools", "type"]) | texts


@functools.cache
def model() -> LoadedModel:
    tokenizer = ChatTokenizer.load(prepare_model(BUILTIN_MODEL))
    return LoadedModel(name="smollm2", tokenizer=tokenizer, context_len_tokens=CONTEXT_TOKENS)


class Anywhere:
    """No worker is better than another."""

    async def choose(self, *_: object) -> None:
        return None


class OneModel:
    async def ready(self, name: str, until_unix_s: float) -> LoadedModel:
        return model()


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, Any]:
    """A valid request with some fields, at any depth, dropped or replaced by anything."""
    request = json.loads(json.dumps(VALID))
    for _ in range(draw(st.integers(0, 3))):
        place: Any = request
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and draw(st.booleans()):
                place = place[key]
                continue
            if draw(st.booleans()):
                place[key] = draw(values)
            else:
                del place[key]
            break
    if draw(st.booleans()):
        request[draw(field_names)] = draw(values)
    return request


def packed(fields: dict[str, Any]) -> bytes:
    try:
        return msgpack.packb(fields)
    except OverflowError:  # MessagePack's integers end at 64 bits
        return json.dumps(fields).encode()


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A request cut, or with bytes changed."""
    payload = bytearray(draw(st.sampled_from([json.dumps(VALID).encode(), msgpack.packb(VALID)])))
    for _ in range(draw(st.integers(1, 4))):
        payload[draw(st.integers(0, len(payload) - 1))] = draw(st.integers(0, 255))
    return bytes(payload[: draw(st.integers(0, len(payload)))])


def run(payload: bytes, message_headers: dict[str, str]) -> list[Emit]:
    task = Task(
        payload=payload,
        headers=message_headers,
        subject=names.REQUESTS.of(model="smollm2"),
        stream_seq=7,
        stored_unix_s=time.time(),
    )

    async def collect() -> list[Emit]:
        try:
            return [emit async for emit in preprocess.run(task, models=OneModel(), places=Anywhere())]
        except Permanent as error:
            return list(preprocess.answer(task, error))

    return asyncio.run(collect())


def check(emits: list[Emit]) -> None:
    """One task, or one terminal frame for each choice: right in itself, and small enough to be published."""
    for emit in emits:
        assert emit.msg_id
        assert len(emit.payload) <= limits.PAYLOAD_BYTES_MAX
    if emits[0].frame is None:
        (emit,) = emits
        request = decode(PreprocessedRequest, emit.payload)
        assert names.is_token(request.request_id)
        assert names.is_token(request.client)
        assert 1 <= request.choices <= limits.CHOICES_MAX
        assert 0 <= request.stop.min_tokens <= request.stop.max_tokens
        least = 1 if request.echo is None else 0
        assert least <= request.stop.max_tokens <= CONTEXT_TOKENS - len(request.token_ids)
        return
    frames = [decode(Frame, emit.payload) for emit in emits]
    assert [frame.choice for frame in frames] == list(range(len(frames)))
    for emit, frame in zip(emits, frames, strict=True):
        assert frame.finish_reason == "error"
        assert frame.error and len(frame.error.message) < 1000
        client = names.RESPONSES.parse(emit.subject)["client"]
        assert emit.msg_id == terminal_msg_id(client, frame.request_id, frame.choice)
        assert names.RESPONSES.parse(emit.subject) == {
            "client": names.RESPONSES.parse(emit.subject)["client"],
            "request_id": frame.request_id,
        }


@without_a_clock
@given(st.binary(max_size=200))
@example(b"")
@example(b"{" * 50_000)
@example(b"\x81" * 50_000)
def test_any_bytes(payload):
    check(run(payload, {}))


@settings(without_a_clock, max_examples=400)
@given(mutated(), st.booleans())
def test_any_mutation_of_a_valid_request(fields, as_json):
    emits = run(json.dumps(fields).encode() if as_json else packed(fields), {})
    check(emits)
    if emits[0].frame is not None:
        n, prompt = fields.get("n"), fields.get("prompt")
        # Of JSON that cannot be read (a NaN) only `n` is known.
        assert len(emits) in (choices_of(n, prompt), choices_of(n)), "every choice that was asked for ends"


@settings(without_a_clock, max_examples=300)
@given(damaged())
def test_any_damage_to_a_payload(payload):
    check(run(payload, {}))


@without_a_clock
@given(st.dictionaries(st.sampled_from([headers.CLIENT, headers.MSG_ID, headers.DEADLINE]), long_texts))
@example({headers.MSG_ID: "\udcff", headers.CLIENT: "\udcff", headers.DEADLINE: "\udcff"})
def test_any_headers(message_headers):
    check(run(json.dumps({"prompt": "x"}).encode(), message_headers))
