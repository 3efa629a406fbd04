"""The gateway's application without a pipeline behind it: the names of models, and a broker that is away."""

import asyncio
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace

import httpx
import pytest_asyncio

from pipeline.bus import Bus
from pipeline.config import GatewaySettings
from pipeline.health import Facts, assess
from pipeline.http.accounts import Accounts
from pipeline.http.app import Gateway, make_app
from pipeline.presence import Announcer, Presence
from subjects import streams
from subjects.messages import Heartbeat, ModelCard

WAIT_S = 10.0
NAME = "Qwen/Qwen3-0.6B"
BEAT = Heartbeat(worker="w", role="decode", incarnation="i", model=NAME, ready=True)
CARD = ModelCard(
    worker="w",
    role="decode",
    model="Qwen-Qwen3-0-6B",
    served_name=NAME,
    incarnation="i",
    model_path="/m",
    engine="simulated",
    context_len_tokens=8,
    max_running_requests=1,
    max_prefill_tokens=8,
    kv_blocks=1,
    kv_block_tokens=1,
)


@pytest_asyncio.fixture
async def gateway(bus: Bus) -> AsyncIterator[SimpleNamespace]:
    await bus.provision(streams.STREAMS, streams.CONSUMERS, streams.BUCKETS)
    presence = Presence(bus)
    await presence.start()
    settings = GatewaySettings()

    def health():
        lost_s = 0.0 if bus.connected else 1.0
        return assess(Facts(started=True, broker_lost_s=lost_s))

    app = make_app(Gateway(bus, presence, Accounts(bus, None, 0), settings, health, lambda: False), ())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway", timeout=30) as http:
        yield SimpleNamespace(http=http, bus=bus, presence=presence)
    await presence.close()


async def test_a_model_has_the_name_that_its_operator_gave_it(gateway: SimpleNamespace):
    announcer = Announcer(gateway.bus, "decode", "w", CARD.model, "i", lambda: BEAT)
    await announcer.start()
    await announcer.publish_card(CARD)
    assert await gateway.presence.wait_ready(NAME, timeout_s=WAIT_S)
    listed = (await gateway.http.get("/v1/models")).json()["data"]
    assert [model["id"] for model in listed] == [NAME]
    for name in (NAME, CARD.model):
        found = await gateway.http.get(f"/v1/models/{name}")
        assert (found.status_code, found.json()["id"]) == (200, NAME)
    assert (await gateway.http.get("/v1/models/Qwen3-0.6B")).status_code == 404

    asked = {"model": NAME, "prompt": "hi", "request_id": "named", "deadline": time.time() + 0.1}
    await gateway.http.post(
        "/v1/completions", json=asked, timeout=WAIT_S
    )  # nobody works here; what counts is where it waits
    waiting = [stored.subject async for stored in gateway.bus.read(streams.REQUESTS.name, "sglang.requests.>")]
    assert waiting == [f"sglang.requests.{CARD.model}"]


async def test_a_broker_that_is_away_is_a_503(gateway: SimpleNamespace, nats_server):
    nats_server.kill()
    async with asyncio.timeout(WAIT_S):
        while gateway.bus.connected:  # noqa: ASYNC110
            await asyncio.sleep(0)
    for stream in (False, True):
        began_s = time.monotonic()
        body = {"model": "m", "prompt": "hi", "stream": stream, "deadline": time.time() + 1}
        answer = await gateway.http.post("/v1/completions", json=body)
        assert answer.status_code == 503, answer.text
        assert answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["code"] == "bus_unavailable"
        assert time.monotonic() - began_s < 3, "no longer than the request may take"
    assert (await gateway.http.get("/v1/models")).status_code == 200
    assert (await gateway.http.get("/ready")).status_code == 503
