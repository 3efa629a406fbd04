"""`dead`: look at the work that was given up, try it again, or drop it.

A letter's request has had its terminal frame, and one request has exactly one. So a retry is a new request: the same
payload on the same subject, under an id and a deadline of its own.
"""

import json
import time
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from pipeline.bus import Bus
from pipeline.errors import ConfigError
from pipeline.openai import identify
from pipeline.screen import err, out, table
from subjects import headers, names, streams
from subjects.codec import Format, decode, format_of
from subjects.limits import REQUEST_S_DEFAULT
from subjects.messages import DeadLetter

CONNECT_S_MAX: Final = 3.0
MESSAGE_CHARS_MAX: Final = 100
SEQ_MAX: Final = 2**63 - 1
PREPROCESS: Final = "preprocess"
"""The stage whose letters hold a client's own request; the others' hold a message of ours."""


class DeadLetters:
    """The letters of the DEAD stream, by their sequence numbers."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def all(self) -> dict[int, DeadLetter]:
        """Every letter, oldest first. Raises BusUnavailable."""
        letters = self._bus.read(streams.DEAD.name, names.DEAD.any())
        return {stored.seq: decode(DeadLetter, stored.payload) async for stored in letters}

    async def newest(self, count: int) -> dict[int, DeadLetter]:
        """Those among the stream's last `count` numbers, oldest first. Raises BusUnavailable."""
        from_seq = (await self._bus.stream_state(streams.DEAD.name)).last_seq - count + 1
        letters = self._bus.read(streams.DEAD.name, names.DEAD.any(), from_seq=max(1, from_seq))
        return {stored.seq: decode(DeadLetter, stored.payload) async for stored in letters}

    async def one(self, seq: int) -> DeadLetter:
        """Raises ConfigError where there is none of that number."""
        if not 1 <= seq <= SEQ_MAX:
            raise ConfigError(f"there is no dead letter {seq}: their numbers begin with 1", field="seq")
        async for stored in self._bus.read(streams.DEAD.name, names.DEAD.any(), from_seq=seq):
            if stored.seq == seq:
                return decode(DeadLetter, stored.payload)
            break
        raise ConfigError(f"there is no dead letter {seq}", field="seq")

    async def retry(self, seq: int, deadline_s: float = REQUEST_S_DEFAULT) -> tuple[str, str]:
        """Publish a letter's work again and remove the letter; the client and the id of the new request.

        Done twice, or broken off in between, the work still runs once: its message id is a function of the letter.
        Raises ConfigError where there is no such letter, Overloaded where the queue is full.
        """
        letter = await self.one(seq)
        client, request_id, payload = _again(letter, seq, time.time() + deadline_s)
        kept = {name: value for name, value in letter.headers.items() if name == headers.TRACEPARENT}
        await self._bus.publish_durable(
            letter.subject, payload, msg_id=f"{client}.{request_id}", headers=kept | {headers.CLIENT: client}
        )
        await self.drop(seq)
        return client, request_id

    async def drop(self, seq: int) -> None:
        """Remove a letter. Raises BrokerRefused where there is none."""
        await self._bus.api(f"STREAM.MSG.DELETE.{streams.DEAD.name}", {"seq": seq})


def _again(letter: DeadLetter, seq: int, deadline_unix_s: float) -> tuple[str, str, bytes]:
    """Client, id and payload of the new request. What is no map, which only a client can send, goes as it is."""
    identity = identify(letter.payload, letter.headers, letter.stream_seq)
    suffix = f"-retry-{seq}"
    request_id = identity.request_id[: names.TOKEN_CHARS_MAX - len(suffix)] + suffix
    codec = msgspec.json if format_of(letter.payload) is Format.JSON else msgspec.msgpack
    try:
        fields = codec.decode(letter.payload, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return identity.client, request_id, letter.payload
    deadline = "deadline" if letter.stage == PREPROCESS else "deadline_unix_s"
    return identity.client, request_id, codec.encode(fields | {"request_id": request_id, deadline: deadline_unix_s})


async def show_all(url: str) -> int:
    """Print a table of the letters; the exit code."""
    bus = await Bus.connect(url, name="dead", timeout_s=CONNECT_S_MAX)
    try:
        letters = await DeadLetters(bus).all()
    finally:
        await bus.close()
    rows = [
        (
            str(seq),
            _when(letter),
            letter.stage,
            letter.subject,
            letter.request_id or "-",
            str(letter.attempts),
            letter.error.code,
            letter.error.message[:MESSAGE_CHARS_MAX],
        )
        for seq, letter in letters.items()
    ]
    heads = ("Letter", "Died", "Stage", "Subject", "Request", "Attempts", "Error", "Why")
    out.print(table("", heads, rows) if rows else "no dead letters")
    return 0


async def show(url: str, seq: int) -> int:
    """Print one letter as JSON, its payload readable where it can be read; the exit code."""
    bus = await Bus.connect(url, name="dead", timeout_s=CONNECT_S_MAX)
    try:
        letter = await DeadLetters(bus).one(seq)
    finally:
        await bus.close()
    print(as_json(letter))
    return 0


async def retry(url: str, seqs: list[int], deadline_s: float) -> int:
    """Try letters again, and say how to read the answers; the exit code."""
    bus = await Bus.connect(url, name="dead", timeout_s=CONNECT_S_MAX)
    try:
        letters = DeadLetters(bus)
        for seq in seqs:
            client, request_id = await letters.retry(seq, deadline_s)
            err.print(f"letter {seq} runs again; read it with: sglang-nats resume {request_id} --client {client}")
    finally:
        await bus.close()
    return 0


async def drop(url: str, seqs: list[int]) -> int:
    """Remove letters; the exit code."""
    bus = await Bus.connect(url, name="dead", timeout_s=CONNECT_S_MAX)
    try:
        letters = DeadLetters(bus)
        for seq in seqs:
            await letters.one(seq)
            await letters.drop(seq)
            err.print(f"letter {seq} is dropped")
    finally:
        await bus.close()
    return 0


def as_json(letter: DeadLetter) -> str:
    """A letter with its payload readable where it can be read."""
    shown = msgspec.structs.asdict(letter) | {
        "error": msgspec.structs.asdict(letter.error),
        "died": _when(letter),
        "payload": _readable(letter.payload),
    }
    del shown["died_unix_s"]
    return json.dumps(shown, indent=2, ensure_ascii=False, default=_token_bytes)


def _when(letter: DeadLetter) -> str:
    return datetime.fromtimestamp(letter.died_unix_s, UTC).isoformat(timespec="seconds")


def _readable(payload: bytes) -> Any:
    """A payload's fields where it is a map, else its text."""
    try:
        if format_of(payload) is Format.JSON:
            return msgspec.json.decode(payload)
        return msgspec.msgpack.decode(payload, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return payload.decode(errors="replace")


def _token_bytes(value: Any) -> str:
    """What JSON has no form for: the raw token ids of a MessagePack payload."""
    return f"{len(value) // 4} token ids" if isinstance(value, bytes) else repr(value)
