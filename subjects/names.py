"""Every NATS subject of the pipeline, declared once. No dotted subject literal stands anywhere else.

A `Subject` is a template whose variable parts come last; `of()` fills it, `any()` makes a wildcard for
subscribing and `parse()` reads the parts back.
"""

import re
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Final

TOKEN_CHARS_MAX: Final = 64
TOKENS_KEPT_MAX: Final = 1024
"""Tokens that are remembered: those of a request's client and id stand in the subject of each of its frames."""
ANONYMOUS_CLIENT: Final = "anonymous"
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9_-]")
INBOX_CHARS_MAX: Final = 128
_INBOX: Final = re.compile(r"_INBOX[A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)+")
_PART: Final = re.compile(r"\{(\w+)\}")


class Kind(StrEnum):
    """How a subject travels."""

    JETSTREAM = "JetStream"
    CORE = "core"
    CAPTURED = "core publish, captured by a stream"
    SERVICE = "core request / reply"


@lru_cache(TOKENS_KEPT_MAX)
def token(name: str) -> str:
    """A name made safe as one subject token: other characters than `[A-Za-z0-9_-]` become `-`.

    >>> token("meta-llama/Llama-3.1-8B")
    'meta-llama-Llama-3-1-8B'
    """
    if not name:
        raise ValueError("a subject token cannot be empty")
    return _UNSAFE.sub("-", name)[:TOKEN_CHARS_MAX]


def is_inbox(subject: str) -> bool:
    """True for a subject on which one process hears answers; nothing else is asked for a client's sake."""
    return len(subject) <= INBOX_CHARS_MAX and _INBOX.fullmatch(subject) is not None


def is_token(name: str) -> bool:
    """True where `name` can stand in a subject as it is."""
    return 0 < len(name) <= TOKEN_CHARS_MAX and not _UNSAFE.search(name)


@dataclass(frozen=True)
class Subject:
    """One kind of subject: where it goes, who speaks to whom on it, and what it carries."""

    template: str
    kind: Kind
    flow: str  # "client -> preprocess"
    payload: str  # class name in subjects.messages, or what else it carries
    about: str

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(_PART.findall(self.template))

    def of(self, **parts: str) -> str:
        """The full subject. Every part is made a safe token; a missing part is our bug."""
        return self.template.format_map({name: token(part) for name, part in parts.items()})

    def any(self, **parts: str) -> str:
        """The wildcard subject: parts not given become `*`."""
        return _PART.sub(lambda match: token(parts[match[1]]) if match[1] in parts else "*", self.template)

    def parse(self, subject: str) -> dict[str, str] | None:
        """The parts of a subject of this kind; None where it is of another kind."""
        names, values = self.template.split("."), subject.split(".")
        if len(names) != len(values):
            return None
        found = {}
        for name, value in zip(names, values, strict=True):
            if match := _PART.fullmatch(name):
                found[match[1]] = value
            elif name != value:
                return None
        return found


