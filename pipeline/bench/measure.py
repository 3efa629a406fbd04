"""From what was seen to figures. Pure.

TTFT: from sending to the first piece with tokens. ITL: between two such pieces of one answer, as a reader sees it.
TPOT: from the first piece to the last, over the tokens after the first. E2E: from sending to the answer's end.
Requests that failed have no place in these; they count against goodput, and by code.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final

from pipeline.bench.result import Distribution, Generator, Goodput, Outcome, Seen, Slo, Summary

REJECTED: Final = frozenset({429, 503})
CPU_SHARE_MAX: Final = 0.8
"""Of one core: above, the generator's own work is part of the figures."""
LOOP_LAG_MS_MAX: Final = 10.0
SCHEDULE_LAG_MS_MAX: Final = 20.0


def percentile(ordered: Sequence[float], share: float) -> float:
    """Of numbers in ascending order; between two of them linearly, as numpy does by default.

    >>> percentile([1.0, 2.0, 3.0, 4.0], 0.5)
    2.5
    """
    at = share * (len(ordered) - 1)
    below = math.floor(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (at - below)


def distribution(numbers: Iterable[float]) -> Distribution | None:
    """None for no numbers."""
    ordered = sorted(numbers)
    if not ordered:
        return None
    return Distribution(
        count=len(ordered),
        mean=math.fsum(ordered) / len(ordered),
        min=ordered[0],
        p50=percentile(ordered, 0.5),
        p90=percentile(ordered, 0.9),
        p95=percentile(ordered, 0.95),
        p99=percentile(ordered, 0.99),
        max=ordered[-1],
    )


def outcome(seen: Seen) -> Outcome:
    if not seen.code:
        return "ok"
    return "rejected" if seen.status in REJECTED and seen.first_s is None else "failed"


def ttft_ms(seen: Seen) -> float | None:
    return None if seen.first_s is None else 1e3 * (seen.first_s - seen.sent_s)


def tpot_ms(seen: Seen) -> float | None:
    """None for fewer than two tokens."""
    if seen.first_s is None or seen.last_s is None or seen.output_tokens < 2:
        return None
    return 1e3 * (seen.last_s - seen.first_s) / (seen.output_tokens - 1)


def e2e_ms(seen: Seen) -> float:
    return 1e3 * (seen.end_s - seen.sent_s)


def is_good(seen: Seen, slo: Slo) -> bool:
    """Whether a request ended well and within every limit. One token has no TPOT to miss, no token no TTFT to keep."""
    if outcome(seen) != "ok":
        return False
    first_ms, per_token_ms = ttft_ms(seen), tpot_ms(seen)
    return (
        (slo.ttft_ms is None or (first_ms is not None and first_ms <= slo.ttft_ms))
        and (slo.tpot_ms is None or per_token_ms is None or per_token_ms <= slo.tpot_ms)
        and (slo.e2e_ms is None or e2e_ms(seen) <= slo.e2e_ms)
    )


def goodput(all_seen: Sequence[Seen], slo: Slo, duration_s: float) -> Goodput | None:
    """Of every request that was due, whatever became of it; None without an SLO or a request."""
    if not slo or not all_seen:
        return None
    good = [seen for seen in all_seen if is_good(seen, slo)]
    return Goodput(
        good=len(good),
        of=len(all_seen),
        share=len(good) / len(all_seen),
        requests_per_s=_rate(len(good), duration_s),
        output_tokens_per_s=_rate(sum(seen.output_tokens for seen in good), duration_s),
    )


def summarize(all_seen: Sequence[Seen], itl_s: Iterable[float], slo: Slo) -> Summary:
    """The figures of one run. `itl_s`: the gaps of the answers that ended well."""
    ok = [seen for seen in all_seen if outcome(seen) == "ok"]
    duration_s = max((s.end_s for s in all_seen), default=0.0) - min((s.sent_s for s in all_seen), default=0.0)
    told = [(seen.prompt_tokens, seen.cached_tokens) for seen in ok if seen.prompt_tokens is not None]
    prompt_tokens = sum(tokens for tokens, _ in told) if told else None
    cached = [(tokens, hit) for tokens, hit in told if hit is not None]
    output_tokens, chunks = sum(seen.output_tokens for seen in ok), sum(seen.chunks for seen in ok)
    return Summary(
        duration_s=duration_s,
        requests=len(all_seen),
        ok=len(ok),
        rejected=sum(outcome(seen) == "rejected" for seen in all_seen),
        failed=sum(outcome(seen) == "failed" for seen in all_seen),
        codes=dict(Counter(seen.code for seen in all_seen if seen.code).most_common()),
        requests_per_s=_rate(len(ok), duration_s),
        output_tokens=output_tokens,
        output_tokens_per_s=_rate(output_tokens, duration_s),
        prompt_tokens=prompt_tokens,
        prompt_tokens_per_s=None if prompt_tokens is None else _rate(prompt_tokens, duration_s),
        cached_share=_rate(sum(hit for _, hit in cached), sum(tokens for tokens, _ in cached)) if cached else None,
        tokens_per_chunk=output_tokens / chunks if chunks else None,
        ttft_ms=distribution(ms for seen in ok if (ms := ttft_ms(seen)) is not None),
        itl_ms=distribution(1e3 * gap_s for gap_s in itl_s),
        tpot_ms=distribution(ms for seen in ok if (ms := tpot_ms(seen)) is not None),
        e2e_ms=distribution(map(e2e_ms, ok)),
        goodput=goodput(all_seen, slo, duration_s),
    )


def gaps_s(arrivals_s: Sequence[float]) -> list[float]:
    """Between one piece of an answer and the next."""
    return [later - earlier for earlier, later in itertools.pairwise(arrivals_s)]


def doubts(generator: Generator) -> tuple[str, ...]:
    """Why the figures may not be the server's, as sentences."""
    said = []
    if generator.cpu_share > CPU_SHARE_MAX:
        said.append(
            f"the load generator used {generator.cpu_share:.0%} of a core: it may be what limits; ask less, or run "
            "several generators"
        )
    if generator.loop_lag_ms and generator.loop_lag_ms.p99 > LOOP_LAG_MS_MAX:
        said.append(
            f"the load generator came up to {generator.loop_lag_ms.p99:.0f} ms late to its own timers (p99): times are "
            "too long by as much"
        )
    if generator.schedule_lag_ms and generator.schedule_lag_ms.p99 > SCHEDULE_LAG_MS_MAX:
        said.append(f"requests were sent {generator.schedule_lag_ms.p99:.0f} ms behind the schedule (p99)")
    return tuple(said)


def _rate(count: float, per: float) -> float:
    return count / per if per > 0 else 0.0
