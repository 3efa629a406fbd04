"""NATS's own JavaScript client reads an object of ours, and we read, and see deleted, what it did."""

import asyncio
import hashlib
import json
from pathlib import Path

from pipeline.bus import Bus
from pipeline.nats_server import NatsServer
from subjects.streams import ObjectBucketSpec

MIB = 1024 * 1024
THINGS = ObjectBucketSpec(
    name="THINGS", about="A bucket for tests.", storage="file", ttl_s=600, max_bytes=16 * MIB, object_bytes_max=MIB
)
CONTENT = bytes(range(256)) * 2048


async def test_objects_are_those_of_any_nats_client(node, tmp_path: Path):
    server = NatsServer(tmp_path)
    server.start()
    bus = await Bus.connect(server.url, name="test")
    try:
        things = await bus.objects(THINGS)
        await things.put("a b/c.json", CONTENT, description="ours", metadata={"of": "mine"})
        read = json.loads(await asyncio.to_thread(node, "objects.mjs", server.url, "THINGS", "a b/c.json", "theirs"))
        assert read == {
            "size": len(CONTENT),
            "chunks": 4,
            "description": "ours",
            "metadata": {"of": "mine"},
            "sha256": hashlib.sha256(CONTENT).hexdigest(),
            "listed": ["a b/c.json"],
        }
        assert await things.get("theirs") == CONTENT[:5_500]
        (info,) = await things.list()
        assert (info.name, info.description, info.chunks) == ("theirs", "from JavaScript", 6)
        assert await things.complete(info)
    finally:
        await bus.close()
        server.kill()
