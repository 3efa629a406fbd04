"""What a request may not say, in words: the decoder's complaints with the field's dotted path, and the fields of
OpenAI and SGLang that this release does not serve."""

import difflib
import re
from typing import Final

import msgspec

from pipeline.errors import InvalidRequest
from subjects.messages import EmbeddingRequest, Request

TEXT_CHARS_MAX: Final = 120
"""The most that an error repeats of what a client sent."""

_TOOLS: Final = "tool calling is not supported yet"
_MEDIA: Final = "only text is supported yet"
_REASONING: Final = "reasoning control is not supported yet"
_STORED: Final = "nothing is stored beyond the answer"
_PIPELINE: Final = "the pipeline sets this itself"
_ENGINE: Final = "the pipeline does not pass this on to SGLang yet"

UNSUPPORTED: Final[dict[str, str]] = {
    "audio": _MEDIA,
    "best_of": "use `n`",
    "bootstrap_host": _PIPELINE,
    "bootstrap_port": _PIPELINE,
    "bootstrap_room": _PIPELINE,
    "cache_salt": _ENGINE,
    "chat_template_kwargs": _ENGINE,
    "continue_final_message": "use `prompt`",
    "custom_logit_processor": _ENGINE,
    "custom_params": _ENGINE,
    "data_parallel_rank": _PIPELINE,
    "echo": "the prompt is not sent back",
    "extra_key": _ENGINE,
    "function_call": _TOOLS,
    "functions": _TOOLS,
    "input_ids": "use `prompt`, which takes token ids",
    "lora_path": _ENGINE,
    "max_new_tokens": "use `max_tokens`",
    "metadata": _STORED,
    "min_new_tokens": "use `min_tokens`",
    "modalities": _MEDIA,
    "parallel_tool_calls": _TOOLS,
    "prediction": _ENGINE,
    "prompt_cache_key": "prefixes are found by their tokens",
    "reasoning_effort": _REASONING,
    "return_hidden_states": _ENGINE,
    "rid": "use `request_id`",
    "routed_dp_rank": _PIPELINE,
    "safety_identifier": "use `user`",
    "sampling_params": "its fields stand beside `prompt`",
    "sampling_seed": "use `seed`",
    "separate_reasoning": _REASONING,
    "service_tier": "there is one tier",
    "session_id": "use `session`",
    "session_params": _ENGINE,
    "stop_regex": _ENGINE,
    "store": _STORED,
    "stream_reasoning": _REASONING,
    "structural_tag": _ENGINE,
    "suffix": "text is only continued",
    "text": "use `prompt`",
    "tool_choice": _TOOLS,
    "tools": _TOOLS,
    "verbosity": _ENGINE,
    "web_search_options": _TOOLS,
    # of a message
    "refusal": _STORED,
    "reasoning_content": _REASONING,
    "tool_call_id": _TOOLS,
    "tool_calls": _TOOLS,
    # of `stream_options`
    "include_obfuscation": "frames are not padded",
    "continuous_usage_stats": "the last frame carries the usage",
}
"""Fields that OpenAI's or SGLang's API has and this release refuses, each with the reason or the way round it."""

_PLACE: Final = re.compile(r" - at (?:`key` in )?`\$([^`]*)`$")
_NAMED: Final = re.compile(r"^Object (?:contains unknown field|missing required field) `(.*)`$", re.DOTALL)
_INDEX: Final = re.compile(r"\[(\d+)\]")


def clipped(text: str) -> str:
    """A client's text, short enough to stand in an error."""
    return text if len(text) <= TEXT_CHARS_MAX else f"{text[:TEXT_CHARS_MAX]}..."


def refusal(error: msgspec.ValidationError, kind: type[Request] | type[EmbeddingRequest] = Request) -> InvalidRequest:
    """The decoder's complaint as an error that names the field by its dotted path, e.g. `messages.0.role`."""
    complaint, place = str(error), ""
    if found := _PLACE.search(complaint):
        complaint, place = complaint[: found.start()], found[1]
    field = _INDEX.sub(r".\1", place).replace("[...]", "").strip(".")
    if named := _NAMED.match(complaint):
        name = clipped(named[1])
        field = f"{field}.{name}" if field else name
        why = "is required" if "missing" in complaint else _why_unknown(name, kind)
    else:
        why = _why_wrong(field, complaint)
    return InvalidRequest(f"{field or 'the request'}: {why}", field=field or None)


def _why_unknown(name: str, kind: type[Request] | type[EmbeddingRequest]) -> str:
    if kind is EmbeddingRequest and name in Request.__struct_fields__:
        return "belongs to a request for text; one with `input` asks for vectors"
    if name in UNSUPPORTED:
        return f"this release does not take this field: {UNSUPPORTED[name]}"
    close = difflib.get_close_matches(name, kind.__struct_fields__, n=1)
    return f"unknown field; did you mean `{close[0]}`?" if close else "unknown field"


def _why_wrong(field: str, complaint: str) -> str:
    """The complaint, with what this release would take in place of a word that it does not know."""
    last = field.rpartition(".")[2]
    if complaint.startswith("Invalid") and field.startswith("messages."):
        if last == "role":
            return f"{clipped(complaint)}; the roles are system, developer, user and assistant ({_TOOLS})"
        if last == "type":
            return f"{clipped(complaint)}; the content type is text ({_MEDIA})"
    if field.startswith("prompt.") and complaint.startswith("Expected `int`"):
        return f"{clipped(complaint)}; `prompt` is one text or one list of token ids (send one request for each prompt)"
    return clipped(complaint)
