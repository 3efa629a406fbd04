"""Every control operation, asked over NATS as an operator does, of a worker with the real engine."""

from __future__ import annotations

import asyncio
import gzip
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from pipeline import worker as workers
from pipeline.bus import Bus
from pipeline.config import BUILTIN_MODEL, WorkerSettings
from pipeline.control import command
from pipeline.engine.protocol import Engine, EngineInfo, EngineRequest
from pipeline.errors import Busy, InvalidRequest, NotSupported
from pipeline.models import prepare_model
from pipeline.nats_server import NatsServer
from pipeline.operations import find, parse
from pipeline.worker import Worker
from stages.decode import serve
from subjects.messages import SamplingOptions, StopConditions

if TYPE_CHECKING:
    from tests.engine.one_process.conftest import StartedEngine

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]
DEADLINE_S = 200.0
WORKER = "decode-0"
_numbers = iter(range(1_000_000))


class Borrowed:
    """An engine that was started already, and that outlives the worker."""

    def __init__(self, engine: Engine, info: EngineInfo) -> None:
        self._engine, self._info = engine, info

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def start(self) -> EngineInfo:
        return self._info

    async def close(self) -> None:
        pass


class Operator:
    """Asks the worker for operations."""

    def __init__(self, bus: Bus, worker: Worker) -> None:
        self.bus, self.worker = bus, worker

    async def ask(self, operation: str, **arguments: Any) -> dict[str, Any]:
        async with asyncio.timeout(DEADLINE_S):
            return (await command(self.bus, WORKER, operation, parse(find(operation), arguments))).result


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def operator(sglang: StartedEngine, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Operator]:
    server = NatsServer(tmp_path_factory.mktemp("nats"))
    server.start()
    settings = WorkerSettings(role="decode", worker=WORKER, nats=server.url, model="smollm2", model_path=BUILTIN_MODEL)
    worker = Worker(settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "build_engine", lambda *_: Borrowed(sglang.engine, sglang.info))
        await worker.open()
        serving = asyncio.create_task(serve(worker))
        bus = await Bus.connect(server.url, name="operator")
        try:
            async with asyncio.timeout(DEADLINE_S):
                while not worker.ready:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            yield Operator(bus, worker)
        finally:
            worker.drain()
            await asyncio.wait({serving}, timeout=DEADLINE_S)
            await worker.close()
            await bus.close()
            server.kill()


def request(sglang: StartedEngine, max_tokens: int = 8) -> EngineRequest:
    return EngineRequest(
        rid=f"control.{next(_numbers)}",
        token_ids=sglang.tokens("The capital of France is"),
        stop=StopConditions(max_tokens=max_tokens, ignore_eos=True),
        sampling=SamplingOptions(temperature=0.0),
    )


def events_in(file: str) -> list[Any]:
    """What a profile has recorded."""
    return json.loads(gzip.decompress(Path(file).read_bytes()))["traceEvents"]


def files_in(folder: Path) -> list[Path]:
    return list(folder.iterdir())


async def answer(sglang: StartedEngine, max_tokens: int = 8) -> tuple[str, int]:
    """A greedy answer, and how many of its prompt's tokens were cached."""
    outputs = await sglang.run(request(sglang, max_tokens))
    return "".join(output.text for output in outputs), outputs[-1].cached_tokens


async def test_the_server_info_has_settings_and_capacities_but_no_secrets(sglang: StartedEngine, operator: Operator):
    info = await operator.ask("server_info")
    assert info["max_running_requests"] == sglang.settings["max_running_requests"]
    assert info["memory_usage"]["token_capacity"] == sglang.settings["max_total_tokens"]
    assert not info.keys() & {"api_key", "admin_api_key", "ssl_keyfile_password"}


async def test_a_flushed_cache_is_empty(sglang: StartedEngine, operator: Operator):
    await answer(sglang)
    assert (await answer(sglang))[1] > 0, "the prompt is cached"
    assert await operator.ask("flush_cache") == {"flushed": True}
    assert (await answer(sglang))[1] == 0
    assert not operator.worker.paused


async def test_a_cache_in_use_is_not_flushed(sglang: StartedEngine, operator: Operator, monkeypatch):
    """Not even by a request that the worker does not know of, as a health check's."""
    monkeypatch.setattr("pipeline.engine.sglang.operations.FLUSH_S_MAX", 0.2)
    async with aclosing(sglang.engine.generate(request(sglang, 400))) as outputs:
        await anext(outputs)
        with pytest.raises(Busy, match="SGLang still works on a request"):
            await operator.ask("flush_cache", wait_s=0)
    assert not operator.worker.paused


