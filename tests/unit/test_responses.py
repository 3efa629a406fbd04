"""/v1/responses without a network: requests as chats, frames as events, and where a reader goes on."""

import json
from typing import Any

import pytest
from msgspec.structs import replace

from pipeline.errors import Cancelled, InvalidRequest
from pipeline.http.responses import (
    Answer,
    ResponseEvents,
    chat_fields,
    input_messages,
    parse_request,
)
from subjects.codec import TokenIds
from subjects.messages import Frame, PositionLogprobs, StoredResponse, Timing, TokenLogprob, Usage

STORED = StoredResponse(
    request_id="r", model="m", created_unix_s=7.5, deadline_unix_s=9.0, settings={"store": True, "top_p": 0.5}
)
CHOSEN = PositionLogprobs(chosen=TokenLogprob(token_id=1, logprob=-0.5, text="a"))
FRAMES = [
    Frame(request_id="r", token_ids=TokenIds.of([1, 2]), text="ab", logprobs=(CHOSEN, CHOSEN)),
    Frame(request_id="r", index=2, attempt=2),  # a later owner's first word
    Frame(request_id="r", index=2, attempt=2, token_ids=TokenIds.of([3]), text="", logprobs=(CHOSEN,)),
    Frame(request_id="r", index=3, attempt=2, token_ids=TokenIds.of([4]), text="xy", logprobs=(CHOSEN,)),
]
USAGE = Usage(prompt_tokens=3, completion_tokens=5, cached_tokens=2)
END = Frame(request_id="r", index=4, attempt=2, token_ids=TokenIds.of([5]), text="z", finish_reason="stop", usage=USAGE)
REQUIRED = {
    "id",
    "object",
    "created_at",
    "completed_at",
    "status",
    "incomplete_details",
    "model",
    "previous_response_id",
    "instructions",
    "output",
    "error",
    "tools",
    "tool_choice",
    "truncation",
    "parallel_tool_calls",
    "text",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "top_logprobs",
    "temperature",
    "reasoning",
    "usage",
    "max_output_tokens",
    "max_tool_calls",
    "store",
    "background",
    "service_tier",
    "metadata",
    "safety_identifier",
    "prompt_cache_key",
}
"""Of a response, in the Open Responses specification."""
NAMES = (
    "created in_progress output_item.added content_part.added output_text.delta output_text.delta output_text.delta "
)
NAMES += "output_text.done content_part.done output_item.done completed"


def told(*frames: Frame, after: int = -1) -> list[dict[str, Any]]:
    events = ResponseEvents(STORED, after)
    stream = b"".join(map(events.event, frames)) + events.end()
    bodies = []
    for event in stream.decode().split("\n\n")[:-1]:
        name, data = event.split("\n")
        bodies.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {bodies[-1]['type']}"
    return bodies


def test_events_come_in_openais_order_and_say_the_whole_at_the_end():
    events = told(*FRAMES, END)
    assert [event["type"] for event in events] == [f"response.{name}" for name in NAMES.split()]
    assert [event["sequence_number"] for event in events] == [0, 1, 2, 3, 5, 7, 9, 10, 11, 12, 13]
    deltas = [event for event in events if event["type"].endswith("text.delta")]
    assert [(event["delta"], len(event["logprobs"])) for event in deltas] == [("ab", 2), ("xy", 2), ("z", 0)]
    assert events[7]["text"] == "abxyz"
    body = events[-1]["response"]
    assert (body["id"], body["status"], body["top_p"], body["created_at"]) == ("resp_r", "completed", 0.5, 7)
    assert body["output"] == [events[-2]["item"]]
    assert body["output"][0]["content"] == [events[-3]["part"]]
    assert body["usage"]["input_tokens_details"]["cached_tokens"] == 2
    assert body["usage"]["total_tokens"] == 8
    answer = Answer(STORED)
    for frame in (*FRAMES, END):
        answer.add(frame)
    assert answer.body() == body


def test_a_reader_goes_on_behind_any_number_whatever_it_was_told_of_duplicates():
    events = told(*FRAMES, END)
    for event in events:
        after = event["sequence_number"]
        again = told(FRAMES[0], *FRAMES, END, FRAMES[0], after=after)
        assert again == [later for later in events if later["sequence_number"] > after]


