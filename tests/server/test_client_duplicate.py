"""The same request published again: it runs once, and whoever asks again reads the one run."""

import asyncio
import dataclasses
import sys
from collections import Counter
from pathlib import Path

import msgspec
import pytest

from pipeline.bus import Bus
from pipeline.client import Client
from pipeline.config import SimulatedSettings, load_topology
from pipeline.engine.simulated import expected_tokens
from pipeline.errors import Overloaded
from pipeline.local import running
from pipeline.metrics import OVERLOADED
from subjects import names, streams
from subjects.codec import TokenIds, decode
from subjects.messages import Frame

MODEL = "smollm2"
PROMPT = (20, 11, 12)
TOKENS = 50
READY_S_MAX = 60.0
FIELDS = {"model": MODEL, "prompt": PROMPT, "max_tokens": TOKENS, "ignore_eos": True}


async def ask(client: Client, known: list[str], **fields) -> list[int]:
    """The tokens of a request; `known` gets its id where the broker had it already."""
    tokens = []
    async for frame in client.generate(on_duplicate=known.append, **FIELDS | fields):
        assert frame.error is None, frame.error
        tokens += frame.token_ids.tolist()
    return tokens


async def command(*arguments: str) -> tuple[int, str]:
    """Run a command to its end: its exit code, and what it said."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pipeline.cli", *arguments), stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(READY_S_MAX):
        _, said = await process.communicate()
    return process.returncode or 0, said.decode()


@pytest.mark.timeout(120)
async def test_asking_again_reads_the_one_run(tmp_path: Path):
    shipped = load_topology("simulated")
    groups = tuple(
        msgspec.structs.replace(group, count=1, simulated=SimulatedSettings(ttft_ms=1, itl_ms=10))
        for group in shipped.workers
        if group.role in ("preprocess", "decode")
    )
    wanted = expected_tokens(TokenIds.of(PROMPT), TOKENS).tolist()
    ends: Counter[str] = Counter()
    async with running(msgspec.structs.replace(shipped, workers=groups), tmp_path) as local:
        await local.start()
        async with asyncio.timeout(READY_S_MAX):
            await local.until_ready()
        bus = await Bus.connect(local.url, name="test")

        def count(received) -> None:
            frame = decode(Frame, received.payload)
            ends[frame.request_id] += frame.finish_reason is not None

        await bus.subscribe(names.RESPONSES.any(), count)
        await bus.flush()
        async with Client.connect(local.url, client="me") as one, Client.connect(local.url, client="me") as other:
            first: list[str] = []
            again: list[str] = []
            running_one = one.generate(request_id="r", on_duplicate=first.append, **FIELDS)
            begin = await anext(running_one)
            while_it_runs = asyncio.create_task(ask(other, again, request_id="r"))
            tokens = begin.token_ids.tolist()
            async for frame in running_one:
                tokens += frame.token_ids.tolist()
            assert tokens == await while_it_runs == wanted
            assert (first, again) == ([], ["r"])

            assert await ask(one, again, request_id="r") == wanted  # when it is long over
            assert again == ["r", "r"]
            assert await ask(one, again, request_id="s") == wanted
            assert again == ["r", "r"]
            both = await asyncio.gather(ask(one, again, request_id="t"), ask(one, again, request_id="t"))
            assert both == [wanted, wanted]
            assert again == ["r", "r", "t"]

        async with Client.connect(local.url, client="another") as client:
            assert await ask(client, again, request_id="r") == wanted  # an equal id of another client is another's
            assert again == ["r", "r", "t"]
        assert (await bus.stream_state(streams.REQUESTS.name)).last_seq == 4
        await bus.flush()
        assert ends == {"r": 2, "s": 1, "t": 1}
        await bus.close()


async def test_a_full_queue_turns_requests_away_and_says_when_to_come_again(bus: Bus, nats_server):
    """Each model has a queue of its own: another one's requests are still taken."""
    small = dataclasses.replace(streams.REQUESTS, max_msgs_per_subject=2)
    await bus.provision([small, streams.WORK, streams.RESPONSES], [], [])
    counted = OVERLOADED.labels(MODEL)._value.get
    before = counted()
    cancelled = []
    await bus.subscribe(names.CANCEL.any(), cancelled.append)
    async with Client.connect(nats_server.url) as client:
        for _ in range(2):
            await client.submit(model=MODEL, prompt="hi")
        with pytest.raises(Overloaded, match=r"the queue of .*smollm2 is full") as raised:
            await anext(client.generate(model=MODEL, prompt="hi"))
        assert (raised.value.status, raised.value.retry_after_s) == (429, 1.0)
        await client.submit(model="another", prompt="hi")
        code, said = await command("request", "hi", "--model", MODEL, "--nats", nats_server.url)
        assert (code, said.endswith("(try again after 1 s)\n")) == (1, True), said
        await client._bus.flush()
    await bus.flush()
    assert counted() == before + 1
    assert not cancelled, "a second try under the same id would be cancelled too"
