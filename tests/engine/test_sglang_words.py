"""Requests in SGLang's words and its answers in ours. Needs no SGLang."""

from dataclasses import replace

import pytest

from pipeline.engine.protocol import EngineRequest
from pipeline.engine.sglang import outputs, requests
from pipeline.errors import EngineFailed, InvalidRequest
from subjects.codec import TokenIds
from subjects.messages import (
    EngineOptions,
    OutputOptions,
    PositionLogprobs,
    SamplingOptions,
    StopConditions,
    TokenLogprob,
)

OPEN, STREAMED = SamplingOptions(), OutputOptions()


def request(sampling: SamplingOptions = OPEN, output: OutputOptions = STREAMED, **stop) -> EngineRequest:
    return EngineRequest(
        rid="r.0.1",
        token_ids=TokenIds.of([1, 2]),
        stop=StopConditions(**{"max_tokens": 5} | stop),
        sampling=sampling,
        output=output,
    )


def test_every_sampling_and_stop_field_is_mapped():
    """A field added to our messages and forgotten here would be dropped in silence."""
    ours = {
        *(set(SamplingOptions.__struct_fields__) - {"seed"}),
        *(set(StopConditions.__struct_fields__) - {"max_tokens", "min_tokens"}),
    }
    everything = request(
        SamplingOptions(
            temperature=0.5,
            top_p=0.9,
            top_k=5,
            min_p=0.1,
            frequency_penalty=0.2,
            presence_penalty=0.3,
            repetition_penalty=1.1,
            seed=7,
            logit_bias={"3": -1.0},
            json_schema="{}",
            regex="a",
            ebnf="b",
            structural_tag="{}",
            ebnf_full_assistant=True,
            require_reasoning=True,
        ),
        OutputOptions(skip_special_tokens=False, no_stop_trim=True, stream=False),
        min_tokens=2,
        stop=("x",),
        stop_token_ids=(9,),
        ignore_eos=True,
    )
    theirs = requests.sampling_params(everything, {})
    assert requests.arguments(everything, {})["require_reasoning"] is True
    assert "require_reasoning" not in requests.arguments(request(), {})
    assert set(theirs) == (ours - {"require_reasoning"}) | {
        "sampling_seed",
        "max_new_tokens",
        "min_new_tokens",
        "skip_special_tokens",
        "no_stop_trim",
        "stream_interval",
    }
    assert (theirs["sampling_seed"], theirs["max_new_tokens"], theirs["stop"]) == (7, 5, ["x"])
    assert theirs["skip_special_tokens"] is False and theirs["no_stop_trim"] is True


def test_what_a_request_leaves_open_is_the_models_own():
    own = {"temperature": 0.6, "top_p": 0.95}
    open_ = requests.sampling_params(request(), own)
    assert (open_["temperature"], open_["top_p"]) == (0.6, 0.95)
    given = requests.sampling_params(request(SamplingOptions(temperature=0.0)), own)
    assert (given["temperature"], given["top_p"]) == (0.0, 0.95)
    assert "temperature" not in requests.sampling_params(request(), {})


def test_a_priority_goes_to_engines_that_have_priorities():
    urgent = replace(request(), priority=3)
    assert "priority" not in requests.arguments(urgent, {})  # SGLang may refuse the request for it
    assert requests.arguments(urgent, {}, priority_sign=1)["priority"] == 3
    assert requests.arguments(urgent, {}, priority_sign=-1)["priority"] == -3


def test_logprobs_are_asked_for_only_when_wanted():
    assert "return_logprob" not in requests.arguments(request(), {})
    wanted = requests.arguments(request(output=OutputOptions(logprobs=True, top_logprobs=3)), {})
    assert (wanted["return_logprob"], wanted["top_logprobs_num"], wanted["logprob_start_len"]) == (True, 3, -1)


def chunk(finish=None, ids=(5, 6), text=" five six", **meta):
    return {
        "text": text,
        "output_ids": list(ids),
        "meta_info": {"finish_reason": finish, "cached_tokens": 4, **meta},
    }


def test_a_chunk_is_a_step():
    step = outputs.step(chunk(), logprobs=False, top_logprobs=0)
    assert (step.token_ids.tolist(), step.text, step.finish_reason, step.cached_tokens) == (
        [5, 6],
        " five six",
        None,
        0,
    )
    last = outputs.step(chunk({"type": "stop", "matched": "x"}), logprobs=False, top_logprobs=0)
    assert (last.finish_reason, last.matched_stop, last.cached_tokens) == ("stop", "x", 4)
    full = outputs.step(chunk({"type": "length", "length": 5}), logprobs=False, top_logprobs=0)
    assert (full.finish_reason, full.matched_stop) == ("length", None)


