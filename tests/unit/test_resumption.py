"""A choice that another worker goes on with ends as if nobody had died."""

import pytest

from pipeline.config import SimulatedSettings
from pipeline.engine.protocol import EngineOutput, EngineRequest
from pipeline.engine.simulated import SimulatedEngine, expected_tokens, text_of
from pipeline.errors import EngineFailed
from pipeline.progress import Progress
from pipeline.resumption import Seam, plan
from pipeline.stage import Task
from stages.decode import decode
from subjects.codec import TokenIds
from subjects.codec import decode as read
from subjects.messages import Frame, OutputOptions, PreprocessedRequest, SamplingOptions, StopConditions

PROMPT = TokenIds.of([5, 6, 7])
LENGTH = 12
WHOLE = expected_tokens(PROMPT, LENGTH)
TEXT = "".join(text_of(token) for token in WHOLE)


def request(*, stop: tuple[str, ...] = (), stream: bool = True, no_stop_trim: bool = False, **sampling):
    return PreprocessedRequest(
        request_id="r",
        client="c",
        model="m",
        token_ids=PROMPT,
        stop=StopConditions(max_tokens=LENGTH, stop=stop, ignore_eos=True),
        sampling=SamplingOptions(**sampling),
        output=OutputOptions(stream=stream, no_stop_trim=no_stop_trim),
    )


def progress(tokens: int, text: str | None = None) -> Progress:
    so_far = "".join(text_of(token) for token in WHOLE[:tokens])
    said = so_far if text is None else text
    return Progress(token_ids=WHOLE[:tokens], text=said, raw=said, attempt=1)


class Log:
    """A log that holds what the first worker got out."""

    def __init__(self, so_far: Progress) -> None:
        self.so_far = so_far

    async def history(self, _: PreprocessedRequest):
        return self

    def of(self, choice: int) -> Progress:
        assert choice == 0
        return self.so_far


async def resumed(asked: PreprocessedRequest, so_far: Progress) -> list[Frame]:
    engine = SimulatedEngine(SimulatedSettings(ttft_ms=0, itl_ms=0))
    await engine.start()
    task = Task(payload=asked, subject="s", stream_seq=1, attempt=2)
    emits = [emit async for emit in decode.run(task, engine=engine, responses=Log(so_far), worker="w2")]
    await engine.close()
    return [read(Frame, emit.payload) for emit in emits]


@pytest.mark.parametrize("done", range(LENGTH + 1))
async def test_wherever_it_broke_off_the_rest_is_the_rest(done: int):
    so_far = progress(done)
    frames = await resumed(request(), so_far)
    for frame in frames:
        assert so_far.add(frame) is frame
    assert so_far.token_ids == WHOLE
    assert so_far.text == TEXT
    assert [frame.finish_reason for frame in frames] == [None] * (len(frames) - 1) + ["length"]
    assert frames[-1].usage.completion_tokens == LENGTH
    assert frames[-1].usage.prompt_tokens == len(PROMPT)


@pytest.mark.parametrize("sampling", [{"regex": ".*"}, {"presence_penalty": 0.5}, {"repetition_penalty": 1.1}])
async def test_what_is_more_than_tokens_is_generated_again_without_repeats(sampling):
    asked = request(temperature=0, **sampling)
    so_far = progress(5)
    how = plan(asked, so_far)
    assert (how.token_ids, how.stop, how.repeated_tokens) == (PROMPT, asked.stop, 5)
    seam, engine = Seam(asked, so_far, how), SimulatedEngine(SimulatedSettings(ttft_ms=0, itl_ms=0))
    await engine.start()
    again = EngineRequest(rid="again", token_ids=how.token_ids, stop=how.stop)  # the grammar is the real engine's
    outputs = [new async for output in engine.generate(again) if (new := seam.output(output))]
    await engine.close()
    assert [token for output in outputs for token in output.token_ids] == WHOLE.tolist()[5:]
    assert so_far.text + "".join(output.text for output in outputs) == TEXT


def test_a_sampled_answer_under_a_grammar_is_not_continued():
    with pytest.raises(EngineFailed, match="temperature 0 or a seed"):
        plan(request(temperature=0.7, json_schema="{}"), progress(3))
    assert plan(request(temperature=0.7, json_schema="{}"), progress(0)).token_ids == PROMPT
    assert plan(request(temperature=0.7, seed=1, json_schema="{}"), progress(3)).repeated_tokens == 3


def test_the_frequency_penalty_of_emitted_tokens_becomes_bias():
    so_far = Progress(token_ids=TokenIds.of([9, 9, 8]))
    how = plan(request(frequency_penalty=0.5, logit_bias={"8": 1.0, "3": 2.0}), so_far)
    assert how.sampling.logit_bias == {"8": 0.5, "3": 2.0, "9": -1.0}
    assert how.sampling.frequency_penalty == 0.5


def seam_of(before: str, stop: tuple[str, ...], keep: bool = False) -> Seam:
    asked, so_far = request(stop=stop, no_stop_trim=keep), progress(3, before)
    return Seam(asked, so_far, plan(asked, so_far))


def step(text: str) -> EngineOutput:
    return EngineOutput(token_ids=TokenIds.of([1]), text=text)


@pytest.mark.parametrize(("keep", "text"), [(False, ""), (True, "ND")])
def test_a_stop_string_across_the_seam_ends_it(keep: bool, text: str):
    seam = seam_of("some words E", ("END",), keep)
    assert seam.output(step("N")).finish_reason is None
    last = seam.output(step("D more"))
    assert (last.finish_reason, last.matched_stop) == ("stop", "END")
    assert last.text == text[1:]


def test_a_stop_string_behind_the_seam_is_the_engines():
    seam = seam_of("some words", ("END", "x" * 40))
    assert seam.output(step(" END")).finish_reason is None
    assert seam.output(step(" and so on")).finish_reason is None


async def test_without_streaming_it_starts_again():
    (frame,) = await resumed(request(stream=False), Progress())
    assert (frame.token_ids, frame.text, frame.index) == (WHOLE, TEXT, 0)
