"""A model's tokenizer in an object bucket, so that a machine that tokenizes needs no copy of the model.

Each file is an object named by its SHA-256, and a model card says which files make its tokenizer: workers of one
model, and models with equal files, share them. Whoever serves a model sees to it that they are there, so nobody
has to clean up: what no worker cares for expires with the bucket's `ttl_s`.
"""

import asyncio
import hashlib
import json
import os
import random
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import structlog

from pipeline.bus import Bus, Objects
from pipeline.errors import ModelUnavailable, ObjectDamaged, ObjectNotFound, PayloadTooLarge, PipelineError
from pipeline.models import cache_folder, prepare_model
from pipeline.objects import ObjectInfo
from subjects.limits import TOKENIZER_BYTES_MAX, TOKENIZER_FILE_BYTES_MAX
from subjects.streams import TOKENIZERS

NAMES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
)
"""All that `ChatTokenizer` reads. No other name is ever put or written; what is in vocab.json, merges.txt or a
SentencePiece model is in tokenizer.json too."""
NEEDED: Final = NAMES[0]
CHECK_S: Final = 10.0
"""How often a worker looks whether its files are there; about as often as it puts its card again."""
FRESH_SHARE: Final = 0.5
"""Files older than this share of the bucket's `ttl_s` are put again."""
CACHE_BYTES_MAX: Final = 2 * 1024**3
PARTS_S_MAX: Final = 3600.0
"""A folder that was begun and not finished for so long is a killed process's."""
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_PART: Final = ".part-"

log = structlog.get_logger()


def find(path: str, revision: str | None = None) -> dict[str, Path]:
    """The tokenizer's files of a model that an engine has loaded, by name: in its folder, or in the hub's cache.

    Raises SetupError for a built-in model that cannot be unpacked.
    """
    folder = prepare_model(path)
    if folder.is_dir():
        return {name: folder / name for name in NAMES if (folder / name).is_file()}
    if folder.exists() or folder.is_absolute():
        return {}
    from huggingface_hub import try_to_load_from_cache  # only for those who use it: it takes a third of a second

    cached = {name: try_to_load_from_cache(path, name, revision=revision) for name in NAMES}
    return {name: Path(file) for name, file in cached.items() if isinstance(file, str)}


class OfferedTokenizer:
    """A worker's tokenizer files, kept in the bucket for as long as it serves."""

    def __init__(self, bus: Bus, path: str, revision: str | None = None) -> None:
        """`path`: the folder or hub name that the engine loaded."""
        self._bus, self._path, self._revision = bus, path, revision
        self._found: dict[str, Path] = {}
        self.files: dict[str, str] = {}
        """Name to SHA-256 in hex, for the card; empty where the model has no files to offer."""

    async def offer(self) -> None:
        """Find the files, and put those that the bucket lacks. What goes wrong is logged: an engine that can
        generate is of use to a preprocess worker that has the files itself."""
        try:
            await asyncio.to_thread(self._read)
            await self._put_missing()
        except (OSError, ValueError, PipelineError) as error:
            code = error.code if isinstance(error, PipelineError) else type(error).__name__
            log.warning("tokenizer_not_offered", code=code, reason=str(error))

    async def keep(self) -> None:
        """Put again, for ever, what is missing or about to expire."""
        while self.files:
            await asyncio.sleep(CHECK_S * random.uniform(0.5, 1.5))  # a thousand workers do not ask at once
            try:
                await self._put_missing()
            except (OSError, ValueError, PipelineError) as error:
                log.warning("tokenizer_not_kept", reason=str(error))

    def _read(self) -> None:
        """Runs in a thread. Raises OSError, PayloadTooLarge, SetupError."""
        found = find(self._path, self._revision)
        if NEEDED not in found:
            log.warning("tokenizer_not_offered", code="no_tokenizer_json", reason=f"{self._path} has no {NEEDED}")
            return
        sizes = {name: file.stat().st_size for name, file in found.items()}
        _check_sizes(sizes)
        self.files = {name: _sha256_of(file) for name, file in found.items()}
        self._found = found

    async def _put_missing(self) -> None:
        objects = await self._bus.objects(TOKENIZERS)
        for name, sha256 in self.files.items():
            info = await _readable(objects, sha256)
            if info is None or not await _lasts(objects, info):
                content = await asyncio.to_thread(self._found[name].read_bytes)
                if hashlib.sha256(content).hexdigest() != sha256:
                    raise ValueError(f"{self._found[name]} has changed since the engine read it")
                await objects.put(sha256, content, description=name, replace=info is not None)
                log.info("tokenizer_file_put", bucket=TOKENIZERS.name, reason=f"{name}, {len(content)} bytes")


