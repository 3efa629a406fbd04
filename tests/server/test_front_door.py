"""The front door without HTTP: what `nats req sglang.generate.<model>` is told, with a worker played by the test."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from pipeline import front_door
from pipeline.bus import Bus, Received
from pipeline.front_door import FrontDoor
from pipeline.presence import Presence
from subjects import headers, names, streams
from subjects.codec import Format, TokenIds, encode
from subjects.messages import Frame, Usage

MODEL = "smollm2"
SUBJECT = names.GENERATE.of(model=MODEL)
WAIT_S = 10.0


class Asker:
    """Asks as `nats req` does, and keeps every reply."""

    def __init__(self, bus: Bus) -> None:
        self._bus, self.inbox = bus, bus.new_inbox()
        self.replies: asyncio.Queue[Received] = asyncio.Queue()

    async def ask(self, payload: bytes, about: dict[str, str] | None = None) -> "Asker":
        self._listening = await self._bus.subscribe(self.inbox, self.replies.put_nowait)
        await self._bus.publish(SUBJECT, payload, headers=about, reply=self.inbox)
        return self

    async def leave(self) -> None:
        await self._listening.unsubscribe()

    async def next(self) -> Received:
        async with asyncio.timeout(WAIT_S):
            return await self.replies.get()

    async def all(self) -> list[Received]:
        """Every reply but the empty one that ends them."""
        found: list[Received] = []
        while (reply := await self.next()).payload:
            found.append(reply)
        return found


class Served:
    """A door, and the two connections of who asks and who works."""

    def __init__(self, bus: Bus, door: FrontDoor) -> None:
        self.bus, self.door = bus, door
        self.drained = asyncio.Event()
        self.stored: asyncio.Queue[Received] = asyncio.Queue()

    async def ask(self, payload: Any, about: dict[str, str] | None = None) -> Asker:
        raw = payload if isinstance(payload, bytes) else msgspec.json.encode(payload)
        return await Asker(self.bus).ask(raw, about)

    async def accepted(self) -> tuple[dict[str, Any], dict[str, str]]:
        """The fields and headers of the next request that a stage would get."""
        async with asyncio.timeout(WAIT_S):
            stored = await self.stored.get()
        kind = msgspec.json if stored.payload[:1] == b"{" else msgspec.msgpack
        return kind.decode(stored.payload), stored.headers or {}

    async def say(self, request_id: str, index: int, text: str, end: bool, choice: int = 0) -> None:
        frame = Frame(
            request_id=request_id,
            choice=choice,
            index=index,
            token_ids=TokenIds.of([7]),
            text=text,
            finish_reason="stop" if end else None,
            usage=Usage(prompt_tokens=1, completion_tokens=index + 1) if end else None,
        )
        subject = names.RESPONSES.of(client=names.ANONYMOUS_CLIENT, request_id=request_id)
        await self.bus.publish_durable(subject, encode(frame, Format.JSON))


@pytest_asyncio.fixture
async def served(bus: Bus, nats_server, connect) -> AsyncIterator[Served]:
    await bus.provision(streams.STREAMS, streams.CONSUMERS, streams.BUCKETS)
    own = await connect(nats_server.url, name="door")
    presence = Presence(own)
    await presence.start()
    served = Served(bus, FrontDoor(own, presence, "preprocess-0", "abc"))
    await bus.subscribe(names.REQUESTS.of(model=MODEL), served.stored.put_nowait)
    serving = asyncio.create_task(served.door.serve(served.drained.wait()))
    await _found(bus)
    yield served
    served.drained.set()
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    await presence.close()


async def _found(bus: Bus) -> dict[str, Any]:
    """What the door says of itself, once it is there."""
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                return msgspec.json.decode((await bus.request(f"{names.SRV}.INFO.{front_door.SERVICE}")).payload)
            except front_door.BusUnavailable:
                await asyncio.sleep(0.01)


async def test_one_answer_in_kind_then_the_end(served: Served):
    asker = await served.ask({"prompt": "hi"})
    fields, about = await served.accepted()
    assert about[headers.CLIENT] == names.ANONYMOUS_CLIENT
    assert fields["deadline"] > time.time() + 500
    await served.say(fields["request_id"], 0, "Hello", end=True)
    (reply,) = await asker.all()
    assert reply.headers == {headers.REPLY_COUNTER: "2"}
    answer = msgspec.json.decode(reply.payload)
    assert (answer["text"], answer["token_ids"], answer["finish_reason"]) == ("Hello", [7], "stop")


async def test_a_stream_of_two_choices_in_messagepack_with_headers(served: Served):
    deadline = time.time() + 60
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    about = {headers.MSG_ID: "mine", headers.DEADLINE: str(deadline), headers.TRACEPARENT: trace}
    asker = await served.ask(msgspec.msgpack.encode({"prompt": "hi", "n": 2, "stream": True}), about)
    fields, stored = await served.accepted()
    assert (fields["request_id"], fields["deadline"]) == ("mine", deadline)
    assert stored[headers.TRACEPARENT].split("-")[1] == trace.split("-")[1]
    for index in range(3):
        for choice in (0, 1):
            await served.say("mine", index, f"{choice}{index} ", end=index == 2, choice=choice)
    replies = await asker.all()
    assert [reply.headers for reply in replies] == [None] * 6, "how many there will be is not known"
    texts = ["", ""]
    for reply in replies:
        frame = msgspec.msgpack.decode(reply.payload)
        texts[frame.get("choice", 0)] += frame["text"]
    assert texts == ["00 01 02 ", "10 11 12 "]


@pytest.mark.parametrize(
    ("payload", "about", "field"),
    [
        (b"", None, "payload"),
        (b"hello", None, "payload"),
        (b"[1]", None, "payload"),
        (b'{"prompt": "hi", "request_id": "a.b"}', None, "request_id"),
        (b'{"prompt": "hi", "request_id": 7}', None, "request_id"),
        (b'{"prompt": "hi", "client": "me"}', None, "client"),
        (b'{"prompt": "hi"}', {headers.DEADLINE: "soon"}, headers.DEADLINE),
    ],
)
async def test_a_request_that_goes_nowhere_is_told_why(served: Served, payload, about, field):
    (reply,) = await (await served.ask(payload, about)).all()
    assert reply.headers[headers.SERVICE_ERROR_CODE] == "400"
    assert field in reply.headers[headers.SERVICE_ERROR]
    assert msgspec.json.decode(reply.payload)["error"]["field"] == field
    assert (await served.bus.stream_state(streams.REQUESTS.name)).messages == 0


async def test_too_many_at_once_are_told_to_come_again(served: Served, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(front_door, "REQUESTS_MAX", 1)
    await served.ask({"prompt": "hi"})
    (reply,) = await (await served.ask({"prompt": "hi"})).all()
    assert reply.headers[headers.SERVICE_ERROR_CODE] == "429"
    assert msgspec.json.decode(reply.payload)["error"]["retry_after_s"] == front_door.RETRY_AFTER_S


async def test_who_leaves_cancels(served: Served, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(front_door, "GONE_S", 0.1)
    cancelled = asyncio.Event()
    await served.bus.subscribe(names.CANCEL.of(request_id="left"), lambda _: cancelled.set())
    asker = await served.ask({"prompt": "hi", "request_id": "left", "stream": True})
    await served.accepted()
    await served.say("left", 0, "a", end=False)
    await asker.next()
    await asker.leave()
    async with asyncio.timeout(WAIT_S):
        for index in range(1, 1000):
            await served.say("left", index, "a", end=False)
            if cancelled.is_set():
                break
            await asyncio.sleep(0.02)
    assert index > 3, "a moment without its reader does not end a request"


async def test_a_draining_door_takes_no_more_and_ends_what_it_has(served: Served):
    asker = await served.ask({"prompt": "hi", "request_id": "open"})
    await served.accepted()
    served.drained.set()
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                await served.bus.request(SUBJECT, b"")
            except front_door.BusUnavailable as error:
                assert error.code == "no_responders"
                break
    await served.say("open", 0, "done", end=True)
    (reply,) = await asker.all()
    assert msgspec.json.decode(reply.payload)["text"] == "done"


async def test_it_is_found_and_counts(served: Served):
    info = await _found(served.bus)
    assert (info["name"], info["id"], info["endpoints"]) == (front_door.SERVICE, "abc", [])


async def test_what_is_no_inbox_gets_nothing(served: Served):
    """Else who may ask could have this worker publish where only workers may."""
    heard: list[Received] = []
    elsewhere = names.CONTROL.of(worker="w", operation="drain")
    await served.bus.subscribe(elsewhere, heard.append)
    await served.bus.publish(SUBJECT, b"", reply=elsewhere)
    await (await served.ask(b"")).all()
    assert heard == []
