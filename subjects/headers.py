"""The message headers of the pipeline."""

from typing import Final

# Set by clients on a request.
CLIENT: Final = "Sglang-Client"
"""Where the answer goes: `sglang.responses.<client>.<request_id>`. Default "anonymous"."""
DEADLINE: Final = "Sglang-Deadline"
"""Absolute deadline in seconds since the Unix epoch, e.g. "1790000000.5". Work past it is answered, not done."""
TRACEPARENT: Final = "traceparent"
"""W3C trace context; copied to every hop and frame."""

# Defined by NATS.
MSG_ID: Final = "Nats-Msg-Id"
"""JetStream drops a second message with the same id inside the stream's duplicate window."""

ALL: Final[dict[str, str]] = {
    CLIENT: "client -> preprocess: names the response subject's client part; default `anonymous`",
    DEADLINE: "client -> preprocess: absolute deadline, seconds since the Unix epoch; past it the request is answered "
    "with `deadline_exceeded`",
    TRACEPARENT: "W3C trace context, copied to every hop and frame",
    MSG_ID: "request id of a request that names none; `<request_id>.<choice>.end` on terminal frames",
}
