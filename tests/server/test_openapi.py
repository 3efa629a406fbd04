"""schemathesis against a gateway over a real broker: no answer is a 500, and every answer is as the document says."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
from strict_document import strict

from pipeline.config import (
    BUILTIN_MODEL,
    GatewaySettings,
    GroupSettings,
    RoutingSettings,
    SimulatedSettings,
    TopologySettings,
)
from pipeline.local import running

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(900)]
HERE = Path(__file__).parent
KEY = "sk-test"
READY_S_MAX, ANSWER_S_MAX, RUN_S_MAX = 60.0, 30.0, 840.0
STREAM_WITHOUT_END = "/console/api/state"
TALK, VECTORS = "talk", "vectors"  # as the hooks have them


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def http(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[httpx.AsyncClient]:
    """A gateway that needs a key and has every route, over engines that say little at once."""
    folder = tmp_path_factory.mktemp("openapi")
    keys = folder / "keys.toml"
    keys.write_text(f'team = "{KEY}"\n')
    simulated = SimulatedSettings(
        ttft_ms=0, itl_ms=0, eos_after_tokens=4, context_len_tokens=256, embedding_dimensions=8
    )
    shared = {"model_path": BUILTIN_MODEL, "engine": "simulated", "simulated": simulated}
    gateway = GatewaySettings(port=0, keys_file=str(keys), console=True, console_clients=("team",), request_s=10.0)
    models = {TALK: BUILTIN_MODEL, VECTORS: BUILTIN_MODEL}
    topology = TopologySettings(
        workers=(
            GroupSettings(role="preprocess", models=models, routing=RoutingSettings(policy="any")),
            GroupSettings(role="decode", model=TALK, **shared),
            GroupSettings(role="embed", model=VECTORS, **shared),
            GroupSettings(role="gateway", gateway=gateway),
        )
    )
    async with running(topology, folder) as local:
        await local.start()
        async with asyncio.timeout(READY_S_MAX):
            await local.until_ready()
        headers = {"Authorization": f"Bearer {KEY}"}
        url = local.gateway_addresses()[0]
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=ANSWER_S_MAX) as client:
            yield client


async def schemathesis(http: httpx.AsyncClient, folder: Path, *arguments: str) -> None:
    """Run it, with what it says shown where it finds something."""
    document = folder / "openapi.json"
    document.write_text(json.dumps(strict((await http.get("/openapi.json")).json())))
    call = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(HERE / "schemathesis.toml"), "run"]
    asked = [str(document), "--url", str(http.base_url), "-H", f"Authorization: Bearer {KEY}", "--seed", "1"]
    running = await asyncio.create_subprocess_exec(
        *call,
        *asked,
        *("--exclude-path", STREAM_WITHOUT_END),
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (HERE.parents[1], *filter(None, sys.path))))},
        cwd=folder,
    )
    try:
        async with asyncio.timeout(RUN_S_MAX):
            said, _ = await running.communicate()
    finally:
        if running.returncode is None:
            running.kill()
    assert running.returncode == 0, said.decode()[-20_000:]


async def test_each_field_at_its_limits(http: httpx.AsyncClient, tmp_path: Path):
    """The same cases each time. Chats and responses have the completions' fields for the most part."""
    left_out = ("--exclude-path", "/v1/chat/completions", "--exclude-path", "/v1/responses", "--exclude-tag", "console")
    await schemathesis(http, tmp_path, "--phases", "coverage", *left_out)


@pytest.mark.full
async def test_whatever_is_sent(http: httpx.AsyncClient, tmp_path: Path):
    await schemathesis(http, tmp_path, "--phases", "coverage,fuzzing,stateful", "-n", "200", "--max-time", "600")
