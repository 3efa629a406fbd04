"""SGLang's own Prometheus series on their way out of its processes.

SGLang counts with `prometheus_client` and would let each process write its figures to memory-mapped files, for an HTTP
server to add them up. Here no file is written and no port is opened: each process keeps its figures in its memory, and
a thread of it sends them once a second through a datagram socket that it inherited from the worker. A datagram is whole
or not there, so any number of processes may share the socket; one that finds it full leaves that second out.
"""

import asyncio
import logging
import socket
import threading
import time
from typing import Final

import msgspec
from prometheus_client import REGISTRY, CollectorRegistry

from pipeline import metrics
from subjects.codec import decode, encode
from subjects.limits import HEARTBEAT_S
from subjects.messages import Message, MetricFamily

PREFIX: Final = "sglang:"
DATAGRAM_BYTES_MAX: Final = 512 * 1024
"""Asked of the kernel, which may grant less (net.core.wmem_max); `metrics.SAMPLES_MAX` samples take about 300 KiB."""
PROCESSES_MAX: Final = 256
"""Schedulers, over all ranks, whose figures are kept."""
SILENT_S_MAX: Final = 10.0
"""A process not heard of for this long has no figures any more: better none than old ones."""

logger = logging.getLogger(__name__)


class _Figures(Message, frozen=True, kw_only=True):
    """What one of SGLang's processes has counted."""

    process: str
    families: tuple[MetricFamily, ...]


def keep_in_memory() -> None:
    """Let SGLang's processes write no multi-process files. In the worker, before it starts them."""
    from sglang.srt.entrypoints import engine

    engine.set_prometheus_multiproc_dir = lambda: None


def take_out() -> CollectorRegistry:
    """Take SGLang's series out of this process's registry, which takes no name twice, into one of their own."""
    taken = CollectorRegistry()
    theirs = {collector for name, collector in REGISTRY._names_to_collectors.items() if name.startswith(PREFIX)}
    for collector in theirs:
        REGISTRY.unregister(collector)
        taken.register(collector)
    return taken


def counted(registry: CollectorRegistry = REGISTRY) -> tuple[MetricFamily, ...]:
    """What SGLang, and our handshake inside it, have counted in this process; families without a figure left out."""
    theirs = [family for family in metrics.snapshot(registry) if family.name.startswith(PREFIX) and family.samples]
    ours = [family for family in metrics.snapshot(metrics.ENGINE) if any(sample.value for sample in family.samples)]
    return metrics.bounded(ours + theirs)


def send_from(outlet: socket.socket, process: str) -> None:
    """Begin to send this process's figures, as those of `process`, until it ends or the worker is gone."""
    threading.Thread(target=_send, args=(outlet, process), name="series", daemon=True).start()


def _send(outlet: socket.socket, process: str) -> None:
    outlet.setblocking(False)
    while True:
        time.sleep(HEARTBEAT_S)
        try:
            outlet.send(encode(_Figures(process=process, families=counted())))
        except BlockingIOError:
            continue
        except OSError as error:
            logger.warning("%s sends no more metrics: %s", process, error)
            return


class Inlet:
    """The worker's end: keeps what each of SGLang's processes said last."""

    def __init__(self) -> None:
        self._inlet, self.outlet = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._inlet.setblocking(False)
        self.outlet.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, DATAGRAM_BYTES_MAX)
        self._heard: dict[str, tuple[_Figures, float]] = {}  # by process; when, on the monotonic clock
        self._own = CollectorRegistry()  # what the engine's part in this process counts
        self._loop: asyncio.AbstractEventLoop | None = None

    def listen(self) -> None:
        """Begin to take in what is sent, on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._inlet, self._hear)

    def adopt(self) -> None:
        """The engine has started: the series that it has registered in this process are its own."""
        self._own = take_out()

    def current(self) -> dict[str, tuple[MetricFamily, ...]]:
        """The families of each process that is still heard of, and of this one."""
        now_s = time.monotonic()
        fresh = {
            process: figures.families
            for process, (figures, heard_s) in self._heard.items()
            if now_s - heard_s < SILENT_S_MAX
        }
        return fresh | {"tokenizer": counted(self._own)}

    def close(self) -> None:
        if self._loop is not None:
            self._loop.remove_reader(self._inlet)
            self._loop = None
        self._inlet.close()
        self.outlet.close()

    def _hear(self) -> None:
        try:
            figures = decode(_Figures, self._inlet.recv(DATAGRAM_BYTES_MAX))
        except BlockingIOError:
            return
        except msgspec.DecodeError as error:
            logger.warning("unreadable metrics of a process of SGLang: %s", error)
            return
        if figures.process in self._heard or len(self._heard) < PROCESSES_MAX:
            self._heard[figures.process] = (figures, time.monotonic())
