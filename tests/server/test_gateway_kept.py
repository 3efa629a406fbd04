"""What gateways keep for each other: files, batches and responses, through the official client; and one that dies."""

import asyncio
import json
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import msgspec
import openai
import pytest
import pytest_asyncio
from openai.types import Batch

from pipeline.bus import Bus, Received
from pipeline.config import GatewaySettings, GroupSettings, SimulatedSettings, load_topology
from pipeline.local import LocalTopology, running
from subjects import limits, names, streams
from subjects.codec import decode
from subjects.messages import BatchState, Frame

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]
MODEL = "smollm2"
READY_S_MAX = 60.0
WAIT_S_MAX = 45.0
ITL_MS = 20


class Serving:
    """A topology with three gateways, and a connection of our own."""

    def __init__(self, local: LocalTopology, bus: Bus) -> None:
        self.local, self.bus = local, bus
        self.urls = local.gateway_addresses()
        self.http = httpx.AsyncClient(timeout=WAIT_S_MAX)

    def openai(self, gateway: int = 1) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.urls[gateway]}/v1", api_key="x", max_retries=0, timeout=WAIT_S_MAX)

    async def state(self, batch_id: str) -> BatchState:
        bucket = await self.bus.bucket(streams.BATCHES)
        value = await bucket.get(names.owned_key("http", batch_id))
        assert value is not None
        return decode(BatchState, value)

    async def owner(self, batch_id: str) -> int:
        """The number of the gateway that works on a batch."""
        return int((await self.state(batch_id)).owner.split("-")[1])

    def send(self, gateway: int, number: signal.Signals) -> None:
        (child,) = (child for child in self.local.children if child.name == f"gateway-{gateway}")
        os.kill(child.process.pid, number)

    async def batch(self, content: bytes, gateway: int = 1, **fields: Any) -> Batch:
        client = self.openai(gateway)
        file = await client.files.create(file=("in.jsonl", content), purpose="batch")
        asked = {"endpoint": "/v1/completions", "completion_window": "24h"} | fields
        return await client.batches.create(input_file_id=file.id, **asked)

    async def ended(self, batch_id: str, gateway: int = 1) -> Batch:
        client = self.openai(gateway)

        async def is_over() -> Batch | None:
            batch = await client.batches.retrieve(batch_id)
            return batch if batch.status in ("completed", "failed", "expired", "cancelled") else None

        return await until(is_over)

    async def lines(self, file_id: str, gateway: int = 1) -> list[dict[str, Any]]:
        content = await self.openai(gateway).files.content(file_id)
        return [json.loads(line) for line in content.text.splitlines()]


async def until(holds: Callable[[], Awaitable[Any]]) -> Any:
    """Wait for something that only asking can tell."""
    deadline_s = time.monotonic() + WAIT_S_MAX
    while not (found := await holds()):
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.05)
    return found


def lines_of(count: int, prefix: str, tokens: int = 4, **body: Any) -> bytes:
    ask = {"model": MODEL, "max_tokens": tokens, "ignore_eos": True, **body}
    lines = (
        {"custom_id": f"{prefix}-{number}", "method": "POST", "url": "/v1/completions"}
        | {"body": ask | {"prompt": f"{prefix} {number}"}}
        for number in range(count)
    )
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def serving(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Serving]:
    shipped = load_topology("simulated")
    groups = [
        msgspec.structs.replace(group, count=1, simulated=SimulatedSettings(ttft_ms=5, itl_ms=ITL_MS))
        for group in shipped.workers
        if group.role in ("preprocess", "decode")
    ]
    gateway = GatewaySettings(port=0, batch_in_flight=16)
    groups.append(GroupSettings(role="gateway", count=3, gateway=gateway))
    folder = tmp_path_factory.mktemp("batches")
    async with running(msgspec.structs.replace(shipped, workers=tuple(groups)), folder) as local:
        await local.start()
        async with asyncio.timeout(READY_S_MAX):
            await local.until_ready()
        bus = await Bus.connect(local.url, name="test")
        serving = Serving(local, bus)
        yield serving
        await serving.http.aclose()
        await bus.close()


