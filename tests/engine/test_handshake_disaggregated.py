"""Two real engines on CPU, prefill and decode, with nothing between them but a broker and shared memory."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.engine.sglang.handshake import ONE_MACHINE_ENVIRONMENT, HandshakeSettings, bootstrap_host
from pipeline.nats_server import NatsServer

pytestmark = [pytest.mark.full, pytest.mark.engine, pytest.mark.timeout(900)]

START_S = 400.0  # several engines start at once on two busy cores
ANSWER_S = 90.0
DEATH_S = 1.5  # of which the kernel takes a part, as it frees a process's memory before it closes its sockets
PROMPTS = [
    "The capital of France is",
    "Once upon a time",
    "def fibonacci(n):",
    "Water boils at",
    "Hello" + " world" * 700,
]


class Child:
    """One engine in its own process group."""

    def __init__(self, role: str, environment: dict[str, str]) -> None:
        script = Path(__file__).with_name("handshake_engine.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script), role],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
            start_new_session=True,
        )
        self._answers: dict[str, dict[str, Any]] = {}
        self._changed = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError), self._changed:
                answer = json.loads(line)
                self._answers[answer["id"]] = answer
                self._changed.notify_all()
        with self._changed:
            self._answers["end"] = {"id": "end"}
            self._changed.notify_all()

    def tell(self, **message: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def answer(self, name: str, timeout_s: float = ANSWER_S) -> dict[str, Any]:
        with self._changed:
            arrived = self._changed.wait_for(lambda: name in self._answers or "end" in self._answers, timeout_s)
            assert arrived, f"{name} was not answered in {timeout_s:.0f} s"
            return self._answers[name]

    def listening(self) -> list[str]:
        """The TCP sockets on which any process of the engine listens."""
        mine = set()
        for process in self._group():
            for fd in Path(f"/proc/{process}/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):
                    mine.add(str(fd.readlink()))
        tables = [Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6")]
        lines = [line.split() for table in tables for line in table.splitlines()]
        return [line[1] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in mine]

    def _group(self) -> Iterator[int]:
        for process in Path("/proc").iterdir():
            with contextlib.suppress(ProcessLookupError, ValueError):
                if os.getpgid(int(process.name)) == self._process.pid:
                    yield int(process.name)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Pair:
    """A prefill and a decode engine; the test plays the stages."""

    def __init__(self, server: NatsServer) -> None:
        self.server, self._room, self._incarnation = server, 1000, 0
        self.decode = self._child("decode", "d1")
        self.start_prefill()
        self.decode.answer("ready", START_S)

    def _child(self, role: Any, incarnation: str) -> Child:
        settings = HandshakeSettings(url=self.server.url, worker=f"{role}-0", incarnation=incarnation, role=role)
        return Child(role, settings.to_environment() | ONE_MACHINE_ENVIRONMENT)

    def start_prefill(self) -> None:
        self._incarnation += 1
        self.prefill = self._child("prefill", f"p{self._incarnation}")
        self.prefill.answer("ready", START_S)

    def submit(self, prompt: str) -> str:
        self._room += 1
        request = generation(prompt) | {
            "bootstrap_host": bootstrap_host("prefill-0", f"p{self._incarnation}"),
            "bootstrap_room": self._room,
            "rid": str(self._room),
        }
        for engine in (self.decode, self.prefill):
            engine.tell(id=str(self._room), args=request)
        return str(self._room)

    def close(self) -> None:
        self.prefill.kill()
        self.decode.kill()


def generation(prompt: str) -> dict[str, Any]:
    return {"prompt": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": 24}}


@pytest.fixture(scope="module")
def expected() -> dict[str, list[int]]:
    """What an aggregated engine says to each prompt, alone."""
    engine = Child("aggregated", {})
    try:
        engine.answer("ready", START_S)
        answers = {}
        for number, prompt in enumerate(PROMPTS):
            engine.tell(id=str(number), args=generation(prompt))
            answers[prompt] = engine.answer(str(number))["ids"]
        return answers
    finally:
        engine.kill()


@pytest.fixture(scope="module")
def pair(expected: dict[str, list[int]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    server = NatsServer(tmp_path_factory.mktemp("nats"))
    server.start()
    pair = Pair(server)
    yield pair
    pair.close()
    server.kill()


def test_greedy_tokens_equal_the_aggregated_ones(pair: Pair, expected: dict[str, list[int]]) -> None:
    for prompt in PROMPTS:
        assert pair.decode.answer(pair.submit(prompt))["ids"] == expected[prompt]


def test_many_at_once_all_end_well(pair: Pair) -> None:
    rooms = [pair.submit(prompt) for prompt in PROMPTS * 2]
    assert [pair.decode.answer(room)["finish"]["type"] for room in rooms] == ["length"] * len(rooms)


def test_no_engine_listens_on_tcp(pair: Pair) -> None:
    assert (pair.prefill.listening(), pair.decode.listening()) == ([], [])


def test_a_broker_restart_costs_no_room(pair: Pair) -> None:
    room = pair.submit("word " * 2000)
    with pytest.raises(AssertionError):
        pair.decode.answer(room, 0.5)  # it is in the forward pass
    pair.server.kill()
    pair.server.start()
    assert pair.decode.answer(room)["finish"]["type"] == "length"
    assert pair.decode.answer(pair.submit(PROMPTS[0]))["finish"]["type"] == "length"


def test_a_killed_prefill_fails_its_room_soon_and_its_successor_serves(
    pair: Pair, expected: dict[str, list[int]]
) -> None:
    room = pair.submit("word " * 3000)
    with pytest.raises(AssertionError):
        pair.decode.answer(room, 1.0)  # it is in the forward pass
    killed_s = time.monotonic()
    pair.prefill.kill()
    finish = pair.decode.answer(room)["finish"]
    assert finish["type"] == "abort"
    assert "prefill-0.p1" in finish["message"]
    assert time.monotonic() - killed_s < DEATH_S
    pair.start_prefill()
    assert pair.decode.answer(pair.submit(PROMPTS[0]))["ids"] == expected[PROMPTS[0]]
