"""An engine of one process opens no TCP port.

SGLang makes process groups even for one process: torch's store then listens on TCP, and each gloo group on a
port of its own. A group of one has nobody to talk to, so its store is kept in memory and its gloo backend is
torch's fake one, whose collectives leave a tensor as it is: what a group of one does. Engines of several
processes are left alone: their ranks do talk, on the loopback device where they are on one machine.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch.distributed
import torch.testing._internal.distributed.fake_pg  # registers the backend "fake"

_ALONE = "fake"


@functools.cache
def close_ports() -> None:
    """Change how this process makes process groups. Idempotent."""
    torch.distributed.init_process_group = _alone_in_memory(torch.distributed.init_process_group)
    torch.distributed.new_group = _alone_without_gloo(torch.distributed.new_group)
    torch.distributed.monitored_barrier = _alone_without_waiting(torch.distributed.monitored_barrier)


def _alone_in_memory(init_process_group: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init_process_group)
    def init(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("world_size") == 1 and not args:
            del kwargs["init_method"]
            kwargs["store"] = torch.distributed.HashStore()
            backend = _ALONE if backend == "gloo" else backend
        init_process_group(backend, *args, **kwargs)

    return init


def _alone_without_gloo(new_group: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(new_group)
    def new(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("backend") == "gloo" and torch.distributed.get_world_size() == 1:
            kwargs["backend"] = _ALONE
        return new_group(*args, **kwargs)

    return new


def _alone_without_waiting(monitored_barrier: Callable[..., None]) -> Callable[..., None]:
    """Torch has this barrier for gloo only."""

    @functools.wraps(monitored_barrier)
    def barrier(*args: Any, **kwargs: Any) -> None:
        if torch.distributed.get_world_size() > 1:
            monitored_barrier(*args, **kwargs)

    return barrier