async def test_a_file_is_kept_listed_read_and_deleted(serving: Serving):
    one, other = serving.openai(0), serving.openai(1)
    content = os.urandom(700_000)
    file = await one.files.create(file=("random.bin", content), purpose="user_data")
    assert (file.bytes, file.filename, file.purpose, file.status) == (700_000, "random.bin", "user_data", "processed")
    assert await other.files.retrieve(file.id) == file
    assert (await other.files.content(file.id)).content == content
    later = await one.files.create(
        file=("b", b"x"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert later.expires_at - later.created_at in (3599, 3600)
    assert [found.id async for found in other.files.list(limit=1)] == [later.id, file.id]
    assert [found.id async for found in other.files.list(order="asc", purpose="user_data")] == [file.id]
    assert (await other.files.delete(file.id)).deleted
    with pytest.raises(openai.NotFoundError):
        await one.files.content(file.id)


@pytest.mark.parametrize(
    ("form", "field"),
    [
        ({"data": {"purpose": "batch"}, "files": {"other": b"x"}}, "other"),
        ({"data": {"purpose": "poetry"}, "files": {"file": b"x"}}, "purpose"),
        ({"data": {"purpose": "batch"}, "files": {"file": b""}}, "file"),
        ({"data": {"purpose": "batch", "expires_after[seconds]": "9"}, "files": {"file": b"x"}}, "expires_after"),
        ({"json": {"purpose": "batch"}}, "Content-Type"),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, None),
        ({"content": b"--a\r\nx", "headers": {"content-type": "multipart/form-data; boundary=a"}}, "file"),
    ],
)
async def test_an_upload_that_is_wrong_is_told_why(serving: Serving, form: dict[str, Any], field: str | None):
    answer = await serving.http.post(f"{serving.urls[0]}/v1/files", **form)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)


async def test_a_batch_is_answered_with_outputs_and_errors(serving: Serving):
    wrong = json.dumps({"custom_id": "wrong", "url": "/v1/completions", "body": {"model": MODEL, "prompt": ""}})
    batch = await serving.batch(lines_of(20, "plain") + wrong.encode(), metadata={"team": "a"})
    assert (batch.status, batch.metadata, batch.request_counts.total) == ("validating", {"team": "a"}, 0)
    batch = await serving.ended(batch.id)
    assert (batch.status, batch.request_counts.model_dump()) == (
        "completed",
        {"total": 21, "completed": 20, "failed": 1},
    )
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at < batch.expires_at
    answers = await serving.lines(batch.output_file_id, gateway=0)
    assert {answer["custom_id"] for answer in answers} == {f"plain-{number}" for number in range(20)}
    body = answers[0]["response"]["body"]
    assert (body["object"], body["choices"][0]["finish_reason"]) == ("text_completion", "length")
    (error,) = await serving.lines(batch.error_file_id)
    assert (error["custom_id"], error["response"]["status_code"]) == ("wrong", 400)
    kept = await (await serving.bus.objects(streams.FILES)).list()
    assert not [info.name for info in kept if info.name.startswith("~answers")]


@pytest.mark.parametrize(
    ("content", "line", "param"),
    [
        (lines_of(1, "a") + b"{\n", 2, "file"),
        (lines_of(1, "a") + lines_of(1, "a"), 2, "custom_id"),
        (lines_of(1, "a").replace(b"/v1/completions", b"/v1/chat/completions"), 1, "url"),
        (lines_of(1, "a", client="someone"), 1, "body.client"),
        (lines_of(1, "a", user="u" * 600_000), 1, "body"),
        (b"\n", None, "input_file_id"),
    ],
)
async def test_a_file_that_is_no_batch_fails_it_by_its_line(serving: Serving, content, line, param):
    batch = await serving.ended((await serving.batch(content)).id)
    (error,) = batch.errors.data
    assert (batch.status, error.line, error.param) == ("failed", line, param)


async def test_what_cannot_be_a_batch_is_refused(serving: Serving):
    for fields, param in (
        ({"completion_window": "25h"}, "completion_window"),
        ({"endpoint": "/v1/moderations"}, "endpoint"),
        ({"metadata": {"k" * 65: "v"}}, "metadata." + "k" * 64),
        ({"extra_body": {"input_file_id": 7}}, "input_file_id"),
        ({"extra_body": {"nonsense": 7}}, "nonsense"),
    ):
        with pytest.raises(openai.BadRequestError) as raised:
            await serving.batch(b"x", **fields)
        assert raised.value.body["param"] == param
    for path in ("/v1/batches?limit=0", "/v1/batches?limit=x", "/v1/files?limit=10001"):
        assert (await serving.http.get(serving.urls[0] + path)).status_code == 400
    for wrong in ("nothing", "a.b", "*", "%20"):
        assert (await serving.http.get(f"{serving.urls[0]}/v1/batches/{wrong}")).status_code == 404
    assert (await serving.http.get(f"{serving.urls[0]}/v1/batches?after=batch_0")).status_code == 404


