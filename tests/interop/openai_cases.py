"""A hundred requests of OpenAI's API, over every option that SGLang's own HTTP server and the gateway both know."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

MODEL: Final = "smollm2"
CHAT: Final = "/v1/chat/completions"
TEXT: Final = "/v1/completions"
_FRANCE: Final = "The capital of France is"
_IDS: Final = [504, 3575, 282, 4649, 314]  # the same for SmolLM2
_TALK: Final = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": [{"type": "text", "text": "Name three"}, {"type": "text", "text": " colours."}]},
]
_SCHEMA: Final = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "year": {"type": "integer"}},
    "required": ["city", "year"],
}
_BASE: Final = {"model": MODEL, "temperature": 0, "max_tokens": 12}
_LONG_WORD: Final = "salt " * 40


@dataclass(frozen=True)
class Case:
    """One request. Its name says which option it is about."""

    name: str
    path: str
    body: dict[str, Any]


# Options of both, beside a prompt or messages.
_BOTH: Final[dict[str, dict[str, Any]]] = {
    "plain": {},
    "max_tokens": {"max_tokens": 1},
    "n": {"n": 3},
    "stop string": {"stop": "."},
    "stop strings": {"stop": ["Paris", " blue", "Red"]},
    "stop_token_ids": {"stop_token_ids": [30, 28]},
    "no_stop_trim": {"stop": [".", ","], "no_stop_trim": True},
    "min_tokens": {"min_tokens": 10, "stop": "."},
    "ignore_eos": {"ignore_eos": True, "max_tokens": 24},
    "frequency_penalty": {"frequency_penalty": 1.5, "max_tokens": 24},
    "presence_penalty": {"presence_penalty": 1.5, "max_tokens": 24},
    "repetition_penalty": {"repetition_penalty": 1.5, "max_tokens": 24},
    "logit_bias": {"logit_bias": {"7042": -100, "30": 5}},
    "seed": {"temperature": 0.9, "seed": 7},
    "seed, top_p": {"temperature": 0.9, "top_p": 0.5, "seed": 8},
    "seed, top_k": {"temperature": 0.9, "top_k": 4, "seed": 9},
    "seed, min_p": {"temperature": 0.9, "min_p": 0.3, "seed": 10},
    "response_format json_schema": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "place", "schema": _SCHEMA}},
        "max_tokens": 40,
    },
    "response_format json_object": {"response_format": {"type": "json_object"}, "max_tokens": 24},
    "response_format text": {"response_format": {"type": "text"}},
    "regex": {"regex": "[A-Z][a-z]{2,8}, [0-9]{4}"},
    "ebnf": {"ebnf": 'root ::= ("yes" | "no") " indeed"'},
    "skip_special_tokens": {"skip_special_tokens": False, "max_tokens": 40},
    "user": {"user": "someone"},
    "cache_salt": {"cache_salt": "tenant-7"},
    "data_parallel_rank": {"data_parallel_rank": 0},
    "usage in stream": {"stream_options": {"include_usage": True}, "stream": True},
}
_TEXT_ONLY: Final[dict[str, dict[str, Any]]] = {
    "token ids": {"prompt": _IDS},
    "logprobs": {"logprobs": 3},
    "logprobs, n": {"logprobs": 2, "n": 2},
    "logprobs 0": {"logprobs": 0},
    "logprobs, unicode": {"logprobs": 2, "prompt": "Emoji and 北京: 🧑‍🚀 é", "ignore_eos": True, "max_tokens": 20},
    "echo": {"echo": True},
    "echo of token ids": {"echo": True, "prompt": _IDS},
    "echo, n": {"echo": True, "n": 2},
    "echo, logprobs": {"echo": True, "logprobs": 2},
    "echo, logprobs, a cached prompt": {"echo": True, "logprobs": 1, "prompt": _LONG_WORD},
    "echo, logprobs 0": {"echo": True, "logprobs": 0},
    "best_of": {"best_of": 1},
}
_TEXT_WHOLE: Final[dict[str, dict[str, Any]]] = {
    "echo, no output": {"echo": True, "max_tokens": 0},
    "echo, logprobs, no output": {"echo": True, "logprobs": 1, "max_tokens": 0},
    "prompts": {"prompt": [_FRANCE, "One, two,"]},
    "prompts of token ids": {"prompt": [_IDS, _IDS[:3]], "n": 2},
    "prompts, echo": {"prompt": [_FRANCE, "One, two,"], "echo": True, "logprobs": 1},
    "suffix": {"suffix": " the end"},
    "best_of more than n": {"best_of": 3},
}
_CHAT_ONLY: Final[dict[str, dict[str, Any]]] = {
    "logprobs": {"logprobs": True},
    "top_logprobs": {"logprobs": True, "top_logprobs": 4},
    "top_logprobs, n": {"logprobs": True, "top_logprobs": 2, "n": 2},
    "logprobs, unicode": {
        "messages": [{"role": "user", "content": "Repeat: 北京 🧑‍🚀"}],
        "logprobs": True,
        "top_logprobs": 2,
        "max_tokens": 24,
    },
    "max_completion_tokens": {"max_tokens": None, "max_completion_tokens": 5},
    "developer": {"messages": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi"}]},
}
# Requests that are refused: the status is what counts.
_WRONG: Final[dict[str, dict[str, Any]]] = {
    "temperature -1": {"temperature": -1},
    "top_p 2": {"top_p": 2},
    "n 0": {"n": 0},
    "max_tokens beyond the context": {"max_tokens": 10**6},
    "min_tokens above max_tokens": {"min_tokens": 20},
    "frequency_penalty 9": {"frequency_penalty": 9},
    "logit_bias of no token": {"logit_bias": {"99999999": 1}},
    "two grammars": {"regex": "a+", "ebnf": 'root ::= "a"'},
    "a regex that is none": {"regex": "(("},
    "lora_path": {"lora_path": "poet"},
    "adapter in model": {"model": f"{MODEL}:poet"},
    "data_parallel_rank 7": {"data_parallel_rank": 7},
    "a model that is not there": {"model": "nobody"},
}


def cases() -> Iterator[Case]:
    for name, options in _BOTH.items():
        yield Case(f"text, {name}", TEXT, _text(options))
        yield Case(f"chat, {name}", CHAT, _chat(options))
    for name, options in (_TEXT_ONLY | {"seed": _BOTH["seed"], "stop string": _BOTH["stop string"]}).items():
        if name not in _BOTH:
            yield Case(f"text, {name}", TEXT, _text(options))
        yield Case(f"text, {name}, stream", TEXT, _text(options | {"stream": True}))
    for name, options in _TEXT_WHOLE.items():
        yield Case(f"text, {name}", TEXT, _text(options))
    for name, options in (_CHAT_ONLY | {"n": _BOTH["n"], "plain": {}}).items():
        if name not in _BOTH:
            yield Case(f"chat, {name}", CHAT, _chat(options))
        yield Case(f"chat, {name}, stream", CHAT, _chat(options | {"stream": True}))
    for name, options in _WRONG.items():
        yield Case(f"refused, {name}", TEXT, _text(options))
    yield Case("refused, no prompt", TEXT, _BASE | {"prompt": ""})
    yield Case("refused, no messages", CHAT, _BASE | {"messages": []})
    yield Case("refused, an unknown role", CHAT, _BASE | {"messages": [{"role": "wizard", "content": "x"}]})


def _text(options: dict[str, Any]) -> dict[str, Any]:
    return _BASE | {"prompt": _FRANCE} | options


def _chat(options: dict[str, Any]) -> dict[str, Any]:
    return _BASE | {"messages": _TALK} | options
