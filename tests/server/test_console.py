"""The console's own API, over a real broker: who may ask, the state that viewers share, timelines, dead letters."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.datastructures import Headers

from pipeline import metrics
from pipeline.bus import Bus
from pipeline.config import GatewaySettings
from pipeline.errors import AttemptsExhausted, ConfigError, NotPermitted
from pipeline.http import overview
from pipeline.http.accounts import Accounts, load_keys
from pipeline.http.app import make_app
from pipeline.http.console import console_routes, refuse_other_sites, refuse_rebound_names
from pipeline.http.server import listen, serving, url_of
from pipeline.presence import Presence
from subjects import names, streams
from subjects.codec import TokenIds, encode
from subjects.limits import PRESENCE_S
from subjects.messages import DeadLetter, Frame, Heartbeat, MetricsSnapshot, ModelCard, Request, Timing, Usage

MODEL = "m"
ANSWER_S_MAX = 10.0
JSON = {"Content-Type": "application/json"}


class Nothing:
    """A gateway that answers nothing but the console."""

    def __getattr__(self, _: str) -> Any:
        return lambda _: None


class Served:
    """The console of one gateway, and a client of it."""

    def __init__(self, bus: Bus, url: str) -> None:
        self.bus, self.url = bus, url
        self.http = httpx.AsyncClient(base_url=f"{url}/console", timeout=ANSWER_S_MAX)
        self.draining = False

    @contextlib.asynccontextmanager
    async def states(self) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
        """What a viewer is told."""
        async with self.http.stream("GET", "/api/state") as answer:
            assert answer.status_code == 200
            lines = answer.aiter_lines()
            yield (json.loads(line.removeprefix("data: ")) async for line in lines if line)

    async def beat(self, worker: str, role: str = "decode", incarnation: str = "i", **fields: Any) -> None:
        model = MODEL if role == "decode" else None
        beat = Heartbeat(worker=worker, role=role, incarnation=incarnation, model=model, slots=4, **fields)
        await self.bus.publish(names.HEARTBEAT.of(role=role, worker=worker), encode(beat))


@contextlib.asynccontextmanager
async def console(bus: Bus, **settings: Any) -> AsyncIterator[Served]:
    await bus.provision(streams.STREAMS, streams.CONSUMERS, streams.BUCKETS)
    configured = GatewaySettings(console=True, **settings)
    presence = Presence(bus)
    await presence.start()
    accounts = Accounts(bus, load_keys(configured), 0)
    listener = listen("127.0.0.1", 0)
    served = Served(bus, url_of(listener))
    try:
        async with console_routes(bus, presence, accounts, configured, lambda: served.draining) as routes:
            app: Starlette = make_app(Nothing(), (), routes)
            async with serving(app, listener):
                yield served
                served.draining = True
                await served.http.aclose()
    finally:
        await presence.close()


async def until(states: AsyncIterator[dict[str, Any]], holds: Any, deadline_s: float = ANSWER_S_MAX) -> dict[str, Any]:
    """The first state of which something holds."""
    async with asyncio.timeout(deadline_s):
        async for state in states:
            if holds(state):
                return state
    raise AssertionError("the states ended")


async def test_it_is_off_unless_asked_for_and_needs_named_clients_where_there_are_keys(bus, tmp_path):
    accounts = Accounts(bus, None, 0)
    async with console_routes(bus, Presence(bus), accounts, GatewaySettings(), lambda: False) as routes:
        assert routes == []
    keyed = Accounts(bus, {b"digest": "team"}, 0)
    with pytest.raises(ConfigError, match="console_clients"):
        async with console_routes(bus, Presence(bus), keyed, GatewaySettings(console=True), lambda: False):
            pass


async def test_pages_may_run_and_load_nothing_from_elsewhere(bus):
    async with console(bus) as served:
        assert (await served.http.get(f"{served.url}/console")).headers["location"] == "console/"
        page = await served.http.get("/")
        assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert page.headers["x-content-type-options"] == "nosniff"
        for inline in ("<style", "style=", "onclick=", "http://", "https://"):
            assert inline not in page.text
        script = await served.http.get("/console.js", headers={"If-None-Match": "none"})
        assert script.headers["content-type"].startswith("text/javascript") and script.headers["etag"]
        assert (await served.http.get("/../console.py")).status_code == 404


async def test_only_the_keys_of_named_clients_open_it(bus, tmp_path):
    (tmp_path / "keys.json").write_text('{"ops": "sk-ops", "team": "sk-team"}')
    async with console(bus, keys_file=str(tmp_path / "keys.json"), console_clients=("ops",)) as served:
        for path in ("/api/session", "/api/state", "/api/dead", "/api/trace/x"):
            assert (await served.http.get(path)).status_code == 401
            answer = await served.http.get(path, headers={"Authorization": "Bearer sk-team"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "not_permitted")
        good = {"Authorization": "Bearer sk-ops", "Host": "console.example.com"}
        assert (await served.http.get("/api/session", headers=good)).json() == {"open": False}
        assert (await served.http.get("/")).status_code == 200, "the page that asks for the key"


@pytest.mark.parametrize(
    ("headers", "ours"),
    [
        ({}, True),  # no browser
        ({"sec-fetch-site": "same-origin", "origin": "http://proxy"}, True),
        ({"sec-fetch-site": "none"}, True),  # typed by a person
        ({"sec-fetch-site": "cross-site"}, False),
        ({"sec-fetch-site": "same-site"}, False),
        ({"host": "gw:8000", "origin": "http://gw:8000"}, True),
        ({"host": "gw:8000", "origin": "http://gw:8001"}, False),
        ({"host": "gw:8000", "origin": "null"}, False),
    ],
)
def test_other_sites_pages_are_refused(headers, ours):
    with contextlib.nullcontext() if ours else pytest.raises(NotPermitted):
        refuse_other_sites(Headers(headers))


@pytest.mark.parametrize(
    ("host", "ours"),
    [
        ("127.0.0.1:8000", True),
        ("[::1]:8000", True),
        ("localhost:8000", True),
        ("gpu-7:8000", True),
        ("a.localhost", True),
        ("evil.example:8000", False),
        ("127.0.0.1.evil.example", False),
    ],
)
def test_a_name_that_anybody_may_own_does_not_lead_to_a_console_without_keys(host, ours):
    with contextlib.nullcontext() if ours else pytest.raises(NotPermitted):
        refuse_rebound_names(Headers({"host": host}))


async def test_viewers_share_a_state_and_a_silent_worker_is_gone_in_time(bus, monkeypatch):
    monkeypatch.setattr(overview, "VIEWERS_MAX", 2)
    async with console(bus) as served:
        await bus.ensure_consumer(streams.decode_any(MODEL))
        bucket = await bus.bucket(streams.CARDS)
        card = ModelCard(
            worker="d0", role="decode", model=MODEL, incarnation="i", model_path="p", engine="simulated",
            context_len_tokens=10, max_running_requests=4, max_prefill_tokens=10, kv_blocks=10, kv_block_tokens=1,
        )  # fmt: skip
        await bucket.put(names.card_key("decode", MODEL, "d0"), encode(card))
        request = Request(prompt="hi", request_id="r", client="c")
        await bus.publish_durable(names.REQUESTS.of(model=MODEL), encode(request))
        async with served.states() as one, served.states() as other:
            assert (await served.http.get("/api/state")).status_code == 429
            await served.beat("d0", ready=True, in_flight=3)
            await served.beat("p0", role="preprocess", ready=True)
            state = await until(one, lambda state: len(state["workers"]) == 2 and state["depths"])
            assert state == await until(other, lambda other: other["unix_s"] == state["unix_s"])
            decode, preprocess = state["workers"]
            assert (decode["worker"], decode["state"], decode["in_flight"]) == ("d0", "ready", 3)
            assert (preprocess["worker"], preprocess["state"]) == ("p0", "ready")
            assert {"queue": "requests", "model": MODEL, "messages": 1} in state["depths"]
            assert state["leases"][0] == {
                "queue": "requests", "model": None, "leased": 0, "oldest_s": pytest.approx(0, abs=5),
                "paused_until_unix_s": None,
            }  # fmt: skip
            silent_s = time.monotonic()
            gone = await until(one, lambda state: {box["state"] for box in state["workers"]} == {"gone"})
            assert time.monotonic() - silent_s < PRESENCE_S + 1.5
            assert [(box["worker"], box["in_flight"]) for box in gone["workers"]] == [("d0", 0), ("p0", 0)]
            await served.beat("p0", role="preprocess", ready=True)
            back = await until(one, lambda state: state["workers"][1]["state"] == "ready")
            assert back["workers"][1]["died_unix_s"] == pytest.approx(time.time(), abs=10), "that it died is still told"
            assert back["workers"][1]["restarted_unix_s"] is None, "it was only silent: the same life goes on"
        async with served.states() as again:
            await until(again, lambda state: state["broker"])


async def test_a_worker_whose_successor_comes_at_once_has_died_and_was_restarted(bus, monkeypatch):
    async with console(bus) as served, served.states() as states:
        await served.beat("d0", ready=True)
        first = await until(states, lambda state: state["workers"])
        assert (first["workers"][0]["died_unix_s"], first["workers"][0]["restarted_unix_s"]) == (None, None)
        await served.beat("d0", incarnation="next", ready=True)
        state = await until(states, lambda state: state["workers"][0]["restarted_unix_s"])
        (worker,) = state["workers"]
        assert worker["state"] == "ready"
        assert worker["died_unix_s"] <= worker["restarted_unix_s"] <= time.time()
        monkeypatch.setattr(overview, "GONE_S", 0.0)
        await until(states, lambda state: state["workers"][0]["died_unix_s"] is None)


async def test_rates_are_of_each_worker(bus):
    async with console(bus) as served, served.states() as states:
        await until(states, lambda state: True)
        for ended in range(2):
            metrics.STAGE_SECONDS.labels("prefill", "done").observe(0.1)
            snapshot = MetricsSnapshot(worker="f0", role="prefill", model=MODEL, families=metrics.snapshot())
            await bus.publish(names.METRICS.of(role="prefill", worker="f0"), encode(snapshot))
            await served.beat("f0", role="prefill", ready=True)
            if not ended:
                await until(states, lambda state: state["workers"])
        state = await until(states, lambda state: state["workers"][0]["tasks_per_s"])
        assert state["workers"][0]["tasks_per_s"] == pytest.approx(1 / state["watched_s"])
        assert state["total"]["requests_per_s"] == 0, "a prefilled prompt is no answered request"


async def test_viewers_leave_with_the_gateway(bus):
    async with console(bus) as served, served.states() as states:
        await until(states, lambda state: True)
        served.draining = True
        async with asyncio.timeout(4.0):
            async for _ in states:
                pass


async def test_a_timeline_is_told_in_phases(bus):
    async with console(bus) as served:
        began = time.time()
        first = {"attempt": 1, "worker": "d0", "token_ids": TokenIds.of([1]), "text": "a"}
        word = Frame(request_id="r", attempt=2, worker="d1")
        timing = Timing(accepted_unix_s=began - 2, preprocessed_unix_s=began - 1.5, started_unix_s=began)
        usage = Usage(prompt_tokens=1, completion_tokens=1)
        end = {"attempt": 2, "worker": "d1", "index": 1, "finish_reason": "stop", "usage": usage, "timing": timing}
        subject = names.RESPONSES.of(client="c", request_id="r")
        await bus.publish_durable(subject, encode(Frame(request_id="r", **first)))
        await bus.publish_durable(names.OWNERS.of(client="c", request_id="r"), encode(word))
        await bus.publish_durable(subject, encode(Frame(request_id="r", **end)))
        found = (await served.http.get("/api/trace/r", params={"client": "c"})).json()
        assert (found["request_id"], found["client"], found["missing"]) == ("r", "c", [])
        assert [(phase["kind"], phase["what"], phase["where"]) for phase in found["phases"]][-4:] == [
            ("decode", "decode", "d0"), ("gap", "no owner", ""), ("queue", "taken over", "d1"),
            ("decode", "decode, attempt 2", "d1"),
        ]  # fmt: skip
        assert found["phases"][0]["end_unix_s"] - found["phases"][0]["begin_unix_s"] == pytest.approx(0.5)
        assert found["events"][-1]["what"] == "ended: stop"
        for path in ("/api/trace/nothing", "/api/trace/r?client=d"):
            assert (await served.http.get(path)).status_code == 404
        assert (await served.http.get("/api/trace/a.b")).status_code == 400


async def test_letters_are_listed_shown_run_again_and_dropped(bus):
    payload = b'{"prompt": "hi", "request_id": "r", "client": "c", "deadline": 1.0}'
    for number in range(2):
        letter = DeadLetter(
            stage="preprocess", subject=names.REQUESTS.of(model=MODEL), stream_seq=7, attempts=5, request_id="r",
            error=AttemptsExhausted("five workers died").failure(), payload=payload, died_unix_s=float(number),
        )  # fmt: skip
        if not number:
            await bus.provision(streams.STREAMS, streams.CONSUMERS, streams.BUCKETS)
        await bus.publish_durable(names.DEAD.of(stage="preprocess", model=MODEL), encode(letter))
    async with console(bus) as served:
        listed = (await served.http.get("/api/dead")).json()["letters"]
        assert [(letter["seq"], letter["code"]) for letter in listed] == [
            (2, "attempts_exhausted"),
            (1, "attempts_exhausted"),
        ]
        assert (await served.http.get("/api/dead/1")).json()["payload"]["prompt"] == "hi"
        for headers in ({}, {"Content-Type": "text/plain"}, JSON | {"Origin": "http://other"}):
            refused = await served.http.post("/api/dead/1/retry", headers=headers, content="{}")
            assert refused.status_code in (400, 403)
        assert (await served.http.get("/api/dead/1/retry")).status_code == 405, "a link does nothing"
        again = await served.http.post("/api/dead/1/retry", headers=JSON | {"Origin": served.url}, content="{}")
        assert again.json() == {"client": "c", "request_id": "r-retry-1"}
        (asked,) = [stored async for stored in bus.read(streams.REQUESTS.name, names.REQUESTS.any())]
        assert json.loads(asked.payload)["deadline"] > time.time()
        assert (await served.http.post("/api/dead/1/drop", headers=JSON, content="{}")).status_code == 404
        assert (await served.http.post("/api/dead/2/drop", headers=JSON, content="{}")).json() == {"dropped": 2}
        assert (await served.http.get("/api/dead")).json() == {"letters": []}
