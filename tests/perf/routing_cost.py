"""What routing costs one process: events applied, prompts hashed and ranked, memory.

    python tests/perf/routing_cost.py [--rounds 5]

The figures of docs/adr/0005: medians of CPU time, with the spread over the rounds.
"""

import argparse
import gc
import random
import statistics
import time
import tracemalloc
from collections.abc import Callable
from functools import partial

from pipeline.block_hashes import PromptHasher, block_hashes
from pipeline.config import RoutingSettings
from pipeline.prefix_index import PrefixIndex, RankId
from pipeline.routing import Candidate, Overlap, RankLoad, Router
from subjects.codec import BlockHashes, TokenIds, decode, encode
from subjects.messages import BlocksRemoved, BlocksStored, KvEvents

WORKERS = 32
PROMPT_TOKENS = 4096
SIZES = (1, 16, 64)
BLOCKS_MAX = 1_000_000
RANKS = [RankId(f"decode-{number}") for number in range(WORKERS)]
EVENT_BLOCKS = 64  # in a message: a step of the scheduler
VOCABULARY = 128_000


def prompt(seed: int, tokens: int = PROMPT_TOKENS) -> TokenIds:
    return TokenIds.of(random.Random(seed).choices(range(VOCABULARY), k=tokens))


def random_hashes(seed: int, count: int) -> BlockHashes:
    return BlockHashes(random.Random(seed).randbytes(8 * count))


def spread(values: list[float], unit: str) -> str:
    return f"{statistics.median(values):9.1f} {unit}  ({min(values):.1f} - {max(values):.1f})"


def measure(rounds: int, work: Callable[[], int]) -> list[float]:
    """Seconds of CPU for each of what `work` says it did, once a round."""
    times = []
    for _ in range(rounds):
        gc.collect()
        started = time.process_time()
        done = work()
        times.append((time.process_time() - started) / done)
    return times


def events(block_tokens: int) -> list[bytes]:
    """100k blocks stored, and half of them removed, as they come over the wire."""
    payloads = []
    for number in range(100_000 // EVENT_BLOCKS):
        hashes = BlockHashes.of(block_hashes(prompt(number, EVENT_BLOCKS * block_tokens), block_tokens))
        changes: list[BlocksStored | BlocksRemoved] = [BlocksStored(hashes=hashes)]
        if number % 2:
            changes.append(BlocksRemoved(hashes=hashes))
        worker = RANKS[number % WORKERS].worker
        payloads.append(
            encode(KvEvents(worker=worker, incarnation="1", seq=1, block_tokens=block_tokens, events=tuple(changes)))
        )
    return payloads


def apply_all(payloads: list[bytes]) -> int:
    index, blocks = PrefixIndex(BLOCKS_MAX), 0
    for payload in payloads:
        message = decode(KvEvents, payload)
        index.apply(RankId(message.worker, message.dp_rank), message.block_tokens, message.events)
        blocks += sum(len(event.hashes) for event in message.events)
    return blocks


def filled(block_tokens: int, asked: TokenIds) -> PrefixIndex:
    """Each worker has another part of the prompt, the last one all of it, and 1,000 prompts' worth of others."""
    index = PrefixIndex(BLOCKS_MAX)
    hashes = block_hashes(asked, block_tokens)
    for number, rank in enumerate(RANKS):
        leading = BlockHashes.of(hashes[: len(hashes) * (number + 1) // WORKERS])
        index.apply(rank, block_tokens, [BlocksStored(hashes=leading)])
        for other in range(1000 // WORKERS):
            blocks = random_hashes(1000 * number + other, len(hashes))
            index.apply(rank, block_tokens, [BlocksStored(hashes=blocks)])
    return index


def ranked(index: PrefixIndex, router: Router, asked: TokenIds, hasher: PromptHasher) -> None:
    """From the prompt's tokens to the ranking."""
    overlaps = index.overlaps(partial(hasher.landmarks, asked))
    none, load = Overlap(), RankLoad(running=3, kv_share=0.4)
    ranking = router.rank(len(asked), [Candidate(rank, overlaps.get(rank, none), load) for rank in RANKS], "session")
    assert ranking.best is not None


def hash_cold(asked: TokenIds, block_tokens: int) -> int:
    for _ in range(10):
        PromptHasher().landmarks(asked, block_tokens)
    return 10


def hash_again(hasher: PromptHasher, asked: TokenIds, block_tokens: int) -> int:
    for _ in range(100):
        hasher.landmarks(asked, block_tokens)
    return 100


def rank_hashed(index: PrefixIndex, router: Router, asked: TokenIds, block_tokens: int) -> int:
    """Without hashing."""
    landmarks = PromptHasher().landmarks(asked, block_tokens)
    none, load = Overlap(), RankLoad(running=3, kv_share=0.4)
    for _ in range(100):
        overlaps = index.overlaps(lambda _: landmarks)
        router.rank(len(asked), [Candidate(rank, overlaps.get(rank, none), load) for rank in RANKS], "session")
    return 100


def rank_all(index: PrefixIndex, router: Router, asked: TokenIds, hasher: PromptHasher) -> int:
    for _ in range(100):
        ranked(index, router, asked, hasher)
    return 100


def show_speed(block_tokens: int, rounds: int) -> None:
    asked, router, hasher = prompt(-1), Router(RoutingSettings()), PromptHasher()
    payloads = events(block_tokens)
    index = filled(block_tokens, asked)
    rates = [1e-3 / second for second in measure(rounds, partial(apply_all, payloads))]
    print(f"\nblocks of {block_tokens} tokens; index of {len(index):,} entries")
    print(f"  events decoded and applied   {spread(rates, 'k blocks/s')}")
    for name, work in (
        ("hash a prompt, first time", partial(hash_cold, asked, block_tokens)),
        ("hash it again", partial(hash_again, hasher, asked, block_tokens)),
        ("rank, prompt hashed", partial(rank_hashed, index, router, asked, block_tokens)),
        ("hash again and rank", partial(rank_all, index, router, asked, hasher)),
    ):
        print(f"  {name:28} {spread([1e6 * second for second in measure(rounds, work)], 'us')}")


def show_memory(entries: int = 500_000) -> None:
    """Of an index with entries that two ranks share each, and the pauses of dropping a rank and of thinning."""
    hashes = random_hashes(1, entries // 2)
    tracemalloc.start()
    index = PrefixIndex(entries)
    for rank in RANKS[:2]:
        index.apply(rank, 64, [BlocksStored(hashes=hashes)])
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    print(f"\n{entries:,} entries of 2 ranks: {size / len(index):.0f} bytes each")
    started = time.process_time()
    index.apply(RANKS[2], 64, [BlocksStored(hashes=BlockHashes.of([1]))])
    print(f"  thinning them to {len(index):,}: {1e3 * (time.process_time() - started):.0f} ms")
    started = time.process_time()
    index.drop(RANKS[0])
    print(f"  dropping a rank with {entries // 4:,}: {1e3 * (time.process_time() - started):.0f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print(f"{WORKERS} workers, prompts of {PROMPT_TOKENS} tokens, {rounds} rounds")
    for block_tokens in SIZES:
        show_speed(block_tokens, rounds)
    show_memory()


if __name__ == "__main__":
    main()
