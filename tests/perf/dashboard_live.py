"""Shows the alerts and the dashboard against live data: a topology under load, scraped by a real Prometheus.

    python tests/perf/dashboard_live.py tests/perf/dashboard.toml --users 24 --cancel 0.03 --kill-decode

Needs `prometheus` on the PATH (Debian's package) and `uv`, which brings matplotlib for the pictures. Prints what each
rule says in the end. With --kill-decode the decode workers are killed at half time, with --cancel some requests are.
With --keep Prometheus' own files are kept instead of drawn, to be drawn on a machine that has matplotlib.
"""

import argparse
import asyncio
import contextlib
import json
import random
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final
from urllib.request import urlopen

import msgspec
import uvloop

from pipeline.client import Client
from pipeline.config import TopologySettings, load_topology
from pipeline.local import LocalTopology, running

INFRA: Final = Path(__file__).parents[2] / "infra"
RENDER: Final = Path(__file__).with_name("render_dashboard.py")
SYSTEM: Final = "You are an assistant that answers in one sentence, plainly, without an introduction. " * 6
SCRAPE: Final = "2s"
READY_S_MAX: Final = 90.0
DRAW_S_MAX: Final = 180.0


@contextlib.asynccontextmanager
async def prometheus(address: str, folder: Path) -> AsyncIterator[str]:
    """A Prometheus with our rules that scrapes `address`; its URL."""
    config = (INFRA / "prometheus" / "prometheus.yml").read_text()
    config = config.replace("127.0.0.1:9464", address).replace("interval: 5s", f"interval: {SCRAPE}")
    (folder / "prometheus.yml").write_text(config)
    shutil.copy(INFRA / "prometheus" / "alerts.yml", folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = [
        *("prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'tsdb'}"),
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "prometheus.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(*arguments, stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            await asyncio.to_thread(_await_ready, url)
            yield url
        finally:
            process.terminate()
            await process.wait()


def _await_ready(url: str) -> None:
    deadline_s = time.monotonic() + READY_S_MAX
    while True:
        try:
            urlopen(f"{url}/-/ready", timeout=1).close()
            return
        except OSError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.2)


async def chat(client: Client, model: str, number: int, until_s: float, cancel: float) -> int:
    """One user: conversations of three turns, one after another; how many answers came."""
    dice = random.Random(number)
    answers = 0
    while time.monotonic() < until_s:
        messages = [{"role": "system", "content": SYSTEM}]
        for turn in range(3):
            messages.append({"role": "user", "content": f"Tell me of number {dice.randrange(100)}, turn {turn}."})
            text, give_up = "", dice.random() < cancel
            async with contextlib.aclosing(
                client.generate(model=model, messages=messages, max_tokens=dice.randint(12, 48), ignore_eos=True)
            ) as frames:
                async for frame in frames:
                    text += frame.text
                    if give_up or time.monotonic() > until_s:
                        break
            answers += 1
            if time.monotonic() > until_s:
                break
            messages.append({"role": "assistant", "content": text})
    return answers


async def load(local: LocalTopology, given: argparse.Namespace) -> int:
    """The whole load; how many answers came."""
    until_s = time.monotonic() + given.seconds
    killing = asyncio.create_task(_kill_decode(local, given.seconds / 2)) if given.kill_decode else None
    async with Client.connect(local.url, client="dashboard") as client:
        users = [chat(client, local.models[0], number, until_s, given.cancel) for number in range(given.users)]
        answers = sum(await asyncio.gather(*users))
    if killing:
        await killing
    return answers


async def _kill_decode(local: LocalTopology, after_s: float) -> None:
    await asyncio.sleep(after_s)
    for child in local.children:
        if child.settings.role == "decode" and child.process:
            child.process.kill()


def told(url: str) -> list[str]:
    """What Prometheus says of our rules."""
    with urlopen(f"{url}/api/v1/rules", timeout=10) as answer:
        groups = json.load(answer)["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    lines = [f"{rule['name']}: {rule['health']}, {rule['state']} {rule.get('lastError', '')}".strip() for rule in rules]
    with urlopen(f"{url}/api/v1/query?query=count({{__name__!=''}})", timeout=10) as answer:
        count = json.load(answer)["data"]["result"][0]["value"][1]
    return [*lines, f"{count} series in all"]


@contextlib.asynccontextmanager
async def started(topology: TopologySettings, folder: Path) -> AsyncIterator[tuple[LocalTopology, str]]:
    async with running(topology, folder) as local:
        await local.start()
        await local.until_ready()
        watching = asyncio.create_task(local.until_failed())
        yield local, local.metrics_addresses()[0].removeprefix("http://").removesuffix("/metrics")
        watching.cancel()


async def show(given: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        topology = load_topology(str(given.topology))
        async with started(topology, folder / "run") as (local, address), prometheus(address, folder) as url:
            began_s = time.monotonic()
            answers = await load(local, given)
            print(f"{answers} answers in {time.monotonic() - began_s:.0f} s", flush=True)
            if given.page:
                page = await asyncio.to_thread(lambda: urlopen(f"http://{address}/metrics", timeout=10).read())
                given.page.write_bytes(page)
            print(*told(url), sep="\n", flush=True)
            if not given.keep:
                await draw(url, given.out, round(time.monotonic() - began_s) + 5)
        if given.keep:
            shutil.copytree(folder / "tsdb", given.keep)


async def draw(url: str, out: Path, seconds: int) -> None:
    """The dashboard's pictures of the last `seconds`."""
    command = ["uv", "run", "-q", "--no-project", "--with", "matplotlib", "python", str(RENDER), url, str(out)]
    drawing = await asyncio.create_subprocess_exec(*command, "--seconds", str(seconds))
    async with asyncio.timeout(DRAW_S_MAX):
        if await drawing.wait():
            sys.exit("the pictures could not be drawn; see above")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("topology", type=Path)
    parser.add_argument("--seconds", type=float, default=120.0, help="of load")
    parser.add_argument("--users", type=int, default=6, help="at once")
    parser.add_argument("--cancel", type=float, default=0.0, help="share of answers given up after their first frame")
    parser.add_argument("--kill-decode", action="store_true", help="kill -9 the decode workers at half time")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--keep", type=Path, help="copy Prometheus' files here, and draw nothing")
    parser.add_argument("--page", type=Path, help="write the /metrics page here in the end")
    given = parser.parse_args()
    try:
        uvloop.run(show(given))
    except msgspec.ValidationError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
