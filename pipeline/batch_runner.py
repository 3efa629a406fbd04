"""Works on batches: takes what nobody works on, asks the pipeline for each line, and puts the answers into files.

Every gateway runs one. A batch's lines are submitted under ids that follow from the batch and the line, so a gateway
that takes a batch over finds in the log what the one before it was waiting for, and submits only the rest.
"""

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Final

import msgspec
import structlog

from pipeline.batch import ID_CHARS, Batch, BatchAnswer, BatchError, Item, Run, read_lines
from pipeline.batch_answers import KeptAnswers
from pipeline.batches import ENDED, Batches
from pipeline.bus import Bus, Objects
from pipeline.client import Client
from pipeline.errors import Busy, ConfigError, NotFound, Permanent, PipelineError, Transient
from pipeline.files import Files
from pipeline.lease import LeaseLost
from subjects import limits
from subjects.codec import decode
from subjects.messages import BatchAnswers, BatchLineError, BatchState, BatchStatus

TICK_S: Final = 1.0
STEP_S: Final = 0.25
"""How often is looked whether answers are to be kept."""
SWEEP_S: Final = 600.0
ERRORS_MAX: Final = 100
"""So many lines of a refused file are told of."""
PRIORITY: Final = -1
"""Of a line that names none: batches take what interactive requests leave."""
DEADLINE_SLACK_S: Final = 60.0
"""A line's deadline stays so far below the longest that is allowed, for clocks that differ."""
SPARE_BYTES: Final = 512
"""What a payload may grow by until it is published."""
HAND_ON_S_MAX: Final = 3.0
NOT_IN_TIME: Final = BatchError(
    code="batch_expired", message="this request was not executed before the batch's completion window ended"
)
NOT_KEPT: Final = BatchError(code="output_gone", message="the pipeline answered, but its log lost the answer")

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class Stores:
    """Where batches and their files are."""

    bus: Bus
    objects: Objects
    batches: Batches
    files: Files


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How much is done at once, and how soon it is kept."""

    batches_max: int  # at once; 0: none
    in_flight: int  # lines of one batch
    flush_s: float  # an answer waits no longer for others to be put with


class BatchRunner:
    """Takes batches up and over, for as long as `run` runs."""

    def __init__(self, stores: Stores, owner: str, pace: Pace) -> None:
        """`owner`: this process's own name, different after each start."""
        self._stores, self._owner, self._pace = stores, owner, pace
        self._seen: dict[str, tuple[BatchState, float]] = {}  # what has not ended, and since when it is unchanged
        self._jobs: dict[str, Job] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Work until cancelled; then what is in work is handed on."""
        watch = await self._stores.batches.watch(self._note)
        sweep_s = time.monotonic() + SWEEP_S
        try:
            while True:
                self._take_some()
                if time.monotonic() > sweep_s:
                    sweep_s = time.monotonic() + SWEEP_S
                    self._stores.bus.spawn(self._stores.files.sweep())
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(TICK_S):
                        await self._changed.wait()
                self._changed.clear()
        finally:
            await watch.stop()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _note(self, key: str, value: bytes | None) -> None:
        state = decode(BatchState, value) if value is not None else None
        if state is None or state.status in ENDED:
            self._seen.pop(key, None)
            return
        self._seen[key] = state, time.monotonic()
        if state.status == "cancelling" and key in self._jobs:
            self._jobs[key].cancelling.set()
        if not state.owner:
            self._changed.set()

    def _take_some(self) -> None:
        """Begin on the oldest batches that nobody works on, up to `batches_max`."""
        free = [
            (state.created_unix_s, key) for key, (state, since_s) in self._seen.items() if self._free(state, since_s)
        ]
        for _, key in sorted(free):
            if key not in self._jobs and len(self._jobs) < self._pace.batches_max:
                job = self._jobs[key] = Job(self._stores, self._seen[key][0], self._owner, self._pace)
                task = asyncio.create_task(job.run(), name="batch")
                self._tasks.add(task)
                task.add_done_callback(lambda done, key=key: self._ended(done, key))

    def _free(self, state: BatchState, since_s: float) -> bool:
        """An owner is gone when its state has not changed for a lease during which changes would have been heard."""
        now_s, bus = time.monotonic(), self._stores.bus
        heard_since_s = max(since_s, bus.connected_since_s)
        return not state.owner or (bus.connected and now_s - heard_since_s > limits.LEASE_S)

    def _ended(self, task: asyncio.Task[None], key: str) -> None:
        self._tasks.discard(task)
        self._jobs.pop(key, None)
        self._changed.set()


class Job:
    """One batch in the hands of this process."""

    def __init__(self, stores: Stores, state: BatchState, owner: str, pace: Pace) -> None:
        self._stores, self._state, self._owner, self._pace = stores, state, owner, pace
        self._answers = KeptAnswers(stores.objects, state.batch_id, owner, self._commit)
        self.cancelling = asyncio.Event()

    async def run(self) -> None:
        """Take the batch, work on it to its end, or to that of the lease. Logs what goes wrong; raises nothing."""
        try:
            await self._take()
            log.info("batch_taken", request_id=self._state.batch_id, attempt=self._state.taken)
            await self._work_while_owner()
        except asyncio.CancelledError:
            await self._hand_on()
            raise
        except (Busy, LeaseLost) as lost:
            log.info("batch_lost", request_id=self._state.batch_id, reason=str(lost))
        except Permanent as error:
            await self._fail(error)
        except PipelineError as error:
            log.warning("batch_stalled", request_id=self._state.batch_id, code=error.code, reason=str(error))
        except Exception:  # the outermost guard: whoever takes the batch next may have more luck
            log.exception("batch_broken", request_id=self._state.batch_id)
        if self._state.status in ENDED:
            await self._clear()

    async def _take(self) -> None:
        """Become the owner. Raises Busy where someone else did."""
        seen = self._state

        def taken(state: BatchState) -> BatchState:
            if state.status in ENDED or (state.owner, state.renewals) != (seen.owner, seen.renewals):
                raise Busy("another gateway works on it")
            return msgspec.structs.replace(state, owner=self._owner, taken=state.taken + 1, renewals=state.renewals + 1)

        self._state = await self._stores.batches.change(seen.client, seen.batch_id, taken)
        if self._state.status == "cancelling":
            self.cancelling.set()
        if self._state.taken > limits.BATCH_TAKES_MAX:
            raise NotFound(f"{limits.BATCH_TAKES_MAX} gateways have begun on this batch and ended none of it")

    async def _work_while_owner(self) -> None:
        keeping = asyncio.create_task(self._keep(), name="batch.lease")
        working = asyncio.create_task(self._work(), name="batch.work")
        try:
            done, _ = await asyncio.wait({keeping, working}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in (keeping, working):
                task.cancel()
            await asyncio.gather(keeping, working, return_exceptions=True)

    async def _keep(self) -> None:
        """Renew the lease. Raises LeaseLost where it was taken, or could not be renewed in time."""
        while True:
            try:
                async with asyncio.timeout(limits.LEASE_S - limits.LEASE_RENEW_S):
                    await self._renew()
            except (TimeoutError, Transient) as error:
                raise LeaseLost(f"it could not be renewed: {error}") from None
            await asyncio.sleep(limits.LEASE_RENEW_S)

    async def _renew(self) -> None:
        answers = self._answers

        def renewed(state: BatchState) -> BatchState:
            return msgspec.structs.replace(
                state,
                renewals=state.renewals + 1,
                completed=max(answers.completed, state.completed),
                failed=max(answers.failed, state.failed),
            )

        await self._change(renewed)

    async def _work(self) -> None:
        """All of the batch that is still to do. Raises PipelineError."""
        if (items := await self._items()) is None:
            return
        await self._answers.load(self._state)
        if len(self._answers.answered) < len(items):
            await self._answer(items)
        await self._finish(items)

    async def _items(self) -> tuple[Item, ...] | None:
        """The requests of the input file; None where the batch has failed for them. Raises ObjectNotFound."""
        state = self._state
        content = await self._stores.files.read(state.client, state.input_file_id)
        items, errors = await asyncio.to_thread(_checked, content, state.endpoint, state.batch_id)
        if errors:
            await self._change(_status("failed", failed_unix_s=time.time(), errors=tuple(errors), owner=""))
            return None
        if state.status == "validating":
            await self._change(_status("in_progress", in_progress_unix_s=time.time(), total=len(items)))
        elif not state.total:  # cancelled before it was looked into
            await self._change(lambda now: msgspec.structs.replace(now, total=len(items)))
        return items

    async def _answer(self, items: tuple[Item, ...]) -> None:
        """Get every missing answer, until the batch is cancelled or its time is over."""
        state, answers = self._state, self._answers
        client = Client(self._stores.bus, state.batch_id)
        await client.start()
        day_s = limits.REQUEST_S_MAX - DEADLINE_SLACK_S
        until_unix_s = state.expires_unix_s + limits.LEASE_S  # with no gateway up, the workers end them
        run = Run(client, Batch(client.name, items), answers, deadline_s=day_s, until_unix_s=until_unix_s)
        try:
            if state.taken > 1:
                await run.recover()
            if self.cancelling.is_set() or time.time() >= state.expires_unix_s or not await self._run_out(run):
                await run.cancel()
        finally:
            await client.stop()

    async def _run_out(self, run: Run) -> bool:
        """Whether every line was answered before the batch was cancelled or expired. Raises PipelineError."""
        answering = asyncio.create_task(run.answer_all(self._pace.in_flight))
        stopped = asyncio.create_task(self.cancelling.wait())
        try:
            while (left_s := self._state.expires_unix_s - time.time()) > 0:
                step_s = min(left_s, STEP_S)
                await asyncio.wait({answering, stopped}, timeout=step_s, return_when=asyncio.FIRST_COMPLETED)
                if answering.done() or stopped.done():
                    break
                if self._answers.due(self._pace.flush_s):
                    await self._answers.flush()
            if answering.done():
                answering.result()
            return answering.done()
        finally:
            for task in (answering, stopped):
                task.cancel()
            await asyncio.gather(answering, stopped, return_exceptions=True)

    async def _finish(self, items: tuple[Item, ...]) -> None:
        """Make the files and end the batch."""
        missing = [item for item in items if item.answer_id not in self._answers.answered]
        cancelled = self.cancelling.is_set()
        expired = bool(missing) and not cancelled and time.time() >= self._state.expires_unix_s
        if not cancelled:
            for item in missing:
                error = NOT_IN_TIME if expired else NOT_KEPT
                self._answers.add(BatchAnswer(id=item.answer_id, custom_id=item.custom_id, response=None, error=error))
        await self._answers.flush()
        if not cancelled:
            await self._change(_status("finalizing", finalizing_unix_s=time.time()))
        output_id = await self._file("output", failed=False) if self._answers.completed else None
        error_id = await self._file("error", failed=True) if self._answers.failed else None
        end: BatchStatus = "cancelled" if cancelled else "expired" if expired else "completed"
        await self._change(
            _status(
                end,
                output_file_id=output_id,
                error_file_id=error_id,
                completed=self._answers.completed,
                failed=self._answers.failed,
                owner="",
                **{f"{end}_unix_s": time.time()},
            )
        )
        log.info("batch_ended", client=self._state.client, request_id=self._state.batch_id, reason=end)

    async def _file(self, kind: str, *, failed: bool) -> str:
        """One of the batch's files, under an id that another owner would give it too."""
        state = self._state
        file = await self._stores.files.put(
            state.client,
            self._answers.lines(failed=failed),
            filename=f"{state.batch_id}_{kind}.jsonl",
            purpose="batch_output",
            file_id=f"file-{kind}-{state.batch_id.removeprefix('batch_')}",
        )
        return file.file_id

    async def _fail(self, error: PipelineError) -> None:
        """Nobody can do better with this batch."""
        told = BatchLineError(code=error.code, message=str(error), param=error.field)
        log.warning("batch_failed", request_id=self._state.batch_id, code=error.code, reason=str(error))
        with contextlib.suppress(PipelineError, LeaseLost):
            await self._change(_status("failed", failed_unix_s=time.time(), errors=(told,), owner=""))

    async def _hand_on(self) -> None:
        """Leave the batch to any other gateway, at once."""
        with contextlib.suppress(PipelineError, LeaseLost, TimeoutError):
            async with asyncio.timeout(HAND_ON_S_MAX):
                await self._answers.flush()
                await self._change(lambda state: msgspec.structs.replace(state, owner=""))

    async def _clear(self) -> None:
        """The parts are of no more use; what is not removed expires."""
        with contextlib.suppress(PipelineError):
            await self._answers.remove()

    async def _commit(self, written: BatchAnswers) -> None:
        def committed(state: BatchState) -> BatchState:
            others = tuple(answers for answers in state.answers if answers.owner != written.owner)
            return msgspec.structs.replace(state, answers=(*others, written))

        await self._change(committed)

    async def _change(self, change: Callable[[BatchState], BatchState]) -> None:
        """Raises LeaseLost where this process is no longer the owner, BusUnavailable."""

        def as_owner(state: BatchState) -> BatchState:
            if state.owner != self._owner:
                raise LeaseLost(f"{state.owner or 'nobody'} has it now")
            return change(state)

        self._state = await self._stores.batches.change(self._state.client, self._state.batch_id, as_owner)


