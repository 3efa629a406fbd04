"""The prefix index against a model that is too simple to be wrong: a set of hashes for each rank and tier."""

from hypothesis import given
from hypothesis import strategies as st

from pipeline.block_hashes import PromptHasher, block_hashes, landmark_mask
from pipeline.prefix_index import TIERS, Overlap, PrefixIndex, RankId
from subjects.codec import BlockHashes, TokenIds
from subjects.messages import BlocksCleared, BlocksRemoved, BlocksStored, KvEvent

RANKS = (RankId("a"), RankId("a", 1), RankId("b"), RankId("c"))
SIZES = {RANKS[0]: 1, RANKS[1]: 1, RANKS[2]: 16, RANKS[3]: 64}
PROMPT_TOKENS = 300
BLOCKS_MAX = 10_000
# Few prompts that share prefixes: any two part at a token of their own.
PROMPTS = tuple(
    TokenIds.of([*range(parting), *range(1000 * parting, 1000 * parting + PROMPT_TOKENS - parting)])
    for parting in (0, 40, 200, PROMPT_TOKENS)
)
HASHES = {(size, n): block_hashes(prompt, size) for size in {1, 16, 64} for n, prompt in enumerate(PROMPTS)}


@st.composite
def changes(draw: st.DrawFn) -> tuple[RankId, KvEvent | None]:
    """A rank and an event on part of a prompt's blocks; None: the rank is dropped."""
    rank = draw(st.sampled_from(RANKS))
    kind = draw(st.sampled_from(("stored", "stored", "stored", "removed", "cleared", "dropped")))
    if kind == "dropped":
        return rank, None
    if kind == "cleared":
        return rank, BlocksCleared()
    blocks = HASHES[SIZES[rank], draw(st.integers(0, len(PROMPTS) - 1))]
    start, end = sorted(draw(st.tuples(*[st.integers(0, len(blocks))] * 2)))
    hashes, tier = BlockHashes.of(blocks[start:end]), draw(st.sampled_from(TIERS))
    return rank, (BlocksStored if kind == "stored" else BlocksRemoved)(hashes=hashes, tier=tier)


class Model:
    """What each rank holds, told by the events alone."""

    def __init__(self) -> None:
        self.held: dict[tuple[RankId, str], set[int]] = {(rank, tier): set() for rank in RANKS for tier in TIERS}

    def apply(self, rank: RankId, event: KvEvent | None) -> None:
        match event:
            case BlocksStored():
                self.held[rank, event.tier] |= set(event.hashes)
            case BlocksRemoved():
                self.held[rank, event.tier] -= set(event.hashes)
            case _:
                for tier in TIERS:
                    self.held[rank, tier].clear()

    def overlap(self, rank: RankId, prompt: int, thinned: int) -> Overlap:
        """Walk the prompt once for each tier and those above it; only landmarks count."""
        mask = landmark_mask(SIZES[rank]) | (thinned - 1) << 32
        reach = []
        for tiers in range(1, len(TIERS) + 1):
            there = set().union(*(self.held[rank, tier] for tier in TIERS[:tiers]))
            reached = 0
            usable = (PROMPT_TOKENS - 1) // SIZES[rank]
            for number, block in enumerate(HASHES[SIZES[rank], prompt][:usable]):
                if block & mask:
                    continue
                if block not in there:
                    break
                reached = (number + 1) * SIZES[rank]
            reach.append(reached)
        return Overlap(reach[0], reach[1] - reach[0], reach[2] - reach[1])


def check(index: PrefixIndex, model: Model) -> None:
    hasher = PromptHasher()
    for rank in RANKS:
        mask = landmark_mask(SIZES[rank]) | (index.thinned - 1) << 32
        for tier in TIERS:
            assert index.blocks(rank, tier) == {block for block in model.held[rank, tier] if not block & mask}
    assert len(index) == sum(index.ranks().values())
    for number, prompt in enumerate(PROMPTS):
        found = index.overlaps(lambda size, prompt=prompt: hasher.landmarks(prompt, size))
        for rank in RANKS:
            assert found.get(rank, Overlap()) == model.overlap(rank, number, index.thinned), (rank, number)
        assert all(overlap.tokens for overlap in found.values())


@given(st.lists(changes(), max_size=40))
def test_the_index_is_the_model(steps: list[tuple[RankId, KvEvent | None]]):
    index, model = PrefixIndex(BLOCKS_MAX), Model()
    for rank, event in steps:
        if event is None:
            index.drop(rank)
        else:
            index.apply(rank, SIZES[rank], [event])
        model.apply(rank, event)
    check(index, model)


@given(st.lists(changes(), max_size=60), st.integers(5, 40))
def test_a_full_index_keeps_a_part_of_everything(steps: list[tuple[RankId, KvEvent | None]], blocks_max: int):
    """Without drops: those of the last rank would let the index begin anew, finely."""
    index, model = PrefixIndex(blocks_max), Model()
    for rank, event in steps:
        if event is not None:
            index.apply(rank, SIZES[rank], [event])
            model.apply(rank, event)
        assert len(index) <= blocks_max
    check(index, model)