class TokenizerCache:
    """The tokenizers of other machines' models, as folders on this one. Any number of processes may share it."""

    def __init__(self, bus: Bus, folder: Path | None = None) -> None:
        self._bus = bus
        self._root = folder or cache_folder() / "tokenizers"

    async def folder(self, files: Mapping[str, str]) -> Path:
        """The folder with exactly these files (name to SHA-256), fetched where it is not here yet.

        Raises ModelUnavailable where the bucket does not have them as they should be, BusUnavailable.
        """
        _check_names(files)
        folder = self._root / _key(files)
        try:
            if not await asyncio.to_thread(_intact, folder, files):
                await self._fetch(files, folder)
        except (ObjectNotFound, ObjectDamaged) as error:
            raise ModelUnavailable(f"its tokenizer files are not to be had: {error}") from None
        except OSError as problem:
            raise ModelUnavailable(f"its tokenizer files cannot be kept in {self._root}: {problem}") from problem
        return folder

    async def _fetch(self, files: Mapping[str, str], folder: Path) -> None:
        """Beside the folder, then renamed: a folder that exists is whole."""
        objects = await self._bus.objects(TOKENIZERS)
        part = await asyncio.to_thread(_begin, folder)
        try:
            left = TOKENIZER_BYTES_MAX
            for name, sha256 in files.items():
                content = await _content(objects, name, sha256, left)
                left -= len(content)
                await asyncio.to_thread((part / name).write_bytes, content)
            await asyncio.to_thread(_finish, part, folder, files)
        finally:
            await asyncio.to_thread(shutil.rmtree, part, ignore_errors=True)
        await asyncio.to_thread(_make_room, self._root, folder)


async def _readable(objects: Objects, name: str) -> ObjectInfo | None:
    """None where there is no such object, or nothing that could be one."""
    try:
        return await objects.info(name)
    except ObjectDamaged:
        return None


async def _lasts(objects: Objects, info: ObjectInfo) -> bool:
    """Whether an object is whole and far from its end."""
    fresh = time.time() - info.stored_unix_s < FRESH_SHARE * objects.spec.ttl_s
    return fresh and await objects.complete(info)


async def _content(objects: Objects, name: str, sha256: str, bytes_max: int) -> bytes:
    """One file. Raises ObjectNotFound, ObjectDamaged, ModelUnavailable for one that is too large."""
    info = await objects.info(sha256)
    if info is not None and info.size > min(bytes_max, TOKENIZER_FILE_BYTES_MAX):
        raise ModelUnavailable(f"its {name} has {info.size} bytes; the limit is {bytes_max}", limit=bytes_max)
    content = await objects.get(sha256)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ObjectDamaged(f"{sha256} in {TOKENIZERS.name} is not what its name says; delete it", field=name)
    return content


def _check_names(files: Mapping[str, str]) -> None:
    """A card comes over the wire: nothing of it becomes a path, or a subject, unseen."""
    unknown = [name for name in files if name not in NAMES]
    if unknown or NEEDED not in files or not all(_SHA256.fullmatch(sha256) for sha256 in files.values()):
        raise ModelUnavailable(f"its card names no tokenizer: {', '.join(sorted(files))[:200]}")


def _check_sizes(sizes: Mapping[str, int]) -> None:
    for name, size in sizes.items():
        if size > TOKENIZER_FILE_BYTES_MAX:
            limit = TOKENIZER_FILE_BYTES_MAX
            raise PayloadTooLarge(f"{name} has {size} bytes; the limit is {limit}", size=size, limit=limit)
    if (total := sum(sizes.values())) > TOKENIZER_BYTES_MAX:
        limit = TOKENIZER_BYTES_MAX
        raise PayloadTooLarge(f"the tokenizer has {total} bytes; the limit is {limit}", size=total, limit=limit)


def _key(files: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()[:32]


def _sha256_of(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _intact(folder: Path, files: Mapping[str, str]) -> bool:
    """Whether the folder has these files, to the byte. It counts as used now."""
    try:
        if any(_sha256_of(folder / name) != sha256 for name, sha256 in files.items()):
            log.warning("cached_tokenizer_damaged", reason=str(folder))
            return False
        os.utime(folder)
    except FileNotFoundError:
        return False
    return True


def _begin(folder: Path) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f"{folder.name}{_PART}", dir=folder.parent))


def _finish(part: Path, folder: Path, files: Mapping[str, str]) -> None:
    """Give the folder its name, in the place of a damaged one. Another process may have been faster."""
    part.chmod(0o755)
    if folder.exists() and not _intact(folder, files):
        shutil.rmtree(folder)
    try:
        part.rename(folder)
    except OSError:
        if not _intact(folder, files):
            raise


def _make_room(root: Path, keep: Path) -> None:
    """Remove the folders that were not used for longest, until the rest fits; and what killed processes began."""
    used, left = [], CACHE_BYTES_MAX
    for folder, used_s, size in _folders(root):
        if _PART in folder.name:
            if time.time() - used_s > PARTS_S_MAX:
                shutil.rmtree(folder, ignore_errors=True)
        elif folder == keep:
            left -= size
        else:
            used.append((used_s, size, folder))
    for _, size, folder in sorted(used, reverse=True):
        left -= size
        if left < 0:
            shutil.rmtree(folder, ignore_errors=True)


def _folders(root: Path) -> Iterator[tuple[Path, float, int]]:
    """Each folder, when it was last used in seconds since the Unix epoch, and its bytes."""
    for folder in root.iterdir():
        try:
            size = sum(file.stat().st_size for file in folder.iterdir())
            yield folder, folder.stat().st_mtime, size
        except (FileNotFoundError, NotADirectoryError):
            continue  # another process removed it; or it is not ours