def _status(status: BatchStatus, **fields: object) -> Callable[[BatchState], BatchState]:
    """A change of status. A cancellation that came between stands until the batch ends."""

    def changed(state: BatchState) -> BatchState:
        stays = state.status == "cancelling" and status in ("in_progress", "finalizing")
        return msgspec.structs.replace(state, **fields, status=state.status if stays else status)

    return changed


def _checked(content: bytes, endpoint: str, batch_id: str) -> tuple[tuple[Item, ...], list[BatchLineError]]:
    """The requests of an input file, or what is wrong with it, the first `ERRORS_MAX` lines."""
    items: list[Item] = []
    errors: list[BatchLineError] = []
    for number, item in read_lines(content, None):
        if (wrong := _wrong(item, endpoint)) is None:
            assert isinstance(item, Item)
            items.append(_own(item, batch_id))
        else:
            errors.append(BatchLineError(code=wrong[0], message=wrong[1], line=number, param=wrong[2]))
        if len(errors) == ERRORS_MAX:
            break
    if not errors and not 1 <= len(items) <= limits.BATCH_LINES_MAX:
        size = f"the file has {len(items)} requests; 1 to {limits.BATCH_LINES_MAX} are taken"
        errors.append(BatchLineError(code="invalid_request", message=size, param="input_file_id"))
    return tuple(items), errors


