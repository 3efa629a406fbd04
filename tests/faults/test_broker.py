"""What the broker may do to a topology: lose its store, run out of disk, cut off a slow reader, refuse a size."""

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest
from load import MODEL

from pipeline.bus import Bus
from pipeline.client import Client
from pipeline.config import BUILTIN_MODEL, GroupSettings, SimulatedSettings, TopologySettings
from pipeline.engine.simulated import expected_tokens
from pipeline.errors import BusUnavailable, OutputGone, Overloaded, PayloadTooLarge
from pipeline.local import LocalTopology, running
from pipeline.nats_server import NatsServer
from subjects import limits, names, streams
from subjects.codec import TokenIds, encode
from subjects.messages import PreprocessedRequest, StopConditions

pytestmark = pytest.mark.timeout(180)

PROMPT = (11, 12, 13)
ANSWER_S_MAX = 60.0
LARGE = encode(
    PreprocessedRequest(
        request_id="large",
        client="nobody",
        model="nobody-serves-it",
        token_ids=TokenIds(bytes(100_000)),
        stop=StopConditions(max_tokens=1),
    )
)
TOPOLOGY = TopologySettings(
    model=MODEL,
    model_path=BUILTIN_MODEL,
    start_s_max=60,
    workers=(
        GroupSettings(role="preprocess"),
        GroupSettings(role="decode", engine="simulated", count=2, simulated=SimulatedSettings(ttft_ms=1, itl_ms=10)),
    ),
)


@contextlib.asynccontextmanager
async def up(server: NatsServer, folder: Path) -> AsyncIterator[LocalTopology]:
    """The topology over a broker of its own, ready."""
    server.start()
    settings = msgspec.structs.replace(TOPOLOGY, nats=msgspec.structs.replace(TOPOLOGY.nats, url=server.url))
    try:
        async with running(settings, folder) as local:
            await local.start()
            await local.until_ready()
            yield local
    finally:
        server.kill()


async def answer(client: Client, count: int, at_token: int = 0, then=None, **fields) -> list[int]:
    """Ask for so many tokens, and do something when `at_token` of them have come."""
    tokens: list[int] = []
    frames = client.generate(model=MODEL, prompt=PROMPT, max_tokens=count, ignore_eos=True, **fields)
    async with asyncio.timeout(ANSWER_S_MAX):
        async for frame in frames:
            assert frame.error is None, frame.error
            before, tokens = len(tokens), tokens + frame.token_ids.tolist()
            if then is not None and before < at_token <= len(tokens):
                then()
    return tokens


def right(count: int) -> list[int]:
    return expected_tokens(TokenIds.of(PROMPT), count).tolist()


async def test_a_broker_that_lost_its_store_leaves_nobody_waiting(tmp_path: Path) -> None:
    """No queue knows of the request any more: it goes on, or its reader is told so at once."""
    server = NatsServer(tmp_path / "nats")

    def wipe() -> None:
        server.kill()
        shutil.rmtree(server.store / "jetstream")
        server.start()

    async with up(server, tmp_path), Client.connect(server.url) as client:
        with contextlib.suppress(OutputGone):
            assert await answer(client, 300, at_token=100, then=wipe) == right(300)
        assert await answer(client, 20) == right(20)
        await until_empty(server)


class SmallDisk(NatsServer):
    """Told that it has room, on a disk that has not: what a neighbour that fills the disk does."""

    def config(self) -> str:
        return super().config().replace(" }\n", ", max_file_store: 64GB }\n", 1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small disk takes the right to mount one")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


async def test_a_full_disk_refuses_and_loses_nothing_that_was_accepted(small_disk: Path, tmp_path: Path) -> None:
    server = SmallDisk(small_disk / "nats")
    ballast = small_disk / "ballast"
    async with up(server, tmp_path), Client.connect(server.url) as client:
        assert await answer(client, 20) == right(20)
        bus = await Bus.connect(server.url, name="filler")
        accepted = 0
        with pytest.raises((Overloaded, BusUnavailable)) as refused:
            ballast.write_bytes(bytes(os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize - 2**20))
            for accepted in range(64):
                await bus.publish_durable(
                    names.DECODE_ANY.of(model="nobody-serves-it"), LARGE, msg_id=f"m{accepted}", timeout_s=3.0
                )
        assert 0 < accepted < 64, "some were taken, then the disk was full"
        assert str(refused.value), "it says why"
        ballast.unlink()
        server.kill()
        server.start()
        await bus.close()
        assert await answer(client, 20) == right(20)


async def test_a_reader_that_does_not_read_is_cut_off_and_its_log_is_whole(tmp_path: Path) -> None:
    server = NatsServer(tmp_path / "nats", extra_config='max_pending: 2MB\nwrite_deadline: "500ms"\n')
    async with up(server, tmp_path), Client.connect(server.url, client="slow") as client:
        with socket.create_connection(("127.0.0.1", server.port)) as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.sendall(b"CONNECT {}\r\nSUB %s 1\r\nPING\r\n" % names.RESPONSES.any(client="slow").encode())
            requests = [answer(client, 400, request_id=f"r{n}", logprobs=20) for n in range(12)]
            assert await asyncio.gather(*requests) == [right(400)] * 12
            await until_logged(server, "Slow Consumer")
        tokens: list[int] = []
        async for frame in client.resume("r0"):
            tokens += frame.token_ids.tolist()
        assert tokens == right(400)


async def until_empty(server: NatsServer) -> None:
    """The last ack comes a moment after the last frame."""
    bus = await Bus.connect(server.url, name="look")
    async with asyncio.timeout(ANSWER_S_MAX):
        while (await bus.stream_state(streams.WORK.name)).messages:
            await bus.flush()
    await bus.close()


async def until_logged(server: NatsServer, words: str) -> None:
    """The broker's own word is in its log file."""
    deadline_s = asyncio.get_running_loop().time() + 20.0
    while words not in server.log_path.read_text():
        assert asyncio.get_running_loop().time() < deadline_s, server.log_path.read_text()[-2000:]
        await asyncio.sleep(0.05)


async def test_too_large_a_request_is_an_error_that_says_the_limit(tmp_path: Path) -> None:
    async with up(NatsServer(tmp_path / "nats"), tmp_path) as local, Client.connect(local.url) as client:
        with pytest.raises(PayloadTooLarge) as refused:
            await answer_to(client, "x" * 600_000)
        assert refused.value.limit == limits.PAYLOAD_BYTES_MAX
        assert refused.value.size and refused.value.size > limits.PAYLOAD_BYTES_MAX
        assert await answer(client, 20) == right(20)


async def answer_to(client: Client, prompt: str) -> None:
    async for _ in client.generate(model=MODEL, prompt=prompt):
        pass