REQUESTS: Final = Subject(
    "sglang.requests.{model}",
    Kind.JETSTREAM,
    "client -> preprocess",
    "Request",
    "One OpenAI-shaped request; its PubAck is the promise of exactly one terminal frame per choice.",
)
GENERATE: Final = Subject(
    "sglang.generate.{model}",
    Kind.SERVICE,
    "client -> preprocess",
    "Request",
    "As a request on `sglang.requests`, and kept as one, but answered with its frames on the reply subject; an empty "
    "message is the end.",
)
DECODE_ANY: Final = Subject(
    "sglang.decode.{model}.any",
    Kind.JETSTREAM,
    "preprocess -> decode",
    "PreprocessedRequest",
    "A tokenized request for any decode worker of the model; the worker that pulls it owns it.",
)
DECODE_HIGH: Final = Subject(
    "sglang.decode.{model}.high",
    Kind.JETSTREAM,
    "preprocess -> decode",
    "PreprocessedRequest",
    "A tokenized request of a priority above 0: a worker with a free slot looks here first.",
)
DECODE_LOW: Final = Subject(
    "sglang.decode.{model}.low",
    Kind.JETSTREAM,
    "preprocess -> decode",
    "PreprocessedRequest",
    "A tokenized request of a priority below 0: taken when nothing else of its model waits.",
)
DECODE_WORKER: Final = Subject(
    "sglang.decode.{model}.w.{worker}",
    Kind.JETSTREAM,
    "preprocess -> decode",
    "PreprocessedRequest",
    "A tokenized request offered to one decode worker first.",
)
PREFILL_ANY: Final = Subject(
    "sglang.prefill.{model}.any",
    Kind.JETSTREAM,
    "decode -> prefill",
    "PrefillTask",
    "A prompt whose KV its owner waits for, for any prefill worker of the model; it claims the room before it starts.",
)
PREFILL_WORKER: Final = Subject(
    "sglang.prefill.{model}.w.{worker}",
    Kind.JETSTREAM,
    "decode -> prefill",
    "PrefillTask",
    "A prompt offered first to the prefill worker that ranks best for it; others take what that one cannot.",
)
EMBED_ANY: Final = Subject(
    "sglang.embed.{model}.any",
    Kind.JETSTREAM,
    "preprocess -> embed",
    "EmbeddingTask",
    "The tokenized inputs of an embedding request, for any embedding worker of the model; who pulls it owns it.",
)
RESPONSES: Final = Subject(
    "sglang.responses.{client}.{request_id}",
    Kind.CAPTURED,
    "decode, embed -> client",
    "Frame",
    "Output frames in order; live subscribers get them at core speed, the stream keeps them for a resume.",
)
OWNERS: Final = Subject(
    "sglang.owners.{client}.{request_id}",
    Kind.JETSTREAM,
    "decode, embed -> stream RESPONSES",
    "Frame",
    "A later owner of a request writes itself down before it reads the log: from then on the broker refuses the "
    "terminal frames of an earlier one.",
)
CANCEL: Final = Subject(
    "sglang.cancel.{request_id}",
    Kind.CAPTURED,
    "client -> whoever holds the request",
    "Cancel",
    'Stop working on a request; its holder ends it with finish_reason "abort". Kept for a worker that starts later.',
)
HEARTBEAT: Final = Subject(
    "sglang.heartbeat.{role}.{worker}",
    Kind.CORE,
    "worker -> everyone",
    "Heartbeat",
    "Once a second: the worker lives, whether it takes work, and its load.",
)
METRICS: Final = Subject(
    "sglang.metrics.{role}.{worker}",
    Kind.CORE,
    "worker -> telemetry",
    "MetricsSnapshot",
    "Once a second: the worker's Prometheus series.",
)
CONTROL: Final = Subject(
    "sglang.control.{worker}.{operation}",
    Kind.SERVICE,
    "operator -> worker",
    "ControlRequest",
    "An operator's command, answered with a result or an error that says why.",
)
CLAIM: Final = Subject(
    "sglang.bootstrap.{worker}.claim",
    Kind.SERVICE,
    "prefill -> decode",
    "Claim",
    "May I prefill this room? Answered with a Grant: once for each room, and only while its owner waits.",
)
REFUSAL: Final = Subject(
    "sglang.bootstrap.{worker}.refusal",
    Kind.CORE,
    "prefill -> decode",
    "Refusal",
    "A claimed room comes to nothing: why, and whether another prefill worker could do better.",
)
BOOTSTRAP: Final = Subject(
    "sglang.bootstrap.{worker}.{rank}.{operation}.{room}",
    Kind.CORE,
    "prefill <-> decode engines",
    "SGLang's frames",
    "The handshake of a KV transfer: register, transfer, status, abort, abort_ack, receipt, rooms (what is open).",
)
PEER: Final = Subject(
    "sglang_peer.{worker}.{rank}",
    Kind.CORE,
    "prefill <-> decode engines",
    "empty",
    "Asked four times a second while a room is open: no responders means that the rank is gone. Outside `sglang.>`, "
    "since whoever reads a subject is a responder on it.",
)
KV_EVENTS: Final = Subject(
    "sglang.kv.{model}.{worker}",
    Kind.CAPTURED,
    "engine -> preprocess, telemetry",
    "KvEvents",
    "KV blocks stored and removed, of each data-parallel rank and cache tier, numbered by worker and incarnation.",
)
KV_SNAPSHOT: Final = Subject(
    "sglang.kv_snapshot.{worker}.{rank}",
    Kind.SERVICE,
    "preprocess, telemetry -> engine",
    "KvSnapshotRequest",
    "All blocks that a rank holds, answered with KvSnapshot parts: for a reader that starts late or missed events.",
)
FAILED: Final = Subject(
    "sglang.failed.{stage}.{task}",
    Kind.JETSTREAM,
    "any stage -> any stage",
    "Failure",
    "A stage or its engine broke on a task (`<stream>-<stream_seq>-<microseconds>`); those of one task are counted.",
)
DEAD: Final = Subject(
    "sglang.dead.{stage}.{model}",
    Kind.JETSTREAM,
    "any stage -> operator",
    "DeadLetter",
    "Work given up: the payload as it came, the error and the number of attempts.",
)

