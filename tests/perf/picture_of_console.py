"""Make the pictures of the web console in docs/images, as a browser shows it over a live topology under load.

    PYTHONPATH=.:tests/interop python tests/perf/picture_of_console.py [--out docs/images]

Eight workers with simulated engines, prefill and decode apart, 29 users, and a chat in which a decode worker is killed.
The browser is this machine's Chromium or the one inside an npm package (tests/interop/browsing.py).
"""

import argparse
import asyncio
import os
import random
import signal
import tempfile
import time
from pathlib import Path

from browsing import Page, browsing

from pipeline.bus import Bus
from pipeline.client import Client
from pipeline.config import load_topology
from pipeline.errors import AttemptsExhausted
from pipeline.local import LocalTopology, running
from subjects import names
from subjects.codec import encode
from subjects.messages import DeadLetter

MODEL = "smollm2"
USERS = 29  # a few more than the decode workers have places, so that some wait
LOADED_S = 25.0
START_S_MAX = 90.0
SEEN_S_MAX = 30.0
QUESTION = "How does a request find its way when the worker that owns it dies?"
TOPOLOGY = """
about = "For pictures."
model = "smollm2"
model_path = "builtin:smollm2"
[[workers]]
role = "preprocess"
count = 2
[[workers]]
role = "prefill"
count = 2
engine = "simulated"
slots = 4
simulated = { ttft_ms = 80, disaggregation = "prefill", max_running_requests = 4 }
[[workers]]
role = "decode"
count = 3
engine = "simulated"
simulated = { itl_ms = 18, disaggregation = "decode", max_running_requests = 8, context_len_tokens = 1024 }
[[workers]]
role = "telemetry"
[[workers]]
role = "gateway"
gateway = { port = 0, console = true }
"""


async def user(client: Client, draw: random.Random) -> None:
    """Asks for ever."""
    while True:
        tokens = tuple(draw.choices(range(3, 30_000), k=draw.randint(260, 740)))
        async for _ in client.generate(
            model=MODEL, prompt=tokens, max_tokens=draw.randint(20, 120), ignore_eos=True, stream=True
        ):
            pass


async def bury(url: str) -> None:
    """Put a letter among the dead, as a worker does."""
    bus = await Bus.connect(url, name="picture")
    letter = DeadLetter(
        stage="decode",
        subject=names.DECODE_ANY.of(model=MODEL),
        stream_seq=7,
        attempts=5,
        error=AttemptsExhausted("handed to 5 workers without an end").failure(),
        payload=b'{"request_id": "report-17", "client": "reports"}',
        died_unix_s=time.time() - 90,
        request_id="report-17",
    )
    await bus.publish_durable(names.DEAD.of(stage="decode", model=MODEL), encode(letter))
    await bus.close()


async def pictures(local: LocalTopology, page: Page, out: Path) -> None:
    """Chat, kill the owner in the middle, and take the pictures on the way."""
    await page.look(1280, 860, scale=1)
    await page.goto(f"{local.gateway_addresses()[0]}/console")
    await page.until("document.getElementById('chat-model').value", SEEN_S_MAX)
    await asyncio.sleep(LOADED_S)
    await page.value("document.getElementById('max-tokens').value = 60")
    await page.type("#prompt", QUESTION)
    await page.press("Enter")
    about = "document.querySelector('li[data-role=assistant]:last-child .meta')"
    await page.until(f"{about}.textContent.includes('length')", SEEN_S_MAX)
    await page.click("li[data-role=assistant]:last-child .meta a")
    await page.until("document.querySelectorAll('.phase').length > 4", SEEN_S_MAX)
    await page.value("scrollTo(0, 0)")
    await page.screenshot(out / "console.png")
    await page.look(1280, 860, scale=1, dark=True)
    (child,) = (child for child in local.children if child.name == "decode-1")
    assert child.process
    os.killpg(child.process.pid, signal.SIGKILL)
    await page.click("#tab-log")
    back = "document.querySelector('[data-worker=decode-1]')"
    await page.until(f"{back}.dataset.died === 'yes' && {back}.dataset.state === 'ready'", SEEN_S_MAX)
    await page.value("scrollTo(0, 0)")
    await page.screenshot(out / "console-dark.png")
    await page.look(400, 860, phone=True)
    await page.click("#tab-dead")
    await page.until("document.querySelector('#picture svg').clientWidth < 400", SEEN_S_MAX)
    await page.screenshot(out / "console-phone.png", whole=True)
    assert await page.said() == []


async def main(out: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        topology = Path(folder) / "pictures.toml"
        topology.write_text(TOPOLOGY)
        async with (
            browsing(Path(folder) / "browser") as page,
            running(load_topology(str(topology)), Path(folder) / "run") as local,
        ):
            print("starting the workers", flush=True)
            await local.start()
            await asyncio.wait_for(local.until_ready(), START_S_MAX)
            async with Client.connect(local.url, client="picture") as client:
                await bury(local.url)
                draw = random.Random(7)
                print(f"every worker is ready; {USERS} users ask for {LOADED_S:g} s", flush=True)
                users = [asyncio.create_task(user(client, draw)) for _ in range(USERS)]
                try:
                    await pictures(local, page, out)
                finally:
                    for each in users:
                        each.cancel()
                    await asyncio.gather(*users, return_exceptions=True)
    print(f"console.png, console-dark.png and console-phone.png are in {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    asyncio.run(main(parser.parse_args().out.resolve()))
