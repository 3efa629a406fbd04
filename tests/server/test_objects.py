"""Object buckets over a real broker: whole or not at all, nothing left behind, damage noticed."""

import asyncio
import dataclasses
import hashlib

import msgspec
import pytest

from pipeline.bus import Objects
from pipeline.errors import ObjectDamaged, ObjectNotFound, Overloaded, PayloadTooLarge, ProvisionError
from pipeline.objects import CHUNK_BYTES, CHUNKS_AT_ONCE
from subjects.streams import ObjectBucketSpec

MIB = 1024 * 1024
THINGS = ObjectBucketSpec(
    name="THINGS",
    about="A bucket for tests.",
    storage="file",
    ttl_s=600,
    max_bytes=16 * MIB,
    object_bytes_max=4 * MIB,
)
CONTENT = bytes(range(256)) * 1024 * 2 + b"the end"  # four chunks and a piece
SUBJECTS = "$O.THINGS.>"


@pytest.fixture
async def things(bus) -> Objects:
    return await bus.objects(THINGS)


async def stored(bus) -> dict[str, int]:
    """How many messages the bucket has on each subject."""
    return await bus.subjects_state("OBJ_THINGS", SUBJECTS)


def chunk_subjects(subjects: dict[str, int]) -> list[str]:
    return [subject for subject in subjects if ".C." in subject]


async def pieces(content: bytes, size: int):
    for at in range(0, len(content), size):
        yield content[at : at + size]