ALL: Final[tuple[Subject, ...]] = (
    REQUESTS,
    GENERATE,
    DECODE_ANY,
    DECODE_HIGH,
    DECODE_LOW,
    DECODE_WORKER,
    PREFILL_ANY,
    PREFILL_WORKER,
    EMBED_ANY,
    CLAIM,
    REFUSAL,
    BOOTSTRAP,
    PEER,
    RESPONSES,
    OWNERS,
    CANCEL,
    HEARTBEAT,
    METRICS,
    CONTROL,
    KV_EVENTS,
    KV_SNAPSHOT,
    FAILED,
    DEAD,
)

DECODE_TASKS: Final = "sglang.decode.>"
"""Every tokenized request that waits or runs, of whatever model, priority or worker."""
PREFILL_TASKS: Final = "sglang.prefill.>"
"""Every prompt that waits for a claim, of whatever model, offered to one worker or to any."""
ADDRESSED: Final = {"decode": DECODE_WORKER, "prefill": PREFILL_WORKER}
"""By role: what is offered to one worker first."""
OWNED_TASKS: Final = (DECODE_TASKS, EMBED_ANY.any())
"""Every task whose worker answers the client itself."""
EVERYTHING: Final = "sglang.>"
"""All of them but `PEER`, for an operator who looks on."""
READABLE: Final = tuple(subject for subject in ALL if subject is not PEER)

# Subjects that nats-server itself defines.
MAX_DELIVERIES_ADVISORIES: Final = "$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.>"
LEADER_ELECTED: Final = "$JS.EVENT.ADVISORY.STREAM.LEADER_ELECTED"
"""`.<stream>`: a cluster's stream has a new leader; what was published to it in between may not be in it."""
JS_API: Final = "$JS.API"
SRV: Final = "$SRV"
"""`.<PING|INFO|STATS>[.<name>[.<id>]]`: how micro services are found (NATS ADR-32); every worker answers."""
JS_ACK: Final = "$JS.ACK"
KV: Final = "$KV"
OBJECTS: Final = "$O"
"""`.<bucket>.C.<nuid>`: the chunks of an object; `.<bucket>.M.<name in base64url>`: what it is (NATS ADR-20)."""


def decode_tasks(priority: int) -> Subject:
    """Where a tokenized request of this priority waits for any worker of its model."""
    return DECODE_HIGH if priority > 0 else DECODE_LOW if priority < 0 else DECODE_ANY


def tasks_of(tasks: str, model: str) -> str:
    """Those of `DECODE_TASKS` or `PREFILL_TASKS` that are of one model.

    >>> tasks_of(PREFILL_TASKS, "smollm2")
    'sglang.prefill.smollm2.>'
    """
    return tasks.replace(">", f"{token(model)}.>")


def card_key(role: str, model: str | None, worker: str) -> str:
    """A worker's key in the bucket of model cards; a worker that serves every model has the model `_`.

    >>> card_key("decode", "smollm2", "w1")
    'decode.smollm2.w1'
    """
    return f"{token(role)}.{token(model or '_')}.{token(worker)}"


def owned_key(client: str, name: str) -> str:
    """The key of what belongs to a client, in the buckets of batches and of stored responses.

    >>> owned_key("http", "batch_1f")
    'http.batch_1f'
    """
    return f"{token(client)}.{token(name)}"
