"""Object buckets: content of any size under names, in the layout that every NATS client has (NATS ADR-20).

An object is a row of chunks on a subject of its own, and a description of them that is published last: until
then there is no object, and from then on the one before is gone. The broker takes a description only in the
place of the one that its sender knew, so that two who put one name at once leave no chunk behind.
"""

import hashlib
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import AsyncIterable, AsyncIterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from secrets import token_hex
from typing import TYPE_CHECKING, Final

import msgspec
import structlog

from pipeline.errors import (
    BrokerRefused,
    BusUnavailable,
    Busy,
    ObjectDamaged,
    ObjectNotFound,
    Overloaded,
    PayloadTooLarge,
)
from pipeline.jetstream import WRONG_LAST_SEQ, StoredMessage
from pipeline.provision import object_stream
from subjects import headers, names
from subjects.streams import ObjectBucketSpec

if TYPE_CHECKING:
    from pipeline.bus import Bus

CHUNK_BYTES: Final = 128 * 1024
"""As every client cuts them."""
CHUNKS_AT_ONCE: Final = 16
"""Read by one request, and then in memory."""
NAME_CHARS_MAX: Final = 512
TRIES_MAX: Final = 16
"""Of a put that others' puts of the same name come before, and of a get that a put comes between."""
_DIGEST: Final = "SHA-256="
_HEADER_BYTES: Final = 1024  # for the headers of a chunk

log = structlog.get_logger()


class _Options(msgspec.Struct, frozen=True, omit_defaults=True):
    max_chunk_size: int = 0


class _Meta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An object's description as it is stored, in JSON."""

    name: str
    bucket: str
    nuid: str  # of its chunks' subject
    size: int
    chunks: int
    mtime: str = "0001-01-01T00:00:00Z"  # readers take the message's own time
    description: str = ""
    metadata: dict[str, str] | None = None
    options: _Options | None = None
    digest: str = ""  # "SHA-256=" and the hash in base64url
    deleted: bool = False


@dataclass(frozen=True, kw_only=True)
class ObjectInfo:
    """What is known of an object without reading it."""

    name: str
    size: int  # bytes
    sha256: str  # of the content, in hex; empty where another client left it out
    stored_unix_s: float
    description: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    chunks: int = 0
    nuid: str = ""  # other for each put


