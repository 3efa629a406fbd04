"""What the adapter makes of SGLang: outputs, stops, sampling, refusals, cancellation."""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from msgspec.structs import replace as replace_struct

from pipeline.engine.protocol import EngineOutput, EngineRequest
from pipeline.errors import InvalidRequest
from subjects.codec import NO_TOKENS, TokenIds
from subjects.messages import EngineOptions, OutputOptions, SamplingOptions, StopConditions

if TYPE_CHECKING:
    from tests.engine.one_process.conftest import StartedEngine

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]
DEADLINE_S = 60.0
FRANCE = "The capital of France is"
GREEDY = SamplingOptions(temperature=0.0)
_numbers = iter(range(1_000_000))


def request(prompt: TokenIds, max_tokens: int = 12, sampling: SamplingOptions = GREEDY, **stop) -> EngineRequest:
    return EngineRequest(
        rid=f"test.{next(_numbers)}",
        token_ids=prompt,
        stop=StopConditions(max_tokens=max_tokens, **stop),
        sampling=sampling,
    )


def text(outputs: list[EngineOutput]) -> str:
    return "".join(output.text for output in outputs)


def tokens(outputs: list[EngineOutput]) -> TokenIds:
    return sum((output.token_ids for output in outputs), NO_TOKENS)


async def until_idle(sglang: StartedEngine) -> None:
    """Wait until SGLang's own accounting shows no request and no KV in use."""
    async with asyncio.timeout(DEADLINE_S):
        while (load := await sglang.engine.load()).running or load.waiting or load.kv_tokens_used:  # noqa: ASYNC110
            # SGLang writes its state at every step and offers no event.
            await asyncio.sleep(0.05)


async def test_it_says_what_it_is(sglang: StartedEngine):
    info = sglang.info
    assert re.fullmatch(r"sglang 0\.5\.\d+", info.name)
    assert info.model_path == "builtin:smollm2"
    assert info.context_len_tokens == sglang.settings["max_total_tokens"]  # the KV cache is smaller than the context
    assert info.max_running_requests == sglang.settings["max_running_requests"]
    assert info.kv_blocks * info.kv_block_tokens == sglang.settings["max_total_tokens"]
    assert (info.disaggregation, info.dp_size, info.tp_size) == ("aggregated", 1, 1)


async def test_greedy_knows_the_capital_of_france(sglang: StartedEngine):
    outputs = await sglang.run(request(sglang.tokens(FRANCE), 1))
    assert text(outputs) == " Paris"
    assert outputs[-1].finish_reason == "length"


async def test_pieces_are_disjoint_and_make_the_whole(sglang: StartedEngine):
    prompt = sglang.tokens("Write a poem about ünïcödé and 日本:")
    outputs = await sglang.run(request(prompt, 32, ignore_eos=True))
    assert len(outputs) > 16, "tokens come one by one"
    assert len(tokens(outputs)) == 32
    assert text(outputs) == sglang.tokenizer.decode(tokens(outputs).tolist())
    assert [output.finish_reason for output in outputs] == [None] * (len(outputs) - 1) + ["length"]


async def test_without_streaming_the_whole_is_the_same(sglang: StartedEngine):
    prompt = sglang.tokens(FRANCE)
    streamed = await sglang.run(request(prompt, 24))
    whole = await sglang.run(replace(request(prompt, 24), output=OutputOptions(stream=False)))
    assert (tokens(whole), text(whole)) == (tokens(streamed), text(streamed))
    assert len(whole) < len(streamed)


def assert_same_up_to_a_tie(some: list[EngineOutput], others: list[EngineOutput]) -> None:
    """The same tokens, or from the first difference on two that were as good as equally likely.

    oneDNN's bf16 product over 1,536 columns rounds otherwise for 6 rows than for 5, so a greedy output depends on
    the batch where two logits are within a step or two of bf16: 0.125 between 16 and 32.
    """
    a, b = tokens(some).tolist(), tokens(others).tolist()
    index = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
    if index is not None:
        position = [position for output in some for position in output.logprobs][index]
        rival = next((one for one in position.top if one.token_id == b[index]), None)
        assert rival is not None, f"token {index} is one that was not even likely"
        assert position.chosen.logprob - rival.logprob <= 0.25


