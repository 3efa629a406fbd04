"""`trace` over a real broker: a request's timeline from whatever the streams have of it."""

import time

import pytest

from pipeline.bus import Bus
from pipeline.errors import ConfigError
from pipeline.trace import Event, Found, Search, gone, timeline
from pipeline.tracing import TraceContext
from subjects import headers, names, streams
from subjects.codec import TokenIds, encode
from subjects.messages import (
    Cancel,
    DeadLetter,
    Failure,
    Frame,
    PrefillTask,
    PreprocessedRequest,
    Request,
    StopConditions,
    Timing,
    Usage,
)

MODEL, CLIENT, ID = "m", "c", "r1"
TRACE = TraceContext.new()
TRACED = {headers.TRACEPARENT: TRACE.traceparent}
FAILURE = Failure(code="engine_died", message="a process ended", status=503)
STOP = StopConditions(max_tokens=9)


@pytest.fixture
async def bus(bus: Bus) -> Bus:
    await bus.provision(streams.STREAMS, streams.CONSUMERS, streams.BUCKETS)
    return bus


async def say(bus: Bus, client: str = CLIENT, request_id: str = ID, choice: int = 0, **fields) -> None:
    """Publish a frame."""
    frame = Frame(request_id=request_id, choice=choice, **fields)
    subject = names.RESPONSES.of(client=client, request_id=request_id)
    await bus.publish_durable(subject, encode(frame), headers=TRACED)


async def find(bus: Bus, client: str | None = None) -> Found:
    await bus.flush()
    return await Search(bus, ID).find(client)


def lines(events: list[Event]) -> list[tuple[str, str, str]]:
    return [(event.what, event.where, event.detail) for event in events]


async def test_an_answer_of_two_owners_is_told_in_order(bus):
    began = time.time()
    await say(bus, worker="d0", token_ids=TokenIds.of([1]), text="a")
    await say(bus, index=1, token_ids=TokenIds.of([2, 3]), text="b")
    about = {headers.REQUEST: ID} | TRACED
    await bus.publish_durable(names.FAILED.of(stage="decode", task="t"), encode(FAILURE), headers=about)
    other = {headers.REQUEST: "r2"} | TRACED
    await bus.publish_durable(names.FAILED.of(stage="decode", task="u"), encode(FAILURE), headers=other)
    word = Frame(request_id=ID, attempt=2, worker="d1")
    await bus.publish_durable(names.OWNERS.of(client=CLIENT, request_id=ID), encode(word), headers=TRACED)
    await say(bus, attempt=2, worker="d1")
    started = time.time()
    await bus.publish(names.CANCEL.of(request_id=ID), encode(Cancel(reason="enough")))
    await bus.flush()
    await say(bus, attempt=2, worker="d1", index=3, token_ids=TokenIds.of([4]), text="c")
    timing = Timing(
        accepted_unix_s=began - 2,
        preprocessed_unix_s=began - 1.5,
        started_unix_s=started,
        prefill_worker="p0",
        prefill_claimed_unix_s=started + 1e-5,
        kv_landed_unix_s=started + 2e-5,
    )
    usage = Usage(prompt_tokens=8, completion_tokens=4, cached_tokens=6)
    await say(bus, attempt=2, worker="d1", index=4, finish_reason="stop", usage=usage, timing=timing)
    found = await find(bus)
    told = lines(timeline(found))
    assert [what for what, _, _ in told] == [
        "accepted", "preprocessed", "first token", "last frame so far", "decode failed", "taken over", "started",
        "prefill claimed", "KV landed", "cancelled", "first token", "ended: stop",
    ]  # fmt: skip
    assert found.trace_id == TRACE.trace_id
    assert ("decode failed", "", "engine_died: a process ended") in told
    assert ("taken over", "d1", "attempt 2") in told
    assert ("prefill claimed", "p0", "") in told
    assert told[3][1:] == ("d0", told[3][2]) and told[3][2].startswith("attempt 1: 3 tokens")
    assert told[-1][1:] == ("d1", "1 tokens; 8 prompt tokens (6 cached), 4 in all")
    assert gone(found) == []
    assert (timeline(found)[-1].unix_s - began) == pytest.approx(0, abs=5)


async def test_what_waits_is_told_with_where(bus):
    request = Request(prompt="hi", request_id=ID, client=CLIENT)
    await bus.publish_durable(names.REQUESTS.of(model=MODEL), encode(request), headers=TRACED)
    (event,) = timeline(await find(bus))
    assert (event.what, event.where) == ("accepted", "REQUESTS")
    assert "in the queue still" in event.detail
    await bus.api(f"STREAM.PURGE.{streams.REQUESTS.name}")
    work = PreprocessedRequest(
        request_id=ID, client=CLIENT, model=MODEL, token_ids=TokenIds.of([1]), stop=STOP, accepted_unix_s=1000.0
    )
    await bus.publish_durable(names.DECODE_ANY.of(model=MODEL), encode(work), headers=TRACED)
    prompt = PrefillTask(request_id=ID, room=7, owner="d0", model=MODEL, token_ids=TokenIds.of([1]), stop=STOP)
    await bus.publish_durable(names.PREFILL_ANY.of(model=MODEL), encode(prompt), headers=TRACED)
    found = await find(bus)
    events = timeline(found)
    assert [event.what for event in events] == [
        "accepted", "preprocessed", "in the queue for decode", "prefill offered"
    ]  # fmt: skip
    assert events[0].unix_s == 1000.0
    assert gone(found) == ["RESPONSES has no frame of it: none came yet, or they are older than responses_kept_s"]


async def test_what_the_streams_no_longer_have_is_said(bus):
    await say(bus, index=40, token_ids=TokenIds.of([1]), text="a")
    missing = gone(await find(bus))
    assert any("tokens 0 to 39 of choice 0" in sentence for sentence in missing)
    assert any("when it was accepted" in sentence for sentence in missing)


async def test_choices_are_told_apart_and_one_piece_has_no_pace(bus):
    now = time.time()
    for choice in (0, 1):
        timing = Timing(accepted_unix_s=now - 2, started_unix_s=now - 1, first_token_unix_s=now - 0.5)
        tokens = TokenIds.of([1, 2, 3])
        await say(bus, choice=choice, worker="d0", token_ids=tokens, finish_reason="length", timing=timing)
    told = lines(timeline(await find(bus)))
    assert [what for what, _, _ in told] == [
        "accepted", "started", "choice 0: first token", "choice 1: first token",
        "choice 0: ended: length", "choice 1: ended: length",
    ]  # fmt: skip
    assert told[-1][2] == "3 tokens"


async def test_a_dead_letter_alone_tells_of_a_request(bus):
    letter = DeadLetter(
        stage="decode", subject="s", stream_seq=4, attempts=2, error=FAILURE, payload=b"", request_id=ID
    )
    await bus.publish_durable(names.DEAD.of(stage="decode", model=MODEL), encode(letter))
    found = await find(bus)
    assert found.client is None
    assert lines(timeline(found)) == [("given up by decode", "DEAD", "letter 1: engine_died after 2 deliveries")]


async def test_nothing_and_two_clients_are_sentences(bus):
    with pytest.raises(ConfigError, match="no stream has anything of request r1"):
        await find(bus)
    for client in ("a", "b"):
        await say(bus, client=client, finish_reason="stop")
    with pytest.raises(ConfigError, match="--client NAME: there are requests r1 of a, b"):
        await find(bus)
    assert (await find(bus, "b")).client == "b"
    with pytest.raises(ConfigError, match="there are requests r1 of a, b"):
        await find(bus, "c")
