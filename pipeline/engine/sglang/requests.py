"""A request of the pipeline in SGLang's words. Pure: needs no SGLang."""

import re
from collections.abc import Mapping
from typing import Any, Final

from pipeline.block_hashes import salt_of
from pipeline.engine.protocol import EngineRequest
from pipeline.engine.sglang.handshake import bootstrap_host
from pipeline.errors import InvalidRequest
from subjects.messages import EngineOptions

FAKE_BOOTSTRAP_HOST: Final = "2.2.2.2"
"""SGLang's name for a peer that is not there: its side of a KV transfer succeeds at once."""
_STEP_TOKENS_WITHOUT_STREAMING: Final = 50
"""How often SGLang reports on an output that nobody reads before its end."""

_OUR_NAMES: Final = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "sampling_seed": "seed",
    "context length": "max_tokens",
    "json grammar": "json_schema",
    "routed_dp_rank": "data_parallel_rank",
    "LoRA": "lora_path",
    "loras": "lora_path",
}
"""Fields that SGLang's refusals name differently."""

_NAMED: Final = re.compile(
    r"max_new_tokens|min_new_tokens|sampling_seed|temperature|top_p|top_k|min_p|frequency_penalty|presence_penalty|"
    r"repetition_penalty|logit_bias|stop_token_ids|stop|json_schema|json grammar|regex|ebnf|top_logprobs|"
    r"context length|routed_dp_rank|LoRA|loras|max_thinking_tokens"
)


def arguments(
    request: EngineRequest, defaults: Mapping[str, Any], priority_sign: int = 0, *, salted: bool = True
) -> dict[str, Any]:
    """Keyword arguments of SGLang's GenerateReqInput.

    `defaults` are the model's own sampling parameters (generation_config.json), used where the request leaves one open.
    `priority_sign`: 1 or, where the engine serves low values first, -1; 0: it has no priorities, and may refuse one.
    `salted`: whether this SGLang knows a `cache_salt` (0.5.21), or only an `extra_key` (0.5.17).
    """
    output = request.output
    given = {
        "rid": request.rid,
        "input_ids": request.token_ids.tolist(),
        "sampling_params": sampling_params(request, defaults),
        "stream": True,
    }
    if request.dp_rank is not None:
        given["routed_dp_rank"] = request.dp_rank
    given |= _options(request.options, salted)
    if priority_sign:
        given["priority"] = priority_sign * request.priority
    if request.room is not None and request.room.loopback:
        given |= {"bootstrap_host": FAKE_BOOTSTRAP_HOST, "bootstrap_room": request.room.number}
    elif request.room is not None:
        given |= {
            "bootstrap_host": bootstrap_host(request.room.prefill_worker, request.room.prefill_incarnation),
            "bootstrap_room": request.room.number,
        }
    if request.sampling.require_reasoning:
        given["require_reasoning"] = True
    if output.logprobs:
        given |= {
            "return_logprob": True,
            "logprob_start_len": 0 if output.prompt_logprobs else -1,  # -1: of the output alone
            "top_logprobs_num": output.top_logprobs,
            "return_text_in_logprobs": True,
        }
    return given


def _options(options: EngineOptions, salted: bool) -> dict[str, Any]:
    given: dict[str, Any] = {}
    if options.lora_path:
        given["lora_path"] = options.lora_path
    if salt := salt_of(options):
        given["cache_salt" if salted else "extra_key"] = salt
    if options.max_thinking_tokens is not None:
        given["max_thinking_tokens"] = options.max_thinking_tokens
    return given


def sampling_params(request: EngineRequest, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """SGLang's SamplingParams as a dictionary. What is None here is left to `defaults`, then to SGLang."""
    stop, sampling, output = request.stop, request.sampling, request.output
    given = {
        "max_new_tokens": stop.max_tokens,
        "min_new_tokens": stop.min_tokens,
        "stop": list(stop.stop) or None,
        "stop_token_ids": list(stop.stop_token_ids) or None,
        "ignore_eos": stop.ignore_eos,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "frequency_penalty": sampling.frequency_penalty,
        "presence_penalty": sampling.presence_penalty,
        "repetition_penalty": sampling.repetition_penalty,
        "sampling_seed": sampling.seed,
        "logit_bias": sampling.logit_bias,
        "json_schema": sampling.json_schema,
        "regex": sampling.regex,
        "ebnf": sampling.ebnf,
        "structural_tag": sampling.structural_tag,
        "ebnf_full_assistant": sampling.ebnf_full_assistant or None,  # SGLang 0.5.21 alone knows it, and asks for it
        "skip_special_tokens": output.skip_special_tokens,
        "no_stop_trim": output.no_stop_trim,
        "stream_interval": None if output.stream else _STEP_TOKENS_WITHOUT_STREAMING,
    }
    return dict(defaults) | {name: value for name, value in given.items() if value is not None}


def refusal(message: str) -> InvalidRequest:
    """What SGLang refused, with the field that its sentence names first."""
    found = _NAMED.search(message)
    return InvalidRequest(message, field=_OUR_NAMES.get(found[0], found[0]) if found else None)