async def test_batches_are_listed_newest_first_by_pages(serving: Serving):
    made = [(await serving.batch(lines_of(1, f"listed-{number}"))).id for number in range(3)]
    for batch_id in made:
        await serving.ended(batch_id)
    first = await serving.openai(0).batches.list(limit=2)
    assert [batch.id for batch in first.data] == [made[2], made[1]]
    assert first.has_more
    async for batch in serving.openai(0).batches.list(limit=2, after=made[1]):
        assert batch.id == made[0]
        break


async def test_a_cancelled_batch_ends_with_what_it_has(serving: Serving):
    batch = await serving.batch(lines_of(17, "quick") + lines_of(40, "slow", tokens=2000))

    async def quick_are_done() -> bool:
        return (await serving.openai().batches.retrieve(batch.id)).request_counts.completed >= 2

    await until(quick_are_done)
    assert (await serving.openai(0).batches.cancel(batch.id)).status in ("cancelling", "cancelled")
    batch = await serving.ended(batch.id)
    assert (batch.status, batch.error_file_id) == ("cancelled", None)
    assert batch.cancelling_at <= batch.cancelled_at
    assert batch.request_counts.completed == len(await serving.lines(batch.output_file_id))
    again = await serving.openai(0).batches.cancel(batch.id)
    assert again.status == "cancelled"

    async def nothing_runs() -> bool:
        return (await serving.bus.stream_state(streams.WORK.name)).messages == 0

    await until(nothing_runs)  # its requests were cancelled too


async def test_a_batch_that_takes_too_long_expires(serving: Serving):
    batch = await serving.batch(lines_of(3, "quick") + lines_of(2, "slow", tokens=2000), completion_window="2s")
    batch = await serving.ended(batch.id)
    assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("expired", 3, 2)
    assert len(await serving.lines(batch.output_file_id)) == 3
    errors = await serving.lines(batch.error_file_id)
    assert {(error["custom_id"], error["error"]["code"]) for error in errors} == {
        ("slow-0", "batch_expired"),
        ("slow-1", "batch_expired"),
    }


ASKED: dict[str, Any] = {"model": MODEL, "max_output_tokens": 8, "extra_body": {"ignore_eos": True}}


async def test_a_response_whole_and_streamed_and_gone_on_from_anywhere(serving: Serving):
    one, other = serving.openai(0), serving.openai(1)
    asked = ASKED | {"input": "hi", "instructions": "Be brief.", "metadata": {"team": "a"}, "temperature": 0.5}
    whole = await one.responses.create(**asked)
    assert (whole.status, whole.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (whole.instructions, whole.metadata, whole.temperature) == ("Be brief.", {"team": "a"}, 0.5)
    assert whole.usage.output_tokens == 8 and whole.output_text
    assert await other.responses.retrieve(whole.id) == whole

    events = [event async for event in await one.responses.create(**asked, stream=True)]
    kinds = [event.type.removeprefix("response.") for event in events]
    deltas = kinds.count("output_text.delta")
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * deltas,
        *("output_text.done", "content_part.done", "output_item.done", "incomplete"),
    ]
    assert deltas > 2
    last = events[-1].response
    assert last.output_text == whole.output_text == "".join(event.delta for event in events[4 : 4 + deltas])
    number = events[5].sequence_number
    rest = await other.responses.retrieve(last.id, stream=True, starting_after=number)
    assert [event async for event in rest] == events[6:]

    second = await other.responses.create(**ASKED, input="and then?", previous_response_id=last.id)
    alone = await other.responses.create(**ASKED, input="and then?")
    assert second.usage.input_tokens > alone.usage.input_tokens + 8
    assert second.previous_response_id == last.id
    await one.responses.delete(last.id)
    with pytest.raises(openai.NotFoundError):
        await other.responses.retrieve(last.id)
    with pytest.raises(openai.NotFoundError) as raised:
        await other.responses.create(**ASKED, input="x", previous_response_id=last.id)
    assert raised.value.body["param"] == "previous_response_id"


