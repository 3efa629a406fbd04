"""`batch`: a file of requests in, a file of answers out, in OpenAI's batch format, to be stopped and gone on with.

A line's request id is a function of the line, and the client's name one of the whole file, so a second run finds what
the first one left: answers in the output file, answers in the log of frames, and requests that wait or run. It
submits only the rest, and the broker recognizes what it has taken within `subjects.limits.DEDUPE_S`.
"""

import asyncio
import contextlib
import hashlib
import math
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol, TypeVar

import msgspec
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from pipeline.client import Client
from pipeline.completion import Completion, error_body
from pipeline.errors import BrokerRefused, ConfigError, OutputGone, Overloaded
from pipeline.request_options import choices_of
from pipeline.screen import PLAIN_S, err
from subjects import limits
from subjects.messages import Failure

LINES_MAX: Final = 100_000
FILE_BYTES_MAX: Final = 512 * 1024 * 1024
URLS: Final = {"/v1/chat/completions": True, "/v1/completions": False}
"""What can be asked for, and whether it is a chat."""
ID_CHARS: Final = 32
TICK_S: Final = 0.2
T = TypeVar("T")


class BatchLine(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the input file, as OpenAI defines it."""

    custom_id: str
    url: str
    body: dict[str, Any]
    method: str = "POST"


class BatchResponse(msgspec.Struct, frozen=True, kw_only=True):
    status_code: int
    request_id: str
    body: dict[str, Any]


class BatchError(msgspec.Struct, frozen=True, kw_only=True):
    code: str
    message: str


class BatchAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the output file, as OpenAI defines it. `error` repeats the response's where it is one."""

    id: str
    custom_id: str
    response: BatchResponse | None
    error: BatchError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One request of a batch."""

    request_id: str
    custom_id: str
    url: str
    model: str
    choices: int
    body: dict[str, Any]

    @property
    def chat(self) -> bool:
        return URLS[self.url]

    @property
    def answer_id(self) -> str:
        """Its answer's `id` in the output file; an edited request has another one."""
        return f"batch_req_{self.request_id}"

    def completion(self) -> Completion:
        prompts = choices_of(1, self.body.get("prompt"))
        return Completion(self.request_id, self.model, self.chat, self.choices, prompts)

    def payload(self, deadline_unix_s: float) -> bytes:
        """The request as it is published: the body as it came, so that preprocess checks it, answered whole."""
        own = {"request_id": self.request_id, "model": self.model, "stream": False, "deadline": deadline_unix_s}
        return msgspec.json.encode(self.body | own)


@dataclass(frozen=True, slots=True)
class Batch:
    """A whole input file. `client`: the name under which all its runs ask."""

    client: str
    items: tuple[Item, ...]


def read_batch(file: Path, model: str | None) -> Batch:
    """Read and check every line. `model` stands in for bodies that name none. Raises ConfigError naming the line."""
    try:
        if file.stat().st_size > FILE_BYTES_MAX:
            raise ConfigError(f"{file} is larger than {FILE_BYTES_MAX} bytes", field="file", limit=FILE_BYTES_MAX)
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}", field="file") from None
    items = []
    for number, item in read_lines(content, model):
        if isinstance(item, ConfigError):
            hint = "; give --model NAME for such lines" if item.field == "model" else ""
            raise ConfigError(f"{file}, line {number}: {item}{hint}", field=item.field)
        items.append(item)
    if not 1 <= len(items) <= LINES_MAX:
        raise ConfigError(f"{file} has {len(items)} requests; 1 to {LINES_MAX} are taken", field="file")
    return Batch(f"batch-{hashlib.sha256(content).hexdigest()[:ID_CHARS]}", tuple(items))


