"""Embedding requests without a network: what is refused and how, how many ends there are, OpenAI's body."""

import base64
import json
import math
from typing import Any

import msgspec
import pytest

from pipeline import embeddings
from pipeline.embeddings import Embeddings
from pipeline.engine.sglang import outputs, pooling
from pipeline.errors import DeadlineExceeded, EngineFailed, EngineStartError, InvalidRequest, PipelineError
from pipeline.openai import identify, inputs_of, is_embedding
from subjects.codec import TokenIds, Vector
from subjects.limits import INPUTS_MAX
from subjects.messages import Embedding, Failure, Frame, Usage

NOW_UNIX_S = 1_790_000_000.0
SUBJECT = "sglang.requests.m"
CUT = Embedding(dimensions=64, matryoshka=True, matryoshka_dimensions=(16, 32))


def payload(msgpack: bool = False, **fields: Any) -> bytes:
    return msgspec.msgpack.encode(fields) if msgpack else json.dumps(fields).encode()


def parsed(**fields: Any):
    return embeddings.parse(payload(**fields), {}, SUBJECT, 7, accepted_unix_s=NOW_UNIX_S, now_unix_s=NOW_UNIX_S)


def resolved(
    inputs: list[list[int]], embedding: Embedding | None = None, now_unix_s: float = NOW_UNIX_S, **fields: Any
):
    return embeddings.resolve(
        parsed(**{"input": inputs} | fields),
        tuple(TokenIds.of(one) for one in inputs),
        context_len_tokens=8,
        vocab_size=100,
        embedding=embedding,
        now_unix_s=now_unix_s,
    )


@pytest.mark.parametrize("msgpack", [False, True])
@pytest.mark.parametrize(
    ("fields", "embeds", "choices"),
    [
        ({"input": "a"}, True, 1),
        ({"input": ["a", "b"]}, True, 2),
        ({"input": [1, 2, 3]}, True, 1),
        ({"input": [[1], [2], [3]]}, True, 3),
        ({"input": ["a"], "prompt": None, "n": 5}, True, 1),
        ({"input": []}, True, 1),
        ({"input": ["a"] * INPUTS_MAX}, True, INPUTS_MAX),
        ({"input": ["a"] * (INPUTS_MAX + 1)}, True, 1),
        ({"input": None, "prompt": "a", "n": 3}, False, 3),
        ({"input": ["a", "b"], "prompt": "a", "n": 3}, False, 3),
        ({"input": ["a", "b"], "messages": [], "n": 4}, False, 4),
        ({"prompt": "a"}, False, 1),
    ],
)
def test_a_request_for_vectors_is_told_by_its_input(fields: dict[str, Any], embeds: bool, choices: int, msgpack: bool):
    """Whoever answers an error must count the ends as the client does."""
    body = payload(msgpack, **fields)
    assert is_embedding(body) is embeds
    assert identify(body, {}, 1).choices == choices
    if embeds:
        assert inputs_of(fields["input"]) == choices


def test_what_cannot_be_read_asks_for_no_vectors():
    assert not is_embedding(b'{"input": ["a", "b"') and not is_embedding(b"\x00") and not is_embedding(b"")
    assert identify(b'{"input": ["a", "b", "request_id": "r"', {}, 1).choices == 1


def test_dimensions_follow_the_models_word():
    assert resolved([[1]], CUT, dimensions=16).dimensions == 16
    assert resolved([[1]], Embedding(dimensions=64, matryoshka=True), dimensions=63).dimensions == 63
    for embedding, wanted, said in (
        (Embedding(dimensions=64), 64, "Matryoshka"),
        (CUT, 17, "16, 32"),
        (CUT, 65, "at most 64"),
    ):
        with pytest.raises(InvalidRequest, match=said) as caught:
            resolved([[1]], embedding, dimensions=wanted)
        assert (caught.value.field, caught.value.size) == ("dimensions", wanted)


def test_each_limit_names_its_input():
    assert resolved([[1, 2], [99]]).choices == 2
    assert resolved([[1] * 7]).inputs == (TokenIds.of([1] * 7),)
    for inputs, field, limit in (
        ([[1], [1] * 8], "input.1", 7),
        ([[1], [2, 100]], "input.1.1", 99),
    ):
        with pytest.raises(PipelineError) as caught:
            resolved(inputs)
        assert (caught.value.field, caught.value.limit) == (field, limit)
    with pytest.raises(DeadlineExceeded):
        resolved([[1]], now_unix_s=NOW_UNIX_S + 1e6)


def test_the_answer_is_openais():
    answer = Embeddings("r", "m", 2)
    vectors = [Vector.of([0.5, -0.25]), Vector.of([1.0, 0.0])]
    for choice in (1, 0):
        usage = Usage(prompt_tokens=choice + 2, completion_tokens=0)
        frame = Frame(request_id="r", choice=choice, embedding=vectors[choice], finish_reason="stop", usage=usage)
        answer.add(frame)
        answer.add(msgspec.structs.replace(frame, embedding=Vector.of([9.0])))  # a second end brings nothing new
    body = answer.body("float")
    assert [one["embedding"] for one in body["data"]] == [[0.5, -0.25], [1.0, 0.0]]
    assert body["usage"] == {"prompt_tokens": 5, "total_tokens": 5} and answer.failure is None
    assert base64.b64decode(answer.body("base64")["data"][1]["embedding"]) == vectors[1].raw


def test_the_first_input_that_failed_says_why():
    answer = Embeddings("r", "m", 3)
    for choice in (2, 1):
        failure = Failure(code="engine_failed", message=f"input {choice}", status=500)
        answer.add(Frame(request_id="r", choice=choice, finish_reason="error", error=failure))
    assert answer.failure is not None and answer.failure.message == "input 1"


def test_sglangs_answer_is_a_vector_or_an_error():
    meta = {"finish_reason": None}
    assert outputs.vector({"embedding": [0.5, 1.0], "meta_info": meta}) == Vector.of([0.5, 1.0])
    for wrong in ([math.nan, 1.0], [math.inf], {"3": 0.5}):
        with pytest.raises(EngineFailed, match="finite"):
            outputs.vector({"embedding": wrong, "meta_info": meta})
    aborted = {"type": "abort", "message": "too long", "status_code": 400}
    with pytest.raises(InvalidRequest, match="too long"):
        outputs.vector({"embedding": [], "meta_info": {"finish_reason": aborted}})


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False, "word_embedding_dimension": 384}, "mean"),
        ({"pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode_lasttoken": True}, "last"),
        (None, "model"),
        ({"pooling_mode_max_tokens": True}, "pooling_mode_max_tokens"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "and"),
        ({}, "no pooling"),
    ],
)
def test_a_models_files_say_how_it_pools(tmp_path, settings: dict[str, Any] | None, found: str):
    if settings is not None:
        (tmp_path / "1_Pooling").mkdir()
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    if found in ("mean", "cls", "last", "model"):
        assert pooling.of_model(tmp_path) == found
        return
    with pytest.raises(EngineStartError, match=found):
        pooling.of_model(tmp_path)
