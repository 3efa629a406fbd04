"""SGLang on a machine without an accelerator: what has to be so before SGLang is imported, and after.

SGLang takes the CPU path where `SGLANG_USE_CPU_ENGINE=1`, and then imports `sgl_kernel`, whose published wheel
has no CPU kernels and needs libcuda. `prepare()` puts our own torch kernels in its place. It has to come before
the first import of SGLang in *each* process, and SGLang's plugins are loaded too late for that: a scheduler
imports all of SGLang before it loads them. So there are two hooks:

- `pipeline.engine.sglang.processes`, the entry functions of the child processes, calls `prepare()` when it is
  imported, which is the first thing that a spawned process does when it unpickles what it shall run;
- `pipeline.engine.sglang.plugin`, SGLang's own plugin hook, calls `patch()`, which changes SGLang itself.

Where there is an accelerator, neither changes anything.
"""

import functools
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

_THREADS: Final = str(max(1, len(os.sched_getaffinity(0)) // 2))  # half the cores: there may be a second engine
ENVIRONMENT: Final = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "OMP_NUM_THREADS": _THREADS,
    "MKL_NUM_THREADS": _THREADS,
    "TOKENIZERS_PARALLELISM": "false",
}
"""Set where the user did not, and inherited by SGLang's processes."""

SERVER_ARGS: Final = {
    "device": "cpu",
    "dtype": "bfloat16",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "grammar_backend": "xgrammar",
    "mm_attention_backend": "sdpa",
    "disable_cuda_graph": True,
    "disable_overlap_schedule": True,
    "disable_custom_all_reduce": True,
    "max_running_requests": 32,
    "max_total_tokens": 16_384,
    # What other processes take while the weights load counts against it; max_total_tokens is what bounds the KV pool.
    "mem_fraction_static": 0.8,
    "chunked_prefill_size": 512,  # a long prompt must not stop everyone's tokens for seconds
    # Decode's pages that must make room go to ordinary memory as they do; SGLang's own choice, a pool made at start,
    # wants 10 GiB free besides.
    "disaggregation_decode_retraction_backup": "cpu_tensor",
    "decode_log_interval": 16,  # about once a second at a CPU's pace: SGLang refreshes its gauges as often
    "sleep_on_idle": True,
    "skip_server_warmup": True,
}
"""SGLang's own settings on a CPU, used where the user did not set the field."""

_POOL: Final = "sglang.srt.mem_cache.pool_host.common"
_SAMPLING: Final = "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo"
_SAMPLER: Final = "sglang.srt.layers.sampler"
_SCHEDULER: Final = "sglang.srt.managers.scheduler.Scheduler"
_NIXL: Final = "sglang.srt.disaggregation.nixl.conn"


def accelerator_present() -> bool:
    """True where torch sees a GPU or another accelerator. Imports torch."""
    import torch

    return torch.accelerator.is_available()


def prepare() -> None:
    """Make SGLang importable on a CPU, in this process. Before its first import; idempotent."""
    if accelerator_present():
        return
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from pipeline.engine.sglang import cpu_kernels, torchvision_cpu

    torchvision_cpu.declare_operators()
    if "sgl_kernel" not in sys.modules:
        sys.modules.update(cpu_kernels.modules())
    _complete_torch_cpu()


def bind_ranks(arguments: Mapping[str, Any]) -> None:
    """Name the cores of each of an engine's ranks, where it has several and the user named none.

    SGLang's own choice is one NUMA node for each, and no start where there are fewer nodes than ranks.
    """
    ranks = 1
    for size in ("dp_size", "tp_size", "pp_size"):
        ranks *= arguments.get(size) or 1
    if ranks > 1 and not accelerator_present():
        os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", cores_of_ranks(ranks, sorted(os.sched_getaffinity(0))))


def cores_of_ranks(ranks: int, cores: Sequence[int]) -> str:
    """The cores dealt out, as SGLang takes them; ranks beyond the cores share them.

    >>> cores_of_ranks(2, [0, 1, 2, 3])
    '0,2|1,3'
    >>> cores_of_ranks(3, [0, 1])
    '0|1|0'
    """
    shares = (cores[rank::ranks] or [cores[rank % len(cores)]] for rank in range(ranks))
    return "|".join(",".join(map(str, share)) for share in shares)


def _complete_torch_cpu() -> None:
    """Two functions that every accelerator's module has and `torch.cpu` has not: the expert recorder calls them."""
    import torch

    for name, answer in (("is_current_stream_capturing", False), ("empty_cache", None)):
        if name not in vars(torch.cpu):
            setattr(torch.cpu, name, functools.partial(_same, answer))


def _same(answer: Any) -> Any:
    return answer


def patch() -> None:
    """Change what SGLang and NIXL take for granted about GPUs. After SGLang's import, in each of its processes."""
    if accelerator_present():
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from pipeline.engine.sglang import cpu_idle, cpu_kernels, cpu_sampling, nixl_cpu

    for target, hook, kind in (
        (f"{_POOL}._cuda_host_register", cpu_kernels.leave_unregistered, HookType.REPLACE),
        (f"{_POOL}._cuda_host_unregister", cpu_kernels.leave_unregistered, HookType.REPLACE),
        (f"{_SAMPLING}.from_schedule_batch", cpu_sampling.carry_seeds, HookType.AFTER),
        (f"{_SAMPLER}.sampling_from_probs_torch", cpu_sampling.sample, HookType.REPLACE),
        (
            f"{_SAMPLER}.top_k_top_p_min_p_sampling_from_probs_torch",
            cpu_sampling.sample_filtered,
            HookType.AROUND,
        ),
        (f"{_SCHEDULER}.on_idle", cpu_idle.pause_while_waiting, HookType.AFTER),
        (f"{_NIXL}.NixlKVManager.__init__", nixl_cpu.before_kv_manager, HookType.BEFORE),
    ):
        HookRegistry.register(target, hook, kind)
