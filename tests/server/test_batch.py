"""Batches: whatever ends a run, the next one goes on, and no line is run twice."""

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pipeline.bus import Bus, Received
from pipeline.client import Client
from pipeline.config import SimulatedSettings, TopologySettings, load_topology
from pipeline.local import LocalTopology, running
from subjects import names, streams
from subjects.codec import decode
from subjects.messages import Frame

MODEL = "smollm2"
READY_S_MAX = 60.0
COMMAND_S_MAX = 60.0


def topology(url: str | None = None, **simulated: float) -> TopologySettings:
    """One preprocess and one decode worker."""
    shipped = load_topology("simulated")
    groups = tuple(
        msgspec.structs.replace(group, count=1, simulated=SimulatedSettings(**simulated))
        for group in shipped.workers
        if group.role in ("preprocess", "decode")
    )
    return msgspec.structs.replace(shipped, workers=groups, nats=msgspec.structs.replace(shipped.nats, url=url))


@contextlib.asynccontextmanager
async def serving(folder: Path, url: str | None = None, **simulated: float) -> AsyncIterator[LocalTopology]:
    async with running(topology(url, **simulated), folder) as local:
        await local.start()
        async with asyncio.timeout(READY_S_MAX):
            await local.until_ready()
        yield local


def write_batch(file: Path, count: int, tokens: int = 4, **body: Any) -> None:
    """Chats and completions by turns."""
    with file.open("w") as out:
        for number in range(count):
            ask = {"model": MODEL, "max_tokens": tokens, "ignore_eos": True, **body}
            if number % 2:
                url, ask = "/v1/completions", ask | {"prompt": f"line {number}"}
            else:
                url, ask = "/v1/chat/completions", ask | {"messages": [{"role": "user", "content": f"line {number}"}]}
            out.write(json.dumps({"custom_id": f"line-{number}", "method": "POST", "url": url, "body": ask}) + "\n")


