"""A tokenizer goes from a worker to a machine without the model: by a bucket, checked, kept, and renewed."""

import asyncio
import contextlib
import hashlib
import json
import os
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from pipeline import served, tokenizer_files
from pipeline.bus import Bus, Objects
from pipeline.chat import ChatTokenizer
from pipeline.client import Client
from pipeline.config import BUILTIN_MODEL, GroupSettings, SimulatedSettings, TopologySettings
from pipeline.errors import EngineStartError, ModelUnavailable, UnknownModel
from pipeline.local import running
from pipeline.models import CACHE_VARIABLE, prepare_model
from pipeline.presence import Announcer, Presence
from pipeline.served import ServedModels
from pipeline.tokenizer_files import OfferedTokenizer, TokenizerCache
from subjects.messages import ChatMessage, Heartbeat, ModelCard
from subjects.streams import TOKENIZERS

MODEL = "m"
STREAM = "OBJ_SGLANG_TOKENIZERS"
READY_S_MAX = 60.0
DEADLINE_S = 10.0


def write_model(folder: Path, *words: str, template: str | None = None) -> Path:
    """A model's folder with a tokenizer that knows these words, and weights that must not travel."""
    folder.mkdir()
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"vocab_size": len(words), "eos_token_id": 0}))
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "evil.py").write_text("raise SystemExit")
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return folder


class Worker:
    """A decode worker as preprocess sees it: its card, its heartbeats, its tokenizer."""

    def __init__(self, bus: Bus, name: str, folder: Path | str) -> None:
        self.name, self.folder, self._bus = name, str(folder), bus
        self.announcer = Announcer(bus, "decode", name, MODEL, "i1", self._heartbeat)
        self.tokenizer = OfferedTokenizer(bus, self.folder)

    def _heartbeat(self) -> Heartbeat:
        return Heartbeat(worker=self.name, role="decode", incarnation="i1", model=MODEL, ready=True)

    async def begin(self, **files: str) -> "Worker":
        await self.tokenizer.offer()
        card = ModelCard(
            worker=self.name,
            role="decode",
            model=MODEL,
            incarnation="i1",
            model_path="/nowhere",
            engine="simulated",
            context_len_tokens=8,
            max_running_requests=1,
            max_prefill_tokens=8,
            kv_blocks=1,
            kv_block_tokens=1,
            tokenizer_files=files or self.tokenizer.files,
            started_unix_s=time.time(),
        )
        await self.announcer.start()
        await self.announcer.publish_card(card)
        return self


class Scene:
    """Workers, and a preprocess worker's models on another machine, which has none of theirs."""

    def __init__(self, bus: Bus, presence: Presence, cache: Path) -> None:
        self.bus, self.presence, self.cache = bus, presence, cache
        self.models = self.machine()
        self.workers: list[Worker] = []

    def machine(self, cache: Path | None = None, **declared: str) -> ServedModels:
        return ServedModels(self.presence, declared, TokenizerCache(self.bus, cache or self.cache))

    async def worker(self, name: str, folder: Path | str, **files: str) -> Worker:
        self.workers.append(await Worker(self.bus, name, folder).begin(**files))
        async with asyncio.timeout(DEADLINE_S):
            while not any(state.worker == name and state.registered for state in self.presence.workers()):
                await self.presence._changed.wait()
        return self.workers[-1]

    async def encode(self, text: str, models: ServedModels | None = None) -> list[int]:
        model = await (models or self.models).ready(MODEL, time.time() + DEADLINE_S)
        return model.tokenizer.encode(text, add_special_tokens=True).tolist()


@pytest.fixture
async def scene(bus, tmp_path):
    presence = Presence(bus)
    await presence.start()
    scene = Scene(bus, presence, tmp_path / "cache")
    yield scene
    for worker in scene.workers:
        await worker.announcer.close()
    await presence.close()


@pytest.fixture
async def objects(bus) -> Objects:
    return await bus.objects(TOKENIZERS)


async def written(bus: Bus) -> int:
    """Messages that were ever put into the bucket."""
    return (await bus.stream_state(STREAM)).last_seq


