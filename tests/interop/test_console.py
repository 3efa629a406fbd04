"""The web console as a person sees it, in headless Chromium, over simulated engines."""

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from browsing import NoBrowser, Page, browsing

from pipeline import local
from pipeline.bus import Bus
from pipeline.config import GatewaySettings, GroupSettings, SimulatedSettings, load_topology
from pipeline.errors import AttemptsExhausted
from pipeline.local import LocalTopology, running
from subjects import names
from subjects.codec import encode
from subjects.limits import HEARTBEAT_S
from subjects.messages import DeadLetter, Heartbeat

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240), pytest.mark.full]
MODEL = "smollm2"
KEY = "sk-console"
READY_S_MAX = 60.0
SEEN_S_MAX = 20.0
RED_S_MAX = 5.0
RED = "rgb(189, 31, 45)"
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>"


class Shown:
    """A topology, and the console of its gateway in a browser."""

    def __init__(self, topology: LocalTopology, page: Page) -> None:
        self.local, self.page = topology, page
        self.url = topology.gateway_addresses()[0]


@contextlib.asynccontextmanager
async def stay_dead() -> AsyncIterator[None]:
    """A worker that is killed is not started again, so its requests have to move."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "RESTART_S_MIN", 3600.0)
        yield


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shown(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Shown]:
    folder = tmp_path_factory.mktemp("console")
    (folder / "keys.json").write_text(json.dumps({"ops": KEY, "other": "sk-other"}))
    gateway = GatewaySettings(port=0, console=True, console_clients=("ops",), keys_file=str(folder / "keys.json"))
    shipped = load_topology("simulated")
    slow = SimulatedSettings(ttft_ms=5, itl_ms=20, max_running_requests=8)
    groups = [
        msgspec.structs.replace(group, count=1)
        if group.role == "preprocess"
        else msgspec.structs.replace(group, simulated=slow)
        for group in shipped.workers
        if group.role in ("preprocess", "decode")
    ]
    groups.append(GroupSettings(role="gateway", gateway=gateway))
    try:
        async with (
            browsing(folder / "browser") as page,
            stay_dead(),
            running(msgspec.structs.replace(shipped, workers=tuple(groups)), folder) as topology,
        ):
            await topology.start()
            async with asyncio.timeout(READY_S_MAX):
                await topology.until_ready()
            yield Shown(topology, page)
    except NoBrowser as error:
        if os.environ.get("CI"):
            raise  # nobody would see there that it was skipped
        pytest.skip(f"no Chromium: {error}")


def worker(name: str) -> str:
    return f"document.querySelector('[data-worker={name}]')"


async def test_a_key_is_asked_for_once_and_opens_the_console(shown: Shown):
    page = shown.page
    await page.look(1280, 800)
    headers = await page.goto(f"{shown.url}/console")
    assert "unsafe-inline" not in headers["content-security-policy"]
    await page.until("!document.getElementById('key-form').hidden", SEEN_S_MAX)
    for key, error in (("sk-wrong", "is not known"), ("sk-other", "does not open")):
        await page.type("#key", key)
        await page.press("Enter")
        await page.until(f"document.getElementById('key-error').textContent.includes({error!r})", SEEN_S_MAX)
    await page.type("#key", KEY)
    await page.press("Enter")
    for name in ("gateway-0", "preprocess-0", "decode-0", "decode-1"):
        await page.until(f"{worker(name)}?.dataset.state === 'ready'", SEEN_S_MAX)
    assert await page.value("sessionStorage.length") == 1
    assert [text for text in await page.said() if "401" not in text and "403" not in text] == []


async def test_a_killed_worker_turns_red_and_the_chat_goes_on(shown: Shown):
    page = shown.page
    await page.until("document.getElementById('chat-model').value", SEEN_S_MAX)
    await page.value("document.getElementById('max-tokens').value = 300")
    await page.type("#prompt", "Count to three hundred.")
    await page.press("Enter")
    said = "document.querySelector('li[data-role=assistant]:last-child .said').textContent"
    busy = (
        "[...document.querySelectorAll('[data-role=decode]')].find((box) => box.dataset.inFlight > 0)?.dataset.worker"
    )
    owner = await page.until(busy, SEEN_S_MAX)
    heir = {"decode-0": "decode-1", "decode-1": "decode-0"}[owner]
    (child,) = (child for child in shown.local.children if child.name == owner)
    assert child.process
    before = len(await page.value(said))
    os.killpg(child.process.pid, signal.SIGKILL)
    killed_s = time.monotonic()
    await page.until(f"{worker(owner)}.dataset.state === 'gone'", RED_S_MAX)
    red_s = time.monotonic() - killed_s
    color = await page.value(f"getComputedStyle({worker(owner)}.querySelector('.body')).stroke")
    await page.until(f"{worker(heir)}.dataset.inFlight === '1'", SEEN_S_MAX)
    await page.until("!document.getElementById('send').disabled", SEEN_S_MAX)
    moved_s = time.monotonic() - killed_s
    print(f"\n{owner} red after {red_s:.2f} s, its request ended after {moved_s:.2f} s")
    assert red_s < RED_S_MAX
    assert color == RED
    assert len(await page.value(said)) > before
    about = await page.value("document.querySelector('li[data-role=assistant]:last-child .meta').textContent")
    assert about.startswith("TTFT ") and " · 300 tokens · " in about and "length" in about

    await page.click("li[data-role=assistant]:last-child .meta a")
    await page.until("document.querySelectorAll('.phase[data-kind=decode]').length === 2", SEEN_S_MAX)
    assert await page.value("document.querySelectorAll('.phase[data-kind=gap]').length") == 1
    told = await page.value("document.getElementById('timeline-shown').textContent")
    assert "taken over" in told and owner in told and heir in told
    assert await page.said() == []


async def test_stop_cancels(shown: Shown):
    page = shown.page
    await page.value("document.getElementById('max-tokens').value = 4000")
    await page.type("#prompt", "Go on for ever.")
    await page.click("#send")
    about = "document.querySelector('li[data-role=assistant]:last-child .meta').textContent"
    await page.until(f"{about}.includes('tokens/s')", SEEN_S_MAX)
    await page.click("#stop")
    await page.until(f"{about}.includes('stopped')", SEEN_S_MAX)
    await page.click("li[data-role=assistant]:last-child .meta a")
    await page.until("document.getElementById('timeline-shown').textContent.includes('ended: abort')", SEEN_S_MAX)


async def test_what_workers_and_clients_say_is_text_and_letters_run_again(shown: Shown):
    page = shown.page
    bus = await Bus.connect(shown.local.url, name="test")
    fields: dict[str, Any] = {"prompt": HOSTILE, "max_tokens": 2, "request_id": "hostile", "client": "ops"}
    for _ in range(2):
        letter = DeadLetter(
            stage="preprocess",
            subject=names.REQUESTS.of(model=MODEL),
            stream_seq=1,
            attempts=5,
            error=AttemptsExhausted(HOSTILE).failure(),
            payload=json.dumps(fields).encode(),
            died_unix_s=time.time(),
            request_id=HOSTILE,
        )
        await bus.publish_durable(names.DEAD.of(stage="preprocess", model=MODEL), encode(letter))
    await bus.close()
    await page.click("#tab-dead")
    await page.until("document.querySelectorAll('[data-letter]').length === 2", SEEN_S_MAX)
    await page.click("[data-letter='1'] .doing button:nth-child(1)")
    await page.until("document.querySelector('[data-letter=\"1\"] pre').textContent.includes('onerror')", SEEN_S_MAX)
    assert await page.value("document.querySelectorAll('#letters img, #letters script').length") == 0

    await page.click("[data-letter='1'] .doing button:nth-child(2)")
    await page.until("document.querySelectorAll('[data-letter]').length === 1", SEEN_S_MAX)
    await page.click("#dead-said a")
    await page.until("document.getElementById('timeline-shown').textContent.includes('ended: length')", SEEN_S_MAX)
    await page.click("#tab-dead")
    await page.until("document.getElementById('letters').ariaBusy === 'false'", SEEN_S_MAX)
    await page.click("[data-letter='2'] .doing button:nth-child(3)")
    await page.click("[data-letter='2'] .doing button:nth-child(3)")
    await page.until("document.querySelectorAll('[data-letter]').length === 0", SEEN_S_MAX)
    assert await page.said() == [], "nothing ran, nothing was blocked"


@contextlib.asynccontextmanager
async def beating(bus: Bus, incarnation: str) -> AsyncIterator[None]:
    """A worker's heartbeats while the block runs, and nothing else of it."""
    beat = Heartbeat(worker="decode-9", role="decode", incarnation=incarnation, model=MODEL, ready=True, slots=4)

    async def beats() -> None:
        while True:
            await bus.publish(names.HEARTBEAT.of(role="decode", worker="decode-9"), encode(beat))
            await asyncio.sleep(0.5 * HEARTBEAT_S)

    task = asyncio.create_task(beats())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


