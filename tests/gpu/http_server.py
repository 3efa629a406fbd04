"""SGLang's own HTTP server under the load of `run.py`: the figures to hold the pipeline's against.

python tests/gpu/http_server.py MODEL_FOLDER --out http.json
"""

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import aiohttp
from run import AT_ONCE, ENGINE, NEW_TOKENS, START_S_MAX, Clock, load

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
    clock, tokens = Clock(), []
    async with session.post(f"{URL}/generate", json=body) as answer:
        async for line in answer.content:
            if line.startswith(b"data: {"):
                clock.tick()
                tokens = json.loads(line[6:])["output_ids"]
    return {"tokens": tokens, "error": None if tokens else "answered without a token"} | clock.figures()


async def measure() -> list[dict[str, Any]]:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=600)) as session:
        await until_healthy(session)
        return [await load(lambda prompt: ask(session, prompt), at_once, 1000 + at_once) for at_once in AT_ONCE]


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
