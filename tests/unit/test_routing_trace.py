"""What the policies reach on a trace: conversations that share system prompts, on workers with caches of their own."""

import random
from collections import deque
from collections.abc import Iterator
from functools import partial

import pytest

from pipeline.block_hashes import PromptHasher, block_hashes
from pipeline.config import RoutingSettings
from pipeline.prefix_index import Overlap, PrefixIndex, RankId
from pipeline.routing import Candidate, RankLoad, Router
from subjects.codec import BlockHashes, TokenIds
from subjects.messages import BlocksStored

CONVERSATIONS = 40
TURNS = 4
SYSTEM_PROMPTS, SYSTEM_TOKENS = 5, 200
TURN_TOKENS = 80
AT_ONCE = 8  # requests in work


def trace(seed: int) -> Iterator[TokenIds]:
    """Prompts in the order in which they come: conversations take turns, each prompt with all that was said before."""
    rng = random.Random(seed)
    systems = [rng.choices(range(50_000), k=SYSTEM_TOKENS) for _ in range(SYSTEM_PROMPTS)]
    talks = [list(rng.choice(systems)) for _ in range(CONVERSATIONS)]
    for _ in range(TURNS):
        for talk in rng.sample(talks, len(talks)):
            talk += rng.choices(range(50_000), k=TURN_TOKENS)
            yield TokenIds.of(talk)


def cached_share(policy: str, workers: int, block_tokens: int, seed: int = 1) -> float:
    """Of all prompt tokens, those that were cached where the prompt went; caches hold all they are given."""
    ranks = [RankId(f"w{number}") for number in range(workers)]
    caches, hasher = {rank: set[int]() for rank in ranks}, PromptHasher()
    router, index = Router(RoutingSettings(policy=policy, seed=seed)), PrefixIndex(1_000_000)
    running: deque[RankId] = deque()
    cached = total = 0
    for prompt in trace(seed):
        overlaps = index.overlaps(partial(hasher.landmarks, prompt))
        load = {rank: RankLoad(running=running.count(rank)) for rank in ranks}
        candidates = [Candidate(rank, overlaps.get(rank, Overlap()), load[rank]) for rank in ranks]
        chosen = router.rank(len(prompt), candidates).best.rank
        hashes = block_hashes(prompt, block_tokens)
        there = next((n for n, block in enumerate(hashes) if block not in caches[chosen]), len(hashes))
        cached, total = cached + there * block_tokens, total + len(prompt)
        caches[chosen].update(hashes)
        index.apply(chosen, block_tokens, [BlocksStored(hashes=BlockHashes.of(hashes))])
        running.append(chosen)
        if len(running) > AT_ONCE:
            running.popleft()
    return cached / total


@pytest.mark.parametrize("block_tokens", [1, 16])
def test_kv_reaches_nine_tenths_of_what_one_cache_would(block_tokens: int):
    one = cached_share("kv", 1, block_tokens)
    assert cached_share("kv", 2, block_tokens) > 0.9 * one
    assert cached_share("kv", 4, block_tokens) > 0.9 * one
    assert cached_share("random", 4, block_tokens) < 0.75 * one
