"""The few kernels of `sgl_kernel` that SGLang needs on a CPU, in torch.

For dense models (Llama, Qwen, Gemma, ...) and plain decoding SGLang calls only the first two; the other names are
imported at the top of its modules and stand for features that need Intel AMX or a GPU: calling one says so.
"""

import types
from collections.abc import Callable
from typing import Any, Final, NoReturn

import torch

_ONLY_IMPORTED: Final = {
    "sgl_kernel": (
        "assign_draft_cache_locs_contiguous_cpu",
        "build_draft_decode_metadata_cpu",
        "build_tree_kernel_efficient_cpu",
        "copy_all_layer_kv_cache_cpu",
        "fill_accept_out_cache_loc_cpu",
        "fill_bonus_tokens_cpu",
        "rotate_input_ids_cpu",
        "verify_tree_greedy_cpu",
    ),
    "sgl_kernel.mamba": (
        "causal_conv1d_fn_cpu",
        "causal_conv1d_update_cpu",
        "chunk_gated_delta_rule_cpu",
    ),
}


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,  # int[batch]
    req_to_token: torch.Tensor,  # int32[requests, pool_len], changed in place
    start_offset: torch.Tensor,  # int[batch]
    end_offset: torch.Tensor,  # int[batch]
    out_cache_loc: torch.Tensor,  # int[sum(end - start)]
    pool_len: int,
) -> None:
    """Write each request's new cache slots into its row, from `start` to `end`.

    As `assign_req_to_token_pool` in sglang/srt/mem_cache/allocation.py, for all requests in one scatter: a decode
    step has one new slot for each request, and a loop over them would cost more than the model's small layers.
    """
    lengths = end_offset - start_offset
    rows = torch.repeat_interleave(req_pool_indices, lengths)
    within = torch.arange(rows.numel()) - torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    columns = torch.repeat_interleave(start_offset, lengths) + within
    req_to_token[rows, columns] = out_cache_loc[: rows.numel()].to(req_to_token.dtype)


def assign_extend_cache_locs_cpu(
    req_pool_indices: torch.Tensor,  # int[batch]
    req_to_token: torch.Tensor,  # int32[requests, pool_len]
    start_offset: torch.Tensor,  # int[batch]
    end_offset: torch.Tensor,  # int[batch]
    out_cache_loc: torch.Tensor,  # int[sum(end - start)], changed in place
    pool_len: int,
) -> None:
    """Read each request's cache slots from `start` to `end` out of its row: the reverse of the above."""
    lengths = end_offset - start_offset
    rows = torch.repeat_interleave(req_pool_indices, lengths)
    within = torch.arange(rows.numel()) - torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    columns = torch.repeat_interleave(start_offset, lengths) + within
    out_cache_loc[: rows.numel()] = req_to_token[rows, columns].to(out_cache_loc.dtype)


def leave_unregistered(*_: Any) -> None:
    """In place of cudaHostRegister and its reverse: without CUDA there is nobody to pin memory for."""


def modules() -> dict[str, types.ModuleType]:
    """`sgl_kernel` and its submodules, to be put into `sys.modules`."""
    package = types.ModuleType("sgl_kernel", __doc__)
    package.__path__ = []  # a package without files
    package.assign_req_to_token_pool_cpu = assign_req_to_token_pool_cpu
    package.assign_extend_cache_locs_cpu = assign_extend_cache_locs_cpu
    package.mamba = types.ModuleType("sgl_kernel.mamba")
    made = {"sgl_kernel": package, "sgl_kernel.mamba": package.mamba}
    for module, names in _ONLY_IMPORTED.items():
        for name in names:
            setattr(made[module], name, _missing(f"{module}.{name}"))
    return made


def _missing(name: str) -> Callable[..., NoReturn]:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(f"{name} has no CPU kernel here: this model or feature needs a GPU")

    return refuse
