"""What SGLang loads in each of its processes: the entry point `sglang.srt.plugins` of this distribution.

SGLang calls `register()` in the process of the engine before it reads its settings, and in every scheduler before
the scheduler is made, and then applies the hooks that were registered. By then SGLang itself is imported: what must
come before that is in `pipeline.engine.sglang.cpu_platform.prepare`, called from elsewhere.
"""

import logging
import os
import sys

from pipeline.engine.sglang import cpu_platform, kv_events, pooling
from pipeline.engine.sglang.handshake import from_environment, install
from pipeline.engine.sglang.ports import close_ports
from pipeline.errors import EngineStartError

logger = logging.getLogger(__name__)


def register() -> None:
    """Fit SGLang to this machine, and its handshake and KV events to NATS where the worker asked for it."""
    try:
        cpu_platform.patch()
        close_ports()
        pooling.install()
        if (handshake := from_environment()) is not None:
            install(handshake)
        if (events := kv_events.from_environment()) is not None:
            kv_events.install(events)
    except EngineStartError as error:
        _end(str(error))
    except Exception:  # the outermost guard: SGLang would log it and go on, with its own HTTP and ZMQ handshake
        logger.exception("the SGLang plugin failed")
        _end("the SGLang plugin failed; see above")


def _end(reason: str) -> None:
    """End this process, as SGLang goes on without a plugin that raises."""
    print(f"sglang-nats: {reason}", file=sys.stderr, flush=True)
    os._exit(1)
