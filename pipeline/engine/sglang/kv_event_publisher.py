"""Our event publisher in SGLang's scheduler, and what is changed around it. Imports SGLang."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, Final

from sglang.srt.disaggregation.kv_events import BlockRemoved, BlockStored, EventBatch, KVCacheEvent, StorageMedium

from pipeline.engine.sglang import bus_thread
from pipeline.engine.sglang.kv_events import KvEventsSettings
from pipeline.errors import EngineStartError, PipelineError
from pipeline.kv_publisher import KvPublisher, KvRank
from subjects.codec import BlockHashes
from subjects.messages import BlocksCleared, BlocksRemoved, BlocksStored, KvEvent, Tier

START_S: Final = 10.0
TIERS: Final[dict[str | None, Tier]] = {
    None: "gpu",  # SGLang's default
    StorageMedium.GPU.value: "gpu",
    StorageMedium.CPU.value: "host",
    StorageMedium.DISK.value: "disk",
    StorageMedium.EXTERNAL.value: "disk",
}


def check_media() -> None:
    """Raises EngineStartError where this SGLang knows a medium that has no tier here."""
    if unknown := {medium.value for medium in StorageMedium} - TIERS.keys():
        raise EngineStartError(f"this SGLang keeps KV blocks on {', '.join(sorted(unknown))}, which has no tier here")


def publisher(settings: KvEventsSettings) -> Callable[..., "NatsEventPublisher"]:
    """What SGLang's factory calls, with the rank and with fields for its own publisher."""
    return functools.partial(NatsEventPublisher, settings)


class NatsEventPublisher:
    """Has the methods of SGLang's `EventPublisher`; one for each rank that has a KV cache of its own."""

    def __init__(self, settings: KvEventsSettings, attn_dp_rank: int, **sglangs: Any) -> None:
        """`sglangs`: ZMQ's endpoint, queue lengths and topic, of no use here."""
        self._settings, self._dp_rank = settings, attn_dp_rank
        self._block_tokens = 0
        self._publisher: KvPublisher | None = None

    def begin(self, block_tokens: int) -> None:
        """Reach the broker. Raises EngineStartError."""
        settings = self._settings
        name = f"engine {settings.worker}.{settings.incarnation}.dp{self._dp_rank}"
        thread = bus_thread.of_this_process(settings.url, name)
        self._block_tokens = block_tokens
        rank = KvRank(
            model=settings.model,
            worker=settings.worker,
            incarnation=settings.incarnation,
            dp_rank=self._dp_rank,
            block_tokens=block_tokens,
        )

        async def start() -> KvPublisher:
            made = KvPublisher(thread.bus, rank)
            await made.start()
            return made

        try:
            self._publisher = thread.run(start(), START_S)
        except (PipelineError, TimeoutError) as error:
            reason = str(error) or f"no answer within {START_S:.0f} s"
            raise EngineStartError(f"KV events cannot be published: {reason}") from error

    def publish(self, batch: EventBatch) -> None:
        """Called by the scheduler with the events since the last call; never waits for the broker."""
        if self._publisher is not None and (events := translate(batch.events, self._block_tokens)):
            self._publisher.publish(events)

    def shutdown(self) -> None:
        """The connection goes with the process."""
        self._publisher = None


def translate(events: Iterable[KVCacheEvent], block_tokens: int) -> list[KvEvent]:
    """SGLang's events without their token ids; consecutive blocks of one prefix, stored one by one, become one event.

    A block of fewer tokens than `block_tokens` is left out: no other prompt can be looked up by it.
    """
    found: list[KvEvent] = []
    run: list[int] = []  # of the store that is being put together
    parent: int | None = None
    tier: Tier = "gpu"

    def end_run() -> None:
        if run:
            found.append(BlocksStored(hashes=BlockHashes.of(run), parent=parent, tier=tier))
            run.clear()

    for event in events:
        if isinstance(event, BlockStored):
            if event.block_size != block_tokens:
                continue
            if not run or event.parent_block_hash != run[-1] or TIERS[event.medium] != tier:
                end_run()
                parent, tier = event.parent_block_hash, TIERS[event.medium]
            run += event.block_hashes
            continue
        end_run()
        if isinstance(event, BlockRemoved):
            found.append(BlocksRemoved(hashes=BlockHashes.of(event.block_hashes), tier=TIERS[event.medium]))
        else:
            found.append(BlocksCleared())
    end_run()
    return found


# --- hooks of SGLang's scheduler ----------------------------------------------------------------------


def begin(result: Any, component: Any, *_: object, **__: object) -> Any:
    """After `SchedulerKvEventsPublisher.init_kv_events`, where the size of a block is known."""
    if isinstance(component.kv_event_publisher, NatsEventPublisher):
        component.kv_event_publisher.begin(component.tree_cache.page_size)
    return result


def emit_nothing(component: Any) -> None:
    """In place of `SchedulerKvEventsPublisher.emit_kv_metrics`, which sends to a ZMQ socket that nobody reads here:
    with metrics on, its queue would grow without a limit."""


def flush(result: Any, scheduler: Any, *_: object, **__: object) -> Any:
    """After `Scheduler.process_batch_result`: events leave with the step that made them.

    While it decodes, SGLang itself publishes with every 40th step only, seconds later.
    """
    scheduler.kv_events_publisher.publish_kv_events()
    return result
