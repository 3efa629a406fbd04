"""The gateway beside SGLang's own HTTP server: the same requests, the same engine, the same answers?

    python tests/interop/against_http.py ask sglang theirs.json     # starts SGLang's server on this machine's CPU
    python tests/interop/against_http.py ask gateway ours.json      # starts a topology with a gateway
    python tests/interop/against_http.py compare theirs.json ours.json --page docs/compatibility.md

Text, finish reasons, usage and log probabilities are compared; of a stream, what its chunks say together; of a refusal,
its status. Float32, since in bfloat16 a batch's size decides between two close tokens, in SGLang alone as here.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import httpx
import msgspec
from openai_cases import Case, cases

from pipeline.config import load_topology
from pipeline.local import running

HERE: Final = Path(__file__).parent
READY_S_MAX: Final = 240.0
ANSWER_S_MAX: Final = 120.0
AT_ONCE: Final = 4
TOLERANCE: Final = 2e-3
"""Of a log probability."""
BEGIN: Final = "<!-- begin: written by tests/interop/against_http.py -->"
END: Final = "<!-- end -->"

_WHOLE_LOGPROBS: Final = (
    "OpenAI's API gives the prompt's log probabilities with `logprobs: 0` too; SGLang takes 0 for none"
)
_PROMPT_ALONE: Final = "OpenAI's API takes `max_tokens: 0` with `echo`, to score a prompt; SGLang refuses it"
REASONS: Final[dict[str, str]] = {
    "text, echo, logprobs 0": _WHOLE_LOGPROBS,
    "text, echo, logprobs 0, stream": _WHOLE_LOGPROBS,
    "text, echo, no output": _PROMPT_ALONE,
    "text, echo, logprobs, no output": _PROMPT_ALONE,
    "text, suffix": "SGLang drops `suffix` in silence, for a model without a template for it; here it is refused",
    "text, best_of more than n": "SGLang drops `best_of` in silence; here it is refused unless it is `n`",
    "refused, a model that is not there": "SGLang serves one model and takes any name for it",
}
"""Why a case differs, by its name."""

Answer = dict[str, Any]


# --- asking ------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def sglang() -> AsyncIterator[str]:
    """The address of SGLang's own server."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = (sys.executable, str(HERE / "sglang_http.py"), str(port))
    process = await asyncio.create_subprocess_exec(*command, start_new_session=True)
    try:
        await _until_healthy(f"http://127.0.0.1:{port}/health", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def _until_healthy(url: str, process: asyncio.subprocess.Process) -> None:
    async with asyncio.timeout(READY_S_MAX), httpx.AsyncClient() as http:
        while True:
            assert process.returncode is None, "SGLang's server ended; see what it wrote"
            with contextlib.suppress(httpx.HTTPError):
                if (await http.get(url)).status_code == 200:
                    return
            await asyncio.sleep(0.5)


@contextlib.asynccontextmanager
async def gateway() -> AsyncIterator[str]:
    """The address of a gateway before one real engine."""
    shipped = load_topology("cpu-gateway")
    replace = msgspec.structs.replace
    groups = [
        replace(group, sglang={"dtype": "float32"})
        if group.role == "decode"
        else replace(group, gateway=replace(group.gateway, port=0))
        if group.role == "gateway"
        else group
        for group in shipped.workers
        if group.role != "telemetry"
    ]
    with tempfile.TemporaryDirectory() as folder:
        async with running(replace(shipped, workers=tuple(groups)), Path(folder)) as local:
            await local.start()
            async with asyncio.timeout(READY_S_MAX):
                await local.until_ready()
            yield local.gateway_addresses()[0]


async def ask_all(url: str) -> dict[str, Answer]:
    """Every case's answer, by its name."""
    gate = asyncio.Semaphore(AT_ONCE)
    async with httpx.AsyncClient(base_url=url, timeout=ANSWER_S_MAX) as http:

        async def one(case: Case) -> tuple[str, Answer]:
            async with gate:
                return case.name, await ask(http, case)

        return dict(await asyncio.gather(*map(one, cases())))


async def ask(http: httpx.AsyncClient, case: Case) -> Answer:
    if not case.body.get("stream"):
        response = await http.post(case.path, json=case.body)
        return _whole(response.status_code, response.json())
    async with http.stream("POST", case.path, json=case.body) as response:
        if response.status_code != 200:
            await response.aread()
            return _whole(response.status_code, response.json())
        lines = [line async for line in response.aiter_lines()]
    return _streamed([json.loads(line[6:]) for line in lines if line.startswith("data: {")], lines)


def _whole(status: int, body: Any) -> Answer:
    """What is compared of an answer in one piece."""
    if status != 200:
        return {"status": status, "error": json.dumps(body)[:300]}
    choices = {str(choice["index"]): _choice(choice) for choice in body["choices"]}
    return {"status": status, "choices": choices, "usage": _usage(body["usage"])}


def _choice(choice: dict[str, Any]) -> Answer:
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    return {"text": text or "", "finish": choice["finish_reason"], "logprobs": _positions(choice.get("logprobs"))}


def _streamed(chunks: list[dict[str, Any]], lines: list[str]) -> Answer:
    """What a stream's chunks say together."""
    choices: dict[str, Answer] = {}
    usage = None
    for chunk in chunks:
        if "error" in chunk:
            return {"status": 200, "error": json.dumps(chunk)[:300]}
        usage = chunk.get("usage") or usage
        for piece in chunk["choices"]:
            choice = choices.setdefault(str(piece["index"]), {"text": "", "finish": None, "logprobs": []})
            text = piece["delta"].get("content") if "delta" in piece else piece["text"]
            choice["text"] += text or ""
            choice["finish"] = piece["finish_reason"] or choice["finish"]
            choice["logprobs"] += _positions(piece.get("logprobs"))
    done = "data: [DONE]" in lines
    return {"status": 200, "choices": choices, "usage": usage and _usage(usage), "done": done}


def _usage(usage: dict[str, Any]) -> list[int]:
    return [usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]]


