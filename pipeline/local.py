"""A whole topology on this machine: a broker and every worker as a real process, started, watched and ended.

Each worker is `python -m pipeline.cli <role>` in a process group of its own, with its settings and its log as
files in the run folder. A worker that ends before it was ready is an error; one that ends later is started again.
"""

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec
import structlog

from pipeline.bus import Bus
from pipeline.config import TopologySettings, WorkerSettings
from pipeline.errors import PipelineError, WorkerStartError
from pipeline.models import prepare_model
from pipeline.nats_server import NatsServer
from pipeline.presence import Presence
from subjects import streams

STOP_S_MAX: Final = 15.0
"""Workers have this long to finish or hand over their tasks; then they are killed."""
RESTART_S_MIN: Final = 0.5
RESTART_S_MAX: Final = 10.0
STEADY_S: Final = 60.0
"""A worker that lived this long restarts at once when it ends."""
TAIL_BYTES: Final = 8192
TAIL_LINES: Final = 12
WATCH_S: Final = 0.1
NOISE: Final = re.compile(r"Warning:|warnings\.warn")
"""Log lines of libraries that tell nothing of how far a start has come."""

log = structlog.get_logger()


@dataclass
class Child:
    """One worker's process, and what is known of it."""

    settings: WorkerSettings
    environment: dict[str, str]
    log_path: Path
    process: asyncio.subprocess.Process | None = None
    state: str = "waiting"  # waiting, starting, ready, restarting, stopped
    connected: bool = False  # since its last start a heartbeat has come
    restarts: int = 0
    started_unix_s: float = field(default_factory=time.time)

    @property
    def name(self) -> str:
        return self.settings.worker

    def doing(self) -> str:
        """What it does while it starts, in a few words: the last thing that its log says."""
        for line in reversed(tail(self.log_path)):
            if not NOISE.search(line):
                return _in_words(line)
        return "connected; its engine starts" if self.connected else ""

    def last_words(self) -> str:
        """Why it ended: the sentence of its last error, else the end of its log."""
        lines = tail(self.log_path)
        for line in reversed(lines):
            event = _event(line)
            if event.get("level") in {"error", "critical"} and event.get("reason"):
                return str(event["reason"])
        return "\n".join(lines[-TAIL_LINES:]) or "it wrote nothing to its log"


