"""The prompt sent back, with its logprobs: once, before the output, whoever owns the choice and whoever reads it."""

import json
from collections.abc import Sequence

import pytest

from pipeline.completion import Completion
from pipeline.config import SimulatedSettings
from pipeline.engine.simulated import SimulatedEngine, expected_tokens, text_of
from pipeline.errors import InvalidRequest
from pipeline.follow import Output
from pipeline.http.chunks import Chunks, Cursor
from pipeline.progress import History
from pipeline.stage import Task
from stages.decode import decode
from subjects.codec import TokenIds
from subjects.codec import decode as read
from subjects.messages import (
    EngineOptions,
    Frame,
    FurtherPrompt,
    OutputOptions,
    PositionLogprobs,
    PreprocessedRequest,
    StopConditions,
    TokenLogprob,
)

PROMPT, OTHER = TokenIds.of([5, 6, 7]), TokenIds.of([8, 9])
LENGTH = 6
TEXT = "".join(map(text_of, expected_tokens(PROMPT, LENGTH)))
OTHER_TEXT = "".join(map(text_of, expected_tokens(OTHER, LENGTH)))


def request(*, stream: bool = True, logprobs: bool = True, max_tokens: int = LENGTH, **fields) -> PreprocessedRequest:
    output = OutputOptions(stream=stream, logprobs=logprobs, top_logprobs=1, prompt_logprobs=logprobs)
    stop = StopConditions(max_tokens=max_tokens, ignore_eos=True)
    asked = {"request_id": "r", "client": "c", "model": "m", "token_ids": PROMPT, "echo": "What is asked"}
    return PreprocessedRequest(**asked | {"stop": stop, "output": output} | fields)


class Log:
    """Holds what an earlier owner got out."""

    def __init__(self, frames: Sequence[Frame]) -> None:
        self._history = History()
        for frame in frames:
            self._history.of(frame.choice).add(frame)

    async def history(self, _: PreprocessedRequest) -> History:
        return self._history


async def frames_of(asked: PreprocessedRequest, before: Sequence[Frame] = ()) -> list[Frame]:
    engine = SimulatedEngine(SimulatedSettings(ttft_ms=0, itl_ms=5))
    await engine.start()
    task = Task(payload=asked, subject="s", stream_seq=1, attempt=2 if before else 1)
    try:
        emits = [emit async for emit in decode.run(task, engine=engine, responses=Log(before), worker="w")]
    finally:
        await engine.close()
    return [read(Frame, emit.payload) for emit in emits]


def body_of(frames: Sequence[Frame], choices: int = 1, prompts: int = 1) -> dict:
    completion = Completion("r", "m", chat=False, choices=choices, prompts=prompts)
    for frame in frames:
        completion.add(frame)
    assert completion.whole
    return completion.body(0.0)


def streamed(frames: Sequence[Frame], cursor: Cursor) -> tuple[str, list[str], Cursor]:
    """The text and the tokens that a stream's events say, and the last event's id."""
    chunks, text, tokens = Chunks("r", cursor), "", []
    for event in filter(None, map(chunks.event, frames)):
        (choice,) = json.loads(event.split(b"data: ")[1])["choices"]
        cursor = Cursor.parse(event.split(b"\n")[0].removeprefix(b"id: ").decode())
        text += choice["text"]
        tokens += choice["logprobs"]["tokens"] if choice["logprobs"] else []
    return text, tokens, cursor


@pytest.mark.parametrize("stream", [True, False])
async def test_the_first_frame_alone_carries_the_prompt(stream: bool):
    first, *others = await frames_of(request(stream=stream))
    assert first.echo.text == "What is asked"
    assert [position.chosen.token_id for position in first.echo.logprobs] == PROMPT.tolist()
    assert first.echo.logprobs[0].chosen.logprob is None
    assert not any(frame.echo for frame in others)
    (choice,) = body_of([first, *others])["choices"]
    assert choice["text"] == "What is asked" + TEXT
    logprobs = choice["logprobs"]
    assert len(logprobs["tokens"]) == len(PROMPT) + LENGTH == len(logprobs["top_logprobs"])
    assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
    assert logprobs["top_logprobs"][1] == {text_of(6): -0.25}


async def test_without_logprobs_it_is_text_alone():
    first, *_ = await frames_of(request(logprobs=False))
    assert (first.echo.text, first.echo.logprobs) == ("What is asked", None)
    assert not any(frame.echo for frame in await frames_of(request(logprobs=False, echo=None)))