class Objects:
    """An object bucket of the broker. Every call raises BusUnavailable where the broker stays away."""

    def __init__(self, bus: "Bus", spec: ObjectBucketSpec) -> None:
        self._bus, self.spec = bus, spec
        self._stream = object_stream(spec.name)
        self._prefix = f"{names.OBJECTS}.{spec.name}"

    async def put(
        self,
        name: str,
        content: bytes | AsyncIterable[bytes],
        *,
        description: str = "",
        metadata: Mapping[str, str] | None = None,
        replace: bool = True,
    ) -> ObjectInfo:
        """Store an object, whole or not at all; with `replace` False one that is there is left as it is.

        Broken off, it leaves nothing; killed, chunks that nobody sees and that expire with the bucket's `ttl_s`.
        Raises PayloadTooLarge for more than the bucket's `object_bytes_max`, Overloaded where the bucket is full,
        Busy where others keep putting the same name, ProvisionError.
        """
        if not 0 < len(name) <= NAME_CHARS_MAX:
            raise ValueError(f"an object's name has 1 to {NAME_CHARS_MAX} characters, not {len(name)}")
        await self._bus.ensure_bucket(self.spec)
        if not replace and (there := _readable(await self._last(name))):
            return there
        nuid = token_hex(11)
        try:
            size, chunks, digest = await self._write(nuid, content)
        except BaseException:
            await self._forget(nuid)
            raise
        meta = _Meta(
            name=name,
            bucket=self.spec.name,
            nuid=nuid,
            size=size,
            chunks=chunks,
            mtime=datetime.now(UTC).isoformat(),
            description=description,
            metadata=dict(metadata or {}) or None,
            options=_Options(CHUNK_BYTES),
            digest=digest,
        )
        try:
            info = await self._describe(meta, replace)
        except (Busy, Overloaded):  # any other failure may have left the description: then its chunks must stay
            await self._forget(nuid)
            raise
        if info.nuid != nuid:
            await self._forget(nuid)
        return info

    async def info(self, name: str) -> ObjectInfo | None:
        """What is known of an object; None where there is none. Raises ObjectDamaged where the description is."""
        stored = await self._last(name)
        return _info_of(stored) if stored else None

    async def complete(self, info: ObjectInfo) -> bool:
        """Whether all chunks of an object are there, without reading them."""
        subject = f"{self._prefix}.C.{info.nuid}"
        there = await self._bus.subjects_state(self._stream, subject)
        return there.get(subject, 0) == info.chunks

    async def get(self, name: str) -> bytes:
        """The whole content, checked. Raises ObjectNotFound, ObjectDamaged."""
        for _ in range(TRIES_MAX):
            info = await self._info(name)
            try:
                return b"".join([chunk async for chunk in self._read(info)])
            except ObjectDamaged:
                if (now := await self.info(name)) is None or now.nuid == info.nuid:
                    raise
        raise Busy(f"{name} in {self.spec.name} is replaced again and again while it is read")

    async def chunks(self, name: str) -> AsyncIterator[bytes]:
        """The content piece by piece, in little memory: whole and right only once the iterator has ended.

        Raises ObjectNotFound before the first, ObjectDamaged before the end, also where the object is replaced
        or deleted meanwhile.
        """
        async for chunk in self._read(await self._info(name)):
            yield chunk

    async def delete(self, name: str) -> bool:
        """Remove an object, a damaged one too; whether there was one. Raises Busy."""
        try:
            if await self.info(name) is None:
                return False
        except ObjectDamaged:
            log.info("damaged_object_deleted", bucket=self.spec.name)
        gone = _Meta(name=name, bucket=self.spec.name, nuid=token_hex(11), size=0, chunks=0, deleted=True)
        await self._describe(gone, replace=True)
        return True

    async def list(self) -> list[ObjectInfo]:
        """Every object that can be read, by when it was put."""
        found = []
        async for message in self._bus.read(self._stream, f"{self._prefix}.M.>"):
            if info := _readable(message):
                found.append(info)
        return found

    async def _info(self, name: str) -> ObjectInfo:
        info = await self.info(name)
        if info is None:
            raise ObjectNotFound(f"there is no {name} in {self.spec.name}", field=name)
        return info

    async def _last(self, name: str) -> StoredMessage | None:
        """The message with an object's description, be it that it was deleted."""
        return await self._bus.last(self._stream, self._meta_subject(name))

    async def _describe(self, meta: _Meta, replace: bool) -> ObjectInfo:
        """Make it the object, and drop the chunks of the one before. Gives what is there if that is to stay."""
        subject = self._meta_subject(meta.name)
        for _ in range(TRIES_MAX):
            last = await self._last(meta.name)
            before = _readable(last)
            if before and not replace:
                return before
            behind = {headers.ROLLUP: "sub", headers.EXPECTED_LAST_SEQ: str(last.seq if last else 0)}
            try:
                await self._bus.publish_durable(subject, msgspec.json.encode(meta), headers=behind)
            except BrokerRefused as refusal:
                if refusal.error_number != WRONG_LAST_SEQ:
                    raise
                continue
            if before:
                await self._forget(before.nuid)
            return _info(meta, time.time())
        raise Busy(f"{meta.name} in {self.spec.name} is replaced by others again and again")

    async def _write(self, nuid: str, content: bytes | AsyncIterable[bytes]) -> tuple[int, int, str]:
        """Store the chunks; size, number and digest."""
        subject, limit = f"{self._prefix}.C.{nuid}", self.spec.object_bytes_max
        sha256, size, count = hashlib.sha256(), 0, 0
        async for chunk in _cut(content, min(CHUNK_BYTES, self._bus.max_payload_bytes - _HEADER_BYTES)):
            size += len(chunk)
            if size > limit:
                raise PayloadTooLarge(
                    f"{size} bytes and more do not fit into an object of {self.spec.name}; the limit is {limit}",
                    field="payload",
                    size=size,
                    limit=limit,
                )
            sha256.update(chunk)
            await self._bus.publish_durable(subject, chunk)
            count += 1
        return size, count, _DIGEST + urlsafe_b64encode(sha256.digest()).decode()

    async def _read(self, info: ObjectInfo) -> AsyncIterator[bytes]:
        """The chunks, checked. Raises ObjectDamaged."""
        sha256, size = hashlib.sha256(), 0
        if info.size:
            subject = f"{self._prefix}.C.{info.nuid}"
            async for message in self._bus.read(self._stream, subject, at_once=CHUNKS_AT_ONCE):
                size += len(message.payload)
                if size > info.size:
                    break
                sha256.update(message.payload)
                yield message.payload
        if size != info.size or sha256.hexdigest() != info.sha256:
            raise ObjectDamaged(
                f"{info.name} in {self.spec.name} is damaged: its chunks are not those that its digest is of",
                field=info.name,
                size=size,
                limit=info.size,
            )

    async def _forget(self, nuid: str) -> None:
        """Remove chunks; where the broker is away they go when they expire."""
        try:
            await self._bus.api(f"STREAM.PURGE.{self._stream}", {"filter": f"{self._prefix}.C.{nuid}"})
        except BusUnavailable as error:
            log.warning("chunks_not_removed", bucket=self.spec.name, code=error.code, reason=str(error))

    def _meta_subject(self, name: str) -> str:
        return f"{self._prefix}.M.{urlsafe_b64encode(name.encode()).decode()}"