async def test_a_machine_without_the_model_tokenizes_as_its_worker_does(scene, objects, tmp_path):
    folder = write_model(tmp_path / "model", "?", "hello", "there", template="{{ messages[0].content }} there")
    worker = await scene.worker("w1", folder)
    assert await scene.encode("there hello what") == [2, 1, 0]
    model = await scene.models.ready(MODEL, time.time() + DEADLINE_S)
    assert model.tokenizer.render([ChatMessage(role="user", content="hello")]) == "hello there"
    (kept,) = scene.cache.iterdir()
    assert {file.name for file in kept.iterdir()} == {"tokenizer.json", "config.json", "chat_template.jinja"}
    assert {info.name: info.description for info in await objects.list()} == {
        hashlib.sha256((folder / name).read_bytes()).hexdigest(): name for name in worker.tokenizer.files
    }


async def test_more_workers_and_models_with_equal_files_write_nothing(scene, bus, tmp_path):
    await scene.worker("w1", write_model(tmp_path / "a", "?", "one"))
    once = await written(bus)
    await scene.worker("w2", write_model(tmp_path / "b", "?", "one"))
    assert await written(bus) == once
    await scene.worker("w3", write_model(tmp_path / "c", "?", "one", template="{{ messages }}"))
    assert await written(bus) == once + 2  # the template's chunk and description


async def test_two_at_once_leave_one_copy(bus, objects, tmp_path):
    folder = write_model(tmp_path / "a", *(f"word{number}" for number in range(20_000)))
    others = [OfferedTokenizer(bus, str(folder)) for _ in range(8)]
    await asyncio.gather(*(other.offer() for other in others))
    assert sorted(info.description for info in await objects.list()) == ["config.json", "tokenizer.json"]
    assert all([await objects.complete(info) for info in await objects.list()])
    chunks = await bus.subjects_state(STREAM, f"$O.{TOKENIZERS.name}.C.>")
    assert len(chunks) == 2


async def test_a_worker_with_another_tokenizer_is_taken_over(scene, tmp_path):
    await scene.worker("w2", write_model(tmp_path / "a", "?", "one", "two"))
    assert await scene.encode("one two") == [1, 2]
    await scene.worker("w1", write_model(tmp_path / "b", "?", "two", "one"))
    assert await scene.encode("one two") == [2, 1]


async def test_a_path_on_this_machine_wins_and_one_to_nothing_does_not(scene, tmp_path):
    await scene.worker("w1", write_model(tmp_path / "a", "?", "one", "two"))
    here = scene.machine(m=str(write_model(tmp_path / "b", "?", "two", "one")))
    absent = scene.machine(m=str(tmp_path / "absent"))
    for models in (here, absent):
        await models.load_declared()
    assert await scene.encode("one two", here) == [2, 1]
    assert await scene.encode("one two", absent) == [1, 2]
    with pytest.raises(UnknownModel):
        await scene.machine().ready("other", time.time() + DEADLINE_S)


async def test_a_damaged_model_on_this_machine_is_loud(scene, tmp_path):
    folder = write_model(tmp_path / "a", "?")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(EngineStartError, match="is not a tokenizer"):
        await scene.machine(m=str(folder)).load_declared()


async def test_a_deleted_bucket_hurts_nobody_who_knows_the_model_and_is_filled_again(scene, bus, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_files, "CHECK_S", 0.05)
    monkeypatch.setattr(served, "RETRY_S", 0.0)
    worker = await scene.worker("w1", write_model(tmp_path / "a", "?", "one"))
    assert await scene.encode("one") == [1]
    await bus.api(f"STREAM.DELETE.{STREAM}")
    assert await scene.encode("one") == [1]
    assert await scene.encode("one", scene.machine()) == [1]  # restarted on the same machine: from its cache
    elsewhere = scene.machine(tmp_path / "elsewhere")
    with pytest.raises(ModelUnavailable, match="'m' is served, but its tokenizer files are not to be had: there is no"):
        await scene.encode("one", elsewhere)
    keeping = asyncio.create_task(worker.tokenizer.keep())
    async with asyncio.timeout(DEADLINE_S):
        while True:
            with contextlib.suppress(ModelUnavailable):
                assert await scene.encode("one", elsewhere) == [1]
                break
    keeping.cancel()


