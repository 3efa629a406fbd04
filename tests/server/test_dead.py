"""Dead letters: listed, shown, tried again as a new request, dropped."""

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pipeline.bus import Bus
from pipeline.config import BUILTIN_MODEL, SimulatedSettings, load_topology
from pipeline.dead import DeadLetters
from pipeline.errors import AttemptsExhausted, ConfigError
from pipeline.local import running
from subjects import headers, names, streams
from subjects.codec import TokenIds, decode, encode
from subjects.messages import DeadLetter, PreprocessedRequest, StopConditions

MODEL = "smollm2"
COMMAND_S_MAX = 60.0
REQUEST = PreprocessedRequest(
    request_id="r1",
    client="me",
    model=MODEL,
    token_ids=TokenIds.of([20, 11, 12]),
    stop=StopConditions(max_tokens=8, ignore_eos=True),
    deadline_unix_s=1_000.0,
)


async def bury(bus: Bus, payload: bytes, *, stage: str = "decode", subject: str | None = None, **fields: Any) -> int:
    """Put a letter into DEAD; its number."""
    letter = DeadLetter(
        stage=stage,
        subject=subject or names.DECODE_ANY.of(model=MODEL),
        stream_seq=7,
        attempts=5,
        error=AttemptsExhausted("handed to 5 workers without an end").failure(),
        payload=payload,
        died_unix_s=time.time(),
        **fields,
    )
    return (await bus.publish_durable(names.DEAD.of(stage=stage, model=MODEL), encode(letter))).seq


async def command(url: str, *arguments: str) -> tuple[int, str, str]:
    """Run a command to its end: its exit code, what it printed, and what it said besides."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pipeline.cli", *arguments, "--nats", url),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"COLUMNS": "250"},
    )
    async with asyncio.timeout(COMMAND_S_MAX):
        printed, said = await process.communicate()
    return process.returncode or 0, printed.decode(), said.decode()


@pytest.fixture
async def provisioned(bus: Bus) -> Bus:
    await bus.provision(streams.STREAMS, streams.CONSUMERS, streams.BUCKETS)
    return bus


async def work(bus: Bus) -> list[PreprocessedRequest]:
    return [
        decode(PreprocessedRequest, stored.payload)
        async for stored in bus.read(streams.WORK.name, names.DECODE_ANY.any())
    ]


async def test_letters_are_listed_shown_and_dropped(provisioned: Bus, nats_server):
    seq = await bury(provisioned, encode(REQUEST), request_id="r1")
    other = await bury(provisioned, b"nonsense", stage="preprocess", subject=names.REQUESTS.of(model=MODEL))
    _, listed, _ = await command(nats_server.url, "dead", "list")
    assert "r1" in listed and "attempts_exhausted" in listed and "handed to 5 workers" in listed

    _, printed, _ = await command(nats_server.url, "dead", "show", str(seq))
    shown = json.loads(printed)
    assert shown["error"]["code"] == "attempts_exhausted"
    assert shown["payload"]["request_id"] == "r1"
    assert shown["payload"]["token_ids"] == "3 token ids"
    _, printed, _ = await command(nats_server.url, "dead", "show", str(other))
    assert json.loads(printed)["payload"] == "nonsense"

    code, _, said = await command(nats_server.url, "dead", "drop", str(seq), str(other))
    assert (code, said.count("is dropped")) == (0, 2)
    assert (await command(nats_server.url, "dead", "list"))[1] == "no dead letters\n"
    code, _, said = await command(nats_server.url, "dead", "drop", str(seq))
    assert (code, f"there is no dead letter {seq}" in said) == (1, True)


async def test_a_retry_is_a_new_request_with_a_deadline_of_its_own(provisioned: Bus):
    """The old one has had its terminal frame, and its deadline is long over."""
    letters = DeadLetters(provisioned)
    seq = await bury(provisioned, encode(REQUEST), headers={headers.MSG_ID: "me.r1", headers.TRACEPARENT: "00-a-b-01"})
    before = time.time()
    client, request_id = await letters.retry(seq, deadline_s=100)
    assert (client, request_id) == ("me", f"r1-retry-{seq}")
    (again,) = await work(provisioned)
    assert again.deadline_unix_s and before + 100 <= again.deadline_unix_s <= time.time() + 100
    assert again == msgspec.structs.replace(REQUEST, request_id=request_id, deadline_unix_s=again.deadline_unix_s)
    assert await letters.all() == {}
    with pytest.raises(ConfigError, match=f"there is no dead letter {seq}"):
        await letters.retry(seq)


async def test_a_retry_that_was_broken_off_runs_once(provisioned: Bus, monkeypatch: pytest.MonkeyPatch):
    letters = DeadLetters(provisioned)
    seq = await bury(provisioned, encode(REQUEST))

    async def break_off(_: int) -> None:
        raise ConnectionResetError

    with monkeypatch.context() as patched:
        patched.setattr(letters, "drop", break_off)
        with pytest.raises(ConnectionResetError):
            await letters.retry(seq)
    assert seq in await letters.all()
    await letters.retry(seq)
    assert len(await work(provisioned)) == 1


@pytest.mark.timeout(120)
@pytest.mark.parametrize("stage", ["preprocess", "decode"])
async def test_a_retried_letter_is_answered(nats_server, provisioned: Bus, tmp_path: Path, stage: str):
    shipped = load_topology("simulated")
    groups = tuple(
        msgspec.structs.replace(group, count=1, simulated=SimulatedSettings(ttft_ms=1, itl_ms=1))
        for group in shipped.workers
        if group.role in ("preprocess", "decode")
    )
    asked = {"prompt": "hi", "max_tokens": 8, "ignore_eos": True, "stream": True, "request_id": "r1", "client": "me"}
    if stage == "preprocess":
        payload, subject = json.dumps(asked | {"deadline": 1_000}).encode(), names.REQUESTS.of(model=MODEL)
    else:
        payload, subject = encode(REQUEST), names.DECODE_ANY.of(model=MODEL)
    seq = await bury(provisioned, payload, stage=stage, subject=subject)
    own = msgspec.structs.replace(shipped.nats, url=nats_server.url)
    settings = msgspec.structs.replace(shipped, model_path=BUILTIN_MODEL, workers=groups, nats=own)
    async with running(settings, tmp_path) as local:
        await local.start()
        _, _, said = await command(nats_server.url, "dead", "retry", str(seq))
        assert f"sglang-nats resume r1-retry-{seq} --client me" in said
        code, printed, said = await command(nats_server.url, "resume", f"r1-retry-{seq}", "--client", "me")
    assert code == 0, said
    assert printed.count(" t") == 8
