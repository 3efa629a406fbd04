"""Reading on: after a kill, a lost connection, a gap, from any token, and what is said when the log has it no more."""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from pipeline.bus import Bus
from pipeline.client import Client
from pipeline.config import SimulatedSettings, load_topology
from pipeline.engine.simulated import expected_tokens, text_of
from pipeline.errors import DeadlineExceeded, OutputGone
from pipeline.local import LocalTopology, running
from subjects import names, streams
from subjects.codec import TokenIds, encode
from subjects.messages import Frame, Usage

MODEL = "smollm2"
PROMPT = (20, 11, 12)
READY_S_MAX = 60.0
ANSWER_S_MAX = 30.0


@contextlib.asynccontextmanager
async def serving(folder: Path, **simulated: float) -> AsyncIterator[LocalTopology]:
    """One preprocess and one decode worker, ready."""
    shipped = load_topology("simulated")
    groups = tuple(
        msgspec.structs.replace(group, count=1, simulated=SimulatedSettings(**simulated))
        for group in shipped.workers
        if group.role in ("preprocess", "decode")
    )
    async with running(msgspec.structs.replace(shipped, workers=groups), folder) as local:
        await local.start()
        async with asyncio.timeout(READY_S_MAX):
            await local.until_ready()
        yield local


def wanted(count: int) -> list[int]:
    return expected_tokens(TokenIds.of(PROMPT), count).tolist()


async def rest(client: Client, request_id: str, **options) -> tuple[list[int], str]:
    """The tokens and the text that `resume` brings."""
    tokens, text = [], ""
    async with asyncio.timeout(ANSWER_S_MAX):
        async for frame in client.resume(request_id, **options):
            assert frame.error is None, frame.error
            tokens += frame.token_ids.tolist()
            text += frame.text
    return tokens, text


@pytest.fixture
async def log(bus: Bus) -> Bus:
    """A connection to a broker with the pipeline's streams and no worker: frames are published by hand."""
    await bus.provision(streams.STREAMS, streams.CONSUMERS, streams.BUCKETS)
    return bus


async def say(bus: Bus, request_id: str, tokens: list[int], index: int, *, last: bool = False, **fields) -> None:
    """Publish a frame of the client "me"; a terminal one is confirmed."""
    frame = Frame(
        request_id=request_id,
        index=index,
        token_ids=TokenIds.of(tokens),
        text="".join(text_of(token) for token in tokens),
        finish_reason="length" if last else None,
        usage=Usage(prompt_tokens=3, completion_tokens=index + len(tokens)) if last else None,
        **fields,
    )
    subject = names.RESPONSES.of(client="me", request_id=request_id)
    await bus.publish_durable(subject, encode(frame))


READER = """
import asyncio, sys
from pipeline.client import Client

async def main(url):
    async with Client.connect(url, client="me") as client:
        async for frame in client.generate(
            model="smollm2", prompt=(20, 11, 12), max_tokens=200, ignore_eos=True, request_id="killed"
        ):
            print(*frame.token_ids.tolist(), sep="\\n", flush=True)

asyncio.run(main(sys.argv[1]))
"""


async def read_and_be_killed(url: str, after_tokens: int) -> list[int]:
    """A process that asks and reads, ended by kill -9 in the middle; the tokens that it had."""
    reader = await asyncio.create_subprocess_exec(sys.executable, "-c", READER, url, stdout=asyncio.subprocess.PIPE)
    assert reader.stdout
    tokens = []
    async with asyncio.timeout(ANSWER_S_MAX):
        while len(tokens) < after_tokens:
            tokens.append(int(await reader.stdout.readline()))
        os.kill(reader.pid, signal.SIGKILL)
        await reader.wait()
        tokens += [int(line) for line in (await reader.stdout.read()).split()]
    assert len(tokens) < 200, "it was killed too late"
    return tokens


@pytest.mark.timeout(120)
async def test_a_killed_client_goes_on_and_misses_nothing(tmp_path: Path):
    async with serving(tmp_path, ttft_ms=1, itl_ms=10) as local:
        had = await read_and_be_killed(local.url, 20)
        async with Client.connect(local.url, client="me") as client:
            tokens, text = await rest(client, "killed", from_token=len(had))
            assert had + tokens == wanted(200)
            assert text == "".join(text_of(token) for token in tokens)

            again, _ = await rest(client, "killed")
            assert again == wanted(200)


@pytest.mark.timeout(120)
async def test_the_rest_of_a_running_request_comes_live(tmp_path: Path):
    async with serving(tmp_path, ttft_ms=1, itl_ms=10) as local, Client.connect(local.url, client="me") as client:
        submitted = await client.submit(
            model=MODEL, prompt=PROMPT, max_tokens=100, ignore_eos=True, request_id="r", stream=True, n=2
        )
        assert (submitted.request_id, submitted.duplicate) == ("r", False)
        whole, _ = await rest(client, "r")  # the second choice is found out about
        assert sorted(whole) == sorted(2 * wanted(100))
        tail, _ = await rest(client, "r", from_token=90, choice=1)
        assert tail == wanted(100)[90:]

        texts = "".join(text_of(token) for token in wanted(100)[97:])
        command = (sys.executable, "-m", "pipeline.cli", "resume", "r", "-n", "2", "--from", "97", "--nats", local.url)
        reading = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        async with asyncio.timeout(ANSWER_S_MAX):
            printed, _ = await reading.communicate()
        assert printed.decode() == f"[0] {texts}\n[1] {texts}\n"


