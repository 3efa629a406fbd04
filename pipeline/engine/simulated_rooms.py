"""Where two simulated engines meet: prefill holds the KV of a room, decode asks for it until it has it.

There is no KV; a digest of the prompt stands for it, so that decode notices another prompt's. Decode's question goes
to the prefill worker's incarnation itself: no responders means that it is gone, silence that it is frozen, and a room
that it does not know that it gave the room up.
"""

import asyncio
import contextlib
import hashlib
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final, Literal

from pipeline.bus import Bus, Received
from pipeline.engine.protocol import Room
from pipeline.errors import BusUnavailable, EngineFailed, NoResponders, PrefillLost
from subjects import names
from subjects.codec import TokenIds, decode, encode
from subjects.messages import Message

COMING_S: Final = 0.25
"""Prefill answers a question about KV that is not there yet after this long."""
ASK_S_MAX: Final = 1.0
SILENCE_S_MAX: Final = 3.0
"""A prefill worker that answers nothing for this long is lost."""
UNKNOWN_S_MAX: Final = 1.0
"""Decode may ask before prefill has heard that its claim was granted."""
ABSENT_MAX: Final = 3
ABSENT_PAUSE_S: Final = 0.1
"""After an outage decode may be back before prefill is."""
UNFETCHED_S_MAX: Final = 10.0
FETCHED_MAX: Final = 4096
"""Rooms remembered after decode had their KV: the answer that said so may have been lost."""


class KvQuestion(Message, frozen=True, kw_only=True):
    """Is the KV of this room there?"""

    room: int


class KvAnswer(Message, frozen=True, kw_only=True):
    state: Literal["ready", "coming", "unknown"]
    digest: bytes = b""  # with "ready": of the prompt


def digest_of(prompt: TokenIds) -> bytes:
    """What stands for a prompt's KV."""
    return hashlib.blake2b(prompt.raw, digest_size=8).digest()


@dataclass(slots=True)
class _Held:
    """A room that prefill works on, or whose KV waits for decode."""

    prompt: TokenIds
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    fetched: asyncio.Event = field(default_factory=asyncio.Event)


class PrefillRooms:
    """Prefill's side: answers for the rooms of this incarnation."""

    def __init__(self, bus: Bus, worker: str, incarnation: str) -> None:
        self._bus, self._subject = bus, names.PEER.of(worker=worker, rank=incarnation)
        self._held: dict[int, _Held] = {}
        self._fetched: OrderedDict[int, bytes] = OrderedDict()

    async def listen(self) -> None:
        await self._bus.subscribe(self._subject, self._hear)

    @property
    def kv_tokens(self) -> int:
        """Prompt tokens whose KV is being made or waits."""
        return sum(len(held.prompt) for held in self._held.values())

    @contextlib.contextmanager
    def holding(self, room: int, prompt: TokenIds):
        """The room is open while the block runs; then it is forgotten, unless decode had its KV."""
        held = self._held[room] = _Held(prompt)
        try:
            yield held
        finally:
            del self._held[room]

    async def until_fetched(self, held: _Held) -> None:
        """The KV is there: wait for decode. Raises PrefillLost where it does not come."""
        held.ready.set()
        try:
            await asyncio.wait_for(held.fetched.wait(), UNFETCHED_S_MAX)
        except TimeoutError:
            raise PrefillLost(f"decode did not take the KV within {UNFETCHED_S_MAX:g} s") from None

    def _hear(self, received: Received) -> None:
        self._bus.spawn(self._answer(received, decode(KvQuestion, received.payload).room))

    async def _answer(self, received: Received, room: int) -> None:
        held = self._held.get(room)
        if held is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(held.ready.wait(), COMING_S)
            if held.ready.is_set():
                self._note_fetched(room, held)
        if (digest := self._fetched.get(room)) is not None:
            answer = KvAnswer(state="ready", digest=digest)
        else:
            answer = KvAnswer(state="coming" if room in self._held else "unknown")
        await self._bus.respond(received, encode(answer))

    def _note_fetched(self, room: int, held: _Held) -> None:
        self._fetched[room] = digest_of(held.prompt)
        held.fetched.set()
        while len(self._fetched) > FETCHED_MAX:
            self._fetched.popitem(last=False)


class KvFetcher:
    """Decode's side."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def fetch(self, room: Room, prompt: TokenIds) -> None:
        """Wait until the prompt's KV is here. Raises PrefillLost, and EngineFailed for another prompt's KV."""
        subject = names.PEER.of(worker=room.prefill_worker, rank=room.prefill_incarnation)
        question = encode(KvQuestion(room=room.number))
        began_s = heard_s = time.monotonic()
        absent = 0
        while True:
            try:
                answer = decode(KvAnswer, (await self._bus.request(subject, question, timeout_s=ASK_S_MAX)).payload)
            except NoResponders:
                absent += 1
                if absent == ABSENT_MAX:
                    raise PrefillLost(f"prefill worker {room.prefill_worker} is gone") from None
                await asyncio.sleep(ABSENT_PAUSE_S)
                continue
            except BusUnavailable:
                since_s = max(heard_s, self._bus.connected_since_s)
                if self._bus.connected and time.monotonic() - since_s > SILENCE_S_MAX:
                    raise PrefillLost(f"prefill worker {room.prefill_worker} does not answer") from None
                continue
            heard_s, absent = time.monotonic(), 0
            if answer.state == "ready":
                _check(answer, prompt)
                return
            if answer.state == "unknown":
                if heard_s - began_s > UNKNOWN_S_MAX:
                    raise PrefillLost(f"prefill worker {room.prefill_worker} does not know the room {room.number}")
                await asyncio.sleep(COMING_S / 10)


def _check(answer: KvAnswer, prompt: TokenIds) -> None:
    if answer.digest != digest_of(prompt):
        raise EngineFailed("the KV that came is another prompt's")
