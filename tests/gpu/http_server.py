"""SGLang's own HTTP server under the load of `run.py`: the figures to hold the pipeline's against.

python tests/gpu/http_server.py MODEL_FOLDER --out http.json
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

import aiohttp
from run import AT_ONCE, ENGINE, NEW_TOKENS, PROMPT_TOKENS, START_S_MAX, prompts

URL: Final = "http://127.0.0.1:31999"


def arguments(folder: Path) -> list[str]:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in ENGINE.items()]
    return ["--model-path", str(folder), "--port", URL.rpartition(":")[2], "--stream-interval", "1", *flags]


async def until_healthy(session: aiohttp.ClientSession) -> None:
    async with asyncio.timeout(START_S_MAX):
        while True:
            try:
                async with session.get(f"{URL}/health_generate") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.5)


async def ask(session: aiohttp.ClientSession, prompt: list[int]) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    body = {"input_ids": prompt, "sampling_params": sampling, "stream": True}
    began, first, count = time.perf_counter(), None, 0
    async with session.post(f"{URL}/generate", json=body) as answer:
        async for line in answer.content:
            if line.startswith(b"data: {"):
                first = first or time.perf_counter()
                count = json.loads(line[6:])["meta_info"]["completion_tokens"]
    assert first is not None, "the server answered without a token"
    ended = time.perf_counter()
    return {"tokens": count, "ttft_ms": 1e3 * (first - began), "e2e_ms": 1e3 * (ended - began)}


async def load(session: aiohttp.ClientSession, at_once: int, seed: int) -> dict[str, Any]:
    gate = asyncio.Semaphore(at_once)

    async def one(prompt: list[int]) -> dict[str, Any]:
        async with gate:
            return await ask(session, prompt)

    await asyncio.gather(*(one(prompt) for prompt in prompts(at_once, PROMPT_TOKENS, seed)))
    began = time.perf_counter()
    answers = await asyncio.gather(*(one(prompt) for prompt in prompts(4 * at_once, PROMPT_TOKENS, seed + 1)))
    took_s = time.perf_counter() - began
    return {
        "at_once": at_once,
        "requests": len(answers),
        "tokens_per_s": round(sum(answer["tokens"] for answer in answers) / took_s, 1),
        "ttft_ms_p50": round(statistics.median(answer["ttft_ms"] for answer in answers), 2),
        "e2e_ms_p50": round(statistics.median(answer["e2e_ms"] for answer in answers), 2),
    }


async def measure() -> list[dict[str, Any]]:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=600)) as session:
        await until_healthy(session)
        return [await load(session, at_once, 1000 + at_once) for at_once in AT_ONCE]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    server = subprocess.Popen(
        [sys.executable, "-m", "sglang.launch_server", *arguments(given.folder)], start_new_session=True
    )
    try:
        results = asyncio.run(measure())
    finally:
        os.killpg(server.pid, signal.SIGKILL)
    given.out.write_text(json.dumps(results, indent=1))
    print(json.dumps(results), flush=True)


if __name__ == "__main__":
    main()
