"""`bench` against a simulated topology: the same load over NATS and through the gateway."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator

import msgspec
import pytest
import pytest_asyncio

from pipeline.bench import result
from pipeline.bus import Bus
from pipeline.config import GatewaySettings, GroupSettings, SimulatedSettings, load_topology
from pipeline.local import LocalTopology, running
from subjects import names

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]
READY_S_MAX = 60.0
RUN_S_MAX = 30.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def local(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalTopology]:
    shipped = load_topology("simulated")
    groups = [
        msgspec.structs.replace(group, count=1, simulated=SimulatedSettings(ttft_ms=20, itl_ms=5))
        for group in shipped.workers
        if group.role != "telemetry"
    ]
    groups.append(GroupSettings(role="gateway", gateway=GatewaySettings(port=0)))
    folder = tmp_path_factory.mktemp("bench")
    async with running(msgspec.structs.replace(shipped, workers=tuple(groups)), folder) as local:
        await local.start()
        async with asyncio.timeout(READY_S_MAX):
            await local.until_ready()
        yield local


async def bench(local: LocalTopology, *options: str) -> asyncio.subprocess.Process:
    command = (sys.executable, "-m", "pipeline.cli", "bench", "--nats", local.url, *options)
    return await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )


async def said_at_end(process: asyncio.subprocess.Process) -> str:
    said, _ = await asyncio.wait_for(process.communicate(), RUN_S_MAX)
    return said.decode()


async def test_the_same_load_over_nats_and_http(local: LocalTopology, tmp_path) -> None:
    load = ("--requests", "12", "--concurrency", "4", "--warmup", "2", "--output", "8", "--slo", "ttft=10000")
    found = []
    for name, options in (("nats", ()), ("http", ("--url", local.gateway_addresses()[0], "--chat"))):
        file = tmp_path / f"{name}.json"
        process = await bench(local, *load, *options, "--out", str(file))
        said = await said_at_end(process)
        assert process.returncode == 0, said
        assert "TTFT, ms, p50" in said and "CPU a request, ms: decode" in said
        found.append(result.read(file))
    for each in found:
        summary = each.summary
        assert (summary.ok, summary.failed, summary.output_tokens) == (12, 0, 96)
        assert summary.ttft_ms.min >= 20 and summary.itl_ms.max >= 4 and summary.e2e_ms.min >= summary.ttft_ms.min
        assert summary.goodput.share == 1 and summary.prompt_tokens > 12 * 100
        assert each.generator.in_flight_max == 4
        spent = {process.role: process.cpu_s for process in each.processes}
        assert spent["decode"] > 0 and spent["preprocess"] > 0
    assert (found[0].settings.target, found[1].settings.target) == ("nats", "http")


async def test_ctrl_c_leaves_the_figures_so_far(local: LocalTopology, tmp_path) -> None:
    file = tmp_path / "broken-off.json"
    process = await bench(
        local, "--rate", "50", "--fixed", "--requests", "100000", "--warmup", "0", "--output", "2", "--out", str(file)
    )
    await asyncio.wait_for(_answers_have_begun(local), RUN_S_MAX)
    process.send_signal(signal.SIGINT)
    said = await said_at_end(process)
    assert process.returncode == 0, said
    assert "ended early" in " ".join(said.split())
    assert 0 < result.read(file).summary.ok < 1_000


async def _answers_have_begun(local: LocalTopology) -> None:
    bus = await Bus.connect(local.url, name="test")
    heard: asyncio.Queue[str] = asyncio.Queue()
    await bus.subscribe(names.RESPONSES.any(), lambda received: heard.put_nowait(received.subject))
    for _ in range(40):
        await heard.get()
    await bus.close()