async def test_other_weights_change_the_answer_and_the_old_ones_bring_it_back(
    sglang: StartedEngine, operator: Operator, tmp_path: Path
):
    import torch
    from safetensors.torch import load_file, save_file

    original = prepare_model(BUILTIN_MODEL)
    before, _ = await answer(sglang)
    tensors = load_file(original / "model.safetensors")
    name = "model.layers.12.mlp.down_proj.weight"
    noise = torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(1))
    tensors[name] = tensors[name] + 3 * tensors[name].std() * noise.to(tensors[name].dtype)
    other = tmp_path / "other"
    shutil.copytree(original, other, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})

    try:
        result = await operator.ask("update_weights", model_path=str(other), weight_version="noisy")
        assert (result["model_path"], result["weight_version"]) == (str(other), "noisy")
        changed, cached = await answer(sglang)
        assert changed != before
        assert cached == 0, "the cache of the old weights is gone"
    finally:
        await operator.ask("update_weights", model_path=str(original))
    assert (await answer(sglang))[0] == before
    assert not operator.worker.paused


async def test_weights_that_do_not_fit_are_refused_and_the_engine_goes_on(
    sglang: StartedEngine, operator: Operator, tmp_path: Path
):
    """SGLang alone would die of this folder: it loads the first tensors, fails, and rolls back to the same folder."""
    with pytest.raises(InvalidRequest, match="there is no folder"):
        await operator.ask("update_weights", model_path=str(tmp_path / "nowhere"))
    with pytest.raises(InvalidRequest, match=r"has no \*.safetensors"):
        await operator.ask("update_weights", model_path=str(tmp_path))
    assert (await answer(sglang))[0]


async def test_memory_is_not_released_by_an_engine_without_its_saver(sglang: StartedEngine, operator: Operator):
    with pytest.raises(NotSupported, match="start it with --enable-memory-saver"):
        await operator.ask("release_memory")
    with pytest.raises(Busy, match="nothing to resume"):
        await operator.ask("resume_memory")
    assert not operator.worker.paused
    assert (await answer(sglang))[0]


async def test_a_profile_is_written(sglang: StartedEngine, operator: Operator, tmp_path: Path):
    with pytest.raises(Busy, match="no profile is being recorded"):
        await operator.ask("stop_profile")
    started = await operator.ask("start_profile", output_dir=str(tmp_path / "new"), activities=["CPU"])
    with pytest.raises(Busy, match="stop_profile ends it"):
        await operator.ask("start_profile", output_dir=str(tmp_path))
    await answer(sglang, 3)
    (file,) = (await operator.ask("stop_profile"))["files"]
    assert Path(file).parent == Path(started["output_dir"]) == tmp_path / "new"
    assert events_in(file)


async def test_a_profile_of_some_steps_ends_by_itself(sglang: StartedEngine, operator: Operator, tmp_path: Path):
    await operator.ask("start_profile", output_dir=str(tmp_path), activities=["CPU"], num_steps=2)
    await answer(sglang, 3)
    async with asyncio.timeout(DEADLINE_S):
        while not files_in(tmp_path):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    again = await operator.ask("start_profile", output_dir=str(tmp_path / "b"), activities=["CPU"])
    assert again["ends"] == "at stop_profile"
    await answer(sglang, 3)
    assert len((await operator.ask("stop_profile"))["files"]) == 1


async def test_a_profile_that_would_kill_the_scheduler_is_refused(operator: Operator, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(InvalidRequest, match="cannot be made"):
        await operator.ask("start_profile", output_dir=str(tmp_path / "file" / "x"))
    with pytest.raises(InvalidRequest, match="num_steps: start_profile by_stage needs it"):
        await operator.ask("start_profile", output_dir=str(tmp_path), by_stage=True)


@pytest.mark.parametrize("verb", ["start", "stop", "dump"])
async def test_a_dense_model_has_no_expert_distribution(operator: Operator, verb: str):
    with pytest.raises(NotSupported, match="the expert distribution recorder is off: start the engine"):
        await operator.ask(f"{verb}_expert_distribution")
