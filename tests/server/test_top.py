"""`top` over a real broker: workers, queues and rates as they are published, nothing by HTTP."""

import asyncio
import io
import os
import pty
import re
import sys
import termios
import time

import pytest
from rich.console import Console

from pipeline import metrics
from pipeline.bus import Bus
from pipeline.top import Board, watching
from pipeline.top_screen import NARROW_CHARS, View, render
from subjects import names, streams
from subjects.codec import TokenIds, encode
from subjects.messages import (
    DeadLetter,
    Failure,
    Heartbeat,
    Load,
    MetricsSnapshot,
    ModelCard,
    PreprocessedRequest,
    StopConditions,
)

MODEL = "m"
WAIT_S = 20.0


class Pipeline:
    """What workers and clients publish, by hand."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def begin(self) -> None:
        await self._bus.provision(streams.STREAMS, streams.CONSUMERS, streams.BUCKETS)
        await self._bus.ensure_consumer(streams.decode_any(MODEL))
        bucket = await self._bus.bucket(streams.CARDS)
        card = ModelCard(
            worker="d0", role="decode", model=MODEL, incarnation="i", model_path="p", engine="simulated",
            context_len_tokens=10, max_running_requests=4, max_prefill_tokens=10, kv_blocks=10, kv_block_tokens=1,
        )  # fmt: skip
        await bucket.put(names.card_key("decode", MODEL, "d0"), encode(card))

    async def beat(self, worker: str, **fields) -> None:
        beat = Heartbeat(worker=worker, role="decode", incarnation="i", model=MODEL, slots=4, **fields)
        await self._bus.publish(names.HEARTBEAT.of(role="decode", worker=worker), encode(beat))

    async def tell_metrics(self, worker: str) -> None:
        snapshot = MetricsSnapshot(worker=worker, role="decode", model=MODEL, families=metrics.snapshot())
        await self._bus.publish(names.METRICS.of(role="decode", worker=worker), encode(snapshot))

    async def ask(self) -> None:
        await self._bus.publish_durable(names.REQUESTS.of(model=MODEL), b"{}")
        work = PreprocessedRequest(
            request_id="r", client="c", model=MODEL, token_ids=TokenIds.of([1]), stop=StopConditions(max_tokens=1)
        )
        for _ in range(3):
            await self._bus.publish_durable(names.DECODE_ANY.of(model=MODEL), encode(work))
        failure = Failure(code="c", message="m", status=500)
        letter = DeadLetter(stage="decode", subject="s", stream_seq=1, attempts=1, error=failure, payload=b"")
        await self._bus.publish_durable(names.DEAD.of(stage="decode", model=MODEL), encode(letter))


@pytest.fixture
async def pipeline(bus: Bus) -> Pipeline:
    made = Pipeline(bus)
    await made.begin()
    return made


async def until(board: Board, holds, pipeline: Pipeline, worker: str = "d0") -> View:
    """The first view of which it holds, while a worker goes on to beat."""
    async with asyncio.timeout(WAIT_S):
        while not holds(view := await board.view()):
            await pipeline.beat(worker, ready=True, in_flight=2, load=Load(running=2, kv_tokens_used=5, kv_tokens=10))
            await pipeline.tell_metrics(worker)
            await asyncio.sleep(0.05)
    return view


def text_of(view: View, height: int | None = None) -> list[str]:
    console = Console(width=NARROW_CHARS, record=True, file=io.StringIO())
    console.print(render(view, height=height))
    return console.export_text().splitlines()


async def test_a_view_has_workers_queues_rates_and_troubles(pipeline, nats_server, bus):
    await pipeline.ask()
    await bus.api(f"CONSUMER.PAUSE.WORK.{streams.decode_any(MODEL).name}", {"pause_until": "2100-01-01T00:00:00Z"})
    async with watching(nats_server.url) as board:
        await until(board, lambda view: view.models[0].speed.tokens_per_s is not None, pipeline)
        metrics.TTFT_SECONDS.observe(0.15)
        metrics.ERRORS.labels("engine_failed").inc(2)
        await pipeline.beat("d1", draining=True)
        await pipeline.beat("d2", unhealthy=("engine_wedged",))
        await pipeline.beat("d3", paused=True, unhealthy=("paused",))
        view = await until(
            board, lambda view: view.errors and view.models[0].speed.tokens_per_s and len(view.workers) == 4, pipeline
        )
    (model,) = view.models
    assert (model.asked, model.decode_waiting, model.decode_in_work, model.prefill_waiting) == (1, 3, 0, None)
    assert view.dead_letters == 1
    lines = text_of(view)
    assert max(map(len, lines)) <= NARROW_CHARS
    found = "\n".join(lines)
    assert re.search(r"d0 +decode +m +ready +2/4 +2 +0 +▇+ +50%", found)
    assert re.search(r"d1 +decode +m +draining", found)
    assert re.search(r"d2 +decode +m +unhealthy", found)
    assert re.search(r"d3 +decode +m +paused", found)
    assert "d2: engine_wedged" in lines
    assert "m: paused until it is unpaused" in lines
    assert not any(line.startswith("d3: ") for line in lines)
    assert re.search(r"engine_failed 2 .*Dead letters 1", found)


async def test_a_worker_that_fell_silent_and_a_broker_that_is_gone_are_said(pipeline, nats_server):
    async with watching(nats_server.url) as board:
        await pipeline.beat("d0", ready=True)
        await until(board, lambda view: any(state.down for state in view.workers), pipeline, "d1")
        nats_server.kill()
        view = await board.view()
    assert "silent" in "\n".join(text_of(view))
    assert "the broker does not answer" in text_of(view)[-1]


async def test_where_there_is_little_room_the_workers_that_need_a_look_are_shown(pipeline, nats_server):
    async with watching(nats_server.url) as board:
        for number in range(30):
            await pipeline.beat(f"d{number:02}", ready=number != 29)
        view = await until(board, lambda view: len(view.workers) >= 31, pipeline)
    lines = text_of(view, height=24)
    assert len(lines) <= 24
    assert "d29" in "".join(lines)
    assert "more workers" in "".join(lines)


async def test_on_a_terminal_q_ends_it_and_the_terminal_is_as_before(pipeline, nats_server):
    """The command itself, on a pseudo-terminal."""
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pipeline.cli", "top", "--nats", nats_server.url),
        stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
    )  # fmt: skip
    seen, began_s = b"", time.monotonic()
    loop = asyncio.get_running_loop()
    grew: asyncio.Queue[bytes] = asyncio.Queue()
    loop.add_reader(ours, lambda: grew.put_nowait(os.read(ours, 65536)))
    try:
        async with asyncio.timeout(WAIT_S):
            while b"q quits" not in seen:
                await pipeline.beat("d0", ready=True)
                seen += await grew.get()
            assert termios.tcgetattr(theirs) != before, "keys are read as they are pressed"
            os.write(ours, b"xq")
            while b"\x1b[?1049l" not in seen:  # the alternate screen is left
                seen += await grew.get()
            assert await process.wait() == 0
        assert termios.tcgetattr(theirs) == before
    finally:
        loop.remove_reader(ours)
        if process.returncode is None:
            process.kill()
            await process.wait()
        os.close(ours)
        os.close(theirs)
    assert time.monotonic() - began_s < WAIT_S


async def test_once_prints_a_plain_frame(pipeline, nats_server):
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pipeline.cli", "top", "--once", "--nats", nats_server.url),
        stdout=asyncio.subprocess.PIPE,
        env=os.environ | {"COLUMNS": str(NARROW_CHARS)},
    )
    printed, _ = await asyncio.wait_for(process.communicate(), WAIT_S)
    assert process.returncode == 0
    assert b"\x1b" not in printed
    lines = printed.decode().splitlines()
    assert lines[0].startswith("sglang-nats top")
    assert lines[-1].endswith("Dead letters 0")
