"""How long answers can be read again is one setting of the topology, or of every worker."""

import asyncio
import os
import subprocess
import sys

import msgspec
import pytest

from pipeline.bus import Bus
from pipeline.config import load_topology
from pipeline.errors import ProvisionError
from subjects import streams
from subjects.limits import DEDUPE_S, RESPONSES_KEPT_S_MIN


async def kept_ns(bus: Bus) -> tuple[int, int]:
    found = (await bus.api(f"STREAM.INFO.{streams.RESPONSES.name}"))["config"]
    return found["max_age"], found["duplicate_window"]


@pytest.mark.parametrize(
    ("setting", "kept_s", "known_s"),
    [(0, RESPONSES_KEPT_S_MIN, RESPONSES_KEPT_S_MIN), (60, 60, 60), (86_400, 86_400, DEDUPE_S)],
)
async def test_the_broker_keeps_frames_for_as_long_as_the_setting_says(bus: Bus, setting, kept_s, known_s):
    """A second terminal frame is recognized for as long as the first is kept, at most."""
    topology = msgspec.structs.replace(load_topology("simulated"), responses_kept_s=setting)
    (worker, _), *_ = topology.settings(bus.url)
    await bus.provision(streams.with_retention(worker.responses_kept_s), [], [])
    assert await kept_ns(bus) == (kept_s * 1e9, known_s * 1e9)


async def test_workers_of_different_minds_are_refused(bus: Bus):
    await bus.provision(streams.with_retention(600), [], [])
    with pytest.raises(ProvisionError, match="stream RESPONSES differs from its declaration: max_age is 600"):
        await bus.provision(streams.with_retention(0), [], [])


async def test_a_worker_takes_it_from_its_environment(nats_server, bus: Bus):
    await bus.provision(streams.with_retention(600), [], [])
    told = os.environ | {"SGLANG_NATS_RESPONSES_KEPT_S": "0", "SGLANG_NATS_NATS": nats_server.url}
    command = [sys.executable, "-m", "pipeline.cli", "telemetry"]
    said = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60, env=told)
    assert said.returncode == 1
    assert "stream RESPONSES differs from its declaration" in said.stderr
