"""The limits of a request and of the wire. Units stand last in each name."""

from typing import Final

PAYLOAD_BYTES_MAX: Final = 512 * 1024
"""The largest payload on a subject; checked before publishing and by every stream."""

REQUEST_ID_CHARS_MAX: Final = 64
MESSAGES_MAX: Final = 4_096
CHOICES_MAX: Final = 64
INPUTS_MAX: Final = 2_048
"""Inputs of an embedding request, as OpenAI's API has it; each is a choice of its answer."""
STOP_STRINGS_MAX: Final = 32
"""SGLang's own limit (MAX_STOP_COUNT)."""
STOP_STRING_CHARS_MAX: Final = 512
STOP_TOKEN_IDS_MAX: Final = 256
LOGIT_BIAS_ENTRIES_MAX: Final = 1_024
TOP_LOGPROBS_MAX: Final = 20
PROMPT_LOGPROBS_MAX: Final = 4_096
"""Log probabilities of a prompt's tokens in one answer, alternatives counted too: they travel in one frame."""
CACHE_SALT_CHARS_MAX: Final = 256
LORA_NAME_CHARS_MAX: Final = 256
METADATA_ENTRIES_MAX: Final = 16
"""OpenAI's own limit."""
GRAMMAR_CHARS_MAX: Final = 64 * 1024
SCHEMA_DEPTH_MAX: Final = 64
"""Levels of nesting in a JSON schema."""
TEMPERATURE_MAX: Final = 2.0
PENALTY_MAX: Final = 2.0
"""Frequency and presence penalties reach from minus this to this; a repetition penalty from above 0 to this."""
TOP_K_MAX: Final = 1 << 30
"""SGLang's word for the whole vocabulary; a larger number does not fit its tensors."""
LOGIT_BIAS_MAX: Final = 100.0
"""Biases reach from minus this to this, as OpenAI's do."""
PRIORITY_MAX: Final = 1_000
"""Priorities reach from minus this to this; 0 is a request that names none."""
TOOLS_MAX: Final = 128
"""As many as OpenAI takes."""
TOOL_NAME_CHARS_MAX: Final = 128
SEED_MIN: Final = -(2**63)
SEED_MAX: Final = 2**63 - 1

TOKENIZER_FILE_BYTES_MAX: Final = 64 * 1024 * 1024
"""One file of a tokenizer, as a worker offers it to preprocess workers."""
TOKENIZER_BYTES_MAX: Final = 128 * 1024 * 1024
"""All files of one tokenizer."""

LEASE_S: Final = 6.0
"""A task's owner must be heard of within this time, else the task goes to another worker."""
LEASE_RENEW_S: Final = 2.0
HEARTBEAT_S: Final = 1.0
PRESENCE_S: Final = 3.0
"""A worker not heard of for this long is down."""
FAILURES_MAX: Final = 2
"""A task on which so many workers' engines or stages broke is dead-lettered and answered."""
FAILURES_KEPT_S: Final = 3_600.0
ATTEMPTS_MAX: Final = 12
"""A task handed out this often without an end, mostly by the death of its workers, is dead-lettered and answered."""
REQUEST_S_DEFAULT: Final = 600.0
"""The deadline of a request that names none, counted from its acceptance."""
REQUEST_S_MAX: Final = 86_400.0
"""A deadline can be this far away at most, counted from the request's acceptance."""
RESPONSES_KEPT_S: Final = 600.0
"""Frames can be read again for so long, where the setting `responses_kept_s` says nothing else."""
RESPONSES_KEPT_S_MIN: Final = 2 * LEASE_S
"""Without retention: the next owner of a running request needs its frames over a lease."""
CANCELS_KEPT_S: Final = 600.0
"""A request that nobody holds can be cancelled so long before a worker takes it."""
KV_EVENTS_KEPT_S: Final = 600.0
DEDUPE_S: Final = 600.0
"""JetStream's duplicate window: a terminal frame repeated within it is recognized."""

FILE_BYTES_MAX: Final = 100 * 1024 * 1024
"""A file that a client uploads to a gateway."""
BATCH_OUTPUT_BYTES_MAX: Final = 512 * 1024 * 1024
"""All answers of a batch."""
FILES_MAX: Final = 1_000
"""Of one client."""
FILES_KEPT_S: Final = 30 * 86_400.0
FILE_KEPT_S_MIN: Final = 3_600.0
"""The earliest that a client may have a file expire."""
BATCH_LINES_MAX: Final = 50_000
"""OpenAI's own limit."""
BATCH_S_MAX: Final = 86_400.0
"""The longest completion window of a batch."""
BATCHES_KEPT_S: Final = 30 * 86_400.0
BATCH_TAKES_MAX: Final = 1_000
"""A batch that was taken up so often by gateways, without an end, is given up."""
METADATA_MAX: Final = 16
METADATA_KEY_CHARS_MAX: Final = 64
METADATA_VALUE_CHARS_MAX: Final = 512
STORED_RESPONSES_KEPT_S: Final = 86_400.0
"""A response of /v1/responses can be retrieved, and gone on from, for so long."""
