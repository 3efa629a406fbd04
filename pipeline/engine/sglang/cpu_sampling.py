"""Sampling with a seed on a CPU.

SGLang honours a request's seed only under `enable_deterministic_inference`, which knows no CPU attention backend, and
drops it silently otherwise. Here every request carries its seed into the sampler, where a token is drawn with noise
that follows from the seed and the token's position and from nothing else: not from the other requests of the batch,
so that a request resumed elsewhere from prompt + emitted tokens draws what it would have drawn.
"""

from typing import Any, Final

import torch

UNSEEDED: Final = torch.iinfo(torch.int64).min
_GOLDEN: Final = 0x9E3779B97F4A7C15  # spreads neighbouring seeds and positions over all generators


def carry_seeds(result: Any, *args: Any, **_: Any) -> Any:
    """After `SamplingBatchInfo.from_schedule_batch(batch, vocab_size)`: every request's seed, or that it has none."""
    batch = args[-2]
    seeds = (request.sampling_params.sampling_seed for request in batch.reqs)
    result.sampling_seed = torch.tensor([UNSEEDED if seed is None else seed for seed in seeds], dtype=torch.int64)
    return result


def sample(
    probs: torch.Tensor,  # float[batch, vocabulary]
    sampling_seed: torch.Tensor | None = None,  # int64[batch]
    positions: torch.Tensor | None = None,  # int[batch]
) -> torch.Tensor:
    """In place of `sampling_from_probs_torch`: one token of each row, int32[batch]."""
    return _draw(probs, sampling_seed, positions).to(torch.int32)


def sample_filtered(
    original: Any,
    probs: torch.Tensor,  # float[batch, vocabulary]
    top_ks: torch.Tensor,  # int32[batch]
    top_ps: torch.Tensor,  # float[batch]
    min_ps: torch.Tensor,  # float[batch]
    need_min_p_sampling: bool,
    sampling_seed: torch.Tensor | None,
    positions: torch.Tensor,
    **further: Any,
) -> Any:
    """Around `top_k_top_p_min_p_sampling_from_probs_torch`: the same filters, then our draw; int32[batch].

    SGLang's own asserts that no request has both a seed and min_p, and an assertion ends its scheduler.
    """
    if any(further.values()):  # sampling masks are wanted: SGLang's own, which then knows no seeds
        return original(probs, top_ks, top_ps, min_ps, need_min_p_sampling, None, positions, **further)
    ranked, tokens = probs.sort(dim=-1, descending=True)
    before = ranked.cumsum(dim=-1) - ranked
    ranked[torch.arange(ranked.shape[-1]).view(1, -1) >= top_ks.view(-1, 1)] = 0.0
    ranked[before > top_ps.view(-1, 1)] = 0.0
    if need_min_p_sampling:
        ranked[ranked < ranked[:, :1] * min_ps.view(-1, 1)] = 0.0
    ranks = _draw(ranked, sampling_seed, positions)
    return tokens.gather(1, ranks.view(-1, 1)).view(-1).to(torch.int32)


def _draw(weights: torch.Tensor, seeds: torch.Tensor | None, positions: torch.Tensor | None) -> torch.Tensor:
    """An index of each row with the probability of its weight, int64[batch].

    By the exponential race: argmax of weight / noise, where the noise is exponentially distributed.
    """
    noise = torch.empty_like(weights, dtype=torch.float32).exponential_()
    if seeds is not None and positions is not None:
        for row, (seed, position) in enumerate(zip(seeds.tolist(), positions.tolist(), strict=True)):
            if seed != UNSEEDED:
                generator = torch.Generator().manual_seed((seed * _GOLDEN + position) % 2**63)
                noise[row].exponential_(generator=generator)
    noise.clamp_min_(torch.finfo(torch.float32).tiny)
    return (weights.float() / noise).argmax(dim=-1)
