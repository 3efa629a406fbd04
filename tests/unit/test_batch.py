"""A batch's file: what is refused, which ids its lines get, and how the file of answers survives a kill."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.batch import BatchAnswer, Ledger, read_batch
from pipeline.completion import Completion, error_body
from pipeline.errors import ConfigError, InvalidRequest
from subjects.codec import TokenIds
from subjects.messages import Frame, PositionLogprobs, TokenLogprob, Usage


def line(custom_id: str = "a", url: str = "/v1/completions", **body: Any) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "m", **body}})


def written(folder: Path, *lines: str) -> Path:
    file = folder / "in.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (("{",), "line 1: Input data was truncated"),
        ((line("a"), '{"custom_id": "b", "body": {}}'), "line 2: Object missing required field `url`"),
        ((line("a"), line("b"), line("a", prompt="x")), "line 3: the custom_id 'a' is that of line 1"),
        ((line(url="/v1/embeddings"),), "line 1: POST /v1/embeddings is not one of POST /v1/chat/completions"),
        (('{"custom_id": "b", "url": "/v1/completions", "body": {}}',), "line 1: the body names no model"),
        (("",), "has 0 requests"),
    ],
)
def test_a_file_that_is_no_batch_is_refused_with_the_line(tmp_path: Path, lines: tuple[str, ...], says: str):
    with pytest.raises(ConfigError, match=says.replace("(", r"\(")):
        read_batch(written(tmp_path, *lines), None)


def test_ids_are_a_function_of_the_line_and_the_client_of_the_file(tmp_path: Path):
    first = read_batch(written(tmp_path, line("a", prompt="x"), "", line("b", prompt="x")), None)
    again = read_batch(written(tmp_path, line("a", prompt="x"), "", line("b", prompt="x")), None)
    edited = read_batch(written(tmp_path, line("a", prompt="x"), line("b", prompt="y")), None)
    assert first == again
    assert first.items[0].request_id == edited.items[0].request_id
    assert first.items[1].request_id != edited.items[1].request_id
    assert first.client != edited.client


def test_a_body_is_published_as_it_came_to_be_answered_whole(tmp_path: Path):
    batch = read_batch(written(tmp_path, line("a", prompt="x", stream=True, nonsense=1, n="two")), None)
    (item,) = batch.items
    payload = json.loads(item.payload(12.5))
    own = {"model": "m", "stream": False, "deadline": 12.5, "request_id": item.request_id}
    assert payload == own | {"prompt": "x", "nonsense": 1, "n": "two"}
    assert item.choices == 1, "it is refused with one frame"


def test_answers_are_kept_and_a_torn_line_is_cut_off(tmp_path: Path):
    file = tmp_path / "out.jsonl"
    with Ledger(file) as ledger:
        ledger.add(BatchAnswer(id="1", custom_id="a", response=None))
    with file.open("ab") as torn:
        torn.write(b'{"id": "2", "cust')
    with Ledger(file) as ledger:
        assert ledger.answered == {"1"}
        ledger.add(BatchAnswer(id="3", custom_id="c", response=None))
    assert [json.loads(line)["id"] for line in file.read_text().splitlines()] == ["1", "3"]


def test_another_file_is_not_written_into(tmp_path: Path):
    file = tmp_path / "out.jsonl"
    file.write_text("my notes\n")
    with pytest.raises(ConfigError, match=r"line 1 is no answer of a batch.*give another --output"), Ledger(file):
        pass
    assert file.read_text() == "my notes\n"


def frame(choice: int, token: int, index: int, finish_reason: str | None = None) -> Frame:
    chosen = TokenLogprob(token_id=token, logprob=-0.5, text=f" é{token}")
    return Frame(
        request_id="r",
        choice=choice,
        index=index,
        token_ids=TokenIds.of([token]),
        text=f" é{token}",
        logprobs=(PositionLogprobs(chosen=chosen, top=(chosen,)),),
        finish_reason=finish_reason,
        usage=Usage(prompt_tokens=5, completion_tokens=index + 1, cached_tokens=2) if finish_reason else None,
    )


@pytest.mark.parametrize("chat", [True, False])
def test_frames_make_one_body(chat: bool):
    completion = Completion("r", "m", chat, choices=2)
    for part in (frame(1, 7, 0), frame(0, 1, 0, "stop"), frame(1, 7, 0), frame(1, 8, 1, "length")):
        assert not completion.whole
        completion.add(part)
    assert completion.whole
    body = completion.body(99.9)
    assert (body["id"], body["created"]) == (("chatcmpl-r" if chat else "cmpl-r"), 99)
    assert body["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 3,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    second = body["choices"][1]
    assert second["finish_reason"] == "length"
    if chat:
        assert second["message"] == {"role": "assistant", "content": " é7 é8", "refusal": None, "annotations": []}
        assert [position["token"] for position in second["logprobs"]["content"]] == [" é7", " é8"]
        assert second["logprobs"]["content"][0]["bytes"] == list(" é7".encode())
    else:
        assert second["text"] == " é7 é8"
        assert second["logprobs"]["token_logprobs"] == [-0.5, -0.5]


def test_an_error_is_openai_s():
    failure = InvalidRequest("temperature: too high", field="temperature").failure()
    assert error_body(failure)["error"] == {
        "message": "temperature: too high",
        "type": "invalid_request_error",
        "param": "temperature",
        "code": "invalid_request",
    }