def read_lines(content: bytes, model: str | None) -> Iterator[tuple[int, Item | ConfigError]]:
    """Every line that is not empty: its number, and its request or what is wrong with it."""
    numbers: dict[str, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            item = _item(line.strip(), model)
        except ConfigError as error:
            yield number, error
            continue
        first = numbers.setdefault(item.custom_id, number)
        if first != number:
            same = f"the custom_id {item.custom_id!r} is that of line {first}"
            yield number, ConfigError(same, field="custom_id")
        else:
            yield number, item


def _item(line: bytes, model: str | None) -> Item:
    """Raises ConfigError."""
    try:
        parsed = msgspec.json.decode(line, type=BatchLine)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(str(error), field="file") from None
    if parsed.url not in URLS or parsed.method != "POST":
        raise ConfigError(f"{parsed.method} {parsed.url} is not one of POST {', '.join(URLS)}", field="url")
    named = parsed.body.get("model") or model
    if not isinstance(named, str):
        raise ConfigError("the body names no model", field="model")
    return Item(
        request_id=hashlib.sha256(line).hexdigest()[:ID_CHARS],
        custom_id=parsed.custom_id,
        url=parsed.url,
        model=named,
        choices=choices_of(parsed.body.get("n"), parsed.body.get("prompt")),
        body=parsed.body,
    )


class Answers(Protocol):
    """Where the answers of a run go."""

    answered: set[str]
    """The `id` of each."""

    def add(self, answer: BatchAnswer) -> None: ...


class Ledger:
    """The output file: one line an answer, never written twice, whatever ended the runs before."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self.answered: set[str] = set()
        """The `id` of every line."""

    def __enter__(self) -> "Ledger":
        """Read what is there and cut off a line that a killed run began. Raises ConfigError."""
        try:
            self._file = self._path.open("a+b")
            self._file.seek(0)
            whole = self._read()
            self._file.truncate(whole)
            self._file.seek(0, os.SEEK_END)
        except OSError as error:
            raise ConfigError(f"cannot write {self._path}: {error.strerror}", field="output") from None
        return self

    def __exit__(self, *_: object) -> None:
        assert self._file is not None
        self._file.close()

    def add(self, answer: BatchAnswer) -> None:
        """Append an answer; when this returns, no kill of this process can lose it."""
        assert self._file is not None
        self._file.write(msgspec.json.encode(answer) + b"\n")
        self._file.flush()
        self.answered.add(answer.id)

    def _read(self) -> int:
        """Note the answers; the number of bytes that are whole lines."""
        assert self._file is not None
        whole = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                self.answered.add(msgspec.json.decode(line, type=BatchAnswer).id)
            except msgspec.DecodeError as error:
                raise ConfigError(
                    f"{self._path}, line {number} is no answer of a batch: {error}; give another --output",
                    field="output",
                ) from None
            whole += len(line)
        return whole


@dataclass
class Count:
    """How far a run is."""

    total: int
    before: int = 0  # answered by earlier runs
    found: int = 0  # answered meanwhile, found in the log
    attached: int = 0  # accepted earlier: not submitted again
    done: int = 0  # answered, or in a run that waits for no answer submitted; those before included
    lost: int = 0  # answered, but the log had lost it
    tokens: int = 0
    turned_away: int = 0  # times that a full queue said to come again
    failures: dict[str, int] = field(default_factory=dict)  # by error code


class Run:
    """One run of a batch over one connection."""

    def __init__(
        self, client: Client, batch: Batch, ledger: Answers, *, deadline_s: float, until_unix_s: float = math.inf
    ) -> None:
        """`deadline_s`: how long each request may take from its submission; `until_unix_s`: none may take longer."""
        self._client, self._items, self._ledger, self._deadline_s = client, batch.items, ledger, deadline_s
        self._until_unix_s = until_unix_s
        self._accepted: set[str] = set()  # by the broker, of an earlier run
        self._begun: set[str] = set()  # by this run, and without an answer
        self.count = Count(total=len(batch.items))

    async def recover(self) -> None:
        """Take over what earlier runs left: answers in the log, and requests that wait or run."""
        missing = {item.request_id: item for item in self._missing()}
        self.count.before = self.count.done = len(self._items) - len(missing)
        held = await self._held()  # before the log: a request moves from the queues to the log
        logged: dict[str, Completion] = {}
        async for frame in self._client.stored():
            if item := missing.get(frame.request_id):
                completion = logged.setdefault(item.request_id, item.completion())
                completion.add(frame)
                if completion.whole:
                    self._settle(missing.pop(item.request_id), completion)
                    self.count.found += 1
        self._accepted = (held | logged.keys()) & missing.keys()
        self.count.attached = len(self._accepted)

    async def _held(self) -> set[str]:
        """What an earlier run has submitted and nobody has answered; the rest the broker may recognize."""
        try:
            held = await self._client.held(messages_max=2 * LINES_MAX, bytes_max=2 * FILE_BYTES_MAX)
        except BrokerRefused:
            raise ConfigError("there are no streams yet: start the pipeline's first worker", field="nats") from None
        return held or set()

    async def answer_all(self, in_flight: int) -> None:
        """Get every missing answer, `in_flight` at a time. Raises PipelineError; what was answered is kept."""
        await _share(self._missing(), self._answer, in_flight)

    async def cancel(self) -> None:
        """Have the workers end whatever was submitted and is not answered. Nothing may run any more here."""
        for item in self._missing():
            if item.request_id in self._begun or item.request_id in self._accepted:
                await self._client.cancel(item.request_id)

    async def submit_all(self, in_flight: int) -> None:
        """Submit every request that was not, and wait for no answer. Raises PipelineError."""
        await _share(self._missing(), self._submit, in_flight)

    def _missing(self) -> Iterator[Item]:
        """The items without an answer, looked up as they are asked for."""
        return (item for item in self._items if item.answer_id not in self._ledger.answered)

    async def _answer(self, item: Item) -> None:
        self._begun.add(item.request_id)
        try:
            completion = await self._patiently(self._completed, item)
        except OutputGone:
            self.count.lost += 1
        else:
            self._settle(item, completion)

    async def _submit(self, item: Item) -> None:
        if item.request_id not in self._accepted:
            await self._patiently(self._published, item)
        self.count.done += 1

    async def _patiently(self, attempt: Callable[[Item], Awaitable[T]], item: Item) -> T:
        """Attempt it until the model's queue has room."""
        while True:
            try:
                return await attempt(item)
            except Overloaded as full:
                self.count.turned_away += 1
                await asyncio.sleep(full.retry_after_s or 1.0)

    async def _published(self, item: Item) -> None:
        await self._client.publish(item.model, item.payload(self._deadline()), item.request_id)

    async def _completed(self, item: Item) -> Completion:
        deadline = self._deadline()
        if item.request_id in self._accepted:
            frames = self._client.resume(item.request_id, choices=item.choices, deadline=deadline, accepted=True)
        else:
            payload = item.payload(deadline)
            frames = self._client.run(item.model, payload, item.request_id, item.choices, deadline_unix_s=deadline)
        completion = item.completion()
        async with aclosing(frames):
            async for frame in frames:
                completion.add(frame)
        return completion

    def _deadline(self) -> float:
        return min(time.time() + self._deadline_s, self._until_unix_s)

    def _settle(self, item: Item, completion: Completion) -> None:
        failure = completion.failure
        self._begun.discard(item.request_id)
        self._ledger.add(_answer(item, completion, failure))
        self.count.done += 1
        self.count.tokens += completion.usage().completion_tokens
        if failure:
            self.count.failures[failure.code] = self.count.failures.get(failure.code, 0) + 1


def _answer(item: Item, completion: Completion, failure: Failure | None) -> BatchAnswer:
    body = error_body(failure) if failure else completion.body(time.time())
    return BatchAnswer(
        id=item.answer_id,
        custom_id=item.custom_id,
        response=BatchResponse(status_code=failure.status if failure else 200, request_id=item.request_id, body=body),
        error=BatchError(code=failure.code, message=failure.message) if failure else None,
    )


async def _share(items: Iterator[Item], work: Callable[[Item], Awaitable[None]], at_once: int) -> None:
    """Do the work on every item, `at_once` at a time. The first failure ends the others and is raised."""

    async def take() -> None:
        for item in items:
            await work(item)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(take())
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None


async def run_batch(
    url: str,
    file: Path,
    output: Path | None,
    *,
    model: str | None,
    in_flight: int,
    deadline_s: float,
    submit_only: bool,
) -> int:
    """Answer every line of a file, or only submit them; the exit code: 1 where requests failed or answers were lost.

    Raises ConfigError for a file that is no batch, and Transient where the broker is gone for long. Ended anywhere, it
    is gone on with by the same call.
    """
    batch = read_batch(file, model)
    path = output or file.with_suffix(".out.jsonl")
    with Ledger(path) as ledger:
        async with Client.connect(url, client=batch.client) as client:
            run = Run(client, batch, ledger, deadline_s=deadline_s)
            try:
                with progress(run.count, "submitting" if submit_only else "answering"):
                    await run.recover()
                    await (run.submit_all if submit_only else run.answer_all)(in_flight)
            except asyncio.CancelledError:  # Ctrl-C
                err.print(f"stopped at {run.count.done:,} of {run.count.total:,}; the same command goes on from here")
                raise
    if submit_only:
        err.print(f"{run.count.total} requests are accepted; the same command without --submit gets the answers")
        return 0
    err.print(_summary(run.count, path), markup=False)
    return 1 if run.count.failures or run.count.lost else 0


def _summary(count: Count, path: Path) -> str:
    answered = count.done
    parts = [f"{answered:,} of {count.total:,} answered, in {path}"]
    if earlier := count.before + count.found + count.attached:
        parts.append(f"{earlier:,} of them asked for by earlier runs")
    if count.failures:
        listed = ", ".join(f"{number} {code}" for code, number in sorted(count.failures.items()))
        parts.append(f"{sum(count.failures.values()):,} with an error ({listed})")
    if count.lost:
        parts.append(
            f"{count.lost:,} answers were lost by the log; after {limits.DEDUPE_S:g} s the same command asks again"
        )
    return "; ".join(parts)


@contextlib.contextmanager
def progress(count: Count, doing: str) -> Iterator[None]:
    """Show how far a run is while the block runs, on standard error: a bar on a terminal, else a line now and then."""
    columns = (
        TextColumn(doing),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(doing, total=count.total, note="")
        ticker = asyncio.get_running_loop().create_task(_tick(bar, task, count, doing))
        try:
            yield
        finally:
            ticker.cancel()


async def _tick(bar: Progress, task: TaskID, count: Count, doing: str) -> None:
    said_s, began_s = time.monotonic(), time.monotonic()
    turned_away = 0
    while True:
        full = "; the queue is full" if count.turned_away > turned_away else ""
        turned_away = count.turned_away
        failed = f"; {sum(count.failures.values())} failed" if count.failures else ""
        speed = count.tokens / max(time.monotonic() - began_s, 1e-3)
        note = f"{speed:,.0f} tokens/s{failed}{full}" if count.tokens else f"{failed}{full}".removeprefix("; ")
        bar.update(task, completed=count.done, note=note)
        if bar.disable and time.monotonic() - said_s > PLAIN_S:
            said_s = time.monotonic()
            err.print(f"{doing}: {count.done:,} of {count.total:,} {note}", markup=False)
        await asyncio.sleep(TICK_S)
