"""`up` and `demo`: a topology on this machine, with what a person sees of it."""

import asyncio
import contextlib
import fcntl
import signal
import socket
from collections.abc import Coroutine, Iterator
from pathlib import Path
from secrets import token_hex
from typing import Any, Final

import msgspec

from pipeline.client import Client
from pipeline.config import DEMO_QUESTION, NatsSettings, TopologySettings, nats_url
from pipeline.errors import ConfigError, PipelineError
from pipeline.local import LocalTopology, running
from pipeline.look import stream_answer
from pipeline.screen import Starting, err, out, table
from pipeline.tap import Tap
from subjects import names

NATS_PORT: Final = 4222
"""NATS' own port: where clients look when nobody tells them."""
TELL_S: Final = 0.2
EXIT_INTERRUPTED: Final = 130


async def up(topology: TopologySettings, folder: Path, run_s: float | None) -> None:
    """Keep a topology running until a signal, or for `run_s` seconds. Raises SetupError with a sentence."""
    with _only_one(folder):
        async with running(_on_a_known_port(topology), folder) as local:
            ended = _on_signals(local)
            await _until_ready(local, ended)
            if not ended.is_set():
                _say_what_next(local, folder)
                await _first_of(ended.wait(), local.until_failed(), _tell_changes(local), timeout_s=run_s)
            err.print("stopping: workers finish or hand over what they have; Ctrl-C again ends them at once")


async def demo(topology: TopologySettings, folder: Path, question: str, max_tokens: int) -> int:
    """Start a topology, ask it one question, tell the answer; the exit code."""
    try:
        async with running(topology, folder) as local:
            ended = _on_signals(local)
            await _until_ready(local, ended)
            if ended.is_set():
                return EXIT_INTERRUPTED
            answering = asyncio.ensure_future(_ask_and_tell(local, question, max_tokens))
            await _first_of(ended.wait(), answering)
            return EXIT_INTERRUPTED if answering.cancelled() else answering.result()
    except PipelineError as error:
        err.print(f"sglang-nats: {error}", style="red", markup=False)
        err.print(f"the logs are in {folder}", markup=False)
        return 1


async def _until_ready(local: LocalTopology, ended: asyncio.Event) -> None:
    """Start the topology and show how far it is, until every worker is ready or the user has seen enough."""
    starting = Starting(local)

    async def start() -> None:
        await local.start()
        await local.until_ready()

    async def tell() -> None:
        while True:
            starting.tell()
            await asyncio.sleep(TELL_S)

    with starting.shown():
        await _first_of(start(), tell(), ended.wait())
    starting.tell()


async def _ask_and_tell(local: LocalTopology, question: str, max_tokens: int) -> int:
    """Ask, stream the answer, then print its timing and which subjects carried what; the exit code."""
    async with Client.connect(local.url, client="demo") as client, Tap.on(local.url) as tap:
        out.print(f"\n{question}", style="bold", markup=False)
        fields = {
            "request_id": f"demo-{token_hex(3)}",
            "messages": [{"role": "user", "content": question}],
            "max_tokens": max_tokens,
            "temperature": 0.0,
        }
        answer = await stream_answer(client, local.models[0], fields)
        await tap.settle()
    out.print()
    for failure in answer.failures:
        err.print(f"{failure.code}: {failure.message}", style="red", markup=False)
    out.print(answer.timing(), style="green")
    out.print()
    rows = [(seen.subject, seen.flow, f"{seen.messages:,}", f"{seen.payload_bytes:,}") for seen in tap.seen()]
    out.print(table("Subjects used", ("Subject", "From -> to", "Messages", "Bytes"), rows))
    return 1 if answer.failures or not answer.tokens else 0


def _say_what_next(local: LocalTopology, folder: Path) -> None:
    known = local.url == nats_url()
    ours, theirs = ("", "") if known else (f" --nats {local.url}", f" -s {local.url}")
    lines = [f"  sglang-nats {command}{ours}" for command in (f'request "{DEMO_QUESTION}"', "workers", "streams")]
    lines.append(f"  nats{theirs} sub '{names.EVERYTHING}'")
    hello = '{"messages":[{"role":"user","content":"hi"}]}'
    lines += [f"  nats{theirs} pub {names.REQUESTS.of(model=model)} '{hello}'" for model in local.models]
    lines += [f"  curl {address}" for address in local.metrics_addresses()]
    lines += [f"  curl {address}/v1/models" for address in local.gateway_addresses()]
    what_next = "\n".join(lines)
    err.print(f"\nEverything is ready on {local.url}. In another terminal:\n\n{what_next}\n", markup=False)
    err.print(f"Logs and streams: {folder}. Ctrl-C stops everything.\n", markup=False)


async def _tell_changes(local: LocalTopology) -> None:
    while True:
        while local.recent:
            err.print(local.recent.popleft(), style="yellow", markup=False)
        await asyncio.sleep(TELL_S)


def _on_signals(local: LocalTopology) -> asyncio.Event:
    """Set by the first SIGINT or SIGTERM; a second one kills the workers at once."""
    ended = asyncio.Event()

    def on_signal() -> None:
        if ended.is_set():
            local.kill()
        ended.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    return ended


async def _first_of(*works: Coroutine[Any, Any, Any] | asyncio.Future[Any], timeout_s: float | None = None) -> None:
    """Until one of the works ends (its exception is raised) or the time is over; the others are cancelled."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _on_a_known_port(topology: TopologySettings) -> TopologySettings:
    """NATS' own port for the embedded broker where it is free, so that other commands find it unasked."""
    if topology.nats.url or topology.nats.port:
        return topology
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", NATS_PORT))
        except OSError:
            return topology
    return msgspec.structs.replace(topology, nats=NatsSettings(port=NATS_PORT))


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Holds the folder's lock: a second topology on the same streams and logs would disturb the first."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"this topology runs already, with its files in {folder}: stop it, or give --folder", field="folder"
            ) from None
        yield
