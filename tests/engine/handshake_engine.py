"""A real SGLang engine as a child process that takes and answers lines of JSON: what two-engine tests are made of.

`{"id": ..., "args": {...}}` calls `async_generate`, `{"abort": rid}` aborts. The first line out is `{"id": "ready"}`.
"""

import asyncio
import json
import sys
from typing import Any

from pipeline.config import BUILTIN_MODEL
from pipeline.engine.sglang import cpu_platform

cpu_platform.prepare()  # spawned schedulers import this module first, too


def say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


async def generate(engine: Any, request: dict[str, Any]) -> None:
    """Answer with the token ids, or with why there are none."""
    try:
        async for step in await engine.async_generate(stream=True, **request["args"]):
            last = step
    except ValueError as error:
        say({"id": request["id"], "finish": {"type": "abort", "message": str(error)}, "ids": []})
    else:
        say({"id": request["id"], "finish": last["meta_info"]["finish_reason"], "ids": list(last["output_ids"])})


async def serve(engine: Any) -> None:
    loop, running = asyncio.get_running_loop(), set()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        request = json.loads(line)
        if "abort" in request:
            engine.tokenizer_manager.abort_request(rid=request["abort"])
        else:
            running.add(asyncio.create_task(generate(engine, request)))


def main(role: str) -> None:
    import sglang

    from pipeline.models import prepare_model

    disaggregated = {"disaggregation_mode": role, "disaggregation_transfer_backend": "nixl"}
    engine = sglang.Engine(
        model_path=str(prepare_model(BUILTIN_MODEL)),
        log_level="warning",
        **(cpu_platform.SERVER_ARGS | {"max_total_tokens": 8192}),
        **({} if role == "aggregated" else disaggregated),
    )
    say({"id": "ready"})
    asyncio.set_event_loop(engine.loop)
    engine.loop.run_until_complete(serve(engine))


if __name__ == "__main__":
    main(sys.argv[1])