@pytest.mark.parametrize("content", [b"", b"x", CONTENT, CONTENT[: 2 * CHUNK_BYTES]], ids=len)
async def test_put_info_get(bus, things, content):
    put = await things.put("a/b c.json", content, description="a thing", metadata={"of": "mine"})
    info = await things.info("a/b c.json")
    assert info == dataclasses.replace(put, stored_unix_s=info.stored_unix_s)
    assert (info.size, info.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert (info.description, info.metadata) == ("a thing", {"of": "mine"})
    assert await things.get("a/b c.json") == content
    assert [len(chunk) for chunk in [chunk async for chunk in things.chunks("a/b c.json")]] == [
        min(CHUNK_BYTES, len(content) - at) for at in range(0, len(content), CHUNK_BYTES)
    ]


async def test_content_that_comes_in_pieces_and_takes_several_reads(things):
    content = CONTENT * 7
    assert len(content) > CHUNKS_AT_ONCE * CHUNK_BYTES
    for size in (1_000_000, 50_000):
        info = await things.put("a", pieces(content, size))
        assert info.chunks == -(-len(content) // CHUNK_BYTES)
        assert await things.get("a") == content


async def test_a_replaced_objects_chunks_are_gone(bus, things):
    await things.put("a", CONTENT)
    (first,) = chunk_subjects(await stored(bus))
    await things.put("a", b"new")
    assert await things.get("a") == b"new"
    subjects = await stored(bus)
    assert len(subjects) == 2
    assert first not in subjects


async def test_replace_false_leaves_what_is_there(bus, things):
    first = await things.put("a", CONTENT, replace=False)
    again = await things.put("a", b"other", replace=False)
    assert again.nuid == first.nuid
    assert await things.get("a") == CONTENT
    assert set((await stored(bus)).values()) == {1, 5}


@pytest.mark.parametrize("replace", [True, False])
async def test_puts_of_one_name_at_once_leave_one_object_and_no_chunk_of_the_others(bus, things, replace):
    contents = [bytes([number]) * 200_000 for number in range(8)]
    await asyncio.gather(*(things.put("a", content, replace=replace) for content in contents))
    assert await things.get("a") in contents
    subjects = await stored(bus)
    assert sorted(subjects.values()) == [1, 2], subjects


async def test_delete_and_list(bus, things):
    assert await things.list() == []
    for name in ("a", "b", "c"):
        await things.put(name, name.encode())
    assert await things.delete("b")
    assert not await things.delete("b")
    assert not await things.delete("never")
    assert [(info.name, info.size) for info in await things.list()] == [("a", 1), ("c", 1)]
    assert await things.info("b") is None
    with pytest.raises(ObjectNotFound, match="there is no b in THINGS"):
        await things.get("b")
    assert len(chunk_subjects(await stored(bus))) == 2
    await things.put("b", b"again", replace=False)
    assert await things.get("b") == b"again"


async def test_a_put_that_is_broken_off_leaves_nothing(bus, things):
    await things.put("a", b"before")
    came = asyncio.Event()

    async def content():
        yield CONTENT
        came.set()
        await asyncio.Event().wait()

    putting = asyncio.create_task(things.put("a", content()))
    await asyncio.wait_for(came.wait(), 5)
    assert len(await stored(bus)) == 3
    putting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await putting
    assert len(await stored(bus)) == 2
    assert await things.get("a") == b"before"


async def test_too_large_an_object_is_refused_with_its_limit_and_leaves_nothing(bus, things):
    with pytest.raises(PayloadTooLarge, match="limit is 4194304") as raised:
        await things.put("a", pieces(bytes(5 * MIB), MIB))
    assert raised.value.limit == THINGS.object_bytes_max
    assert await stored(bus) == {}


async def test_a_full_bucket_says_so_and_leaves_nothing_of_what_did_not_fit(bus):
    small = await bus.objects(dataclasses.replace(THINGS, max_bytes=MIB))
    await small.put("a", bytes(MIB // 2))
    with pytest.raises(Overloaded):
        await small.put("b", bytes(MIB))
    assert [info.name for info in await small.list()] == ["a"]
    assert len(chunk_subjects(await stored(bus))) == 1


async def test_lost_chunks_and_other_chunks_are_damage(bus, things):
    info = await things.put("a", CONTENT)
    chunks = f"$O.THINGS.C.{info.nuid}"
    await bus.api("STREAM.PURGE.OBJ_THINGS", {"filter": chunks, "keep": 2})
    with pytest.raises(ObjectDamaged, match="a in THINGS is damaged"):
        await things.get("a")
    await bus.api("STREAM.PURGE.OBJ_THINGS", {"filter": chunks})
    for at in range(0, len(CONTENT), CHUNK_BYTES):
        await bus.publish_durable(chunks, CONTENT[at : at + CHUNK_BYTES].replace(b"\x00", b"\x01"))
    with pytest.raises(ObjectDamaged):
        await things.get("a")
    await things.put("a", CONTENT)
    assert await things.get("a") == CONTENT


async def test_a_description_that_is_none_is_damage_and_does_not_hide_others(bus, things):
    await things.put("a", b"1")
    info = await things.put("b", b"2")
    for payload in (b"no json", msgspec.json.encode({"name": "b", "bucket": "THINGS", "nuid": info.nuid})):
        await bus.publish_durable("$O.THINGS.M.Yg==", payload, headers={"Nats-Rollup": "sub"})
        with pytest.raises(ObjectDamaged, match="description"):
            await things.info("b")
        assert [info.name for info in await things.list()] == ["a"]
    await things.put("b", b"3", replace=False)
    assert await things.get("b") == b"3"


async def test_complete_tells_lost_chunks_without_reading(bus, things):
    info = await things.put("a", CONTENT)
    assert await things.complete(info)
    await bus.api("STREAM.PURGE.OBJ_THINGS", {"filter": f"$O.THINGS.C.{info.nuid}", "keep": 2})
    assert not await things.complete(info)
    assert await things.complete(await things.put("empty", b""))


async def test_a_get_that_a_put_comes_between_gives_the_new_content(bus, things):
    await things.put("a", CONTENT)
    info = things._info

    async def then_replaced(name):
        known = await info(name)
        if known.size == len(CONTENT):
            await things.put("a", b"new")
        return known

    things._info = then_replaced
    assert await things.get("a") == b"new"


async def test_a_deleted_bucket_is_made_again_by_a_put(bus, things):
    await things.put("a", b"1")
    await bus.api("STREAM.DELETE.OBJ_THINGS")
    await things.put("b", b"2")
    assert [info.name for info in await things.list()] == ["b"]


async def test_a_put_goes_on_through_a_restart_of_the_broker(nats_server, bus, things):
    async def content():
        yield CONTENT
        nats_server.kill()
        nats_server.start()
        yield CONTENT

    await things.put("a", content())
    assert await things.get("a") == CONTENT * 2


async def test_a_bucket_that_is_otherwise_is_refused(bus, things):
    with pytest.raises(ProvisionError, match=r"stream OBJ_THINGS .*max_bytes is"):
        await bus.objects(dataclasses.replace(THINGS, max_bytes=MIB))