def _positions(logprobs: dict[str, Any] | None) -> list[Any]:
    """Each position: its token, its log probability, its alternatives with theirs."""
    if not logprobs:
        return []
    if "content" in logprobs:
        return [_chat_position(one) for one in logprobs["content"] or ()]
    tops = logprobs["top_logprobs"] or [None] * len(logprobs["tokens"])
    return [list(one) for one in zip(logprobs["tokens"], logprobs["token_logprobs"], tops, strict=False)]


def _chat_position(position: dict[str, Any]) -> list[Any]:
    tops = {bytes(one["bytes"]).decode("latin-1"): one["logprob"] for one in position["top_logprobs"]}
    return [[position["token"], position["bytes"]], position["logprob"], tops]


# --- comparing ---------------------------------------------------------------------------------------


def differences(theirs: Answer, ours: Answer) -> list[str]:
    """Phrases; none where the answers are the same."""
    if theirs["status"] != ours["status"] or "error" in theirs or "error" in ours:
        same = theirs["status"] == ours["status"] and ("error" in theirs) == ("error" in ours)
        return [] if same else [f"SGLang: {_brief(theirs)}; here: {_brief(ours)}"]
    found = [] if theirs["usage"] == ours["usage"] else [f"usage {theirs['usage']}; here {ours['usage']}"]
    if theirs["choices"].keys() != ours["choices"].keys():
        return [*found, f"choices {sorted(theirs['choices'])}; here {sorted(ours['choices'])}"]
    for index, choice in theirs["choices"].items():
        found += _of_choice(choice, ours["choices"][index])
    return list(dict.fromkeys(found))


def _of_choice(theirs: Answer, ours: Answer) -> list[str]:
    found = [
        f"{what} {theirs[what]!r}; here {ours[what]!r}" for what in ("text", "finish") if theirs[what] != ours[what]
    ]
    if len(theirs["logprobs"]) != len(ours["logprobs"]):
        return [*found, f"{len(theirs['logprobs'])} positions with logprobs; here {len(ours['logprobs'])}"]
    for one, other in zip(theirs["logprobs"], ours["logprobs"], strict=True):
        if one[0] != other[0]:
            return [*found, f"logprobs of token {one[0]!r}; here {other[0]!r}"]
        if not _close(one[1], other[1]):
            return [*found, f"logprob of {one[0]!r} {one[1]}; here {other[1]}"]
        if not _alike(one[2] or {}, other[2] or {}):
            return [*found, f"alternatives {one[2]}; here {other[2]}"]
    return found


def _close(one: float | None, other: float | None) -> bool:
    return one is other if one is None or other is None else abs(one - other) <= TOLERANCE


def _alike(some: dict[str, float], others: dict[str, float]) -> bool:
    return some.keys() == others.keys() and all(_close(value, others[token]) for token, value in some.items())


def _brief(answer: Answer) -> str:
    return f"{answer['status']}{', an error in the stream' if answer['status'] == 200 and 'error' in answer else ''}"


def compare(theirs: dict[str, Answer], ours: dict[str, Answer]) -> dict[str, list[str]]:
    """The differences by case; cases without any are left out."""
    found = {name: differences(theirs[name], ours[name]) for name in theirs}
    return {name: phrases for name, phrases in found.items() if phrases}


def table(found: dict[str, list[str]], count: int) -> str:
    lines = [f"{count} requests, {count - len(found)} answered alike, {len(found)} not:", ""]
    lines += ["| Request | Difference | Why |", "|---|---|---|"]
    for name, phrases in found.items():
        what = "<br>".join(phrase.replace("|", "\\|") for phrase in phrases)
        lines.append(f"| {name} | {what} | {REASONS.get(name, '**not explained**')} |")
    return "\n".join(lines)


async def _ask(whom: str) -> dict[str, Answer]:
    async with (sglang if whom == "sglang" else gateway)() as url:
        return await ask_all(url)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    doing = parser.add_subparsers(dest="doing", required=True)
    asking = doing.add_parser("ask")
    asking.add_argument("whom", choices=("sglang", "gateway"))
    asking.add_argument("out", type=Path)
    comparing = doing.add_parser("compare")
    comparing.add_argument("theirs", type=Path)
    comparing.add_argument("ours", type=Path)
    comparing.add_argument("--page", type=Path)
    given = parser.parse_args()
    if given.doing == "ask":
        given.out.write_text(json.dumps(asyncio.run(_ask(given.whom)), indent=1, ensure_ascii=False))
        return 0
    theirs, ours = (json.loads(file.read_text()) for file in (given.theirs, given.ours))
    found = compare(theirs, ours)
    text = table(found, len(theirs))
    if given.page:
        page = given.page.read_text()
        start, end = page.index(BEGIN) + len(BEGIN), page.index(END)
        given.page.write_text(f"{page[:start]}\n{text}\n{page[end:]}")
    print(text)
    return int(bool(found.keys() - REASONS.keys()))


if __name__ == "__main__":
    sys.exit(main())
