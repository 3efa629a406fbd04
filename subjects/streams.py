"""Every JetStream stream, consumer and key-value bucket, as data."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final, Literal

from subjects import limits, names
from subjects.names import token

MIB: Final = 1024 * 1024


@dataclass(frozen=True)
class StreamSpec:
    """A stream's whole configuration. Times in seconds, 0: without limit."""

    name: str
    subjects: tuple[str, ...]
    about: str
    retention: Literal["limits", "workqueue"]
    storage: Literal["file", "memory"]
    discard: Literal["old", "new"]
    max_bytes: int
    max_age_s: float = 0
    max_msgs_per_subject: int = 0
    duplicate_window_s: float = limits.DEDUPE_S
    max_msg_bytes: int = limits.PAYLOAD_BYTES_MAX + 4096  # payload and headers


@dataclass(frozen=True)
class ConsumerSpec:
    """A durable pull consumer with explicit acks."""

    name: str
    stream: str
    filter_subject: str | None
    ack_wait_s: float = limits.LEASE_S
    max_deliver: int = 4 * limits.ATTEMPTS_MAX  # a backstop: the runner gives up at ATTEMPTS_MAX
    max_ack_pending: int = 65_536
    priority_group: str | None = None
    """With a group, its pull requests of the smallest priority number (0 to 9) are served first."""


@dataclass(frozen=True)
class BucketSpec:
    """A key-value bucket, one value a key."""

    name: str
    about: str
    storage: Literal["file", "memory"]
    ttl_s: float = 0
    max_bytes: int = 64 * MIB


@dataclass(frozen=True)
class ObjectBucketSpec:
    """An object bucket (NATS ADR-20): content of any size in chunks, under names."""

    name: str
    about: str
    storage: Literal["file", "memory"]
    ttl_s: float
    """Above 0: what a killed process left of an object that it did not finish goes with it."""
    max_bytes: int
    object_bytes_max: int


REQUESTS: Final = StreamSpec(
    name="REQUESTS",
    subjects=(names.REQUESTS.any(),),
    about="Accepted requests, until a preprocess worker has passed them on.",
    retention="workqueue",
    storage="file",
    discard="new",
    max_bytes=4096 * MIB,
    max_msgs_per_subject=100_000,
)
WORK: Final = StreamSpec(
    name="WORK",
    subjects=(
        names.DECODE_ANY.any(),
        names.DECODE_HIGH.any(),
        names.DECODE_LOW.any(),
        names.DECODE_WORKER.any(),
        names.PREFILL_ANY.any(),
        names.PREFILL_WORKER.any(),
        names.EMBED_ANY.any(),
    ),
    about="Tokenized requests, until their owner has published the last frame; prompts, until their room is claimed.",
    retention="workqueue",
    storage="file",
    discard="new",
    max_bytes=4096 * MIB,
    max_msgs_per_subject=100_000,
)
RESPONSES: Final = StreamSpec(
    name="RESPONSES",
    subjects=(names.RESPONSES.any(), names.OWNERS.any()),
    about="Output frames, so that a client, or a request's next owner, can go on; over a restart of the broker too.",
    retention="limits",
    storage="file",
    discard="old",
    max_bytes=1024 * MIB,
    max_age_s=limits.RESPONSES_KEPT_S,
)
FAILED: Final = StreamSpec(
    name="FAILED",
    subjects=(names.FAILED.any(),),
    about="What broke stages and engines: a task that does so again and again is poison.",
    retention="limits",
    storage="file",
    discard="old",
    max_bytes=64 * MIB,
    max_age_s=limits.FAILURES_KEPT_S,
    max_msgs_per_subject=2 * limits.FAILURES_MAX,
)
CANCELS: Final = StreamSpec(
    name="CANCELS",
    subjects=(names.CANCEL.any(),),
    about="Cancellations, for workers that were not up to hear them.",
    retention="limits",
    storage="memory",
    discard="old",
    max_bytes=16 * MIB,
    max_age_s=limits.CANCELS_KEPT_S,
    max_msgs_per_subject=1,
)
DEAD: Final = StreamSpec(
    name="DEAD",
    subjects=(names.DEAD.any(),),
    about="Work that was given up, for an operator to look at, retry or drop.",
    retention="limits",
    storage="file",
    discard="old",
    max_bytes=1024 * MIB,
    max_age_s=7 * 86_400,
    max_msg_bytes=2 * limits.PAYLOAD_BYTES_MAX,
)
ADVISORIES: Final = StreamSpec(
    name="ADVISORIES",
    subjects=(names.MAX_DELIVERIES_ADVISORIES,),
    about="The broker's own word of tasks that ran out of deliveries.",
    retention="limits",
    storage="file",
    discard="old",
    max_bytes=16 * MIB,
    max_age_s=7 * 86_400,
)
KV_EVENTS: Final = StreamSpec(
    name="KV_EVENTS",
    subjects=(names.KV_EVENTS.any(),),
    about="KV events for a while, for an operator to look at; routers read them live and ask for snapshots.",
    retention="limits",
    storage="memory",
    discard="old",
    max_bytes=64 * MIB,
    max_age_s=limits.KV_EVENTS_KEPT_S,
)
STREAMS: Final = (REQUESTS, WORK, RESPONSES, CANCELS, FAILED, DEAD, ADVISORIES, KV_EVENTS)

