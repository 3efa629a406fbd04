"""The web console over a topology of real processes, without a browser: a killed worker, and what others may not do."""

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import pytest
import pytest_asyncio

from pipeline.bus import Bus
from pipeline.config import GatewaySettings, GroupSettings, SimulatedSettings, load_topology
from pipeline.errors import AttemptsExhausted
from pipeline.http.overview import VIEWERS_MAX
from pipeline.local import LocalTopology, running
from subjects import names
from subjects.codec import encode
from subjects.messages import DeadLetter

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]
MODEL = "smollm2"
READY_S_MAX = 60.0
SEEN_S_MAX = 20.0
RED_S_MAX = 5.0
HOSTILE = "</script><img src=x onerror=alert(1)>"
API = "/console/api"


class Consoles:
    """A topology whose gateway has a console and asks for no key."""

    def __init__(self, local: LocalTopology) -> None:
        self.local = local
        (self.open,) = local.gateway_addresses()
        limits = httpx.Limits(max_connections=2 * VIEWERS_MAX)
        self.http = httpx.AsyncClient(timeout=SEEN_S_MAX, limits=limits)

    async def get(self, path: str, **headers: str) -> httpx.Response:
        return await self.http.get(self.open + path, headers=headers)

    async def post(self, path: str, **headers: str) -> httpx.Response:
        return await self.http.post(
            self.open + path, content="{}", headers={"Content-Type": "application/json"} | headers
        )

    async def states(self) -> AsyncIterator[dict[str, Any]]:
        async with self.http.stream("GET", f"{self.open}{API}/state") as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            async for line in answer.aiter_lines():
                if line.startswith("data: "):
                    yield json.loads(line.removeprefix("data: "))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def consoles(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Consoles]:
    folder = tmp_path_factory.mktemp("console")
    shipped = load_topology("simulated")
    slow = SimulatedSettings(ttft_ms=5, itl_ms=20, max_running_requests=8)
    groups = [
        msgspec.structs.replace(group, count=1)
        if group.role == "preprocess"
        else msgspec.structs.replace(group, count=2, simulated=slow)
        for group in shipped.workers
        if group.role in ("preprocess", "decode")
    ]
    groups.append(GroupSettings(role="gateway", gateway=GatewaySettings(port=0, console=True)))
    async with running(msgspec.structs.replace(shipped, workers=tuple(groups)), folder) as local:
        await local.start()
        async with asyncio.timeout(READY_S_MAX):
            await local.until_ready()
        consoles = Consoles(local)
        yield consoles
        await consoles.http.aclose()


async def test_a_letter_that_cannot_be_is_not_found_at_once(consoles: Consoles):
    async with asyncio.timeout(2.0):  # a number that no letter has was looked for until the broker's time was up
        for seq in ("0", "-1", "99999999", str(2**63), "9" * 5_000, "x"):
            for answer in (await consoles.get(f"{API}/dead/{seq}"), await consoles.post(f"{API}/dead/{seq}/drop")):
                assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found"), seq[:20]


async def test_pages_of_other_sites_may_not_use_it(consoles: Consoles):
    seq = await bury(consoles, "cross")
    evil = ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"})
    rebound = {"Host": "evil.example"}
    for headers in (*evil, rebound):
        for work in ("retry", "drop"):
            assert (await consoles.post(f"{API}/dead/{seq}/{work}", **headers)).status_code == 403, headers
        assert (await consoles.get(f"{API}/dead", **headers)).status_code == 403, headers
    as_form = {"Content-Type": "application/x-www-form-urlencoded"}
    assert (await consoles.post(f"{API}/dead/{seq}/drop", **as_form)).status_code == 400
    assert (await consoles.get(f"{API}/dead/{seq}/drop")).status_code == 405
    assert (await consoles.get(f"{API}/dead/{seq}")).status_code == 200, "nothing of that has dropped it"
    assert (await consoles.post(f"{API}/dead/{seq}/drop", Origin=consoles.open)).status_code == 200


async def test_a_killed_worker_is_gone_within_5_s_and_its_request_goes_on(consoles: Consoles):
    fields = {"model": MODEL, "prompt": [20, 11, 12], "max_tokens": 200, "ignore_eos": True, "request_id": "moved"}
    fields |= {"stream": True, "stream_options": {"include_usage": True}}
    answer = asyncio.create_task(consoles.http.post(f"{consoles.open}/v1/completions", json=fields))
    killed: dict[str, float] = {}
    async with asyncio.timeout(SEEN_S_MAX), contextlib.aclosing(consoles.states()) as states:
        async for now in states:
            boxes = {worker["worker"]: worker for worker in now["workers"]}
            busy = [name for name, box in boxes.items() if box["role"] == "decode" and box["in_flight"]]
            if busy and not killed:
                (child,) = (child for child in consoles.local.children if child.name == busy[0])
                assert child.process
                os.kill(child.process.pid, signal.SIGKILL)
                killed[busy[0]] = time.monotonic()
            (name,) = killed or ("",)
            if killed and (boxes[name]["state"] == "gone" or boxes[name]["died_unix_s"]):
                break
    assert time.monotonic() - killed[name] < RED_S_MAX
    *_, last, done, _ = (await answer).text.split("\n\n")
    assert done == "data: [DONE]" and '"completion_tokens":200' in last
    told = (await consoles.get(f"{API}/trace/moved")).json()
    decoding = [phase for phase in told["phases"] if phase["kind"] == "decode"]
    assert len(decoding) == 2 and decoding[0]["where"] == name  # its successor may be itself, started anew
    assert "taken over" in {event["what"] for event in told["events"]}


async def test_so_many_may_look_on_and_no_more(consoles: Consoles):
    async with contextlib.AsyncExitStack() as viewers, asyncio.timeout(SEEN_S_MAX):
        for _ in range(VIEWERS_MAX):
            answer = await viewers.enter_async_context(consoles.http.stream("GET", f"{consoles.open}{API}/state"))
            assert answer.status_code == 200
        refused = await consoles.get(f"{API}/state")
        assert (refused.status_code, "retry-after" in refused.headers) == (429, True)
    async with asyncio.timeout(SEEN_S_MAX), contextlib.aclosing(consoles.states()) as states:
        assert {worker["role"] for worker in (await anext(states))["workers"]} >= {"gateway", "decode"}


async def bury(consoles: Consoles, request_id: str) -> int:
    """Put a letter into DEAD; its number."""
    fields = {"prompt": HOSTILE, "max_tokens": 2, "request_id": request_id, "client": "http"}
    letter = DeadLetter(
        stage="preprocess",
        subject=names.REQUESTS.of(model=MODEL),
        stream_seq=1,
        attempts=5,
        error=AttemptsExhausted(HOSTILE).failure(),
        payload=json.dumps(fields).encode(),
        died_unix_s=time.time(),
        request_id=request_id,
    )
    bus = await Bus.connect(consoles.local.url, name="test")
    try:
        return (await bus.publish_durable(names.DEAD.of(stage="preprocess", model=MODEL), encode(letter))).seq
    finally:
        await bus.close()