@pytest.mark.parametrize("done", range(1, LENGTH))
async def test_another_owner_does_not_repeat_it(done: int):
    whole = await frames_of(request())
    before = whole[:done]
    after = await frames_of(request(), before)
    assert not any(frame.echo for frame in after)
    assert body_of([*before, *after])["choices"] == body_of(whole)["choices"]


async def test_another_owner_says_it_where_the_first_one_had_not():
    begun = Frame(request_id="r", choice=0, worker="w1")
    after = await frames_of(request(), [begun])
    assert after[0].echo is not None and after[0].echo.logprobs
    assert body_of([begun, *after])["choices"][0]["text"] == "What is asked" + TEXT


@pytest.mark.parametrize("logprobs", [True, False])
async def test_a_prompt_alone_has_no_output(logprobs: bool):
    (frame,) = await frames_of(request(max_tokens=0, logprobs=logprobs, stream=False))
    assert (frame.text, len(frame.token_ids), frame.finish_reason, frame.logprobs) == ("", 0, "length", None)
    assert (frame.usage.prompt_tokens, frame.usage.completion_tokens) == (len(PROMPT), 0)
    assert (frame.echo.text, bool(frame.echo.logprobs)) == ("What is asked", logprobs)


async def test_a_stream_that_another_gateway_goes_on_with_says_it_once():
    frames = await frames_of(request())
    cursor = Cursor(chat=False, model="m")
    whole, tokens, _ = streamed(frames, cursor)
    assert whole == "What is asked" + TEXT and len(tokens) == len(PROMPT) + LENGTH
    for had in range(1, len(frames)):
        text, _, reached = streamed(frames[:had], cursor)
        rest, _, _ = streamed(frames, reached)
        assert text + rest == whole


async def test_a_reader_who_has_tokens_of_it_has_the_prompt_too():
    first, *_ = await frames_of(request(stream=False))
    text, tokens, _ = streamed([first], Cursor(chat=False, seen=((2, False),)))
    assert (text, len(tokens)) == (TEXT, LENGTH - 2)
    assert Output(from_token=2).add(first).echo is None
    assert Output().add(first).echo == first.echo


async def test_each_prompt_has_its_own_choices():
    further = FurtherPrompt(token_ids=OTHER, max_tokens=2, echo="And then")
    frames = await frames_of(request(logprobs=False, choices=4, further=(further,)))
    body = body_of(frames, choices=4, prompts=2)
    short = "".join(map(text_of, expected_tokens(OTHER, 2)))
    assert [choice["text"] for choice in body["choices"]] == ["What is asked" + TEXT] * 2 + ["And then" + short] * 2
    assert body["usage"]["prompt_tokens"] == len(PROMPT) + len(OTHER), "each prompt counts once"
    assert body["usage"]["completion_tokens"] == 2 * LENGTH + 2 * 2
    cursor = Cursor(chat=False, include_usage=True, model="m", prompts=2, seen=((0, False),) * 4)
    chunks = Chunks("r", Cursor.parse(str(cursor)))
    for frame in frames:
        chunks.event(frame)
    assert json.loads(chunks.end().split(b"data: ")[1].split(b"\n")[0])["usage"] == body["usage"]


def test_a_part_of_a_character_is_told_by_its_bytes():
    """As SGLang tells it: in a chat as bytes, in a completion each byte as a character of Latin-1."""
    token = TokenLogprob(token_id=9, logprob=-1.0, text="\ufffd", raw=b"\xf0\x9f")
    position = PositionLogprobs(chosen=token, top=(token,))
    frame = Frame(request_id="r", token_ids=TokenIds.of([9]), logprobs=(position,), finish_reason="length")
    for chat, wanted in ((True, [0xF0, 0x9F]), (False, "\xf0\x9f")):
        completion = Completion("r", "m", chat)
        completion.add(frame)
        logprobs = completion.body(0.0)["choices"][0]["logprobs"]
        assert (logprobs["content"][0]["bytes"] if chat else logprobs["tokens"][0]) == wanted


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"dp_rank": 1}, "data_parallel_rank"),
        ({"engine": EngineOptions(lora_path="poet")}, "lora_path"),
        ({"engine": EngineOptions(max_thinking_tokens=5)}, "max_thinking_tokens"),
    ],
)
async def test_what_this_engine_cannot_do_is_refused_by_name(fields, field):
    with pytest.raises(InvalidRequest) as error:
        await frames_of(request(**fields))
    assert error.value.field == field
