"""Our kernels and sampler for a CPU, against plain loops and against what they stand in for."""

import sys
import types

import pytest
import torch

from pipeline.engine.sglang import cpu_kernels, cpu_platform, cpu_sampling, nixl_cpu
from pipeline.engine.sglang.cpu_sampling import UNSEEDED

pytestmark = pytest.mark.engine
STARTS, ENDS = [0, 3, 5, 5], [3, 4, 9, 5]  # the last request has nothing new


def by_loop(table: torch.Tensor, rows: list[int], new: torch.Tensor) -> torch.Tensor:
    """What SGLang's Triton kernel does, one request after the other."""
    table, at = table.clone(), 0
    for row, start, end in zip(rows, STARTS, ENDS, strict=True):
        table[row, start:end] = new[at : at + end - start].to(table.dtype)
        at += end - start
    return table


def test_new_cache_slots_go_where_the_loop_puts_them():
    table, rows = torch.zeros(6, 10, dtype=torch.int32), [4, 0, 2, 5]
    new = torch.arange(100, 108, dtype=torch.int64)
    expected = by_loop(table, rows, new)
    arguments = (torch.tensor(rows), table, torch.tensor(STARTS), torch.tensor(ENDS), new, 10)
    cpu_kernels.assign_req_to_token_pool_cpu(*arguments)
    assert torch.equal(table, expected)
    read = torch.zeros(8, dtype=torch.int64)
    cpu_kernels.assign_extend_cache_locs_cpu(*arguments[:4], read, 10)
    assert torch.equal(read, new)


def test_a_kernel_that_is_not_there_says_so():
    modules = cpu_kernels.modules()
    with pytest.raises(NotImplementedError, match=r"sgl_kernel\.verify_tree_greedy_cpu .* needs a GPU"):
        modules["sgl_kernel"].verify_tree_greedy_cpu()


def test_nothing_is_touched_where_there_is_an_accelerator(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu_platform, "accelerator_present", lambda: True)
    monkeypatch.delitem(sys.modules, "sgl_kernel", raising=False)
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = dict(cpu_platform.os.environ)
    cpu_platform.prepare()
    cpu_platform.patch()
    assert "sgl_kernel" not in sys.modules
    assert dict(cpu_platform.os.environ) == before


def rows_of(seeds: list[int], positions: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(seeds, dtype=torch.int64), torch.tensor(positions)


def test_a_seeded_row_draws_the_same_in_any_batch():
    probs = torch.softmax(torch.randn(4, 1000), -1)
    alone = cpu_sampling.sample(probs[2:3], *rows_of([11], [40]))
    for _ in range(5):
        among = cpu_sampling.sample(probs, *rows_of([3, UNSEEDED, 11, 11], [1, 2, 40, 41]))
        assert among[2] == alone[0]


def test_position_and_seed_both_count():
    flat = torch.full((64, 4096), 1 / 4096)
    by_position = cpu_sampling.sample(flat, *rows_of([5] * 64, list(range(64))))
    by_seed = cpu_sampling.sample(flat, *rows_of(list(range(-32, 32)), [9] * 64))
    assert len(set(by_position.tolist())) > 55 and len(set(by_seed.tolist())) > 55


@pytest.mark.parametrize("seed", [UNSEEDED, 1])
def test_tokens_come_as_often_as_they_are_likely(seed: int):
    count, weights = 20_000, torch.tensor([0.5, 0.3, 0.15, 0.05])
    probs = weights.repeat(count, 1)
    drawn = cpu_sampling.sample(probs, *rows_of([seed] * count, list(range(count))))
    frequencies = torch.bincount(drawn.long(), minlength=4) / count
    # Five standard deviations of a binomial share.
    assert ((frequencies - weights).abs() < 5 * (weights * (1 - weights) / count).sqrt()).all()


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p", "kept"),
    [
        (2, 1.0, 0.0, {0, 1}),
        (99, 0.6, 0.0, {0, 1}),
        (99, 1.0, 0.4, {0, 1}),
        (3, 0.99, 0.2, {0, 1, 2}),
        (1, 1.0, 0.0, {0}),
    ],
)
def test_filters_keep_what_they_should(top_k: int, top_p: float, min_p: float, kept: set[int]):
    count = 2000
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05]).repeat(count, 1)
    drawn = cpu_sampling.sample_filtered(
        None,
        probs,
        torch.full((count,), top_k),
        torch.full((count,), top_p),
        torch.full((count,), min_p),
        min_p > 0,
        *rows_of([UNSEEDED, 3] * (count // 2), list(range(count))),
    )
    assert set(drawn.tolist()) == kept
    assert drawn.dtype == torch.int32


def test_every_request_carries_its_seed():
    request = lambda seed: types.SimpleNamespace(sampling_params=types.SimpleNamespace(sampling_seed=seed))  # noqa: E731
    batch = types.SimpleNamespace(reqs=[request(4), request(None), request(-1)])
    info = cpu_sampling.carry_seeds(types.SimpleNamespace(), type, batch, 49152)
    assert info.sampling_seed.tolist() == [4, UNSEEDED, -1]


def test_nixl_moves_ordinary_memory_and_sleeps():
    """Two agents in this process: KV that SGLang calls VRAM goes from one tensor to the other."""
    api = pytest.importorskip("nixl._api")
    nixl_cpu.before_kv_manager()
    nixl_cpu.before_kv_manager()
    assert api.nixl_agent.__mro__[1].__name__ == "nixl_agent", "replaced once"
    config = api.nixlBind.nixlAgentConfig()
    config.pthrDelay = 0
    assert config.pthrDelay == nixl_cpu.PROGRESS_THREAD_DELAY_US
    a, b = (api.nixl_agent(name, api.nixl_agent_config()) for name in ("a", "b"))
    source, target = torch.arange(4096, dtype=torch.uint8), torch.zeros(4096, dtype=torch.uint8)
    for agent, memory in ((a, source), (b, target)):
        agent.register_memory([(memory.data_ptr(), memory.numel(), 0, "")], "VRAM")
    peer = a.add_remote_agent(b.get_agent_metadata())
    descriptors = [
        agent.get_xfer_descs([(memory.data_ptr(), memory.numel(), 0)], "VRAM")
        for agent, memory in ((a, source), (b, target))
    ]
    transfer = a.initialize_xfer("WRITE", *descriptors, peer, b"done")
    state = a.transfer(transfer)
    while state == "PROC":
        state = a.check_xfer_state(transfer)
    assert state == "DONE"
    assert torch.equal(target, source)
