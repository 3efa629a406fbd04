"""Handshakes as lines."""

from pipeline.bus import Received
from pipeline.engine.sglang.handshake import Address
from pipeline.watch import line_of
from subjects import headers, names
from subjects.codec import encode
from subjects.messages import Claim, Failure, Refusal


def heard(subject: str, payload: bytes = b"", **said: str) -> Received:
    return Received(subject, payload, dict(said), "")


def test_claims_and_refusals_and_sglangs_own_messages_become_lines():
    claim = heard(names.CLAIM.of(worker="d0"), encode(Claim(room=7, worker="p0", incarnation="i1")))
    assert line_of(claim).split()[:5] == ["7", "p0.i1", "->", "d0", "claim"]
    failure = Failure(code="engine_died", message="gone", status=503)
    refusal = Refusal(room=7, failure=failure, permanent=False)
    assert "refusal engine_died" in line_of(heard(names.REFUSAL.of(worker="d0"), encode(refusal)))
    to = Address("p0", "i1")
    transfer = heard(
        to.subject("transfer", "7"),
        b"\x90",
        **{headers.HANDSHAKE_FROM: "d0.i2.dp0pp0tp0", headers.HANDSHAKE_PAGES: "12", headers.HANDSHAKE_BYTES: "3456"},
    )
    words = line_of(transfer).split()
    assert words[:5] == ["7", "d0.i2.dp0pp0tp0", "->", "p0.i1.dp0pp0tp0", "transfer"]
    assert words[5:] == ["12", "pages", "3456", "bytes"]


def test_other_messages_have_no_line():
    assert line_of(heard(names.CANCEL.of(request_id="r"))) is None
