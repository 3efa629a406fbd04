"""The message headers of the pipeline."""

from typing import Final

# Set by clients on a request.
CLIENT: Final = "Sglang-Client"
"""Where the answer goes: `sglang.responses.<client>.<request_id>`. Default "anonymous"."""
DEADLINE: Final = "Sglang-Deadline"
"""Absolute deadline in seconds since the Unix epoch, e.g. "1790000000.5". Work past it is answered, not done."""
READER: Final = "Sglang-Reader"
"""An inbox on which the client answers for as long as it reads: when nobody does any more, the request is cancelled."""
TRACEPARENT: Final = "traceparent"
"""W3C Trace Context, `00-<trace id>-<span id>-01`: on every hop, and on the frames that begin or end an attempt."""

# Set by workers.
REQUEST: Final = "Sglang-Request"
"""On a failure that is noted down: the id of the request that the task belongs to."""

# Set by the engines on handshake messages (`sglang.bootstrap.>`).
HANDSHAKE_FROM: Final = "Sglang-From"
"""The sending rank: `<worker>.<incarnation>.<rank>`."""
HANDSHAKE_SEQ: Final = "Sglang-Seq"
"""`<seq>/<base>`: the message's place in its sender's row to this rank, and the oldest one not given up."""
HANDSHAKE_PART: Final = "Sglang-Part"
"""`<part>/<parts>` of a message too large for one payload."""
HANDSHAKE_PAGES: Final = "Sglang-Pages"
"""KV pages that a room moves."""
HANDSHAKE_BYTES: Final = "Sglang-Bytes"
"""KV bytes that a room moves."""
HANDSHAKE_SENT: Final = "Sglang-Sent"
"""When the message was first sent: microseconds since the Unix epoch."""
HANDSHAKE_US: Final = "Sglang-Microseconds"
"""On a receipt: from sending to receiving; on a success status: from transfer message to the end of the KV write."""
HANDSHAKE_WRITE_US: Final = "Sglang-Write-Microseconds"
"""On a success status: from handing the prompt's last KV to NIXL to the end of its write."""
HANDSHAKE_STATUS: Final = "Sglang-Status"
"""On a status that only reports: `success`."""

# Defined by NATS.
MSG_ID: Final = "Nats-Msg-Id"
"""JetStream drops a second message with the same id inside the stream's duplicate window."""

SERVICE_ERROR: Final = "Nats-Service-Error"
SERVICE_ERROR_CODE: Final = "Nats-Service-Error-Code"
"""A micro service's answer is an error: what it is, and its number (NATS ADR-32)."""

REPLY_COUNTER: Final = "NATS-Reply-Counter"
"""How many replies there will be, on the first one: `nats req --replies-all` ends after them."""

EXPECTED_LAST_SEQ: Final = "Nats-Expected-Last-Subject-Sequence"
EXPECTED_LAST_SUBJECT: Final = "Nats-Expected-Last-Subject-Sequence-Subject"
"""JetStream refuses the message unless the last one on this subject has that sequence number (0: there is none)."""

ROLLUP: Final = "Nats-Rollup"
"""`sub`: the message takes the place of all earlier ones on its subject."""

ALL: Final[dict[str, str]] = {
    CLIENT: "client -> preprocess: names the response subject's client part; default `anonymous`",
    DEADLINE: "client -> preprocess: absolute deadline, seconds since the Unix epoch; past it the request is answered "
    "with `deadline_exceeded`",
    READER: "client -> preprocess: an inbox that its client answers on while it reads; a request whose reader is gone "
    "is cancelled. Without it, it is worked on to its end whoever reads",
    TRACEPARENT: "W3C Trace Context: client -> preprocess -> decode -> prefill -> claim, and on failures and on the "
    "frames that begin or end an attempt; missing or malformed: a new trace begins",
    REQUEST: "failures: the id of the request that the task belongs to, where it is known",
    HANDSHAKE_FROM: "handshake: the sending rank, `<worker>.<incarnation>.<rank>`",
    HANDSHAKE_SEQ: "handshake: `<seq>/<base>`, the place in the sender's row and the oldest message not given up",
    HANDSHAKE_PART: "handshake: `<part>/<parts>` of a message too large for one payload",
    HANDSHAKE_PAGES: "handshake: KV pages that a room moves",
    HANDSHAKE_BYTES: "handshake: KV bytes that a room moves",
    HANDSHAKE_SENT: "handshake: when first sent, microseconds since the Unix epoch",
    HANDSHAKE_US: "handshake: on a receipt, from sending to receiving; on a success status, until the KV was written",
    HANDSHAKE_WRITE_US: "handshake: on a success status, from handing the last KV to NIXL to the end of its write",
    HANDSHAKE_STATUS: "handshake: on a status that only reports, `success`",
    MSG_ID: "request id of a request that names none; `<client>.<request_id>.<choice>.end` on terminal frames",
    SERVICE_ERROR: "on the answer to a control operation that failed, and on a frame with an error that answers "
    "a request at the front door: its sentence, as micro services give it (ADR-32)",
    SERVICE_ERROR_CODE: "on the same answer: the error's HTTP-like status",
    REPLY_COUNTER: "on the first answer of the front door to a request that is not streamed: how many there will be",
    EXPECTED_LAST_SEQ: "terminal frames: the sequence number of their sender's word as an owner; 0: the first one. "
    "Object buckets: the description that a new one replaces",
    EXPECTED_LAST_SUBJECT: "terminal frames: where the request's owners write themselves down",
    ROLLUP: "object buckets: an object's description takes the place of the one before",
}
