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

import os
import sys
from typing import Final

ENVIRONMENT: Final = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "OMP_NUM_THREADS": "1",  # two engines on two cores: 223 tok/s at batch 32 against 54-140 with one thread a core
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRITON_INTERPRET": "0",
}
"""Set where the user did not."""

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
    "max_total_tokens": 32_768,
    "mem_fraction_static": 0.3,
    "chunked_prefill_size": 512,  # a long prompt must not stop everyone's tokens for seconds
    "sleep_on_idle": True,
    "skip_server_warmup": True,
    "watchdog_timeout": 600.0,
}
"""SGLang's own settings on a CPU, used where the user did not set the field."""


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


def patch() -> None:
    """Change what SGLang and NIXL take for granted about GPUs. After SGLang's import, in each of its processes."""
    if accelerator_present():
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from pipeline.engine.sglang import cpu_kernels, nixl_cpu

    for target, replacement in (
        ("sglang.srt.mem_cache.pool_host.common._cuda_host_register", cpu_kernels.leave_unregistered),
        ("sglang.srt.mem_cache.pool_host.common._cuda_host_unregister", cpu_kernels.leave_unregistered),
    ):
        HookRegistry.register(target, replacement, HookType.REPLACE)
    HookRegistry.register(
        "sglang.srt.disaggregation.nixl.conn.NixlKVManager.__init__",
        nixl_cpu.before_kv_manager,
        HookType.BEFORE,
    )
