"""Make docs/images/top.png: `sglang-nats top` as it looks over a live topology under load.

    pip install resvg-py
    python tests/perf/picture_of_top.py [--out docs/images/top.png]

Six workers with simulated engines, prefill and decode apart, 24 users with chats of many lengths. The frame is the
command's own, drawn by rich as SVG and by resvg as PNG.
"""

import argparse
import asyncio
import io
import random
import re
import tempfile
from pathlib import Path

import resvg_py
from rich.console import Console

from pipeline.client import Client
from pipeline.config import load_topology
from pipeline.local import running
from pipeline.rates import WINDOW_S
from pipeline.top import watching
from pipeline.top_screen import View, render

MODEL = "smollm2"
USERS = 24
LOADED_S = WINDOW_S
WIDTH_CHARS = 86
START_S_MAX = 60.0
TOPOLOGY = """
about = "For a picture."
model = "smollm2"
model_path = "builtin:smollm2"
[[workers]]
role = "preprocess"
[[workers]]
role = "prefill"
count = 2
engine = "simulated"
slots = 4
simulated = { ttft_ms = 80, disaggregation = "prefill", max_running_requests = 4 }
[[workers]]
role = "decode"
count = 3
engine = "simulated"
simulated = { itl_ms = 18, disaggregation = "decode", max_running_requests = 8, context_len_tokens = 1024 }
"""


async def user(client: Client, draw: random.Random) -> None:
    """Asks for ever; now and then for something that cannot be."""
    while True:
        tokens = draw.choices(range(3, 30_000), k=draw.randint(20, 700))
        top_p = 7.0 if draw.random() < 0.01 else None
        fields = {"prompt": tuple(tokens), "max_tokens": draw.randint(20, 120), "ignore_eos": True, "top_p": top_p}
        async for _ in client.generate(model=MODEL, **fields):
            pass


async def loaded_view() -> View:
    with tempfile.TemporaryDirectory() as folder:
        topology = Path(folder) / "picture.toml"
        topology.write_text(TOPOLOGY)
        async with running(load_topology(str(topology)), Path(folder)) as local:
            print("starting the workers", flush=True)
            await local.start()
            await asyncio.wait_for(local.until_ready(), START_S_MAX)
            async with Client.connect(local.url, client="picture") as client, watching(local.url) as board:
                draw = random.Random(7)
                print(f"every worker is ready; {USERS} users ask for {LOADED_S:g} s", flush=True)
                users = [asyncio.create_task(user(client, draw)) for _ in range(USERS)]
                await asyncio.wait(users, timeout=LOADED_S, return_when=asyncio.FIRST_EXCEPTION)
                view = await board.view()
                for each in users:
                    each.cancel()
                await asyncio.gather(*users, return_exceptions=True)
            return view


def draw_png(view: View, out: Path) -> None:
    console = Console(record=True, width=WIDTH_CHARS, file=io.StringIO(), force_terminal=True)
    console.print(render(view, WIDTH_CHARS))
    svg = console.export_svg(title="sglang-nats top")
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)  # fonts of the web, which no renderer fetches
    svg = svg.replace("Fira Code", "DejaVu Sans Mono")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(bytes(resvg_py.svg_to_bytes(svg_string=svg, zoom=1)))
    print(f"{out}: {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/images/top.png"))
    draw_png(asyncio.run(loaded_view()), parser.parse_args().out)