def test_text_of_the_end_without_a_token_of_its_own_has_a_number_too():
    last = Frame(request_id="r", index=2, text="!", finish_reason="length", usage=USAGE)
    numbers = [event["sequence_number"] for event in told(FRAMES[0], last)]
    assert numbers == sorted(set(numbers))
    (*_, end) = told(FRAMES[0], last)
    assert (end["type"], end["response"]["incomplete_details"]) == (
        "response.incomplete",
        {"reason": "max_output_tokens"},
    )
    assert end["response"]["output"][0]["content"][0]["text"] == "ab!"


def test_a_failure_is_raised_and_told_as_the_last_event():
    events = ResponseEvents(STORED)
    failure = Cancelled("cancelled by the client").failure()
    begun = events.event(FRAMES[0])
    assert begun
    with pytest.raises(Cancelled):
        events.event(Frame(request_id="r", index=2, finish_reason="abort", error=failure))
    name, data = events.failed(failure).decode().strip().split("\n")
    body = json.loads(data.removeprefix("data: "))
    assert (name, body["sequence_number"]) == ("event: response.failed", 6)
    assert (body["response"]["status"], body["response"]["output"][0]["status"]) == ("cancelled", "incomplete")


def test_a_body_has_every_field_that_openai_requires_with_what_was_used():
    asked, passed = parse_request(
        {"model": "m", "input": "hi", "top_p": 0.25, "presence_penalty": 0.5, "prompt_cache_key": "k"}
    )
    stored = replace(STORED, settings=asked.settings(passed, {"temperature": 0.6, "top_p": 0.95}))
    timed = replace(END, timing=Timing(started_unix_s=8.0, ended_unix_s=9.5))
    answer = Answer(stored)
    for frame in (*FRAMES, timed):
        answer.add(frame)
    body = answer.body()
    assert (body["temperature"], body["top_p"], body["presence_penalty"]) == (0.6, 0.25, 0.5)
    assert body["prompt_cache_key"] == chat_fields(asked, passed, [])["prompt_cache_key"] == "k"
    assert body["completed_at"] == 9
    assert body.keys() >= REQUIRED
    (*_, incomplete) = told(replace(timed, index=0, finish_reason="length"))
    assert incomplete["response"]["completed_at"] is None
    assert asked.settings({}, {})["temperature"] == 1.0


def test_a_request_becomes_one_for_a_chat():
    asked, passed = parse_request(
        {
            "model": "m",
            "instructions": "be brief",
            "input": [
                {"role": "user", "content": "hi"},
                {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "ho"}]},
                {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
            ],
            "max_output_tokens": 5,
            "text": {"format": {"type": "json_schema", "name": "n", "schema": {}, "strict": True}},
            "include": ["message.output_text.logprobs"],
            "seed": 4,
            "reasoning": {"effort": None},
            "tools": [],
            "user": None,
        }
    )
    assert chat_fields(asked, passed, input_messages(asked)) == {
        "model": "m",
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "ho"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        ],
        "max_completion_tokens": 5,
        "logprobs": True,
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}, "strict": True}},
        "seed": 4,
        "user": None,
    }


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"model": None}, "model"),
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input.0.type"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input.0.role"),
        ({"input": [{"role": "user"}]}, "input.0.content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0.type"),
        ({"input": [{"role": "user", "content": "x", "nonsense": 1}]}, "input.0.nonsense"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"background": True}, "background"),
        ({"reasoning": {"effort": "low"}}, "reasoning"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["file_search_call.results"]}, "include.0"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k"),
        ({"temprature": 1}, "temprature"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ({"messages": []}, "messages"),
    ],
)
def test_what_is_not_served_is_refused_by_name(fields: dict[str, Any], field: str):
    with pytest.raises(InvalidRequest) as raised:
        asked, passed = parse_request({"model": "m", "input": "hi"} | fields)
        chat_fields(asked, passed, input_messages(asked))
    assert raised.value.field == field
