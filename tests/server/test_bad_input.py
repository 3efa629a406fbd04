"""Bad input published by hand to real workers: each ends in one terminal error frame, or in an error at publishing."""

import asyncio
import json
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest

from pipeline.bus import Bus, Received
from pipeline.config import load_topology
from pipeline.errors import PayloadTooLarge
from pipeline.local import running
from subjects import names, streams
from subjects.codec import Format, decode, format_of
from subjects.limits import PAYLOAD_BYTES_MAX, STOP_STRINGS_MAX
from subjects.messages import Frame

READY_S_MAX = 60.0
ANSWER_S_MAX = 10.0
CHAT = {"messages": [{"role": "user", "content": "hi"}]}
NEAR_LIMIT = "a " * (PAYLOAD_BYTES_MAX // 2 - 100)

CASES: dict[str, tuple[str, bytes, str, str | None, str]] = {
    # name: (model, payload, code, field, a word that the message has)
    "not JSON": ("smollm2", b"hello", "invalid_request", "payload", "JSON"),
    "cut JSON": ("smollm2", b'{"prompt": "hi"', "invalid_request", "payload", "JSON"),
    "empty": ("smollm2", b"", "invalid_request", "payload", "0 bytes"),
    "wrong type": ("smollm2", b'{"prompt": "hi", "max_tokens": "many"}', "invalid_request", "max_tokens", "int"),
    "unknown field": ("smollm2", b'{"prompt": "hi", "temprature": 1}', "invalid_request", "temprature", "temperature"),
    "unsupported field": (
        "smollm2", json.dumps(CHAT | {"functions": []}).encode(), "invalid_request", "functions", "tools",
    ),
    "empty messages": ("smollm2", b'{"messages": []}', "invalid_request", "messages", "messages"),
    "prompt over the context": (
        "smollm2", json.dumps({"prompt": NEAR_LIMIT}).encode(), "prompt_too_long", "prompt", "8192",
    ),
    "unknown model": ("nobody", json.dumps(CHAT).encode(), "unknown_model", "model", "smollm2"),
    "max_tokens 0": ("smollm2", json.dumps(CHAT | {"max_tokens": 0}).encode(), "invalid_request", "max_tokens", "1"),
    "NaN temperature": (
        "smollm2", msgpack.packb(CHAT | {"temperature": float("nan")}), "invalid_request", "temperature", "nan",
    ),
    "many stop strings": (
        "smollm2",
        json.dumps(CHAT | {"stop": ["x"] * 100_000}).encode(),
        "invalid_request", "stop", str(STOP_STRINGS_MAX),
    ),
}  # fmt: skip


async def answers(bus: Bus, model: str, payload: bytes) -> list[tuple[Frame, Format]]:
    """Every frame that a published payload is answered with, up to the terminal one."""
    heard: asyncio.Queue[Received] = asyncio.Queue()
    subscription = await bus.subscribe(names.RESPONSES.any(), heard.put_nowait)
    await bus.flush()
    await bus.publish_durable(names.REQUESTS.of(model=model), payload)
    frames: list[tuple[Frame, Format]] = []
    async with asyncio.timeout(ANSWER_S_MAX):
        while not (frames and frames[-1][0].finish_reason):
            received = await heard.get()
            frames.append((decode(Frame, received.payload), format_of(received.payload)))
    await bus.flush()
    await subscription.unsubscribe()
    assert heard.empty()
    return frames


def complaint(name: str, frames: list[tuple[Frame, Format]]) -> str | None:
    """What is wrong with a case's answer."""
    _, payload, code, field, word = CASES[name]
    if len(frames) != 1:
        return f"{name}: {len(frames)} frames"
    frame, form = frames[0]
    error = frame.error
    if error is None or (error.code, error.field) != (code, field) or word not in error.message:
        return f"{name}: {error}"
    if form is not (Format.MSGPACK if payload[:1] == b"\x82" else Format.JSON):
        return f"{name}: answered as {form}"
    return None


@pytest.mark.timeout(180)
async def test_every_bad_input_ends_in_one_error_that_names_it(tmp_path: Path):
    shipped = load_topology("simulated")
    single = tuple(
        msgspec.structs.replace(group, count=1) for group in shipped.workers if group.role in ("preprocess", "decode")
    )
    async with running(msgspec.structs.replace(shipped, workers=single), tmp_path) as local:
        await local.start()
        async with asyncio.timeout(READY_S_MAX):
            await local.until_ready()
        bus = await Bus.connect(local.url, name="test")
        complaints: list[Any] = [
            complaint(name, await answers(bus, model, payload)) for name, (model, payload, *_) in CASES.items()
        ]
        assert "\n".join(one for one in complaints if one) == ""

        for oversize in (b'{"prompt": "' + b"a" * 2_000_000 + b'"}', json.dumps({"stop": ["x"] * 10**6}).encode()):
            with pytest.raises(PayloadTooLarge) as too_large:
                await bus.publish_durable(names.REQUESTS.of(model="smollm2"), oversize)
            assert too_large.value.size >= len(oversize)
            assert too_large.value.limit
        for stream in (streams.REQUESTS, streams.WORK):
            assert (await bus.stream_state(stream.name)).messages == 0
        await bus.close()
