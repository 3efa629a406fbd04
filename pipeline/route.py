"""`route`: where a request would go now, and why. It reads the same events and heartbeats as preprocess does."""

import asyncio
import time
from typing import Any, Final

import msgspec

from pipeline.block_hashes import salt_of
from pipeline.bus import Bus
from pipeline.config import RoutingSettings
from pipeline.look import HEARD_S, looking, only_model
from pipeline.openai import parse_request
from pipeline.placement import Placements
from pipeline.prefix_index import RankId
from pipeline.presence import Presence
from pipeline.request_options import engine_options
from pipeline.routing import Ranking
from pipeline.screen import err, out, table
from pipeline.served import ServedModels
from pipeline.tokenizer_files import TokenizerCache
from subjects import names
from subjects.messages import Role

CAUGHT_UP_S_MAX: Final = 3.0
READY_S_MAX: Final = 2.0


async def explain(
    url: str, fields: dict[str, Any], settings: RoutingSettings, *, model: str | None, role: Role, session: str | None
) -> int:
    """Print the ranking for a request; the exit code. Raises PipelineError with a sentence."""
    async with looking(url) as (bus, presence):
        placements = Placements(bus, presence, settings, role)
        with err.status("listening for heartbeats"):
            await asyncio.sleep(HEARD_S)
        ranking, behind = await _ranking(bus, presence, placements, fields, model, session)
        await placements.close()
    show(ranking, session)
    for rank in behind:
        out.print(f"the blocks of {rank.worker}/{rank.dp_rank} are not known: it gives no snapshot of them")
    return 0 if ranking.scores else 1


async def _ranking(
    bus: Bus,
    presence: Presence,
    placements: Placements,
    fields: dict[str, Any],
    model: str | None,
    session: str | None,
) -> tuple[Ranking, list[RankId]]:
    """The ranking, and the ranks that are not known well enough for it to be sure."""
    named = model or fields.get("model") or only_model(presence)
    request = parse_request(
        msgspec.json.encode(fields),
        {},
        names.REQUESTS.of(model=named),
        0,
        accepted_unix_s=time.time(),
        now_unix_s=time.time(),
    ).request
    served = await ServedModels(presence, {}, TokenizerCache(bus)).ready(named, time.time() + READY_S_MAX)
    salt = salt_of(engine_options(request, names.token(named)))
    placement = await placements.of(named)
    with err.status("reading which worker has which blocks"):
        await placements.wait_caught_up(named, CAUGHT_UP_S_MAX)
    return placement.rank(served.tokenize(request), session, salt), placements.behind(named)


def show(ranking: Ranking, session: str | None) -> None:
    """Print a ranking as a table, and in a sentence how its first was chosen."""
    if ranking.best is None:
        err.print("no worker takes work now; see `sglang-nats workers`")
        return
    rows = [
        (str(place), f"{score.rank.worker}/{score.rank.dp_rank}", f"{score.cost:,.0f}", score.why)
        for place, score in enumerate(ranking.scores, start=1)
    ]
    out.print(table("", ("", "Worker/rank", "Cost", "Why (tokens)"), rows))
    how = f"policy {ranking.policy}, prompt of {ranking.prompt_tokens:,} tokens"
    if ranking.kept_session:
        how += f"; of those that cost little more than the least, {ranking.best.rank.worker} is session {session!r}'s"
    out.print(f"{how}. A busy or dead worker does not hold the request: any other takes it.")
