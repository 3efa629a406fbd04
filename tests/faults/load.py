"""A load of requests whose every answer can be checked, read by the Python client as any user would."""

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from random import Random

from pipeline.client import Client
from pipeline.engine.simulated import History
from pipeline.errors import BusUnavailable, Overloaded, PipelineError
from subjects.codec import TokenIds, encode
from subjects.messages import Frame, Request

MODEL = "smollm2"
REQUEST_S_MAX = 300.0
RETRY_S = 0.2


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One request of the load."""

    request_id: str
    prompt: tuple[int, ...]
    max_tokens: int
    choices: int
    stream: bool

    def payload(self, deadline_unix_s: float) -> bytes:
        request = Request(
            prompt=self.prompt,
            request_id=self.request_id,
            max_tokens=self.max_tokens,
            n=self.choices,
            stream=self.stream,
            ignore_eos=True,
            deadline=deadline_unix_s,
        )
        return encode(request)


@dataclass(frozen=True)
class Mixed:
    """What a reader got that no worker would have drawn."""

    prompt: tuple[int, ...]
    tokens: list[int]
    how: str


@dataclass
class Results:
    """What became of the load."""

    whole: int = 0
    choices: Counter[str] = field(default_factory=Counter)  # by request id: how many it has
    errors: Counter[str] = field(default_factory=Counter)  # by code
    attempts: Counter[int] = field(default_factory=Counter)  # of terminal frames
    resumed: int = 0  # choices with tokens of more than one attempt
    seconds: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    mixed: dict[tuple[str, int], Mixed] = field(default_factory=dict)  # by request id and choice


def draw(number: int, random: Random) -> Asked:
    """Mostly short answers, some long ones to be interrupted, some of two choices, some in one piece."""
    long = random.random() < 0.2
    return Asked(
        request_id=f"r{number}",
        prompt=tuple(random.randrange(3, 30_000) for _ in range(random.randint(2, 40))),
        max_tokens=random.randint(60, 160) if long else random.randint(2, 16),
        choices=2 if random.random() < 0.1 else 1,
        stream=random.random() < 0.9,
    )


def misfit(prompt: tuple[int, ...], tokens: list[int], seeds: tuple[int, ...]) -> int | None:
    """Where the output does not follow: each token must be what some worker draws after exactly those before it.

    Without EOS; the place of the first token that no worker would have drawn there, None where all fit.
    """
    histories = [History(TokenIds.of(list(prompt)), seed) for seed in seeds]
    for place, token in enumerate(tokens):
        if token not in [history.next() for history in histories]:
            return place
        for history in histories:
            history.append(token)
    return None


class Load:
    """Users that each ask, read the whole answer, check it and ask again."""

    def __init__(self, client: Client, seed: int, worker_seeds: tuple[int, ...]) -> None:
        self._client, self._random, self._seeds = client, Random(seed), worker_seeds
        self._number = 0
        self._asked_enough = asyncio.Event()
        self.results = Results()

    @property
    def asked(self) -> int:
        return self._number

    def stop(self) -> None:
        """Ask no more; `run` returns when everything asked is answered."""
        self._asked_enough.set()

    async def run(self, users: int) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(users):
                group.create_task(self._user())

    async def _user(self) -> None:
        while not self._asked_enough.is_set():
            asked = draw(self._number, self._random)
            self._number += 1
            began_s = time.monotonic()
            await self._ask(asked)
            self.results.seconds.append(time.monotonic() - began_s)

    async def _ask(self, asked: Asked) -> None:
        deadline_unix_s = time.time() + REQUEST_S_MAX
        payload = asked.payload(deadline_unix_s)
        frames: list[Frame] = []
        while True:
            try:
                run = self._client.run(MODEL, payload, asked.request_id, asked.choices, deadline_unix_s=deadline_unix_s)
                frames = [frame async for frame in run]
                break
            except (BusUnavailable, Overloaded):
                await asyncio.sleep(RETRY_S)  # not accepted, or nobody knows: ask again under the same id
            except PipelineError as error:
                self.results.wrong.append(f"{asked.request_id}: the reader got {error.code}: {error}")
                return
        self._check(asked, frames)

    def _check(self, asked: Asked, frames: list[Frame]) -> None:
        results = self.results
        results.choices[asked.request_id] = asked.choices
        for choice in range(asked.choices):
            own = [frame for frame in frames if frame.choice == choice]
            ends = [frame for frame in own if frame.finish_reason]
            tokens: list[int] = []
            for frame in own:
                if frame.token_ids and frame.index != len(tokens):
                    results.wrong.append(f"{asked.request_id}.{choice}: index {frame.index} after {len(tokens)} tokens")
                tokens += frame.token_ids.tolist()
            if len(ends) != 1:
                results.wrong.append(f"{asked.request_id}.{choice}: {len(ends)} terminal frames")
                continue
            results.attempts[ends[0].attempt] += 1
            results.resumed += len({frame.attempt for frame in own if frame.token_ids}) > 1
            if ends[0].error is not None:
                results.errors[ends[0].error.code] += 1
                continue
            if len(tokens) != asked.max_tokens or ends[0].finish_reason != "length":
                results.wrong.append(f"{asked.request_id}.{choice}: {len(tokens)} of {asked.max_tokens} tokens")
            if (place := misfit(asked.prompt, tokens, self._seeds)) is not None:
                parts = {frame.attempt: frame.index for frame in reversed(own)}
                results.mixed[asked.request_id, choice] = Mixed(
                    asked.prompt, tokens, f"token {place} does not follow; attempts from token {parts}"
                )
        results.whole += 1
