"""Where a request's trace begins, and how it goes on; and what stands in the way of exporting its spans."""

import asyncio

import pytest

from pipeline import spans, tracing
from pipeline.errors import ConfigError
from pipeline.stage import Emit, emit_frame
from pipeline.tracing import TraceContext
from subjects import headers
from subjects.codec import TokenIds
from subjects.messages import Frame

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GIVEN = f"00-{TRACE}-{SPAN}-01"


@pytest.mark.parametrize("text", [GIVEN, f"00-{TRACE}-{SPAN}-00", f"cc-{TRACE}-{SPAN}-01-what-comes-later"])
def test_a_header_is_read(text):
    context = TraceContext.parse(text)
    assert (context.trace_id, context.span_id) == (TRACE, SPAN)
    assert context.traceparent == f"00-{TRACE}-{SPAN}-{text[53:55]}"


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "garbage",
        GIVEN.upper(),
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE[1:]}-{SPAN}-01",
        f"{GIVEN}\n",
    ],
)
def test_a_malformed_header_begins_a_new_trace_and_a_redelivery_stays_in_it(text):
    assert TraceContext.parse(text) is None
    message = {headers.TRACEPARENT: text} if text is not None else None
    first, again, other = (TraceContext.of(message, origin) for origin in ("R.7", "R.7", "R.8"))
    assert first == again != other
    assert TraceContext.parse(first.traceparent) == first
    assert first.trace_id != TRACE


def frame(**fields) -> Emit:
    return emit_frame("c", "r", Frame(request_id="r", token_ids=TokenIds.of([1]), **fields))


async def test_frames_carry_it_where_an_attempt_begins_or_ends_and_every_task_does():
    async def of_a_task() -> list[dict[str, str] | None]:
        tracing.current.set(TraceContext(TRACE, SPAN))
        emits = [frame(worker="d"), frame(), frame(worker="d", finish_reason="stop")]
        emits.append(Emit(subject="s", payload=b"", msg_id="m", headers={"A": "1"}))
        return [tracing.carried(emit).headers for emit in emits]

    ours = {headers.TRACEPARENT: GIVEN}
    assert await asyncio.create_task(of_a_task()) == [ours, None, ours, ours | {"A": "1"}]
    assert tracing.outgoing() == {}, "another task's context is not ours"


def test_without_an_endpoint_the_context_goes_on_as_it_came():
    spans.start("decode", "d0")
    came = TraceContext(TRACE, SPAN)
    span = spans.begin("decode", came, {"a": 1})
    span.end()
    assert span.context is came
    assert spans.begin("decode", None).context.trace_id != TRACE


def test_an_unknown_protocol_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(ConfigError, match="http/protobuf only"):
        spans.start("decode", "d0")
