"""On one GPU: tokens against `Engine.generate`, throughput, and what happens when a worker is killed.

    python tests/gpu/run.py MODEL_FOLDER --out result.json

Runs, one after another: SGLang by itself, our aggregated and our disaggregated topology (prefill and decode engines on
the same GPU, KV by NIXL, control plane on NATS). Prints a table and writes everything as JSON.
"""

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import uvloop

from pipeline.bus import Bus, Received
from pipeline.client import Client
from pipeline.config import GroupSettings, TopologySettings
from pipeline.engine.sglang.handshake import BootstrapLine, describe
from pipeline.local import LocalTopology, running
from subjects import names

ENGINE: Final = {
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    # Two engines share the GPU: the tokens bound what each takes, for a share of what is free is a race between them.
    "mem_fraction_static": 0.85,
    "max_total_tokens": 200_000,
    "cuda_graph_max_bs_decode": 64,
    "random_seed": 0,
}
START_S_MAX: Final = 400.0
MODEL: Final = "llama"
CHECKED_PROMPTS: Final = 20
CHECKED_TOKENS: Final = 32
PROMPT_TOKENS: Final = 512
NEW_TOKENS: Final = 128
AT_ONCE: Final = (1, 16, 64, 256)
LENGTHS: Final = (512, 4_096, 16_384, 32_768)
TRANSFERS: Final = 5
SEED: Final = 7


def prompts(count: int, tokens: int, seed: int = SEED) -> list[list[int]]:
    """Random prompts, int[count][tokens]; the first token sets each apart, so that no prefix is cached."""
    draw = random.Random(seed)
    return [[draw.randrange(100, 40_000) for _ in range(tokens)] for _ in range(count)]


def topology(folder: Path, *, disaggregated: bool) -> TopologySettings:
    common: dict[str, Any] = {"model": MODEL, "model_path": str(folder)}
    if disaggregated:
        engines = (
            GroupSettings(role="prefill", sglang=ENGINE | {"disable_prefill_cuda_graph": True}, **common),
            GroupSettings(role="decode", sglang=ENGINE | {"disaggregation_mode": "decode"}, **common),
        )
    else:
        engines = (GroupSettings(role="decode", sglang=ENGINE, **common),)
    return TopologySettings(
        start_s_max=START_S_MAX, workers=(GroupSettings(role="preprocess", models={MODEL: str(folder)}), *engines)
    )