CARDS: Final = BucketSpec(
    name="SGLANG_CARDS",
    about="Model cards, key `<role>.<model>.<worker>`; a worker puts its card again every third of the ttl.",
    storage="memory",
    ttl_s=30,
)
ROUTES: Final = BucketSpec(
    name="SGLANG_ROUTES",
    about="The ranks of prefill workers, key `<worker>.<incarnation>.<rank>`; put again every third of the ttl.",
    storage="memory",
    ttl_s=30,
)
TOKENIZERS: Final = ObjectBucketSpec(
    name="SGLANG_TOKENIZERS",
    about="Tokenizer files and chat templates, each under its SHA-256; model cards name them, and who serves a model "
    "puts its files again before they expire.",
    storage="file",
    ttl_s=86_400,
    max_bytes=512 * MIB,
    object_bytes_max=limits.TOKENIZER_FILE_BYTES_MAX,
)
FILES: Final = ObjectBucketSpec(
    name="SGLANG_FILES",
    about="Clients' files at the gateways, `<client>/<file id>`, and the answers of running batches, "
    "`~answers/<batch id>/<owner>/<number>`.",
    storage="file",
    ttl_s=limits.FILES_KEPT_S,
    max_bytes=2048 * MIB,
    object_bytes_max=limits.BATCH_OUTPUT_BYTES_MAX,
)
BATCHES: Final = BucketSpec(
    name="SGLANG_BATCHES",
    about="Batches of the gateways, key `<client>.<batch id>`; the gateway that works on one writes it every "
    f"{limits.LEASE_RENEW_S:g} s, and one that is not written for {limits.LEASE_S:g} s is taken over.",
    storage="file",
    ttl_s=limits.BATCHES_KEPT_S,
)
ANSWERS: Final = BucketSpec(
    name="SGLANG_ANSWERS",
    about="What /v1/responses keeps to be retrieved and gone on from, key `<client>.<request id>`.",
    storage="file",
    ttl_s=limits.STORED_RESPONSES_KEPT_S,
    max_bytes=512 * MIB,
)
BUCKETS: Final[tuple[BucketSpec | ObjectBucketSpec, ...]] = (CARDS, ROUTES, TOKENIZERS, FILES, BATCHES, ANSWERS)

PREPROCESS: Final = ConsumerSpec(name="preprocess", stream=REQUESTS.name, filter_subject=None)
CONSUMERS: Final = (PREPROCESS,)
OWNER_FIRST: Final = "owner-first"
"""The priority group of consumers that have an owner."""
OWNER_PRIORITY: Final = 0
PEER_PRIORITY: Final = 9
"""Pull requests of others are served only where the owner has none open."""
_OWN: Final = "~"