async def test_together_is_as_alone_and_a_resumed_request_goes_on(sglang: StartedEngine):
    with_logprobs = OutputOptions(logprobs=True, top_logprobs=5)

    def wanted(prompt: TokenIds, max_tokens: int) -> EngineRequest:
        return replace(request(prompt, max_tokens, ignore_eos=True), output=with_logprobs)

    prompts = [sglang.tokens(f"{FRANCE} a city. Number {n} is") for n in range(6)]
    alone = [await sglang.run(wanted(prompt, 16)) for prompt in prompts]
    together = await asyncio.gather(*(sglang.run(wanted(prompt, 16)) for prompt in prompts))
    for some, others in zip(alone, together, strict=True):
        assert_same_up_to_a_tie(some, others)
    emitted = alone[0][:7]
    resumed = await sglang.run(wanted(prompts[0] + tokens(emitted), 16 - len(tokens(emitted))))
    assert_same_up_to_a_tie(alone[0][7:], resumed)


async def test_a_second_run_finds_its_prompt_in_the_cache(sglang: StartedEngine):
    prompt = sglang.tokens("Quixotic zephyrs: no other test begins so, and it is long enough to be worth keeping. " * 4)
    assert (await sglang.run(request(prompt, 2)))[-1].cached_tokens == 0
    assert (await sglang.run(request(prompt, 2)))[-1].cached_tokens == len(prompt) - 1


async def test_stops(sglang: StartedEngine):
    prompt = sglang.tokens(FRANCE)
    (paris,) = sglang.tokens(" Paris")
    by_string = await sglang.run(request(prompt, 12, stop=("never", " Paris")))
    assert (by_string[-1].finish_reason, by_string[-1].matched_stop, text(by_string)) == ("stop", " Paris", "")
    kept = replace(request(prompt, 12, stop=(" Paris",)), output=OutputOptions(no_stop_trim=True))
    assert text(await sglang.run(kept)) == " Paris"
    by_token = await sglang.run(request(prompt, 12, stop_token_ids=(paris,)))
    assert (by_token[-1].finish_reason, by_token[-1].matched_stop) == ("stop", paris)
    assert tokens(by_token).tolist() == [paris]
    chat = sglang.tokens("<|im_start|>user\nSay hi<|im_end|>\n<|im_start|>assistant\n")
    by_end = await sglang.run(request(chat, 200))
    assert by_end[-1].finish_reason == "stop" and tokens(by_end).tolist()[-1] == by_end[-1].matched_stop == 2
    assert not text(by_end).endswith("<|im_end|>")
    late = await sglang.run(request(chat, 60, min_tokens=50))
    assert len(tokens(late)) >= 50


async def test_logprobs_name_the_tokens(sglang: StartedEngine):
    wanted = replace(request(sglang.tokens(FRANCE), 5), output=OutputOptions(logprobs=True, top_logprobs=3))
    outputs = await sglang.run(wanted)
    positions = [position for output in outputs for position in output.logprobs]
    assert [position.chosen.token_id for position in positions] == tokens(outputs).tolist()
    assert positions[0].chosen.text == " Paris"
    for position in positions:
        assert len(position.top) == 3
        assert position.chosen.logprob <= 0
        assert position.top[0].logprob == max(one.logprob for one in position.top) == position.chosen.logprob