def reference(folder: Path) -> list[list[int]]:
    """Greedy tokens of `Engine.generate`, one prompt at a time, in a process of its own."""
    asked = {
        "prompts": prompts(CHECKED_PROMPTS, PROMPT_TOKENS),
        "max_new_tokens": CHECKED_TOKENS,
        "server_args": ENGINE,
        "model_path": str(folder),
        "ignore_eos": True,
    }
    script = Path(__file__).parents[1] / "engine" / "reference.py"
    done = subprocess.run(
        [sys.executable, str(script)], input=json.dumps(asked), capture_output=True, text=True, timeout=START_S_MAX
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return json.loads(done.stdout.splitlines()[-1])


class Clock:
    """When a stream's pieces came, in ms since it was asked for."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._ticks: list[float] = []

    def tick(self) -> None:
        self._ticks.append(1e3 * (time.perf_counter() - self._began))

    def figures(self) -> dict[str, Any]:
        return {
            "ttft_ms": round(self._ticks[0], 2) if self._ticks else None,
            "e2e_ms": round(1e3 * (time.perf_counter() - self._began), 2),
            "gaps_ms": [later - earlier for earlier, later in pairwise(self._ticks)],
        }


async def ask(client: Client, prompt: list[int], new_tokens: int) -> dict[str, Any]:
    """One greedy request: its tokens, its error if it had one, and when its frames came."""
    clock, tokens, error = Clock(), [], None
    async for frame in client.generate(
        model=MODEL, prompt=tuple(prompt), temperature=0.0, max_tokens=new_tokens, ignore_eos=True
    ):
        if frame.token_ids:
            clock.tick()
        tokens += frame.token_ids.tolist()
        error = frame.error.message if frame.error else error
    return {"tokens": tokens, "error": error} | clock.figures()


async def load(ask_one: Callable[[list[int]], Awaitable[dict[str, Any]]], at_once: int, seed: int) -> dict[str, Any]:
    """A closed loop of `at_once` requests, four rounds' worth and at least 16, after a round that is not counted."""
    gate = asyncio.Semaphore(at_once)

    async def one(prompt: list[int]) -> dict[str, Any]:
        async with gate:
            return await ask_one(prompt)

    await asyncio.gather(*(one(prompt) for prompt in prompts(at_once, PROMPT_TOKENS, seed)))
    began = time.perf_counter()
    answers = await asyncio.gather(*(one(prompt) for prompt in prompts(max(16, 4 * at_once), PROMPT_TOKENS, seed + 1)))
    took_s = time.perf_counter() - began
    gaps = sorted(gap for answer in answers for gap in answer["gaps_ms"])
    return {
        "at_once": at_once,
        "requests": len(answers),
        "failed": sum(answer["error"] is not None for answer in answers),
        "tokens_per_s": round(sum(len(answer["tokens"]) for answer in answers) / took_s, 1),
        "ttft_ms_p50": statistics.median(answer["ttft_ms"] for answer in answers if answer["ttft_ms"] is not None),
        "e2e_ms_p50": statistics.median(answer["e2e_ms"] for answer in answers),
        "frames": len(answers) + len(gaps),
        "gap_ms_p50": round(statistics.median(gaps), 2),
        "gap_ms_p99": round(gaps[len(gaps) * 99 // 100], 2),
    }


async def transfers(client: Client, url: str) -> list[dict[str, Any]]:
    """For prompts of several lengths, one at a time: KV bytes, how long writing them took, and its share of TTFT."""
    bus = await Bus.connect(url, name="transfers")
    written: asyncio.Queue[BootstrapLine] = asyncio.Queue()

    def hear(received: Received) -> None:
        line = describe(received)
        if line and line.operation == "status success":
            written.put_nowait(line)

    await bus.subscribe(names.BOOTSTRAP.any(), hear)
    await bus.flush()
    rows = []
    for tokens in LENGTHS:
        samples = []
        for prompt in prompts(TRANSFERS + 1, tokens, seed=tokens):
            answer = await ask(client, prompt, 4)
            line = await asyncio.wait_for(written.get(), 10)
            samples.append((answer["ttft_ms"], line.kv_bytes, line.microseconds))
        ttft_ms = statistics.median(sample[0] for sample in samples[1:])  # the first of a length may compile
        write_ms = statistics.median(sample[2] for sample in samples[1:]) / 1e3
        kv_bytes = samples[-1][1]
        rows.append(
            {
                "prompt_tokens": tokens,
                "ttft_ms_p50": ttft_ms,
                "kv_mb": round(kv_bytes / 1e6, 1),
                "write_ms_p50": round(write_ms, 2),
                "gb_per_s": round(kv_bytes / 1e6 / write_ms, 1),
                "share_of_ttft": round(write_ms / ttft_ms, 3),
            }
        )
    await bus.close()
    return rows


async def killed(client: Client, local: LocalTopology, role: str) -> dict[str, Any]:
    """Kill -9 a role's only worker with 16 requests in flight; the supervisor starts it again."""
    work = [asyncio.create_task(ask(client, prompt, NEW_TOKENS)) for prompt in prompts(16, PROMPT_TOKENS, 99)]
    child = next(child for child in local.children if child.settings.role == role)
    await asyncio.sleep(0.2)  # some have started, some have not
    assert child.process is not None
    child.process.kill()
    began = time.perf_counter()
    answers = await asyncio.gather(*work)
    return {
        "role": role,
        "failed": [answer["error"] for answer in answers if answer["error"]],
        "complete": sum(len(answer["tokens"]) == NEW_TOKENS for answer in answers),
        "until_all_done_s": round(time.perf_counter() - began, 1),
    }


async def measure(folder: Path, wanted: list[list[int]], *, disaggregated: bool, kill: bool) -> dict[str, Any]:
    result: dict[str, Any] = {"disaggregated": disaggregated}
    with tempfile.TemporaryDirectory() as scratch:
        async with running(topology(folder, disaggregated=disaggregated), Path(scratch)) as local:
            began = time.perf_counter()
            await local.start()
            await local.until_ready()
            result["start_s"] = round(time.perf_counter() - began, 1)
            supervising = asyncio.create_task(local.until_failed())
            async with Client.connect(local.url) as client:
                checked = prompts(CHECKED_PROMPTS, PROMPT_TOKENS)
                got = [(await ask(client, prompt, CHECKED_TOKENS)) for prompt in checked]
                result["errors"] = [answer["error"] for answer in got if answer["error"]]
                equal = sum(answer["tokens"] == want for answer, want in zip(got, wanted, strict=True))
                result["equal_to_engine_generate"] = f"{equal} of {len(wanted)}"
                result["load"] = [
                    await load(lambda prompt: ask(client, prompt, NEW_TOKENS), at_once, 1000 + at_once)
                    for at_once in AT_ONCE
                ]
                if disaggregated:
                    result["transfers"] = await transfers(client, local.url)
                if kill:
                    roles = ("prefill", "decode") if disaggregated else ("decode",)
                    result["killed"] = [await killed(client, local, role) for role in roles]
            supervising.cancel()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only-disaggregated", action="store_const", const=(True,), dest="disaggregated")
    parser.add_argument("--kill", action="store_true", help="also kill workers under load")
    given = parser.parse_args()
    wanted = reference(given.folder)
    results = []
    for disaggregated in given.disaggregated or (False, True):
        try:
            results.append(uvloop.run(measure(given.folder, wanted, disaggregated=disaggregated, kill=given.kill)))
        except Exception as error:  # the outermost guard: the other topology's figures are worth having
            results.append({"disaggregated": disaggregated, "broke": f"{type(error).__name__}: {error}"})
        print(json.dumps(results[-1], indent=1), flush=True)
        given.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