def test_logprobs_belong_to_the_last_tokens():
    """Also where SGLang repeats those of the tokens before."""
    all_so_far = [(-1.0, 4, "four"), (-2.0, 5, "five"), (-3.0, 6, "six")]
    tops = [None, [(-2.0, 5, "five"), (-2.5, 7, None)], [(-3.0, 6, "six")]]
    step = outputs.step(
        chunk(output_token_logprobs=all_so_far, output_top_logprobs=tops), logprobs=True, top_logprobs=2
    )
    five, six = (TokenLogprob(token_id=i, logprob=p, text=t) for p, i, t in all_so_far[1:])
    assert step.logprobs == (
        PositionLogprobs(chosen=five, top=(five, TokenLogprob(token_id=7, logprob=-2.5))),
        PositionLogprobs(chosen=six, top=(six,)),
    )


def test_an_aborted_chunk_gives_no_token_twice():
    step = outputs.step(chunk({"type": "abort", "message": "Abort in waiting queue"}), logprobs=True, top_logprobs=0)
    assert (step.finish_reason, len(step.token_ids), step.text) == ("abort", 0, "")


@pytest.mark.parametrize(
    ("status", "error"), [(400, InvalidRequest), (500, EngineFailed), (503, EngineFailed), (504, EngineFailed)]
)
def test_an_abort_with_a_status_is_an_error(status: int, error: type):
    aborted = chunk({"type": "abort", "message": "Failed to compile json grammar: x", "status_code": status})
    with pytest.raises(error, match="Failed to compile") as raised:
        outputs.step(aborted, logprobs=False, top_logprobs=0)
    if error is InvalidRequest:
        assert raised.value.field == "json_schema"


@pytest.mark.parametrize(
    ("says", "field"),
    [
        ("max_new_tokens must be at least 0, got -1.", "max_tokens"),
        ("min_new_tokens must be in [0, max_new_tokens(4)], got 5.", "min_tokens"),
        ("Requested token count exceeds the model's maximum context length of 8 tokens.", "max_tokens"),
        ("top_p must be in (0, 1], got 3.0.", "top_p"),
        ("routed_dp_rank=7 out of range [0, 1)", "data_parallel_rank"),
        ("LoRA adapter 'poet' was requested, but LoRA is not enabled.", "lora_path"),
        ("Received request with 2 unique loras requested but max loaded loras is 1", "lora_path"),
        ("max_thinking_tokens requires the server to be launched with --enable-strict-thinking", "max_thinking_tokens"),
        ("something else entirely", None),
    ],
)
def test_a_refusal_names_our_field(says: str, field: str | None):
    assert (requests.refusal(says).field, str(requests.refusal(says))) == (field, says)


def test_what_an_engine_must_know_beside_is_mapped():
    """A field added to our message and forgotten here would be dropped in silence."""
    options = EngineOptions(lora_path="poet", cache_salt="tenant-7", max_thinking_tokens=0)
    plain, told = (requests.arguments(replace(request(), options=one), {}) for one in (EngineOptions(), options))
    assert told.keys() - plain.keys() == set(EngineOptions.__struct_fields__)
    assert (told["lora_path"], told["max_thinking_tokens"]) == ("poet", 0)
    unsalted = requests.arguments(replace(request(), options=options), {}, salted=False)
    assert unsalted["extra_key"] == told["cache_salt"] != "tenant-7", "the adapter is part of it"
    assert "cache_salt" not in unsalted
    assert requests.arguments(replace(request(), dp_rank=3), {})["routed_dp_rank"] == 3


def test_a_prompts_logprobs_come_with_the_first_chunk():
    wanted = requests.arguments(request(output=OutputOptions(logprobs=True, prompt_logprobs=True)), {})
    assert (wanted["return_logprob"], wanted["logprob_start_len"]) == (True, 0)
    theirs = {
        "input_token_logprobs": [(None, 1, "a"), (-2.0, 2, "\ufffd")],
        "input_top_logprobs": [None, [(-1.0, 3, "c")]],
        "output_token_logprobs": [(-1.0, 5, "five"), (-1.5, 6, "six")],
        "output_top_logprobs": [[], []],
    }
    step = outputs.step(
        chunk(**theirs), logprobs=True, top_logprobs=1, prompt_logprobs=True, piece_of={2: "ðŁ"}.__getitem__
    )
    first, second = step.prompt_logprobs
    assert (first.chosen.logprob, first.top) == (None, ())
    assert (second.chosen.raw, second.top[0].token_id) == (b"\xf0\x9f", 3)
    assert outputs.step(chunk(**theirs), logprobs=True, top_logprobs=1).prompt_logprobs is None