async def _cut(content: bytes | AsyncIterable[bytes], chunk_bytes: int) -> AsyncIterator[bytes]:
    """The content in chunks of this size; the last is shorter."""
    if isinstance(content, bytes):
        for at in range(0, len(content), chunk_bytes):
            yield content[at : at + chunk_bytes]
        return
    held = bytearray()
    async for piece in content:
        held += piece
        whole = len(held) - len(held) % chunk_bytes
        for at in range(0, whole, chunk_bytes):
            yield bytes(held[at : at + chunk_bytes])
        del held[:whole]
    if held:
        yield bytes(held)


def _info_of(stored: StoredMessage) -> ObjectInfo | None:
    """None for an object that was deleted. Raises ObjectDamaged."""
    try:
        meta = msgspec.json.decode(stored.payload, type=_Meta)
    except msgspec.DecodeError as error:
        raise ObjectDamaged(f"the description on {stored.subject} is none: {error}") from None
    return None if meta.deleted else _info(meta, stored.stored_unix_s)


def _readable(stored: StoredMessage | None) -> ObjectInfo | None:
    """As `_info_of`, but a damaged description counts for nothing: a put may take its place."""
    try:
        return _info_of(stored) if stored else None
    except ObjectDamaged as error:
        log.warning("object_unreadable", code=error.code, reason=str(error))
        return None


def _info(meta: _Meta, stored_unix_s: float) -> ObjectInfo:
    return ObjectInfo(
        name=meta.name,
        size=meta.size,
        sha256=_hex(meta.digest),
        stored_unix_s=stored_unix_s,
        description=meta.description,
        metadata=meta.metadata or {},
        chunks=meta.chunks,
        nuid=meta.nuid,
    )


def _hex(digest: str) -> str:
    """Raises ObjectDamaged for what is no SHA-256 in base64url."""
    if not digest:
        return ""
    try:
        return urlsafe_b64decode(digest.removeprefix(_DIGEST)).hex()
    except ValueError:
        raise ObjectDamaged(f"not a digest: {digest[:64]!r}") from None
