"""The limits of a request and of the wire. Units stand last in each name."""

from typing import Final

PAYLOAD_BYTES_MAX: Final = 512 * 1024
"""The largest payload on a subject; checked before publishing and by every stream."""

REQUEST_ID_CHARS_MAX: Final = 64
MESSAGES_MAX: Final = 4_096
CHOICES_MAX: Final = 64
STOP_STRINGS_MAX: Final = 64
STOP_STRING_CHARS_MAX: Final = 512
STOP_TOKEN_IDS_MAX: Final = 256
LOGIT_BIAS_ENTRIES_MAX: Final = 1_024
TOP_LOGPROBS_MAX: Final = 20
GRAMMAR_CHARS_MAX: Final = 64 * 1024
TEMPERATURE_MAX: Final = 2.0

LEASE_S: Final = 6.0
"""A task's owner must be heard of within this time, else the task goes to another worker."""
LEASE_RENEW_S: Final = 2.0
HEARTBEAT_S: Final = 1.0
PRESENCE_S: Final = 3.0
"""A worker not heard of for this long is down."""
ATTEMPTS_MAX: Final = 5
"""A task handed out this often without an end is dead-lettered and answered."""
REQUEST_S_DEFAULT: Final = 600.0
"""The deadline of a request that names none, counted from its acceptance."""
RESPONSES_KEPT_S: Final = 600.0
DEDUPE_S: Final = 600.0
"""JetStream's duplicate window: a terminal frame repeated within it is recognized."""