def with_retention(responses_kept_s: float) -> tuple[StreamSpec, ...]:
    """Every stream, with frames kept for so long; 0: no longer than the pipeline itself needs them.

    The duplicate window cannot be longer: a second terminal frame is recognized for as long as the first is kept.
    """
    kept_s = max(responses_kept_s, limits.RESPONSES_KEPT_S_MIN)
    responses = replace(RESPONSES, max_age_s=kept_s, duplicate_window_s=min(kept_s, limits.DEDUPE_S))
    return tuple(responses if stream is RESPONSES else stream for stream in STREAMS)


def decode_any(model: str) -> ConsumerSpec:
    """The consumer that all decode workers of a model share, for requests without a priority."""
    return ConsumerSpec(
        name=f"decode-{token(model)}", stream=WORK.name, filter_subject=names.DECODE_ANY.of(model=model)
    )


def decode_high(model: str) -> ConsumerSpec:
    return ConsumerSpec(
        name=f"decode-high-{token(model)}", stream=WORK.name, filter_subject=names.DECODE_HIGH.of(model=model)
    )


def decode_low(model: str) -> ConsumerSpec:
    return ConsumerSpec(
        name=f"decode-low-{token(model)}", stream=WORK.name, filter_subject=names.DECODE_LOW.of(model=model)
    )


def decode_consumers(model: str) -> tuple[ConsumerSpec, ...]:
    """What the decode workers of a model share, in the order in which they take from it."""
    return decode_high(model), decode_any(model), decode_low(model)


def own_consumer(role: str, model: str, worker: str) -> ConsumerSpec:
    """A worker's own, for what is addressed to it; others of its role take of it what it does not take itself.

    No token contains what stands between the parts of its name, so that two workers' names are never the same.
    """
    return ConsumerSpec(
        name=_OWN.join((role, token(model), token(worker))),
        stream=WORK.name,
        filter_subject=names.ADDRESSED[role].of(model=model, worker=worker),
        priority_group=OWNER_FIRST,
    )


def decode_takes(model: str, worker: str) -> tuple[ConsumerSpec, ...]:
    """What a decode worker takes from, in this order: what has a high priority, its own, what is anyone's."""
    high, *others = decode_consumers(model)
    return high, own_consumer("decode", model, worker), *others


def prefill_any(model: str) -> ConsumerSpec:
    """The consumer that all prefill workers of a model share."""
    return ConsumerSpec(
        name=f"prefill-{token(model)}", stream=WORK.name, filter_subject=names.PREFILL_ANY.of(model=model)
    )


def prefill_takes(model: str, worker: str) -> tuple[ConsumerSpec, ...]:
    """What a prefill worker takes from, in this order: its own, what is anyone's."""
    return own_consumer("prefill", model, worker), prefill_any(model)


def whose_consumer(name: str) -> tuple[str, str, str] | None:
    """Role, model and worker of a worker's own consumer; None for one that is shared."""
    role, *whose = name.split(_OWN)
    return (role, whose[0], whose[1]) if role in names.ADDRESSED and len(whose) == 2 else None


def embed_any(model: str) -> ConsumerSpec:
    """The consumer that all embedding workers of a model share."""
    return ConsumerSpec(name=f"embed-{token(model)}", stream=WORK.name, filter_subject=names.EMBED_ANY.of(model=model))


def owned_consumers(model: str) -> tuple[ConsumerSpec, ...]:
    """What the workers of a model share that answer its clients."""
    return *decode_consumers(model), embed_any(model)


def all_consumers(models: Iterable[str]) -> tuple[ConsumerSpec, ...]:
    """Every consumer of a pipeline that serves these models, but the workers' own."""
    of_models = ((*decode_consumers(model), prefill_any(model), embed_any(model)) for model in sorted(models))
    return (*CONSUMERS, *(consumer for of_model in of_models for consumer in of_model))
