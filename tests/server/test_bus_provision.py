"""Provisioning: made where missing, refused where different."""

import dataclasses

import pytest

from pipeline.errors import ProvisionError
from pipeline.nats_server import NatsServer
from pipeline.provision import differences, stream_config
from subjects import streams
from tests.server.conftest import QUEUE, TAKERS, VALUES


async def test_everything_that_is_declared_can_be_made_twice(bus):
    for _ in range(2):
        await bus.provision(streams.STREAMS, streams.CONSUMERS, streams.BUCKETS)


@pytest.mark.parametrize(
    "change",
    [
        {"subjects": ("queue.*", "more.*")},
        {"retention": "limits"},
        {"discard": "old"},
        {"max_bytes": 1024 * 1024},
        {"max_age_s": 60},
        {"max_msgs_per_subject": 5},
        {"duplicate_window_s": 5},
        {"max_msg_bytes": 1024},
        {"storage": "memory"},
    ],
    ids=lambda change: next(iter(change)),
)
async def test_a_different_stream_is_named_with_field_and_values(queue, change):
    with pytest.raises(ProvisionError, match="stream QUEUE differs from its declaration") as raised:
        await queue.provision([dataclasses.replace(QUEUE, **change)], [], [])
    (field, value) = next(iter(change.items()))
    assert field.removesuffix("_s").split("_")[0] in str(raised.value)
    wanted = int(value * 1_000_000_000) if field.endswith("_s") else list(value) if field == "subjects" else value
    assert f"should be {wanted!r}" in str(raised.value)


async def test_a_different_consumer_is_named_with_field_and_values(queue):
    with pytest.raises(ProvisionError, match=r"consumer takers of stream QUEUE .*ack_wait is 1000000000 and should be"):
        await queue.provision([], [dataclasses.replace(TAKERS, ack_wait_s=2)], [])


async def test_a_different_bucket_is_named_with_field_and_values(queue):
    with pytest.raises(ProvisionError, match=r"stream KV_VALUES .*max_bytes is 1048576 and should be 2048"):
        await queue.provision([], [], [dataclasses.replace(VALUES, max_bytes=2048)])


async def test_what_an_operator_set_beside_it_is_left_alone(queue):
    config = (await queue.api("STREAM.INFO.QUEUE"))["config"]
    await queue.api("STREAM.UPDATE.QUEUE", config | {"description": "ours", "metadata": {"team": "ours"}})
    await queue.provision([QUEUE], [], [])
    assert (await queue.api("STREAM.INFO.QUEUE"))["config"]["description"] == "ours"


async def test_jetstream_off_is_a_sentence_that_says_how_to_switch_it_on(tmp_path, connect):
    server = NatsServer(tmp_path, jetstream=False)
    server.start()
    try:
        bus = await connect(server.url)
        with pytest.raises(ProvisionError, match=r"JetStream is off at nats://.*`-js`"):
            await bus.provision([QUEUE], [], [])
    finally:
        server.kill()


async def test_too_little_storage_is_a_sentence(bus):
    with pytest.raises(ProvisionError, match=r"stream QUEUE does not fit: .* bytes of file storage"):
        await bus.provision([dataclasses.replace(QUEUE, max_bytes=1 << 55)], [], [])


async def test_overlapping_subjects_are_a_sentence(queue):
    with pytest.raises(ProvisionError, match="stream OTHER cannot be created: subjects overlap"):
        await queue.provision([dataclasses.replace(QUEUE, name="OTHER")], [], [])


def test_more_replicas_than_wanted_are_no_difference():
    three = stream_config(QUEUE, replicas=3)
    assert list(differences(stream_config(QUEUE, replicas=1), three)) == []
    assert list(differences(three, stream_config(QUEUE, replicas=1))) == ["num_replicas is 1 and should be 3"]
