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

_OLD_TOOLS: Final = "use `tools` and `tool_choice`"
_MEDIA: Final = "only text is supported yet"
_STORED: Final = "nothing is stored beyond the answer"
_PIPELINE: Final = "the pipeline sets this itself"
_ENGINE: Final = "the pipeline does not pass this on to SGLang yet"

UNSUPPORTED: Final[dict[str, str]] = {
    "audio": _MEDIA,
    "bootstrap_host": _PIPELINE,
    "bootstrap_port": _PIPELINE,
    "bootstrap_room": _PIPELINE,
    "continue_final_message": "use `prompt`",
    "custom_labels": _ENGINE,
    "custom_logit_processor": "it is code that would run in the engine",
    "custom_params": "only a custom_logit_processor reads them; use `max_thinking_tokens` for a thinking budget",
    "disagg_prefill_dp_rank": _PIPELINE,
    "extra_key": "use `cache_salt`, which routing knows of too",
    "function_call": _OLD_TOOLS,
    "functions": _OLD_TOOLS,
    "input_ids": "use `prompt`, which takes token ids",
    "images_config": _MEDIA,
    "logprob_start_len": "use `echo` with `logprobs` for those of the whole prompt",
    "max_dynamic_patch": _MEDIA,
    "max_new_tokens": "use `max_tokens`",
    "min_dynamic_patch": _MEDIA,
    "min_new_tokens": "use `min_tokens`",
    "moderation": "nothing is moderated",
    "prediction": _ENGINE,
    "prompt_cache_options": "prefixes are found by their tokens",
    "prompt_cache_retention": "prefixes are found by their tokens",
    "return_cached_tokens_details": _ENGINE,
    "return_hidden_states": _ENGINE,
    "return_input_ids_in_sglext": _ENGINE,
    "return_logprob": "use `logprobs`",
    "return_meta_info": _ENGINE,
    "return_output_ids_in_sglext": "frames carry token ids",
    "return_prompt_token_ids": _ENGINE,
    "return_routed_experts": _ENGINE,
    "return_sampling_mask": _ENGINE,
    "return_spec_tokens_details": _ENGINE,
    "return_token_ids": "frames carry token ids",
    "rid": "use `request_id`",
    "routed_experts_start_len": _ENGINE,
    "sampling_logprobs_mode": _ENGINE,
    "sampling_params": "its fields stand beside `prompt`",
    "sampling_seed": "use `seed`",
    "session_id": "use `session`",
    "session_params": _ENGINE,
    "stop_regex": _ENGINE,
    "structural_tag": _ENGINE,
    "suffix": "text is only continued",
    "task": _ENGINE,
    "text": "use `prompt`",
    "thinking_budget": "use `max_thinking_tokens`",
    "use_audio_in_video": _MEDIA,
    "verbosity": _ENGINE,
    "video_config": _MEDIA,
    "web_search_options": "there are no tools but the client's own",
    # of a message
    "refusal": _STORED,
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
            return f"{clipped(complaint)}; the roles are system, developer, user, assistant and tool"
        if last == "type":
            return f"{clipped(complaint)}; the content type is text ({_MEDIA})"
    if field.startswith("prompt.") and complaint.startswith("Expected `int`"):
        return f"{clipped(complaint)}; `prompt` is a text, a list of token ids, or a list of either"
    return clipped(complaint)