def _own(item: Item, batch_id: str) -> Item:
    """The line's request as this batch asks for it.

    Its id is the batch's own: cancellations are kept for a while by request id alone, and one of an earlier batch with
    the same line must not end this one's.
    """
    request_id = hashlib.sha256(f"{batch_id} {item.request_id}".encode()).hexdigest()[:ID_CHARS]
    return replace(item, request_id=request_id, body={"priority": PRIORITY} | item.body)


def _wrong(item: Item | ConfigError, endpoint: str) -> tuple[str, str, str | None] | None:
    """Code, sentence and field of what a batch cannot have in a line."""
    if isinstance(item, ConfigError):
        return "invalid_line", str(item), item.field
    if item.url != endpoint:
        return "mismatched_url", f"url: is {item.url}, and the batch's endpoint {endpoint}", "url"
    if item.body.get("client") is not None:
        return "invalid_line", "client: the batch's own name stands for it", "body.client"
    size = len(item.payload(0.0))
    if size > limits.PAYLOAD_BYTES_MAX - SPARE_BYTES:
        return "payload_too_large", f"body: {size} bytes; a request has at most {limits.PAYLOAD_BYTES_MAX}", "body"
    return None


@contextlib.asynccontextmanager
async def working(runner: BatchRunner) -> AsyncIterator[None]:
    """Have it work while the block runs; behind it its batches are handed on."""
    task = asyncio.create_task(_always(runner), name="batches")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _always(runner: BatchRunner) -> None:
    while True:
        try:
            await runner.run()
        except Exception:  # the outermost guard: a gateway without batches would look well
            log.exception("batches_stopped")
            await asyncio.sleep(limits.LEASE_RENEW_S)
