"""A scheduler that waits for another engine leaves it the core. Pure: needs no SGLang.

SGLang's `sleep_on_idle` sleeps only where no request is open. Between, a decode engine that waits for a prompt's KV,
and a prefill engine that waits to be told the pages, turn their loops as fast as they can: on a machine without an
accelerator that takes a core from the engine they wait for.
"""

import time
from typing import Any, Final

PAUSE_S: Final = 0.001
"""How late the scheduler may notice that what it waits for has come; a prompt's forward pass takes 80 ms and more."""


def pause_while_waiting(result: Any, scheduler: Any) -> Any:
    """After `Scheduler.on_idle()`, which SGLang calls where there is no batch to run."""
    if not scheduler.is_fully_idle():
        time.sleep(PAUSE_S)
    return result
