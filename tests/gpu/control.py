"""On one GPU: what control operations do there that a CPU cannot show. Prints a line of JSON for each step.

    PYTHONPATH=.:tests/engine python tests/gpu/control.py MODEL_FOLDER --out result.jsonl

Memory released and taken again, with and without the weights kept; other weights, fitting and not; a profile; and which
experts the tokens of a tiny mixture of experts go to.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import tiny_moe
import torch
import uvloop
from safetensors.torch import load_file, save_file

from pipeline.engine.protocol import EngineRequest
from pipeline.engine.sglang.engine import SglangEngine
from pipeline.errors import PipelineError
from pipeline.operations import find, parse
from subjects.codec import TokenIds
from subjects.messages import SamplingOptions, StopConditions

ENGINE: Final = {
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "max_total_tokens": 100_000,
    "cuda_graph_max_bs_decode": 4,
    "mem_fraction_static": 0.6,
    "random_seed": 0,
}
PROMPT: Final = TokenIds.of(range(1000, 1064))


class Run:
    """A started engine, and a log of what was done with it."""

    def __init__(self, engine: SglangEngine, out: Path) -> None:
        self._engine, self._out, self._serial = engine, out, 0

    def note(self, **step: Any) -> None:
        line = json.dumps(step, default=str)
        print(line, flush=True)
        with self._out.open("a") as file:
            file.write(line + "\n")

    async def do(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """Do it, and note the result or the error, the time, and the GPU's memory in use."""
        started_s = time.monotonic()
        try:
            result = await self._engine.control(operation, parse(find(operation), arguments))
        except PipelineError as error:
            result = {"error": error.code, "message": str(error)}
        shown = {name: result[name] for name in list(result)[:6]}
        self.note(
            step=operation, arguments=arguments, result=shown, duration_s=round(time.monotonic() - started_s, 3),
            gpu_gib=used_gib(), suspended=self._engine.suspended,
        )  # fmt: skip
        return result

    async def answer(self, tokens: int = 16) -> str:
        """A greedy answer's tokens, or the error's code."""
        self._serial += 1
        request = EngineRequest(
            rid=f"run.{self._serial}",
            token_ids=PROMPT,
            stop=StopConditions(max_tokens=tokens, ignore_eos=True),
            sampling=SamplingOptions(temperature=0.0),
        )
        try:
            outputs = [output async for output in self._engine.generate(request)]
        except PipelineError as error:
            said = error.code
        else:
            said = ",".join(str(token) for output in outputs for token in output.token_ids)
        self.note(step="answer", said=said)
        return said


def used_gib() -> float:
    free, total = torch.cuda.mem_get_info()
    return round((total - free) / 2**30, 2)


def sizes(files: list[str]) -> list[int]:
    return [Path(file).stat().st_size for file in files]


@asynccontextmanager
async def started(model: Path, out: Path, **settings: Any) -> AsyncIterator[Run]:
    engine = SglangEngine(str(model), ENGINE | settings)
    try:
        info = await engine.start()
        run = Run(engine, out)
        run.note(step="start", engine=info.name, settings=settings, gpu_gib=used_gib())
        yield run
    finally:
        await engine.close()


async def memory(model: Path, out: Path, *, weights_kept: bool) -> None:
    async with started(model, out, enable_memory_saver=True, enable_weights_cpu_backup=weights_kept) as run:
        before = await run.answer()
        await run.do("resume_memory")
        await run.do("release_memory")
        await run.do("release_memory", kinds=["weights"])
        assert await run.answer() == "engine_suspended"
        await run.do("resume_memory")
        if not weights_kept:
            assert await run.answer() == "engine_suspended"
            await run.do("update_weights", model_path=str(model))
        assert await run.answer() == before
        await run.do("release_memory", kinds=["kv_cache"])
        await run.do("resume_memory")
        assert await run.answer() == before


async def weights(model: Path, out: Path, folder: Path) -> None:
    other = folder / "other"
    shutil.copytree(model, other)
    tensors = load_file(other / "model.safetensors")
    name = "model.layers.4.mlp.down_proj.weight"
    save_file(tensors | {name: tensors[name] * 3}, other / "model.safetensors", metadata={"format": "pt"})
    wrong = folder / "wrong"
    wrong.mkdir()
    save_file(tensors | {name: tensors[name][:8].contiguous()}, wrong / "model.safetensors", metadata={"format": "pt"})
    async with started(model, out) as run:
        before = await run.answer()
        await run.do("release_memory")
        await run.do("update_weights", model_path=str(other), weight_version="2")
        assert await run.answer() != before
        await run.do("update_weights", model_path=str(wrong))
        await run.do("update_weights", model_path=str(model))
        assert await run.answer() == before
        await run.do("start_profile", output_dir=str(folder / "profile"))
        await run.answer()
        files = (await run.do("stop_profile"))["files"]
        run.note(step="profile", bytes=sizes(files))
        await run.do("start_profile", output_dir=str(folder / "steps"), num_steps=4, by_stage=True)
        await run.answer()
        await run.do("stop_profile")
        await run.do("start_expert_distribution")
        await run.do("server_info")
        await run.answer()


async def experts(model: Path, out: Path, folder: Path) -> None:
    moe = folder / "moe"
    tiny_moe.make(moe, model)
    async with started(moe, out, expert_distribution_recorder_mode="stat") as run:
        await run.do("stop_expert_distribution")
        await run.do("start_expert_distribution")
        await run.answer()
        (file,) = (await run.do("dump_expert_distribution"))["files"]
        counts = torch.load(file, weights_only=True)["logical_count"].sum(dim=0)
        run.note(step="experts", tokens=counts.tolist())
        await run.do("stop_expert_distribution")


async def main(model: Path, out: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for step in (
            lambda: memory(model, out, weights_kept=True),
            lambda: memory(model, out, weights_kept=False),
            lambda: weights(model, out, Path(folder)),
            lambda: experts(model, out, Path(folder)),
        ):
            try:
                await step()
            except Exception as error:  # the outermost guard: one step's failure must not hide the others
                print(json.dumps({"failed": f"{type(error).__name__}: {error}"}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    given.out.unlink(missing_ok=True)
    uvloop.run(main(given.model, given.out))