class LocalTopology:
    """The processes of one topology. `start`, then `until_ready`, then `until_failed` or work; at the end `stop`."""

    def __init__(self, topology: TopologySettings, folder: Path) -> None:
        """`folder`: settings, logs and the embedded broker's streams."""
        self._topology, self._folder = topology, folder
        self._server = None if topology.nats.url else NatsServer(folder / "nats", port=topology.nats.port)
        self._keepers: list[asyncio.Task[None]] = []
        self._stopping = asyncio.Event()
        self._bus: Bus | None = None
        self._presence: Presence | None = None
        self.children: list[Child] = []
        self.preparing = ""
        """What is done before any worker starts."""
        self.recent: deque[str] = deque(maxlen=100)
        """What happened to workers since they were ready, as sentences; the reader takes them out."""

    @property
    def url(self) -> str:
        """The broker's URL; of an embedded one known after `start`."""
        return self._server.url if self._server else str(self._topology.nats.url)

    @property
    def models(self) -> list[str]:
        """The served models' names."""
        return sorted({child.settings.model for child in self.children if child.settings.model})

    @property
    def streams_folder(self) -> Path | None:
        """Where the embedded broker keeps its streams."""
        return self._server.store if self._server else None

    def metrics_addresses(self) -> list[str]:
        """Where the telemetry workers offer their metrics, as their logs tell."""
        return self._addresses("metrics_served")

    def gateway_addresses(self) -> list[str]:
        """Where the gateways listen, as their logs tell."""
        return self._addresses("gateway_served")

    def _addresses(self, told: str) -> list[str]:
        events = [_event(line) for child in self.children for line in tail(child.log_path)]
        return [event["url"] for event in events if event.get("event") == told]

    async def start(self) -> None:
        """Unpack models, then start the broker and every worker. Raises SetupError with a sentence."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(self._topology.model_paths()):
            await asyncio.to_thread(prepare_model, path, self._note_progress)
        self.preparing = ""
        if self._server:
            self._server.start()  # on this thread: the broker dies with the thread that started it
        self._bus = await Bus.connect(self.url, name="local")
        kept = streams.with_retention(self._topology.responses_kept_s)
        await self._bus.provision(kept, streams.CONSUMERS, streams.BUCKETS, replicas=self._topology.nats.replicas)
        self._presence = Presence(self._bus)
        await self._presence.start()
        for settings, environment in self._topology.settings(self.url):
            self.children.append(Child(settings, environment, self._folder / f"{settings.worker}.log"))
        self._keepers = [asyncio.create_task(self._keep(child), name=child.name) for child in self.children]

    async def until_ready(self) -> None:
        """Wait until every worker takes work. Raises WorkerStartError naming the worker and why."""
        deadline_s = time.monotonic() + self._topology.start_s_max
        while not self._note_ready():
            if time.monotonic() > deadline_s:
                late = [child for child in self.children if child.state != "ready"]
                raise WorkerStartError(
                    f"{', '.join(child.name for child in late)} did not become ready within "
                    f"{self._topology.start_s_max:g} s; last: {late[0].doing()}; log: {late[0].log_path}",
                    limit=self._topology.start_s_max,
                )
            await asyncio.wait(self._keepers, timeout=WATCH_S, return_when=asyncio.FIRST_COMPLETED)
            self._raise_failure()

    async def until_failed(self) -> None:
        """Watch over the workers for ever; ends only by cancellation or the failure of this supervisor itself."""
        while True:
            await asyncio.wait(self._keepers, timeout=WATCH_S, return_when=asyncio.FIRST_COMPLETED)
            self._raise_failure()
            self._note_ready()

    def kill(self) -> None:
        """End every process of every worker now."""
        for child in self.children:
            _signal_group(child, signal.SIGKILL)

    async def stop(self) -> None:
        """End the workers, then the broker; at most about `STOP_S_MAX` seconds. Idempotent."""
        self._stopping.set()
        for child in self.children:
            if child.process and child.process.returncode is None:
                child.process.terminate()
        if self._keepers:
            _, late = await asyncio.wait(self._keepers, timeout=STOP_S_MAX)
            if late:
                self.kill()
                await asyncio.wait(late)
        if self._presence:
            await self._presence.close()
        if self._bus:
            await self._bus.close()
        if self._server:
            await asyncio.to_thread(self._server.stop)

    def _note_progress(self, what: str, share: float) -> None:
        self.preparing = f"{what} ({share:.0%})"

    async def _keep(self, child: Child) -> None:
        """Run a worker until the topology stops; start it again when it ends after it was once ready."""
        pause_s = RESTART_S_MIN
        while not self._stopping.is_set():
            code = await self._run_once(child)
            _signal_group(child, signal.SIGKILL)  # an engine that outlived its worker still holds memory
            if self._stopping.is_set():
                break
            if child.state != "ready" and not child.restarts:
                raise WorkerStartError(f"{child.name} {_ended(code)}: {child.last_words()}")
            if time.time() - child.started_unix_s > STEADY_S:
                pause_s = RESTART_S_MIN
            child.state, child.restarts = "restarting", child.restarts + 1
            self.recent.append(f"{child.name} {_ended(code)}; starting it again in {pause_s:g} s")
            log.warning("worker_ended", worker=child.name, role=child.settings.role, reason=_ended(code))
            await self._pause(pause_s)
            pause_s = min(2 * pause_s, RESTART_S_MAX)
        child.state = "stopped"

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)

    async def _run_once(self, child: Child) -> int:
        """Start the worker's process and wait for its end; its exit code."""
        settings_path = self._folder / f"{child.name}.json"
        child.started_unix_s = time.time()
        settings_path.write_bytes(msgspec.json.format(msgspec.json.encode(child.settings)))
        with child.log_path.open("ab") as log_file:
            child.process = await asyncio.create_subprocess_exec(
                *command(child.settings, settings_path),
                env=os.environ | child.environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
                start_new_session=True,  # a group of its own: Ctrl-C reaches only us, and one signal its engine too
            )
        child.state, child.connected = "starting", False
        return await child.process.wait()

    def _note_ready(self) -> bool:
        """Take over from the heartbeats who is ready; whether all are."""
        assert self._presence
        beats = {state.worker: state.heartbeat for state in self._presence.workers() if state.heartbeat is not None}
        for child in self.children:
            beat = beats.get(child.name)
            # A heartbeat from before this start is of the process that ended.
            if child.state != "starting" or beat is None or beat.sent_unix_s < child.started_unix_s:
                continue
            child.connected = True
            if beat.ready:
                child.state = "ready"
                if child.restarts:
                    self.recent.append(f"{child.name} is ready again")
        return all(child.state == "ready" for child in self.children)

    def _raise_failure(self) -> None:
        for keeper in self._keepers:
            if keeper.done() and (error := keeper.exception()):
                raise error


@contextlib.asynccontextmanager
async def running(topology: TopologySettings, folder: Path) -> AsyncIterator[LocalTopology]:
    """A topology to `start` in the block, ended in any case behind it."""
    local = LocalTopology(topology, folder)
    try:
        yield local
    finally:
        with contextlib.suppress(PipelineError):
            await local.stop()


def command(settings: WorkerSettings, settings_path: Path) -> list[str]:
    """The command line of a worker. Name and broker stand on it: to be seen in `ps`, and above the environment."""
    return [
        *(sys.executable, "-m", "pipeline.cli", settings.role),
        *("--config", str(settings_path)),
        *("--worker", settings.worker, "--nats", settings.nats),
        *("--parent", str(os.getpid())),
    ]


def tail(path: Path) -> list[str]:
    """The last lines of a log, none where there is no log yet."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def _event(line: str) -> dict[str, Any]:
    """A log line's values; empty for one that is not ours."""
    if not line.startswith("{"):
        return {}
    try:
        return json.loads(line)
    except json.JSONDecodeError:  # its writer is not done with it
        return {}


def _in_words(line: str) -> str:
    event = _event(line)
    if not event:
        return line
    words = str(event.get("event", "")).replace("_", " ")
    return f"{words}: {event['reason']}" if event.get("reason") else words


def _ended(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _signal_group(child: Child, number: signal.Signals) -> None:
    """Signal a worker's process group: its engine's processes too."""
    if child.process:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.process.pid, number)