@pytest.mark.parametrize("damage", ["other content", "lost chunks", "other object"])
async def test_a_damaged_object_is_an_error_that_says_so_and_the_next_file_is_taken(
    scene, bus, objects, tmp_path, monkeypatch, damage
):
    worker = await scene.worker("w1", write_model(tmp_path / "a", "?", "one"))
    sha256 = worker.tokenizer.files["tokenizer.json"]
    info = await objects.info(sha256)
    chunks = f"$O.{TOKENIZERS.name}.C.{info.nuid}"
    if damage == "other object":
        await objects.put(sha256, b"{}")
    else:
        await bus.api(f"STREAM.PURGE.{STREAM}", {"filter": chunks})
        if damage == "other content":
            await bus.publish_durable(chunks, bytes(info.size))
    for _ in range(2):
        with pytest.raises(ModelUnavailable, match=f"'m' is served, but its tokenizer .*{sha256}") as raised:
            await scene.encode("one")
        assert raised.value.status == 503
    assert list(scene.cache.iterdir()) == []
    await scene.worker("w2", write_model(tmp_path / "b", "?", "two", "one"))
    assert await scene.encode("one") == [2]


async def test_lost_chunks_and_old_files_are_put_again(bus, objects, tmp_path, monkeypatch):
    offered = OfferedTokenizer(bus, str(write_model(tmp_path / "a", "?", "one")))
    await offered.offer()
    first = await objects.info(offered.files["tokenizer.json"])
    await bus.api(f"STREAM.PURGE.{STREAM}", {"filter": f"$O.{TOKENIZERS.name}.C.{first.nuid}"})
    await offered.offer()
    second = await objects.info(first.name)
    assert second.nuid != first.nuid
    assert await objects.get(first.name)
    once = await written(bus)
    await offered.offer()
    assert await written(bus) == once
    monkeypatch.setattr(tokenizer_files, "FRESH_SHARE", 0.0)
    await offered.offer()
    assert (await objects.info(first.name)).nuid != second.nuid
    assert len(await objects.list()) == 2


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer.json": "ab" * 32, "../../evil": "cd" * 32},
        {"tokenizer.json": "ab" * 32, "/etc/evil": "cd" * 32},
        {"tokenizer.json": "../../../evil"},
        {"tokenizer.json": "ab" * 32 + "\n"},
        {"tokenizer.json": "ab" * 32, "evil.py": "cd" * 32},
        {"config.json": "ab" * 32},
    ],
)
async def test_a_card_that_names_no_tokenizer_writes_nothing(scene, tmp_path, files):
    await scene.worker("w1", tmp_path / "none", **files)
    with pytest.raises(ModelUnavailable, match="its card names no tokenizer"):
        await scene.encode("one")
    assert not scene.cache.exists()


async def test_files_over_the_limit_are_neither_offered_nor_fetched(scene, objects, tmp_path, monkeypatch):
    folder = write_model(tmp_path / "a", "?", "one")
    size = (folder / "tokenizer.json").stat().st_size
    worker = await scene.worker("w1", folder)
    for name in ("TOKENIZER_FILE_BYTES_MAX", "TOKENIZER_BYTES_MAX"):
        with monkeypatch.context() as patch:
            patch.setattr(tokenizer_files, name, size - 1)
            offered = OfferedTokenizer(scene.bus, str(folder))
            await offered.offer()
            assert offered.files == {}
            with pytest.raises(ModelUnavailable, match=f"its tokenizer.json has {size} bytes"):
                await TokenizerCache(scene.bus, scene.cache).folder(worker.tokenizer.files)


async def test_a_damaged_cache_is_fetched_again(scene, tmp_path):
    worker = await scene.worker("w1", write_model(tmp_path / "a", "?", "one"))
    cache = TokenizerCache(scene.bus, scene.cache)
    folder = await cache.folder(worker.tokenizer.files)
    content = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(content[:-1])
    assert await cache.folder(worker.tokenizer.files) == folder
    assert (folder / "tokenizer.json").read_bytes() == content
    (folder / "config.json").unlink()
    await cache.folder(worker.tokenizer.files)
    assert {file.name for file in folder.iterdir()} == {"tokenizer.json", "config.json"}