async def test_a_worker_restarted_at_once_died_in_red_and_then_says_when_it_came_back(shown: Shown):
    page, box = shown.page, worker("decode-9")
    bus = await Bus.connect(shown.local.url, name="test")
    async with beating(bus, "first"):
        await page.until(f"{box}?.dataset.state === 'ready'", SEEN_S_MAX)
        assert await page.value(f"{box}.dataset.died") is None
    async with beating(bus, "second"):
        await page.until(f"{box}.dataset.died === 'yes'", RED_S_MAX)
        assert await page.value(f"{box}.dataset.state") == "ready"
        assert "died" in await page.value(f"{box}.querySelector('.note').textContent")
        assert await page.value(f"getComputedStyle({box}.querySelector('.body')).stroke") == RED
        await page.until(f"{box}.querySelector('.note').textContent.startsWith('restarted ')", SEEN_S_MAX)
        assert await page.value(f"{box}.dataset.died") is None
        assert await page.value(f"getComputedStyle({box}.querySelector('.body')).stroke") != RED
        happened = await page.value("document.getElementById('happened').textContent")
        assert "decode-9 died" in happened and "decode-9 was restarted" in happened
    await bus.close()


async def test_nothing_can_make_html_of_a_string(shown: Shown):
    tried = "try { document.body.insertAdjacentHTML('beforeend', '<b>no</b>'); 'made' } catch (error) { error.name }"
    assert await shown.page.value(tried) == "TypeError"


async def test_it_fits_a_phone(shown: Shown):
    await shown.page.look(390, 844, phone=True)
    await shown.page.until("document.querySelector('#picture svg')?.clientWidth <= 390", SEEN_S_MAX)
    assert await shown.page.value("document.documentElement.scrollWidth") <= 390
    await shown.page.look(1280, 800)


async def test_a_gateway_that_stops_does_not_wait_for_viewers(shown: Shown):
    """The last test: it takes the gateway away."""
    (child,) = (child for child in shown.local.children if child.name == "gateway-0")
    assert child.process
    began_s = time.monotonic()
    child.process.terminate()
    await shown.page.until("document.getElementById('live').textContent !== 'live'", SEEN_S_MAX)
    async with asyncio.timeout(SEEN_S_MAX):
        await child.process.wait()
    assert time.monotonic() - began_s < 6.0, "an open stream of states would hold it for STOP_S_MAX"
