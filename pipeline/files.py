"""Clients' files, as /v1/files has them: in an object bucket, so that any gateway has every file."""

import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Final, Literal

from pipeline.bus import Objects
from pipeline.errors import NotFound, Overloaded
from pipeline.objects import ObjectInfo
from subjects import limits

Purpose = Literal["batch", "batch_output", "user_data"]
PURPOSES: Final = ("batch", "user_data")
"""What a client may upload a file for."""
_PURPOSE: Final = "purpose"
_FILENAME: Final = "filename"
_EXPIRES: Final = "expires_unix_s"


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """What is known of a file."""

    file_id: str
    filename: str
    purpose: str
    size: int  # bytes
    created_unix_s: float
    expires_unix_s: float

    def body(self) -> dict[str, Any]:
        """As OpenAI's API gives it."""
        return {
            "id": self.file_id,
            "object": "file",
            "bytes": self.size,
            "created_at": int(self.created_unix_s),
            "expires_at": int(self.expires_unix_s),
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
        }


class Files:
    """All clients' files in one bucket; each sees its own."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    async def put(
        self,
        client: str,
        content: bytes | AsyncIterator[bytes],
        *,
        filename: str,
        purpose: Purpose,
        file_id: str | None = None,
        kept_s: float = limits.FILES_KEPT_S,
    ) -> File:
        """Store a file, whole or not at all; one of the same `file_id` gives way.

        Raises PayloadTooLarge, Overloaded where the bucket or the client's own number of files is full, BusUnavailable.
        """
        if file_id is None and len(await self.list(client)) >= limits.FILES_MAX:
            raise Overloaded(
                f"{client} has {limits.FILES_MAX} files, and may have no more: delete one first", limit=limits.FILES_MAX
            )
        file_id = file_id or f"file-{uuid.uuid4().hex}"
        described = {_PURPOSE: purpose, _FILENAME: filename, _EXPIRES: str(time.time() + kept_s)}
        info = await self._objects.put(_name(client, file_id), content, metadata=described)
        return _file(info)

    async def get(self, client: str, file_id: str) -> File:
        """Raises NotFound, BusUnavailable."""
        info = await self._objects.info(_name(client, file_id))
        if info is None or _file(info).expires_unix_s <= time.time():
            raise NotFound(f"there is no file {file_id[: limits.REQUEST_ID_CHARS_MAX]!r}", field="file_id")
        return _file(info)

    def content(self, client: str, file_id: str) -> AsyncIterator[bytes]:
        """A file's bytes. Raises ObjectNotFound, ObjectDamaged, BusUnavailable."""
        return self._objects.chunks(_name(client, file_id))

    async def read(self, client: str, file_id: str) -> bytes:
        """As `content`, at once."""
        return await self._objects.get(_name(client, file_id))

    async def delete(self, client: str, file_id: str) -> None:
        """Raises NotFound, BusUnavailable."""
        await self.get(client, file_id)
        await self._objects.delete(_name(client, file_id))

    async def list(self, client: str) -> list[File]:
        """A client's files, the oldest first."""
        now_unix_s, mine = time.time(), _name(client, "")
        files = [_file(info) for info in await self._objects.list() if info.name.startswith(mine)]
        return [file for file in files if file.expires_unix_s > now_unix_s]

    async def sweep(self) -> None:
        """Remove what has expired before the bucket's own age limit."""
        now_unix_s = time.time()
        for info in await self._objects.list():
            if _EXPIRES in info.metadata and _file(info).expires_unix_s <= now_unix_s:
                await self._objects.delete(info.name)


def _name(client: str, file_id: str) -> str:
    return f"{client}/{file_id}"


def _file(info: ObjectInfo) -> File:
    kept_unix_s = info.metadata.get(_EXPIRES)
    return File(
        file_id=info.name.partition("/")[2],
        filename=info.metadata.get(_FILENAME, ""),
        purpose=info.metadata.get(_PURPOSE, ""),
        size=info.size,
        created_unix_s=info.stored_unix_s,
        expires_unix_s=float(kept_unix_s) if kept_unix_s else info.stored_unix_s + limits.FILES_KEPT_S,
    )