def answers(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


async def command(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pipeline.cli", *arguments), stderr=asyncio.subprocess.PIPE
    )


async def finished(*arguments: str) -> tuple[int, str]:
    """Run a command to its end: its exit code, and what it said."""
    process = await command(*arguments)
    async with asyncio.timeout(COMMAND_S_MAX):
        _, said = await process.communicate()
    return process.returncode or 0, said.decode()


def lines_of(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Wait for something that only asking the broker, or looking at a file, can tell."""
    deadline_s = time.monotonic() + COMMAND_S_MAX
    while not await holds():
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.01)


async def count_ends(url: str, connect) -> Counter[str]:
    """How many terminal frames each request has had, as they are seen."""
    ends: Counter[str] = Counter()

    def hear(received: Received) -> None:
        frame = decode(Frame, received.payload)
        ends[frame.request_id] += frame.finish_reason is not None

    watching = await connect(url)
    await watching.subscribe(names.RESPONSES.any(), hear)
    await watching.flush()
    return ends


@pytest.mark.timeout(180)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
async def test_an_ended_run_is_gone_on_with_and_no_line_is_paid_twice(tmp_path: Path, connect, number: signal.Signals):
    file, out = tmp_path / "in.jsonl", tmp_path / "in.out.jsonl"
    write_batch(file, 200)
    async with serving(tmp_path / "run", ttft_ms=20, itl_ms=5) as local:
        ends = await count_ends(local.url, connect)
        arguments = ("batch", str(file), "--nats", local.url, "--in-flight", "16")
        first = await command(*arguments)

        async def is_underway() -> bool:
            return lines_of(out) >= 40

        await until(is_underway)
        os.kill(first.pid, number)
        _, said = await first.communicate()
        assert (b"; the same command goes on from here" in said) == (number == signal.SIGINT)
        assert len(answers(out)) < 200
        with out.open("ab") as torn:
            torn.write(b'{"id": "batch_req_of a line that kill -9 cut')

        code, said = await finished(*arguments)
        assert (code, "200 of 200 answered" in said) == (0, True), said
        state = await (await connect(local.url)).stream_state(streams.REQUESTS.name)
        assert state.last_seq == 200, "submitted once each"
        assert (len(ends), set(ends.values())) == (200, {1})

        code, said = await finished(*arguments)
        assert (code, "200 of them asked for by earlier runs" in said) == (0, True), said
    found = answers(out)
    assert Counter(answer["custom_id"] for answer in found) == {f"line-{index}": 1 for index in range(200)}
    assert all(answer["response"]["status_code"] == 200 and answer["error"] is None for answer in found)


@pytest.mark.timeout(180)
async def test_requests_that_nobody_listened_to_are_all_answered_later(nats_server, bus: Bus, tmp_path: Path):
    """Submitted with no worker up, answered with no client there, and collected when both are gone."""
    await bus.provision(streams.STREAMS, streams.CONSUMERS, streams.BUCKETS)
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_batch(file, 300)
    arguments = ("batch", str(file), "--output", str(out), "--nats", nats_server.url)
    for _ in range(2):  # the second time there is nothing to submit
        code, said = await finished(*arguments, "--submit")
        assert (code, "300 requests are accepted" in said) == (0, True), said
        assert (await bus.stream_state(streams.REQUESTS.name)).last_seq == 300

    async def all_are_answered() -> bool:
        return len(await bus.subjects_state(streams.RESPONSES.name, names.RESPONSES.any())) == 300

    async with serving(tmp_path / "run", nats_server.url, ttft_ms=1, itl_ms=1):
        await until(all_are_answered)
    code, said = await finished(*arguments)
    assert (code, "300 of 300 answered" in said) == (0, True), said
    assert len(answers(out)) == 300
    assert (await bus.stream_state(streams.REQUESTS.name)).last_seq == 300


@pytest.mark.timeout(120)
async def test_answers_are_openai_s_and_so_are_errors(tmp_path: Path):
    file, out = tmp_path / "in.jsonl", tmp_path / "in.out.jsonl"
    chat = {"custom_id": "chat", "method": "POST", "url": "/v1/chat/completions"}
    message = {"role": "user", "content": "hi"}
    lines = [
        chat | {"body": {"messages": [message], "max_tokens": 3, "n": 2, "ignore_eos": True, "logprobs": True}},
        chat | {"custom_id": "wrong", "body": {"model": MODEL, "messages": [message], "temperature": 7}},
        chat | {"custom_id": "unknown", "body": {"model": "nobody", "messages": [message]}},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    async with serving(tmp_path / "run", ttft_ms=1, itl_ms=1) as local:
        code, said = await finished("batch", str(file), "--nats", local.url, "--model", MODEL)
    assert code == 1
    assert "3 of 3 answered" in said
    assert "2 with an error (1 invalid_request, 1 unknown_model)" in said
    by_id = {answer["custom_id"]: answer for answer in answers(out)}
    body = by_id["chat"]["response"]["body"]
    assert (body["object"], body["model"]) == ("chat.completion", MODEL)
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert {choice["finish_reason"] for choice in body["choices"]} == {"length"}
    assert all(choice["message"]["content"] for choice in body["choices"])
    assert body["usage"]["completion_tokens"] == 6
    assert by_id["wrong"]["response"]["status_code"] == 400
    assert by_id["wrong"]["response"]["body"]["error"]["param"] == "temperature"
    assert by_id["wrong"]["error"]["code"] == "invalid_request"
    assert by_id["unknown"]["response"]["status_code"] == 404


@pytest.mark.timeout(120)
async def test_a_full_queue_is_waited_for(nats_server, bus: Bus, tmp_path: Path):
    """The queue takes four requests; a worker comes only when the batch has been turned away."""
    small = dataclasses.replace(streams.REQUESTS, max_msgs_per_subject=4)
    others = [stream for stream in streams.STREAMS if stream is not streams.REQUESTS]
    await bus.provision([small, *others], streams.CONSUMERS, streams.BUCKETS)
    file = tmp_path / "in.jsonl"
    write_batch(file, 12)
    submitting = asyncio.create_task(finished("batch", str(file), "--submit", "--nats", nats_server.url))

    async def is_full() -> bool:
        return (await bus.stream_state(streams.REQUESTS.name)).messages == 4

    async def is_over() -> bool:
        await bus.api(f"STREAM.PURGE.{streams.REQUESTS.name}")  # stands in for preprocess
        return submitting.done()

    await until(is_full)
    assert not submitting.done()
    await until(is_over)
    code, said = await submitting
    assert (code, "12 requests are accepted" in said) == (0, True), said
    assert (await bus.stream_state(streams.REQUESTS.name)).last_seq == 12


async def test_a_client_reads_all_that_the_log_has_of_it(nats_server, bus: Bus):
    await bus.provision(streams.STREAMS, streams.CONSUMERS, streams.BUCKETS)
    for client in ("me", "another"):
        subject = names.RESPONSES.of(client=client, request_id="r")
        await bus.publish_durable(subject, msgspec.msgpack.encode({"request_id": "r", "text": client}))
    async with Client.connect(nats_server.url, client="me") as client:
        assert [frame.text async for frame in client.stored()] == ["me"]


async def test_a_broker_without_streams_is_told(nats_server, tmp_path: Path):
    write_batch(tmp_path / "in.jsonl", 1)
    code, said = await finished("batch", str(tmp_path / "in.jsonl"), "--nats", nats_server.url)
    assert (code, said) == (1, "sglang-nats: there are no streams yet: start the pipeline's first worker\n")