async def test_a_response_that_is_not_stored_is_not_there(serving: Serving):
    response = await serving.openai().responses.create(**ASKED, input="hi", store=False)
    with pytest.raises(openai.NotFoundError):
        await serving.openai().responses.retrieve(response.id)
    for wrong in ("resp_", "resp_a.b", "nothing"):
        with pytest.raises(openai.NotFoundError):
            await serving.openai().responses.retrieve(wrong)
    with pytest.raises(openai.NotFoundError, match="not compacted here"):
        await serving.openai().post("/responses/compact", body={}, cast_to=object)


async def test_a_response_is_cancelled_from_another_gateway(serving: Serving):
    asked = ASKED | {"input": "hi", "max_output_tokens": 3000, "stream": True}
    kinds, cancelled = [], None
    async for event in await serving.openai(0).responses.create(**asked):
        kinds.append(event.type)
        if event.type == "response.output_text.delta" and cancelled is None:
            response_id = "resp_" + event.item_id.removeprefix("msg_")
            assert (await serving.openai(1).responses.retrieve(response_id)).status == "in_progress"
            with pytest.raises(openai.BadRequestError, match="in_progress"):
                await serving.openai(1).responses.create(**ASKED, input="x", previous_response_id=response_id)
            cancelled = await serving.openai(1).responses.cancel(response_id)
    assert (cancelled.status, kinds[-1], event.response.status) == ("cancelled", "response.failed", "cancelled")
    assert (await serving.openai(1).responses.retrieve(response_id)).status == "cancelled"


async def test_a_response_s_error_has_its_status(serving: Serving):
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as raised:
            await serving.openai().responses.create(**ASKED | {"max_output_tokens": 9**9}, input="x", stream=stream)
        assert raised.value.body["param"] == "max_completion_tokens"


async def test_a_batch_outlives_its_gateways_and_no_line_is_paid_twice(serving: Serving):
    """One gateway is stopped, the next one killed: the third ends the batch, and tells the rest of a response."""
    ends: Counter[str] = Counter()

    def hear(received: Received) -> None:
        frame = decode(Frame, received.payload)
        ends[frame.request_id] += frame.finish_reason is not None

    before = (await serving.bus.stream_state(streams.REQUESTS.name)).last_seq
    batch = await serving.batch(lines_of(300, "moved", tokens=10))
    subscription = await serving.bus.subscribe(names.RESPONSES.any(client=batch.id), hear)

    async def is_begun() -> bool:
        return sum(ends.values()) >= 40

    await until(is_begun)
    stopped = await serving.owner(batch.id)
    serving.send(stopped, signal.SIGTERM)

    async def is_handed_on() -> bool:
        return not (await serving.state(batch.id)).owner.startswith(f"gateway-{stopped}-")

    stopped_s = time.monotonic()
    await until(is_handed_on)
    assert time.monotonic() - stopped_s < limits.LEASE_S, "it was handed on, not taken over"

    async def is_underway() -> bool:
        return bool((await serving.state(batch.id)).owner) and sum(ends.values()) >= 120

    await until(is_underway)
    killed = await serving.owner(batch.id)
    told = await serving.openai(killed).responses.create(**ASKED | {"max_output_tokens": 100}, input="hi", stream=True)
    events = [await anext(told) for _ in range(10)]
    serving.send(killed, signal.SIGKILL)
    assert sum(ends.values()) < 300
    with pytest.raises((httpx.HTTPError, openai.APIError)):
        async for event in told:
            events.append(event)
    left = 3 - stopped - killed
    rest = await serving.openai(left).responses.retrieve(
        events[0].response.id, stream=True, starting_after=events[-1].sequence_number
    )
    events += [event async for event in rest]
    assert "".join(event.delta for event in events if event.type.endswith("delta")) == events[-1].response.output_text
    assert events[-1].response.usage.output_tokens == 100

    batch = await serving.ended(batch.id, left)
    assert (batch.status, batch.request_counts.completed) == ("completed", 300)
    answers = await serving.lines(batch.output_file_id, left)
    assert Counter(answer["custom_id"] for answer in answers) == {f"moved-{number}": 1 for number in range(300)}
    assert (len(ends), set(ends.values())) == (300, {1})
    assert (await serving.bus.stream_state(streams.REQUESTS.name)).last_seq - before == 301, "submitted once each"
    assert (await serving.state(batch.id)).taken == 3
    await subscription.unsubscribe()
