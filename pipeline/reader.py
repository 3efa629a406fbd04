"""The end of requests whose readers are gone: only of those that name a subject on which their reader answers.

A request without one is worked on to its end whoever reads it: its answer is kept for whoever comes. A killed client
is noticed by the broker's "no responders" within `ASK_S` x (`ABSENCES_MAX` + 1); one that is frozen or slow is there.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Final

from pipeline.bus import Bus
from pipeline.errors import BusUnavailable, NoResponders
from subjects.limits import PRESENCE_S

ASK_S: Final = 2.0
ABSENCES_MAX: Final = 2
"""So often in a row nobody answers where a reader is gone."""


@contextlib.contextmanager
def watched(bus: Bus, reader: str | None, on_gone: Callable[[], None]) -> Iterator[None]:
    """Call `on_gone` when nobody answers on the subject any more while the block lasts; never for None."""
    if reader is None:
        yield
        return
    watching = asyncio.create_task(_watch(bus, reader, on_gone), name="reader")
    try:
        yield
    finally:
        watching.cancel()


async def _watch(bus: Bus, reader: str, on_gone: Callable[[], None]) -> None:
    absences = 0
    while absences < ABSENCES_MAX:
        await asyncio.sleep(ASK_S)
        try:
            await bus.request(reader, b"", timeout_s=ASK_S)
            absences = 0
        except NoResponders:
            absences += 1
        except BusUnavailable:
            continue  # slow, or it cannot be told
        if time.monotonic() - bus.connected_since_s < PRESENCE_S:
            absences = 0  # the reader, too, may not be back yet
    on_gone()
