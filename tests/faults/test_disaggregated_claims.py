"""Offers and claims over a real broker: neither a lost answer nor a lost worker may leave a room to nobody."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from pipeline.bus import Bus, Received
from pipeline.engine.disaggregated import Claims, DisaggregatedEngine
from pipeline.engine.protocol import EngineInfo, EngineOutput, EngineRequest
from pipeline.errors import NoResponders, PrefillLost
from pipeline.nats_server import NatsServer
from pipeline.presence import Presence
from subjects import names, streams
from subjects.codec import TokenIds, decode, encode
from subjects.messages import Heartbeat, Load, PrefillTask, StopConditions

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


class Losing(Decoding):
    """Loses the first prefill worker it is given."""

    def __init__(self) -> None:
        super().__init__()
        self._lost = False

    async def generate(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        if not self._lost:
            self._lost = True
            raise PrefillLost("p1 is lost")
        yield EngineOutput(token_ids=TokenIds.of([1]), finish_reason="stop")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NatsServer]:
    server = NatsServer(tmp_path / "nats")
    server.start()
    yield server
    server.kill()


@pytest_asyncio.fixture
async def bus(server: NatsServer) -> AsyncIterator[Bus]:
    bus = await Bus.connect(server.url, name="test")
    await bus.provision(streams.STREAMS, (), streams.BUCKETS)
    yield bus
    await bus.close()


class Ranked:
    """One prefill worker ranks best, for whatever prompt."""

    def __init__(self, best: str | None) -> None:
        self._best = best

    async def choose(self, model: str, token_ids: TokenIds, session: str | None = None, salt: str = "") -> str | None:
        return self._best


def beat(worker: str) -> Heartbeat:
    return Heartbeat(worker=worker, role="prefill", incarnation="i", model="m", ready=True)


async def offered(bus: Bus, decoding: Decoding) -> tuple[PrefillTask, "asyncio.Task[list[EngineOutput]]"]:
    """A task that decode worker "d" has offered, and its answer to come."""
    tasks: asyncio.Queue[PrefillTask] = asyncio.Queue()
    await bus.subscribe(
        names.PREFILL_ANY.any(), lambda received: tasks.put_nowait(decode(PrefillTask, received.payload))
    )
    engine = DisaggregatedEngine(decoding, bus, "d", "m", Presence(bus), Ranked(None))
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


async def test_two_offers_of_a_room_at_once_are_one_room(bus: Bus) -> None:
    """A worker that was taken for dead may pull what was addressed to it and what was offered to all."""
    decoding = Decoding()
    task, answering = await offered(bus, decoding)
    claims = Claims(bus, "p0", "i")
    async with asyncio.timeout(DEADLINE_S):
        rooms = await asyncio.gather(claims.claim(task), claims.claim(task))
    assert sorted(room is None for room in rooms) == [False, True]
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


async def test_the_best_worker_has_the_first_offer_and_anyone_the_next_where_it_is_lost(bus: Bus) -> None:
    """It goes down before its claim: the same room is anyone's. Its engine is lost after a claim: a new room is."""
    presence = Presence(bus)
    await presence.start()
    for worker in ("p0", "p1"):
        await bus.publish(names.HEARTBEAT.of(role="prefill", worker=worker), encode(beat(worker)))
    offers: asyncio.Queue[Received] = asyncio.Queue()
    await bus.subscribe(names.PREFILL_TASKS, offers.put_nowait)
    decoding = Losing()
    engine = DisaggregatedEngine(decoding, bus, "d", "m", presence, Ranked("p0"))
    await engine.listen()
    await bus.flush()
    request = EngineRequest(rid="r", request_id="r", token_ids=PROMPT, stop=StopConditions(max_tokens=1))

    async def answer() -> list[EngineOutput]:
        return [output async for output in engine.generate(request)]

    async def next_offer() -> tuple[str, PrefillTask]:
        offer = await asyncio.wait_for(offers.get(), DEADLINE_S)
        return offer.subject, decode(PrefillTask, offer.payload)

    answering = asyncio.create_task(answer())
    subject, first = await next_offer()
    assert subject == names.PREFILL_WORKER.of(model="m", worker="p0")
    successor = msgspec.structs.replace(beat("p0"), incarnation="j")  # as when heartbeats stop, but at once
    await bus.publish(names.HEARTBEAT.of(role="prefill", worker="p0"), encode(successor))
    subject, again = await next_offer()
    assert (subject, again.room) == (names.PREFILL_ANY.of(model="m"), first.room)
    assert await Claims(bus, "p1", "i").claim(again)
    assert await Claims(bus, "p0", "j").claim(first) is None
    subject, second = await next_offer()
    assert subject == names.PREFILL_ANY.of(model="m") and second.room != first.room
    assert await Claims(bus, "p1", "i").claim(second)
    assert len(await asyncio.wait_for(answering, DEADLINE_S)) == 1
    await presence.close()


async def test_a_gone_owner_costs_one_message(bus: Bus) -> None:
    task = PrefillTask(
        request_id="r", room=3, owner="gone", model="m", token_ids=PROMPT, stop=StopConditions(max_tokens=1)
    )
    with pytest.raises(NoResponders):
        await asyncio.wait_for(Claims(bus, "p0", "i").claim(task), DEADLINE_S)