async def test_grammars_hold(sglang: StartedEngine):
    prompt = sglang.tokens("Alice is 30 years old. As JSON: ")
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    as_json = SamplingOptions(temperature=0.0, json_schema=json.dumps(schema))
    found = json.loads(text(await sglang.run(request(prompt, 80, as_json))))
    assert set(found) == {"name", "age"} and isinstance(found["age"], int)
    by_regex = SamplingOptions(temperature=0.0, regex=r"(yes|no){2}")
    assert text(await sglang.run(request(prompt, 20, by_regex))) in {"yesyes", "yesno", "noyes", "nono"}
    by_ebnf = SamplingOptions(temperature=0.0, ebnf='root ::= "left" | "right"')
    assert text(await sglang.run(request(prompt, 20, by_ebnf))) in {"left", "right"}


async def test_logit_bias_and_penalties_reach_the_sampler(sglang: StartedEngine):
    prompt = sglang.tokens(FRANCE)
    (london,) = sglang.tokens(" London")
    biased = SamplingOptions(temperature=0.0, logit_bias={str(london): 100.0})
    assert set(tokens(await sglang.run(request(prompt, 3, biased)))) == {london}
    plain = tokens(await sglang.run(request(prompt, 40, ignore_eos=True))).tolist()
    penal = SamplingOptions(temperature=0.0, frequency_penalty=2.0, presence_penalty=2.0)
    varied = tokens(await sglang.run(request(prompt, 40, penal, ignore_eos=True))).tolist()
    assert len(set(varied)) > len(set(plain))


@pytest.mark.parametrize("further", [{}, {"top_p": 0.95, "top_k": 50}, {"min_p": 0.01}], ids=["plain", "top", "min_p"])
async def test_a_seed_decides_the_draw(sglang: StartedEngine, further: dict):
    prompt = sglang.tokens("Once upon a time")

    async def drawn(seed: int | None) -> TokenIds:
        sampling = SamplingOptions(temperature=1.0, seed=seed, **further)
        return tokens(await sglang.run(request(prompt, 12, sampling, ignore_eos=True)))

    await drawn(7)  # from here on the prompt is in the cache, and equal requests are computed equally
    seven = await drawn(7)
    assert await drawn(7) == seven
    assert len({seven, await drawn(8), await drawn(None), await drawn(None)}) == 4


@pytest.mark.parametrize(
    ("sampling", "stop", "field"),
    [
        ({"temperature": -1.0}, {}, "temperature"),
        ({"temperature": float("nan")}, {}, "temperature"),
        ({"top_p": 1.5}, {}, "top_p"),
        ({"top_k": -5}, {}, "top_k"),
        ({"min_p": 2.0}, {}, "min_p"),
        ({"frequency_penalty": 3.0}, {}, "frequency_penalty"),
        ({"presence_penalty": -3.0}, {}, "presence_penalty"),
        ({"repetition_penalty": 0.0}, {}, "repetition_penalty"),
        ({"seed": 2**64}, {}, "seed"),
        ({"logit_bias": {"99999999": 1.0}}, {}, "logit_bias"),
        ({"json_schema": "{not json"}, {}, "json_schema"),
        ({"regex": "(unclosed"}, {}, "regex"),
        ({"ebnf": "root ::= undefined"}, {}, "ebnf"),
        ({}, {"stop": tuple(map(str, range(33)))}, "stop"),
        ({}, {"max_tokens": 100_000}, "max_tokens"),
        ({}, {"max_tokens": 4, "min_tokens": 5}, "min_tokens"),
    ],
)
async def test_what_sglang_refuses_is_refused_by_name(sglang: StartedEngine, sampling, stop, field):
    wanted = EngineRequest(
        rid=f"bad.{next(_numbers)}",
        token_ids=sglang.tokens(FRANCE),
        stop=StopConditions(**{"max_tokens": 4} | stop),
        sampling=SamplingOptions(**sampling),
    )
    with pytest.raises(InvalidRequest) as refused:
        async with asyncio.timeout(DEADLINE_S):
            await sglang.run(wanted)
    assert refused.value.field == field, str(refused.value)
    await until_idle(sglang)


async def test_a_rid_is_used_once_at_a_time(sglang: StartedEngine):
    first = request(sglang.tokens(FRANCE), 200, ignore_eos=True)
    async with aclosing(sglang.engine.generate(first)) as outputs:
        await anext(outputs)
        with pytest.raises(InvalidRequest) as refused:
            await sglang.run(first)
        assert refused.value.field == "rid"
        assert (await anext(outputs)).finish_reason is None


