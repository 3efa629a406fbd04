"""What workers say of themselves while a load runs: CPU time once a second, and every KV transfer."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Final

import msgspec

from pipeline.bench.measure import distribution
from pipeline.bench.result import ProcessCpu, Transfers
from pipeline.bus import Bus, Received
from pipeline.engine.sglang.handshake import describe
from pipeline.errors import ConfigError
from pipeline.metrics import PREFIX
from pipeline.process_cpu import descendants_cpu_s, own_cpu_s
from subjects import headers, names
from subjects.codec import decode
from subjects.messages import MetricsSnapshot

SNAPSHOT_S: Final = 1.3
"""Long enough to hear one snapshot of everyone, which come once a second."""
TRANSFERS_MAX: Final = 200_000
OWN: Final = f"{PREFIX}_process_cpu_seconds_total"
DESCENDANTS: Final = f"{PREFIX}_descendants_cpu_seconds_total"

Spent = tuple[float, float]
"""CPU seconds of a process, and of its descendants."""


class Observer:
    """Listens from `begin` to `end`; without a broker it looks only at processes of this machine."""

    def __init__(self, bus: Bus | None, pids: Mapping[str, int]) -> None:
        """`pids`: of processes on this machine, by what they are called."""
        self._bus, self._pids = bus, pids
        self._latest: dict[tuple[str, str], Spent] = {}  # by role and worker
        self._before: dict[tuple[str, str], Spent] = {}
        self._listening = False
        self._handshakes_us: list[int] = []
        self._writes_us: list[int] = []
        self._transfers_us: list[int] = []
        self._kv_bytes = 0

    async def begin(self) -> None:
        """Returns when every worker has been heard. Raises ConfigError for a process that is not there."""
        if self._bus is not None:
            await self._bus.subscribe(names.METRICS.any(), self._hear_metrics)
            await self._bus.subscribe(names.BOOTSTRAP.any(), self._hear_handshake)
            await self._bus.flush()
            await asyncio.sleep(SNAPSHOT_S)
        self._look()
        self._before = dict(self._latest)
        self._listening = True

    async def end(self) -> None:
        """Wait for what everyone has spent."""
        self._listening = False
        if self._bus is not None:
            await asyncio.sleep(SNAPSHOT_S)
        with contextlib.suppress(ConfigError):  # a process that ended during the run: what it was last is unknown
            self._look()

    def processes(self) -> tuple[ProcessCpu, ...]:
        """What each spent in between; workers that were not there at both ends, or began anew, are left out."""
        found = []
        for (role, name), (own_s, below_s) in sorted(self._latest.items()):
            before = self._before.get((role, name))
            if before is not None and own_s >= before[0]:
                spent_below_s = max(0.0, below_s - before[1])
                found.append(ProcessCpu(name=name, role=role, cpu_s=own_s - before[0], descendants_cpu_s=spent_below_s))
        return tuple(found)

    def transfers(self) -> Transfers | None:
        """None where no KV was written."""
        if not self._handshakes_us and not self._transfers_us:
            return None
        return Transfers(
            handshake_ms=distribution(us / 1e3 for us in self._handshakes_us),
            write_ms=distribution(us / 1e3 for us in self._writes_us),
            transfer_ms=distribution(us / 1e3 for us in self._transfers_us),
            count=len(self._transfers_us),
            kv_bytes=self._kv_bytes,
        )

    def _look(self) -> None:
        for name, pid in self._pids.items():
            try:
                self._latest["", name] = own_cpu_s(pid), descendants_cpu_s(pid)
            except OSError:
                raise ConfigError(f"--pid {name}={pid}: there is no such process here", field="pid") from None

    def _hear_metrics(self, received: Received) -> None:
        with contextlib.suppress(msgspec.DecodeError):
            said = decode(MetricsSnapshot, received.payload)
            if said.process:
                return  # of an engine's process: the worker counts it among its descendants
            values = {sample.name: sample.value for family in said.families for sample in family.samples}
            if OWN in values:
                self._latest[said.role, said.worker] = values[OWN], values.get(DESCENDANTS, 0.0)

    def _hear_handshake(self, received: Received) -> None:
        line = describe(received)
        if line is None or not self._listening or len(self._handshakes_us) + len(self._transfers_us) > TRANSFERS_MAX:
            return
        if line.operation.startswith("receipt") and line.microseconds:
            self._handshakes_us.append(line.microseconds)
        elif line.operation == "status success":
            self._transfers_us.append(line.microseconds)
            self._kv_bytes += line.kv_bytes
            written = (received.headers or {}).get(headers.HANDSHAKE_WRITE_US, "")
            if written.isdigit():
                self._writes_us.append(int(written))


@contextlib.asynccontextmanager
async def observing(url: str | None, pids: Mapping[str, int]) -> AsyncIterator[Observer]:
    """`url`: of the broker; None: there is none to listen to. Raises BusConnectError."""
    if url is None:
        yield Observer(None, pids)
        return
    bus = await Bus.connect(url, name="bench")
    try:
        yield Observer(bus, pids)
    finally:
        await bus.close()
