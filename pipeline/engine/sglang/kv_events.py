"""SGLang's KV events on NATS, in place of its ZMQ publisher: no port for each data-parallel rank.

The worker puts `KvEventsSettings.to_environment()` into the environment and starts its engine with `CONFIG`; the
SGLang plugin calls `install(from_environment())` in every process that SGLang starts.
"""

import os
from collections.abc import Mapping
from typing import Final

import msgspec
import structlog

from pipeline.engine.sglang import environment

ENVIRONMENT: Final = "SGLANG_NATS_KV_PUBLISHER"
"""Environment variable with the settings as JSON."""
PUBLISHER: Final = "nats"
"""Our publisher's name among SGLang's."""
PAGE_TOKENS_MIN: Final = 16
"""With smaller pages SGLang's recording takes a GPU's scheduler too long: at 1 it halves what an H200 prefills."""
CONFIG: Final = f'{{"publisher": "{PUBLISHER}", "endpoint": ""}}'
"""SGLang's `kv_events_config`. Without an endpoint `/server_info` offers none to ZMQ's subscribers."""

log = structlog.get_logger()


class KvEventsSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whose events they are, and where they go. Spawned scheduler processes inherit it through the environment."""

    url: str  # of the broker, credentials included
    model: str  # the served name
    worker: str  # a subject token, unique among live workers
    incarnation: str  # a subject token, new at every start of the worker
    at_any_cost: bool = False

    def to_environment(self) -> dict[str, str]:
        """What to add to `os.environ` before the engine starts."""
        return {ENVIRONMENT: msgspec.json.encode(self).decode()}


def wanted(settings: KvEventsSettings, page_tokens: int, accelerator: bool) -> bool:
    """Whether an engine with pages of so many tokens is to publish; a log line says why it is not."""
    if settings.at_any_cost or not accelerator or page_tokens >= PAGE_TOKENS_MIN:
        return True
    log.warning(
        "kv_events_off",
        worker=settings.worker,
        reason=f"at page_size {page_tokens} they cost a GPU's scheduler too much: "
        f"set SGLang's page_size to {PAGE_TOKENS_MIN} or more, or kv_events to true",
    )
    return False


def from_environment(environ: Mapping[str, str] = os.environ) -> KvEventsSettings | None:
    """The settings that the worker left, or None without KV events. Raises EngineStartError."""
    return environment.read(environ, ENVIRONMENT, KvEventsSettings, tokens=("model", "worker", "incarnation"))


def install(settings: KvEventsSettings) -> None:
    """Offer our publisher to SGLang in this process. Once a process, before SGLang applies its hooks."""
    from sglang.srt.disaggregation.kv_events import EventPublisherFactory
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from pipeline.engine.sglang import kv_event_publisher as ours

    ours.check_media()
    EventPublisherFactory.register_publisher(PUBLISHER, ours.publisher(settings))
    component = "sglang.srt.managers.scheduler_components.kv_events_publisher.SchedulerKvEventsPublisher"
    for target, hook, kind in (
        (f"{component}.init_kv_events", ours.begin, HookType.AFTER),
        (f"{component}.emit_kv_metrics", ours.emit_nothing, HookType.REPLACE),
        ("sglang.srt.managers.scheduler.Scheduler.process_batch_result", ours.flush, HookType.AFTER),
    ):
        HookRegistry.register(target, hook, kind)
