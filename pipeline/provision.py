"""Streams, consumers and buckets: created where they are missing, compared where they are there.

A difference in anything that is declared is refused and named; what an operator set beside it (a
description, a mirror, metadata) is left alone. Nothing is ever changed or deleted here.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from pipeline.errors import BrokerRefused, NoResponders, ProvisionError
from pipeline.jetstream import CONSUMER_DIFFERS, JETSTREAM_OFF, NO_SPACE, NS, STREAM_DIFFERS, STREAM_NOT_FOUND
from subjects import names
from subjects.limits import PAYLOAD_BYTES_MAX
from subjects.streams import BucketSpec, ConsumerSpec, ObjectBucketSpec, StreamSpec

if TYPE_CHECKING:
    from pipeline.bus import Bus

PULLS_WAITING_MAX: Final = 4_096  # open pull requests on one consumer; the broker's own default is 512
_UNCOMPARED: Final = frozenset({"description"})
_OFF: Final = "JetStream is off at {url}: start nats-server with `-js`, or add `jetstream {{}}` to its configuration"


def stream_config(spec: StreamSpec, replicas: int) -> dict[str, Any]:
    """The stream's configuration as JetStream takes it."""
    per_subject = spec.max_msgs_per_subject
    return {
        "name": spec.name,
        "description": spec.about,
        "subjects": list(spec.subjects),
        "retention": spec.retention,
        "storage": spec.storage,
        "discard": spec.discard,
        "discard_new_per_subject": spec.discard == "new" and per_subject > 0,
        "max_bytes": spec.max_bytes,
        "max_age": int(spec.max_age_s * NS),
        "max_msgs": -1,
        "max_msgs_per_subject": per_subject or -1,
        "max_msg_size": spec.max_msg_bytes,
        "duplicate_window": int(spec.duplicate_window_s * NS),
        "num_replicas": replicas,
        "allow_direct": True,
    }


def consumer_config(spec: ConsumerSpec) -> dict[str, Any]:
    """The consumer's configuration as JetStream takes it."""
    config: dict[str, Any] = {
        "durable_name": spec.name,
        "ack_policy": "explicit",
        "ack_wait": int(spec.ack_wait_s * NS),
        "deliver_policy": "all",
        "max_deliver": spec.max_deliver,
        "max_ack_pending": spec.max_ack_pending,
        "max_waiting": PULLS_WAITING_MAX,
    }
    if spec.filter_subject:
        config["filter_subject"] = spec.filter_subject
    if spec.priority_group:
        config |= {"priority_groups": [spec.priority_group], "priority_policy": "prioritized"}
    return config


def bucket_config(spec: BucketSpec | ObjectBucketSpec, replicas: int) -> dict[str, Any]:
    """A bucket as the stream it is."""
    return _object_config(spec, replicas) if isinstance(spec, ObjectBucketSpec) else _values_config(spec, replicas)


def _object_config(spec: ObjectBucketSpec, replicas: int) -> dict[str, Any]:
    """See NATS ADR-20."""
    return {
        "name": object_stream(spec.name),
        "description": spec.about,
        "subjects": [f"{names.OBJECTS}.{spec.name}.C.>", f"{names.OBJECTS}.{spec.name}.M.>"],
        "storage": spec.storage,
        "discard": "new",
        "max_bytes": spec.max_bytes,
        "max_age": int(spec.ttl_s * NS),
        "max_msg_size": PAYLOAD_BYTES_MAX,
        "allow_rollup_hdrs": True,
        "allow_direct": True,
        "num_replicas": replicas,
    }


def _values_config(spec: BucketSpec, replicas: int) -> dict[str, Any]:
    """A key-value bucket (NATS ADR-8); a key's end by age is announced to watchers."""
    config: dict[str, Any] = {
        "name": bucket_stream(spec.name),
        "description": spec.about,
        "subjects": [f"{names.KV}.{spec.name}.>"],
        "storage": spec.storage,
        "discard": "new",
        "max_bytes": spec.max_bytes,
        "max_age": int(spec.ttl_s * NS),
        "max_msgs_per_subject": 1,
        "allow_rollup_hdrs": True,
        "deny_delete": True,
        "allow_direct": True,
        "num_replicas": replicas,
    }
    if spec.ttl_s:
        config |= {"allow_msg_ttl": True, "subject_delete_marker_ttl": int(max(1, spec.ttl_s) * NS)}
    return config


def bucket_stream(bucket: str) -> str:
    return f"KV_{bucket}"


def object_stream(bucket: str) -> str:
    return f"OBJ_{bucket}"


def differences(wanted: dict[str, Any], found: dict[str, Any]) -> Iterator[str]:
    """Each declared field that is otherwise at the broker, as words. Absent there means its zero value.

    More replicas than wanted are no difference: a reader, which makes none, need not know their number.
    """
    for field, value in wanted.items():
        have = found.get(field, type(value)())
        enough = field == "num_replicas" and have > value
        if field not in _UNCOMPARED and have != value and not enough:
            yield f"{field} is {have!r} and should be {value!r}"


async def provision_stream(bus: "Bus", config: dict[str, Any]) -> None:
    """Create the stream or check it. Raises ProvisionError, BusUnavailable."""
    name = config["name"]
    try:
        await bus.api(f"STREAM.CREATE.{name}", config)
    except NoResponders:
        raise ProvisionError(_OFF.format(url=bus.url)) from None
    except BrokerRefused as refusal:
        if refusal.error_number in JETSTREAM_OFF:
            raise ProvisionError(_OFF.format(url=bus.url)) from None
        if refusal.error_number in NO_SPACE:
            raise ProvisionError(
                f"stream {name} does not fit: {refusal}; it takes {config['max_bytes']} bytes of"
                f" {config['storage']} storage, so raise the server's jetstream limits",
                field="max_bytes",
                size=config["max_bytes"],
            ) from None
        if refusal.error_number != STREAM_DIFFERS:
            raise ProvisionError(f"stream {name} cannot be created: {refusal}", field=name) from None
        found = (await bus.api(f"STREAM.INFO.{name}"))["config"]
        _refuse_differences(f"stream {name}", config, found)


async def provision_consumer(bus: "Bus", spec: ConsumerSpec) -> None:
    """Create the consumer or check it. Raises ProvisionError, BrokerRefused (no such stream), BusUnavailable."""
    config = consumer_config(spec)
    subject = f"CONSUMER.CREATE.{spec.stream}.{spec.name}"
    if spec.filter_subject:
        subject += f".{spec.filter_subject}"
    request = {"stream_name": spec.stream, "config": config, "action": "create"}
    try:
        await bus.api(subject, request)
    except BrokerRefused as refusal:
        if refusal.error_number == STREAM_NOT_FOUND:
            raise
        if refusal.error_number not in CONSUMER_DIFFERS:
            raise ProvisionError(f"consumer {spec.name} of {spec.stream} cannot be created: {refusal}") from None
        found = (await bus.api(f"CONSUMER.INFO.{spec.stream}.{spec.name}"))["config"]
        _refuse_differences(f"consumer {spec.name} of stream {spec.stream}", config, found)


def _refuse_differences(what: str, wanted: dict[str, Any], found: dict[str, Any]) -> None:
    if different := list(differences(wanted, found)):
        raise ProvisionError(
            f"{what} differs from its declaration: {'; '.join(different)}; change it or delete it by hand",
            field=different[0].split(" ", 1)[0],
        )