async def test_many_at_once_fetch_one_whole_folder(scene, tmp_path):
    worker = await scene.worker("w1", write_model(tmp_path / "a", "?", "one"))
    caches = [TokenizerCache(scene.bus, scene.cache) for _ in range(8)]
    folders = await asyncio.gather(*(cache.folder(worker.tokenizer.files) for cache in caches))
    assert [folders[0]] == list(scene.cache.iterdir())


async def test_the_cache_keeps_what_was_used_last(scene, tmp_path, monkeypatch):
    cache = TokenizerCache(scene.bus, scene.cache)
    kept = []
    for number in range(4):
        worker = await scene.worker(f"w{number}", write_model(tmp_path / f"m{number}", "?", f"word{number}"))
        kept.append(await cache.folder(worker.tokenizer.files))
        os.utime(kept[-1], (number, number))
        if number == 0:
            bytes_each = sum(file.stat().st_size for file in kept[0].iterdir())
            monkeypatch.setattr(tokenizer_files, "CACHE_BYTES_MAX", 3 * bytes_each)
            (scene.cache / "killed.part-x").mkdir()
            os.utime(scene.cache / "killed.part-x", (0, 0))
            (scene.cache / "running.part-y").mkdir()
        if number == 2:
            await cache.folder(scene.workers[0].tokenizer.files)  # used now
    assert set(scene.cache.iterdir()) == {kept[0], kept[2], kept[3], scene.cache / "running.part-y"}


async def test_a_cache_that_cannot_be_written_is_an_error_that_names_it(scene, tmp_path):
    worker = await scene.worker("w1", write_model(tmp_path / "a", "?", "one"))
    scene.cache.write_text("not a folder")
    with pytest.raises(ModelUnavailable, match=f"cannot be kept in {scene.cache}"):
        await scene.encode("one")
    assert worker.tokenizer.files


async def test_a_model_without_a_tokenizer_is_registered_all_the_same(bus, objects, tmp_path):
    (tmp_path / "model").mkdir()
    for path in (tmp_path / "model", tmp_path / "absent", "no/such-model-at-the-hub"):
        offered = OfferedTokenizer(bus, str(path))
        await offered.offer()
        assert offered.files == {}
        await offered.keep()
    assert await objects.list() == []


async def test_a_load_that_takes_too_long_is_an_error(scene, tmp_path, monkeypatch):
    monkeypatch.setattr(served, "LOAD_S_MAX", 0.05)

    async def never(self, files):
        await asyncio.Event().wait()

    monkeypatch.setattr(TokenizerCache, "folder", never)
    await scene.worker("w1", write_model(tmp_path / "a", "?", "one"))
    with pytest.raises(ModelUnavailable, match="could not be loaded within"):
        await scene.encode("one")


@pytest.mark.timeout(120)
async def test_a_topology_whose_preprocess_machine_lacks_the_model(tmp_path):
    """With the real tokenizer: the prompt has exactly the tokens that the model's own tokenizer gives."""
    topology = TopologySettings(
        model="smollm2",
        model_path=BUILTIN_MODEL,
        workers=(
            GroupSettings(
                role="preprocess",
                models={"smollm2": "/absent/SmolLM2"},
                environment={CACHE_VARIABLE: str(tmp_path / "cache")},
            ),
            GroupSettings(role="decode", engine="simulated", simulated=SimulatedSettings(ttft_ms=1, itl_ms=1)),
        ),
    )
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    tokenizer = await asyncio.to_thread(ChatTokenizer.load, prepare_model(BUILTIN_MODEL))
    prompt = tokenizer.render([ChatMessage(**message) for message in messages])
    async with running(topology, tmp_path / "topology") as local:
        await local.start()
        async with asyncio.timeout(READY_S_MAX):
            await local.until_ready()
        async with Client.connect(local.url) as client:
            for _ in range(2):
                async for frame in client.generate(model="smollm2", messages=messages, max_tokens=3, ignore_eos=True):
                    assert frame.error is None, frame.error
                assert frame.usage.prompt_tokens == len(tokenizer.encode(prompt, add_special_tokens=False))
                await client._bus.api(f"STREAM.DELETE.{STREAM}")
                await client._bus.ensure_bucket(TOKENIZERS)
    assert [folder.is_dir() for folder in (tmp_path / "cache" / "tokenizers").iterdir()] == [True]
