"""Claims over a real broker: an answer that was lost on its way must not leave a room to nobody."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from pipeline.bus import Bus, Received
from pipeline.engine.disaggregated import Claims, DisaggregatedEngine
from pipeline.engine.protocol import EngineInfo, EngineOutput, EngineRequest
from pipeline.errors import NoResponders
from pipeline.nats_server import NatsServer
from subjects import names, streams
from subjects.codec import TokenIds, decode
from subjects.messages import Load, PrefillTask, StopConditions

DEADLINE_S = 10.0
PROMPT = TokenIds.of([5, 6, 7])


class Decoding:
    """A decode engine that waits for `kv`."""

    def __init__(self) -> None:
        self.kv = asyncio.Event()

    async def start(self) -> EngineInfo:
        raise NotImplementedError

    async def generate(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        assert request.room is not None
        await self.kv.wait()
        yield EngineOutput(token_ids=TokenIds.of([1]), finish_reason="stop")

    async def warm_up(self) -> None: ...

    async def died(self) -> str:
        raise NotImplementedError

    async def load(self) -> Load:
        return Load()

    async def close(self) -> None: ...


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NatsServer]:
    server = NatsServer(tmp_path / "nats")
    server.start()
    yield server
    server.kill()


@pytest_asyncio.fixture
async def bus(server: NatsServer) -> AsyncIterator[Bus]:
    bus = await Bus.connect(server.url, name="test")
    await bus.provision(streams.STREAMS, (), ())
    yield bus
    await bus.close()


async def offered(bus: Bus, decoding: Decoding) -> tuple[PrefillTask, "asyncio.Task[list[EngineOutput]]"]:
    """A task that decode worker "d" has offered, and its answer to come."""
    tasks: asyncio.Queue[PrefillTask] = asyncio.Queue()
    await bus.subscribe(
        names.PREFILL_ANY.any(), lambda received: tasks.put_nowait(decode(PrefillTask, received.payload))
    )
    engine = DisaggregatedEngine(decoding, bus, "d", "m")
    await engine.listen()
    await bus.flush()
    request = EngineRequest(rid="r", request_id="r", token_ids=PROMPT, stop=StopConditions(max_tokens=1))

    async def answer() -> list[EngineOutput]:
        return [output async for output in engine.generate(request)]

    answering = asyncio.create_task(answer())
    return await asyncio.wait_for(tasks.get(), DEADLINE_S), answering


async def test_one_worker_gets_a_room_and_only_once(bus: Bus) -> None:
    decoding = Decoding()
    task, answering = await offered(bus, decoding)
    first, second = Claims(bus, "p0", "i"), Claims(bus, "p1", "i")
    assert await first.claim(task)
    assert await second.claim(task) is None
    assert await first.claim(task) is None, "a task that comes again is not prefilled again"
    decoding.kv.set()
    assert len(await asyncio.wait_for(answering, DEADLINE_S)) == 1


async def test_a_lost_answer_is_asked_for_again(bus: Bus, server: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner grants, and its first answer gets lost: without a second one it would wait for ever."""
    lost: list[Received] = []
    respond = bus.respond

    async def lossy(received: Received, payload: bytes, headers: dict[str, str] | None = None) -> None:
        if lost:
            await respond(received, payload, headers)
        else:
            lost.append(received)

    monkeypatch.setattr(bus, "respond", lossy)
    decoding = Decoding()
    task, answering = await offered(bus, decoding)
    other = await Bus.connect(server.url, name="prefill")
    assert await asyncio.wait_for(Claims(other, "p0", "i").claim(task), DEADLINE_S)
    decoding.kv.set()
    await asyncio.wait_for(answering, DEADLINE_S)
    await other.close()
    assert lost


async def test_a_gone_owner_costs_one_message(bus: Bus) -> None:
    task = PrefillTask(
        request_id="r", room=3, owner="gone", model="m", token_ids=PROMPT, stop=StopConditions(max_tokens=1)
    )
    with pytest.raises(NoResponders):
        await asyncio.wait_for(Claims(bus, "p0", "i").claim(task), DEADLINE_S)
