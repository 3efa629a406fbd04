"""What JetStream hands over and answers: deliveries, confirmations, states and API replies, as values.

Pure: bytes and subjects in, structs out. The wire formats are those of NATS ADR-1, ADR-15 and ADR-31.
"""

from base64 import b64decode
from datetime import datetime
from typing import Any, Final

import msgspec

from pipeline.errors import BrokerRefused
from subjects import names

# JetStream's error numbers (err_code) that we act on.
STREAM_NOT_FOUND: Final = 10059
CONSUMER_NOT_FOUND: Final = 10014
STREAM_DIFFERS: Final = 10058
CONSUMER_DIFFERS: Final = (10013, 10148)
STORE_FAILED: Final = 10077  # its text says which "maximum ... exceeded"
NO_SPACE: Final = (10023, 10047, 10028)
MESSAGE_TOO_LARGE: Final = 10054
WRONG_LAST_SEQ: Final = 10071
NO_MESSAGE: Final = 10037
NO_LEADER: Final = (10008, 10009)
JETSTREAM_OFF: Final = (10039, 10076)

# Headers that JetStream sets.
STATUS: Final = "Status"
DESCRIPTION: Final = "Description"
PENDING_MESSAGES: Final = "Nats-Pending-Messages"
LAST_CONSUMER_SEQ: Final = "Nats-Last-Consumer"
TIME_STAMP: Final = "Nats-Time-Stamp"

NS: Final = 1_000_000_000


class Received(msgspec.Struct, frozen=True, gc=False):
    """A message as it came from a subscription."""

    subject: str
    payload: bytes
    headers: dict[str, str] | None
    reply: str  # "": nobody waits for an answer


class Delivery(msgspec.Struct, frozen=True, gc=False):
    """A message that JetStream handed out and waits to hear of."""

    payload: bytes
    headers: dict[str, str] | None
    subject: str
    stream: str
    stream_seq: int
    consumer_seq: int
    attempt: int  # 1: handed out for the first time
    pending: int  # messages behind this one
    stored_unix_s: float
    ack_subject: str


class Stored(msgspec.Struct, frozen=True, gc=False):
    """JetStream's word that it has a message."""

    stream: str
    seq: int
    duplicate: bool = False


class StoredMessage(msgspec.Struct, frozen=True, gc=False):
    """A message read back out of a stream."""

    subject: str
    payload: bytes
    headers: dict[str, str] | None
    seq: int

    @property
    def stored_unix_s(self) -> float:
        """When the broker stored it; 0 where it did not say."""
        text = (self.headers or {}).get(TIME_STAMP)
        return datetime.fromisoformat(text).timestamp() if text else 0.0


class StreamState(msgspec.Struct, frozen=True):
    messages: int
    bytes: int
    first_seq: int
    last_seq: int
    consumers: int
    created_unix_s: float = 0.0


class ConsumerState(msgspec.Struct, frozen=True):
    pending: int  # not handed out yet
    ack_pending: int  # handed out and not settled
    redelivered: int
    waiting: int  # open pull requests
    paused_until_unix_s: float | None = None  # None: it is not paused
    ack_floor: int = 0  # every message of its filter up to this sequence number is settled


def is_delivery(reply: str) -> bool:
    """Whether a message with this reply subject came from a stream, and not from the broker itself."""
    return reply.startswith(names.JS_ACK)


def delivery_of(received: Received) -> Delivery:
    """Read the delivery's facts from its ack subject: nine tokens, or eleven and more with a domain."""
    tokens = received.reply.split(".")
    at = 2 if len(tokens) == 9 else 4
    return Delivery(
        payload=received.payload,
        headers=received.headers,
        subject=received.subject,
        stream=tokens[at],
        stream_seq=int(tokens[at + 3]),
        consumer_seq=int(tokens[at + 4]),
        attempt=int(tokens[at + 2]),
        pending=int(tokens[at + 6]),
        stored_unix_s=int(tokens[at + 5]) / NS,
        ack_subject=received.reply,
    )


def stored_of(answer: dict[str, Any]) -> StoredMessage:
    """The message in an answer to STREAM.MSG.GET, with the headers that a Direct Get would give it."""
    message = answer["message"]
    lines = b64decode(message.get("hdrs", "")).decode().splitlines()[1:]  # the first names the protocol
    headers = {name: value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
    headers[TIME_STAMP] = message["time"]
    return StoredMessage(message["subject"], b64decode(message.get("data", "")), headers, message["seq"])


def answer_of(payload: bytes) -> dict[str, Any]:
    """A JetStream API reply. Raises BrokerRefused where it carries an error."""
    try:
        answer = msgspec.json.decode(payload, type=dict[str, Any])
    except msgspec.DecodeError:
        raise BrokerRefused("the broker's answer is not JSON") from None
    if error := answer.get("error"):
        raise BrokerRefused(error.get("description", "unknown"), error_number=error.get("err_code", 0))
    return answer
