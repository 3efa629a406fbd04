"""The gateway answers as SGLang's own HTTP server does, but where a reason is given."""

import asyncio
from copy import deepcopy

import pytest
from against_http import REASONS, ask_all, compare, differences, gateway, sglang

ANSWER = {
    "status": 200,
    "choices": {"0": {"text": "Paris", "finish": "stop", "logprobs": [["Paris", -0.5, {"Paris": -0.5, "Rome": -2.0}]]}},
    "usage": [5, 1, 6],
}


@pytest.mark.engine
@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_hundred_requests_are_answered_alike():
    for needed in ("jsonschema", "soundfile", "openai_harmony"):
        pytest.importorskip(needed, reason="SGLang's server imports it")

    async def ask(whom):
        async with whom() as url:
            return await ask_all(url)

    theirs, ours = asyncio.run(ask(sglang)), asyncio.run(ask(gateway))
    assert len(theirs) > 100
    found = compare(theirs, ours)
    assert found.keys() == REASONS.keys(), found


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("status",), 400),
        (("error",), "too late"),
        (("usage",), [5, 2, 7]),
        (("choices", "1"), ANSWER["choices"]["0"]),
        (("choices", "0", "text"), "Rome"),
        (("choices", "0", "finish"), "length"),
        (("choices", "0", "logprobs"), []),
        (("choices", "0", "logprobs", 0, 0), "Rome"),
        (("choices", "0", "logprobs", 0, 1), -0.6),
        (("choices", "0", "logprobs", 0, 1), None),
        (("choices", "0", "logprobs", 0, 2, "Rome"), -2.1),
        (("choices", "0", "logprobs", 0, 2, "Oslo"), -3.0),
    ],
)
def test_no_difference_is_overlooked(place, value):
    assert not differences(ANSWER, deepcopy(ANSWER))
    other = deepcopy(ANSWER)
    where = other
    for step in place[:-1]:
        where = where[step]
    where[place[-1]] = value
    assert differences(ANSWER, other)