async def test_a_cursor_inside_a_frame_gives_no_token_twice(log: Bus, nats_server):
    tokens = wanted(10)
    await say(log, "r", tokens[:4], 0)
    await say(log, "r", tokens[4:], 4, last=True)
    async with Client.connect(nats_server.url, client="me") as client:
        for cursor in range(11):
            got, _ = await rest(client, "r", from_token=cursor)
            assert got == tokens[cursor:]
        got, text = await rest(client, "r", from_token=4)
        assert text == "".join(text_of(token) for token in tokens[4:])


async def test_a_gap_in_what_is_heard_is_read_from_the_log(log: Bus, nats_server):
    """A slow reader's broker drops frames on the live path; the log still has them."""
    tokens = wanted(10)
    async with Client.connect(nats_server.url, client="me") as client:
        await say(log, "r", tokens[:2], 0)
        reading = client.resume("r")
        assert (await anext(reading)).index == 0
        deaf = client._hear
        await client._subscription.unsubscribe()
        await say(log, "r", tokens[2:5], 2)
        client._subscription = await client._bus.subscribe(names.RESPONSES.any(client="me"), deaf)
        await client._bus.flush()
        await say(log, "r", tokens[5:], 5, last=True)
        async with asyncio.timeout(ANSWER_S_MAX):
            rest_of_it = [frame async for frame in reading]
        assert [token for frame in rest_of_it for token in frame.token_ids] == tokens[2:]


async def test_a_gap_that_the_log_has_too_is_an_error_that_names_the_tokens(log: Bus, nats_server):
    await say(log, "r", [7], 5, last=True)
    async with Client.connect(nats_server.url, client="me") as client:
        with pytest.raises(OutputGone, match="tokens 0 to 4 of choice 0 of request r are gone: the log has no older"):
            await rest(client, "r")
        assert await rest(client, "r", from_token=5) == ([7], text_of(7))


async def test_frames_that_an_outage_swallowed_and_their_worker_sent_again_are_no_gap(log: Bus, nats_server):
    tokens = wanted(8)
    await say(log, "r", tokens[:2], 0)
    await say(log, "r", tokens[4:6], 4)
    for index in range(2, 6):
        await say(log, "r", [tokens[index]], index)
    await say(log, "r", tokens[6:], 6, last=True)
    async with Client.connect(nats_server.url, client="me") as client:
        assert (await rest(client, "r"))[0] == tokens


async def test_a_request_that_nobody_knows_is_an_error_at_once(log: Bus, nats_server):
    began = time.monotonic()
    async with Client.connect(nats_server.url, client="me") as client:
        with pytest.raises(
            OutputGone, match=r"the rest of what .*\.me\.never carried is gone: no queue holds the request"
        ) as raised:
            await rest(client, "never")
    assert raised.value.status == 410
    assert time.monotonic() - began < 5.0


async def test_a_request_that_still_waits_is_waited_for(log: Bus, nats_server):
    async with Client.connect(nats_server.url, client="me") as client:
        await client.submit(model=MODEL, prompt=PROMPT, request_id="queued")
        assert await client.held() == {"queued"}
        waiting = asyncio.create_task(rest(client, "queued"))
        with pytest.raises(DeadlineExceeded):
            await rest(client, "queued", deadline=time.time() - 4.5)
        assert not waiting.done()
        await say(log, "queued", [1, 2], 0, last=True)
        assert (await waiting)[0] == [1, 2]


async def test_a_broker_that_forgot_the_log_is_said_so(log: Bus, nats_server):
    async with Client.connect(nats_server.url, client="me") as client:
        await say(log, "r", [1, 2], 0)
        reading = client.resume("r")
        assert (await anext(reading)).index == 0
        await log.api(f"STREAM.PURGE.{streams.RESPONSES.name}")
        await log.publish(
            names.RESPONSES.of(client="me", request_id="r"),
            encode(Frame(request_id="r", index=3, token_ids=TokenIds.of([4]), finish_reason="stop")),
        )
        with pytest.raises(OutputGone, match="tokens 2 to 2"):
            async with asyncio.timeout(ANSWER_S_MAX):
                await anext(reading)


async def test_what_an_outage_swallowed_is_read_from_the_log(log: Bus, nats_server):
    """The connection breaks while the last frame is published: nothing more comes live."""
    async with Client.connect(nats_server.url, client="me") as client:
        await say(log, "r", [1, 2], 0)
        reading = client.resume("r")
        assert (await anext(reading)).index == 0
        await client._subscription.unsubscribe()
        await say(log, "r", [3], 2, last=True)
        await client._look_again()  # what the bus calls after each outage
        async with asyncio.timeout(5.0):
            assert [frame.token_ids.tolist() async for frame in reading] == [[3]]