async def test_closing_the_stream_frees_its_kv(sglang: StartedEngine):
    streams = [sglang.engine.generate(request(sglang.tokens(f"{FRANCE} {n}"), 500, ignore_eos=True)) for n in range(4)]
    for stream in streams:
        await asyncio.wait_for(anext(stream), DEADLINE_S)
    assert (await sglang.engine.load()).running >= 1
    for stream in streams:
        await stream.aclose()
    await until_idle(sglang)


async def test_cancelling_frees_at_every_point(sglang: StartedEngine):
    """More requests than run at once, cancelled before the queue, in the queue and while they run."""

    async def read(wanted: EngineRequest, started: asyncio.Event) -> None:
        async for _ in sglang.engine.generate(wanted):
            started.set()

    started = asyncio.Event()
    wanted = [request(sglang.tokens(f"{n}: {FRANCE}"), 500, ignore_eos=True) for n in range(12)]
    readers = [asyncio.create_task(read(one, started)) for one in wanted]
    await asyncio.wait_for(started.wait(), DEADLINE_S)
    readers.append(asyncio.create_task(read(request(sglang.tokens(FRANCE), 500), started)))
    for reader in readers:
        reader.cancel()
    ended = await asyncio.gather(*readers, return_exceptions=True)
    assert all(isinstance(end, asyncio.CancelledError) for end in ended)
    await until_idle(sglang)
    assert text(await sglang.run(request(sglang.tokens(FRANCE), 1))) == " Paris"


async def test_the_prompts_logprobs_are_those_that_its_tokens_have_as_output(sglang: StartedEngine):
    """The prompt is cached meanwhile: SGLang computes it anew for them."""
    prompt = sglang.tokens(FRANCE)
    given = OutputOptions(logprobs=True, top_logprobs=2)
    written = await sglang.run(replace(request(prompt, 4, ignore_eos=True), output=given))
    again = replace(request(prompt + tokens(written), 1), output=replace_struct(given, prompt_logprobs=True))
    first, *others = await sglang.run(again)
    assert not any(output.prompt_logprobs for output in others)
    assert [position.chosen.token_id for position in first.prompt_logprobs] == again.token_ids.tolist()
    assert first.prompt_logprobs[0].chosen.logprob is None
    as_output = [position.chosen.logprob for output in written for position in output.logprobs]
    as_prompt = [position.chosen.logprob for position in first.prompt_logprobs[-4:]]
    assert as_prompt == pytest.approx(as_output, abs=0.25)


async def test_a_cache_salt_keeps_others_from_a_prompts_kv(sglang: StartedEngine):
    prompt = sglang.tokens("Whoever asks this has a salt of their own, and it is long enough to be worth keeping. " * 3)

    async def cached(options: EngineOptions) -> int:
        return (await sglang.run(replace(request(prompt, 2), options=options)))[-1].cached_tokens

    own, others = EngineOptions(cache_salt="tenant-7"), EngineOptions(cache_salt="tenant-8")
    assert [await cached(own), await cached(others), await cached(EngineOptions())] == [0, 0, 0]
    assert await cached(own) == len(prompt) - 1


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"dp_rank": 7}, "data_parallel_rank"),
        ({"options": EngineOptions(lora_path="poet")}, "lora_path"),
        ({"options": EngineOptions(max_thinking_tokens=5)}, "max_thinking_tokens"),
    ],
)
async def test_what_the_engine_was_not_started_for_is_refused_by_name(sglang: StartedEngine, fields, field):
    with pytest.raises(InvalidRequest) as error:
        await sglang.run(replace(request(sglang.tokens(FRANCE)), **fields))
    assert error.value.field == field
    assert await sglang.run(replace(request(sglang.tokens(FRANCE), 1), dp_rank=0)), "the one rank that is there"
