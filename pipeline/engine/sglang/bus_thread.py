"""A scheduler process' connection to the broker, with an event loop, in a thread of its own.

SGLang's scheduler has no event loop and must never wait for the broker. One connection serves all that speaks from
the process: the prefill-decode handshake and the KV events.
"""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

from pipeline.bus import Bus
from pipeline.errors import EngineStartError, PipelineError

CONNECT_S: Final = 10.0

T = TypeVar("T")


class BusThread:
    """Methods may be called from any thread but its own."""

    def __init__(self, url: str, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._url, self._name = url, name
        self._bus: Bus | None = None
        self._thread = threading.Thread(target=self._run, name="bus", daemon=True)

    @property
    def bus(self) -> Bus:
        """The connection, once started."""
        assert self._bus is not None, "the thread is started first"
        return self._bus

    def start(self) -> None:
        """Connect. Idempotent. Raises EngineStartError."""
        if self._thread.is_alive():
            return
        self._thread.start()
        try:
            self._bus = self.run(Bus.connect(self._url, name=self._name, timeout_s=CONNECT_S), 2 * CONNECT_S)
        except (PipelineError, TimeoutError) as error:
            reason = str(error) or f"no answer within {2 * CONNECT_S:.0f} s"
            raise EngineStartError(f"the engine does not reach the broker: {reason}") from error

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
        """Run on the loop and wait for it. Raises what it raises, and TimeoutError."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout_s)

    def call(self, function: Callable[..., object], *args: object) -> None:
        """Call on the loop, soon, and do not wait."""
        self.loop.call_soon_threadsafe(function, *args)

    def close(self) -> None:
        """Leave the bus and end the thread. Idempotent."""
        if not self._thread.is_alive():
            return
        if self._bus is not None:
            self.run(self._bus.close(), CONNECT_S)
        self.call(self.loop.stop)
        self._thread.join(CONNECT_S)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()


_shared: dict[str, BusThread] = {}


def of_this_process(url: str, name: str) -> BusThread:
    """The process' one connection to `url`, made by whoever asks first, and started. Raises EngineStartError."""
    thread = _shared.get(url)
    if thread is None:
        thread = _shared[url] = BusThread(url, name)
    thread.start()
    return thread
