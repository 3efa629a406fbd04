"""The pipeline gives the tokens that SGLang gives: greedy, alone and many at once, over real processes."""

import asyncio

import pytest
from aggregated_topology import Aggregated
from disaggregated_topology import reference

from pipeline.chat import ChatTokenizer
from pipeline.config import BUILTIN_MODEL
from pipeline.models import prepare_model

MAX_TOKENS = 16
SUBJECTS = ("tea", "rivers", "the moon", "steel", "bread", "chess", "salt", "wind", "glass", "sleep")
PROMPTS = tuple(f"Here is what everybody should know about {subject}:" for subject in SUBJECTS) + tuple(
    f"Once upon a time there was a king who loved {subject}. One day" for subject in SUBJECTS
)


@pytest.mark.engine
@pytest.mark.timeout(600)
@pytest.mark.asyncio(loop_scope="session")
async def test_the_pipeline_gives_the_tokens_of_engine_generate(two_engines: Aggregated) -> None:
    tokenizer = ChatTokenizer.load(prepare_model(BUILTIN_MODEL))
    prompts = [tokenizer.encode(prompt, add_special_tokens=True).tolist() for prompt in PROMPTS]
    wanted = await reference(prompts, MAX_TOKENS)
    assert all(len(output) >= 1 for output in wanted)
    assert len({tuple(output) for output in wanted}) == len(prompts)
    alone = [(await two_engines.ask(prompt, MAX_TOKENS)).tokens for prompt in prompts]
    assert alone == wanted
    together = await asyncio.gather(*(two_engines.ask(prompt, MAX_TOKENS) for prompt in prompts))
    assert [answer.tokens for answer in together] == wanted
