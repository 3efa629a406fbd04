"""What handshake messages look like, without a broker and without SGLang."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.engine.sglang.handshake import Address, HandshakeSettings, Rank, describe, from_environment
from pipeline.engine.sglang.handshake.wire import PAIR, Meaning, pack, read_frames, unpack
from pipeline.errors import EngineStartError
from subjects import headers

TOKENS = st.text("abcXYZ019_-", min_size=1, max_size=20)
RANKS = st.builds(Rank, *[st.integers(0, 999)] * 3)
ADDRESSES = st.builds(Address, TOKENS, TOKENS, RANKS)
PREFILL = Address("prefill-0", "p1", Rank(tp=3))
DECODE = Address("decode-0", "d1")


@dataclasses.dataclass
class Message:
    subject: str
    payload: bytes = b""
    headers: dict[str, str] | None = None


@given(ADDRESSES)
def test_an_address_survives_each_form_that_it_takes_in_sglang_and_on_nats(address: Address) -> None:
    assert Address.parse(str(address)) == address
    assert Address.of(address.host, address.port) == address
    assert Address.of_endpoint(f"tcp://{address.host}:{address.port}") == address
    assert Address.of_subject(address.subject("abort", "17")) == (address, "abort", "17")


@given(ADDRESSES)
def test_subjects_have_six_tokens_at_most_and_every_one_reaches_the_inbox(address: Address) -> None:
    subject, inbox = address.subject("transfer", "17").split("."), address.inbox().split(".")
    assert len(subject) == len(inbox) == 6
    assert all(want in ("*", token) for want, token in zip(inbox, subject, strict=True))


@pytest.mark.parametrize("host", ["", "worker", ".x", "10.", "w."])
def test_a_host_that_is_no_worker_is_refused(host: str) -> None:
    with pytest.raises(ValueError, match="incarnation"):
        Address.of(host, 1001)


@pytest.mark.parametrize(
    ("frames", "meaning"),
    [
        ([b"NixlMsgGuard", b"None", b"host"], Meaning("register")),
        ([b"NixlMsgGuard", b"42", b"h", b"1", b"agent", b"\0" * 28, b"3"], Meaning("transfer", "42", 7)),
        ([b"KV_STATUS", b"42", b"0", b"0", b"why"], Meaning("status", "42")),
        ([b"ABORT", b"42", b"h", b"1"], Meaning("abort", "42")),
        ([b"ABORT_ACK", b"42", b"0"], Meaning("abort_ack", "42")),
        ([b"WATERMARK", b"x"], Meaning("watermark", PAIR)),
        ([b"\xff\x00 what. is>this"], Meaning("other", PAIR)),
    ],
)
def test_frames_are_told_apart(frames: list[bytes], meaning: Meaning) -> None:
    assert read_frames(frames) == meaning


@given(st.lists(st.binary(max_size=200), min_size=1, max_size=20), st.integers(1, 300))
def test_frames_survive_the_wire_whole_or_in_parts(frames: list[bytes], limit: int) -> None:
    parts = pack(frames, limit)
    assert all(len(part) <= limit for part in parts)
    assert unpack(parts) == frames


def test_a_transfer_is_described_for_a_reader() -> None:
    said = {headers.HANDSHAKE_FROM: str(DECODE), headers.HANDSHAKE_PAGES: "7", headers.HANDSHAKE_BYTES: "70"}
    line = describe(Message(PREFILL.subject("transfer", "42"), b"", said))
    assert line is not None
    assert (line.room, line.sender, line.to, line.operation) == ("42", str(DECODE), str(PREFILL), "transfer")
    assert (line.pages, line.kv_bytes, line.microseconds) == (7, 70, 0)
    assert "7 pages" in str(line)


def test_receipts_status_and_no_responders_are_described() -> None:
    receipt = describe(Message(DECODE.subject("receipt", "42_0_9"), b"", {headers.HANDSHAKE_US: "850"}))
    assert receipt is not None
    assert (receipt.room, receipt.microseconds) == ("42", 850)
    gone = describe(Message(DECODE.subject("receipt", "42_0_9"), b"", {"Status": "503"}))
    assert gone is not None
    assert gone.operation == "no responders"
    done = describe(Message(DECODE.subject("status", "42"), b"", {headers.HANDSHAKE_STATUS: "success"}))
    assert done is not None
    assert done.operation == "status success"


def test_other_subjects_are_not_described() -> None:
    assert describe(Message("sglang.bootstrap.decode-0.claim")) is None
    assert describe(Message("sglang.heartbeat.decode.decode-0")) is None


def test_settings_survive_the_environment_and_nonsense_is_named() -> None:
    settings = HandshakeSettings(url="nats://h:1", worker="w", incarnation="i", role="decode")
    assert from_environment(settings.to_environment()) == settings
    assert from_environment({}) is None
    for text in ("{}", '{"url":"u","worker":"a.b","incarnation":"i","role":"decode"}', "nonsense"):
        with pytest.raises(EngineStartError, match="SGLANG_NATS_HANDSHAKE"):
            from_environment({"SGLANG_NATS_HANDSHAKE": text})
