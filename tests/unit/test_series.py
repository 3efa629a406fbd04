"""How the series of an engine's processes reach the worker. What SGLang counts: tests/engine/one_process."""

import asyncio
import functools
import multiprocessing
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import prometheus_client
import pytest_asyncio

from pipeline import metrics
from pipeline.engine.sglang import series
from pipeline.engine.sglang.series import Inlet

DEADLINE_S = 20.0


def count_and_send(number: int, outlet: socket.socket) -> None:
    """A process that counts as SGLang's do, in the default registry."""
    gauge = prometheus_client.Gauge("sglang:number", "A number.", ("rank",), multiprocess_mode="mostrecent")
    gauge.labels(rank=str(number)).set(number)
    prometheus_client.Gauge("sglang:never_set", "Labels that no value was given for.", ("rank",))
    prometheus_client.Gauge("other:number", "Somebody else's.").set(1)
    metrics.HANDSHAKE_SECONDS.observe(0.5)
    series.send_from(outlet, f"process {number}")
    time.sleep(60)


@pytest_asyncio.fixture
async def inlet() -> AsyncIterator[Inlet]:
    made = Inlet()
    made.listen()
    yield made
    made.close()


async def until_heard(inlet: Inlet, processes: set[str]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while set(inlet.current()) != processes:  # noqa: ASYNC110
            await asyncio.sleep(0.05)  # the processes send once a second


async def test_several_processes_share_the_socket_and_a_dead_one_is_forgotten(inlet: Inlet, monkeypatch) -> None:
    spawn = multiprocessing.get_context("spawn")
    monkeypatch.syspath_prepend(Path(__file__).parents[2])  # the children import this file by its full name
    entry = functools.partial(count_and_send, outlet=inlet.outlet)  # pickled for the child, as SGLang does
    children = [spawn.Process(target=entry, args=(number,), daemon=True) for number in (1, 2)]
    for child in children:
        child.start()
    try:
        await until_heard(inlet, {"process 1", "process 2", "tokenizer"})
        families = {family.name: family for family in inlet.current()["process 2"]}
        assert set(families) == {"sglang:number", "sglang_nats_handshake_seconds"}
        (sample,) = families["sglang:number"].samples
        assert (sample.name, sample.labels, sample.value) == ("sglang:number", {"rank": "2"}, 2.0)
        children[0].kill()
        monkeypatch.setattr(series, "SILENT_S_MAX", 2.0)
        await until_heard(inlet, {"process 2", "tokenizer"})
    finally:
        for child in children:
            child.kill()
            child.join()


async def test_what_is_unreadable_or_too_much_is_left_out(inlet: Inlet, monkeypatch, caplog) -> None:
    monkeypatch.setattr(series, "PROCESSES_MAX", 2)
    inlet.outlet.send(b"\xc1")
    for number in range(4):
        inlet.outlet.send(series.encode(series._Figures(process=str(number), families=())))
    await until_heard(inlet, {"0", "1", "tokenizer"})
    assert "unreadable" in caplog.text


async def test_two_engines_in_one_process_have_each_their_own_series(inlet: Inlet) -> None:
    """The registry refuses a name that stands, and a later engine's tokenizer has the same names."""
    series.take_out()  # of an engine of another test that did not start
    other = Inlet()
    for asked, engine in ((1, inlet), (2, other)):
        prometheus_client.Counter("sglang:asked_total", "Asked.").inc(asked)
        engine.adopt()
    for asked, engine in ((1, inlet), (2, other)):
        (family,) = [family for family in engine.current()["tokenizer"] if family.name.startswith(series.PREFIX)]
        assert [sample.value for sample in family.samples] == [asked]
    other.close()
