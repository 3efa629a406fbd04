"""Handshakes and KV events as lines."""

from pipeline.bus import Received
from pipeline.engine.sglang.handshake import Address
from pipeline.watch import handshake_line, kv_line
from subjects import headers, names
from subjects.codec import BlockHashes, encode
from subjects.messages import BlocksCleared, BlocksRemoved, BlocksStored, Claim, Failure, KvEvents, Refusal


def heard(subject: str, payload: bytes = b"", **said: str) -> Received:
    return Received(subject, payload, dict(said), "")


def test_claims_and_refusals_and_sglangs_own_messages_become_lines():
    claim = heard(names.CLAIM.of(worker="d0"), encode(Claim(room=7, worker="p0", incarnation="i1")))
    assert handshake_line(claim).split()[:5] == ["7", "p0.i1", "->", "d0", "claim"]
    failure = Failure(code="engine_died", message="gone", status=503)
    refusal = Refusal(room=7, failure=failure, permanent=False)
    assert "refusal engine_died" in handshake_line(heard(names.REFUSAL.of(worker="d0"), encode(refusal)))
    to = Address("p0", "i1")
    transfer = heard(
        to.subject("transfer", "7"),
        b"\x90",
        **{headers.HANDSHAKE_FROM: "d0.i2.dp0pp0tp0", headers.HANDSHAKE_PAGES: "12", headers.HANDSHAKE_BYTES: "3456"},
    )
    words = handshake_line(transfer).split()
    assert words[:5] == ["7", "d0.i2.dp0pp0tp0", "->", "p0.i1.dp0pp0tp0", "transfer"]
    assert words[5:] == ["12", "pages", "3456", "bytes"]


def test_other_messages_have_no_line():
    assert handshake_line(heard(names.CANCEL.of(request_id="r"))) is None


def kv_text(*events: object) -> str:
    message = KvEvents(worker="d0", incarnation="i1", dp_rank=1, seq=7, block_tokens=16, events=events)
    return " ".join(kv_line(heard(names.KV_EVENTS.of(model="m", worker="d0"), encode(message))).split())


def test_kv_events_become_a_line_with_each_tiers_changes():
    changes = kv_text(
        BlocksStored(hashes=BlockHashes.of([1, 2, 3])),
        BlocksRemoved(hashes=BlockHashes.of([9])),
        BlocksStored(hashes=BlockHashes.of([9]), tier="host"),
    )
    assert changes == "d0.i1 dp1 7 gpu +3 -1 blocks (+32 tokens); host +1 -0 blocks (+16 tokens)"
    assert kv_text(BlocksCleared()) == "d0.i1 dp1 7 all cleared"


def test_an_empty_message_says_why_it_was_sent():
    assert "lost" in kv_text()
