"""Starting and ending SGLang's processes."""

import atexit
import functools
import logging
import multiprocessing
import os
import socket
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import psutil

from pipeline.engine.sglang import compat, cpu_platform, kv_events, processes, series, server_args
from pipeline.engine.sglang.handshake import from_environment, install
from pipeline.engine.sglang.kv_events import KvEventsSettings
from pipeline.errors import EngineStartError, PipelineError

KILL_S_MAX: Final = 10.0


def launch(
    model_path: str,
    given: Mapping[str, Any],
    given_up: threading.Event,
    outlet: socket.socket,
    events: KvEventsSettings | None = None,
) -> Any:
    """Start SGLang's processes and load the model; returns a `sglang.Engine`. Blocks for 10 s to minutes.

    Run it in a thread that lives until the engine has ended: Linux kills SGLang's children with the *thread* that
    started them. Raises ConfigError for a wrong setting, EngineStartError for all else; no process is left then.
    Once `given_up` is set it starts nothing. `outlet`: where SGLang's processes send their metrics, see `series`.
    `events`: to publish KV events, where that costs little.
    """
    cpu_platform.prepare()
    compat.check()
    if (handshake := from_environment()) is not None:
        install(handshake)
    series.keep_in_memory()
    series.take_out()  # of an earlier engine here that did not start
    arguments = server_args.resolve(model_path, given)
    cpu_platform.bind_ranks(arguments)
    if events is not None and kv_events.wanted(
        events, arguments.get("page_size") or 1, cpu_platform.accelerator_present()
    ):
        os.environ.update(events.to_environment())  # SGLang's processes inherit it
        arguments["kv_events_config"] = kv_events.CONFIG
    before = children()
    if given_up.is_set():
        raise EngineStartError("the engine was closed while it started")
    with tempfile.TemporaryDirectory(prefix="sglang-nats-") as folder, _root_logging_kept():
        words = Path(folder) / "last-words"
        try:
            return _engine_class(words, outlet)(**arguments)
        except PipelineError:
            raise
        except Exception as error:  # the guard around all that SGLang does at start
            kill(children() - before)
            reason = words.read_text() if words.exists() else str(error) or type(error).__name__
            raise EngineStartError(f"SGLang cannot start {model_path}: {reason}") from error


def end(engine: Any) -> None:
    """End a started engine's processes, and its hold on this one. Blocks for up to `KILL_S_MAX`.

    Not by `Engine.shutdown`, which kills every child of this process, SGLang's or not.
    """
    atexit.unregister(engine.shutdown)
    engine.tokenizer_manager._subprocess_watchdog.stop()
    kill(engine.get_all_child_pids())
    for file in _files(engine):
        file.unlink(missing_ok=True)


def disconnect(engine: Any) -> None:
    """Close SGLang's sockets in this process, in the thread that uses them.

    With what is still unsent dropped: ZMQ would else wait for ever for dead processes to take it, at the latest
    when the interpreter collects the sockets.
    """
    manager = engine.tokenizer_manager
    for end in (manager.send_to_scheduler, manager.recv_from_detokenizer, engine.send_to_rpc):
        if end is not None:
            end.context.destroy(linger=0)


def _files(engine: Any) -> Iterator[Path]:
    """What SGLang leaves behind: its sockets in the temporary folder, and the schedulers' state in shared memory."""
    for address in vars(engine.port_args).values():
        if isinstance(address, str) and address.startswith("ipc://"):
            yield Path(address.removeprefix("ipc://"))
    yield Path(engine.tokenizer_manager.load_snapshot_reader.path)


def children() -> frozenset[int]:
    """The ids of the processes that this one started through multiprocessing, as SGLang does."""
    return frozenset(child.pid for child in multiprocessing.active_children() if child.pid is not None)


def kill(pids: Iterable[int]) -> None:
    """End children of this process and their descendants, and wait until they are gone."""
    doomed = frozenset(pids)
    below: list[psutil.Process] = []
    for pid in doomed:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            below += process.children(recursive=True)
            process.kill()
    for process in below:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    # Children are waited for through multiprocessing: who else waits for one takes its exit status away, and
    # multiprocessing then believes for ever that it lives.
    for child in multiprocessing.active_children():
        if child.pid in doomed:
            child.join(KILL_S_MAX)
    psutil.wait_procs(below, timeout=KILL_S_MAX)


def _engine_class(last_words: Path, outlet: socket.socket) -> type:
    """SGLang's Engine with our entry functions for its processes."""
    from sglang.srt.entrypoints import engine

    if not cpu_platform.accelerator_present():
        # The controller is named in no field of Engine; its schedulers are given to it as they are here.
        engine.run_data_parallel_controller_process = processes.run_data_parallel_controller

    class PipelineEngine(engine.Engine):
        run_scheduler_process_func = functools.partial(processes.run_scheduler, last_words=last_words, outlet=outlet)
        run_detokenizer_process_func = functools.partial(
            processes.run_detokenizer, last_words=last_words, outlet=outlet
        )

    return PipelineEngine


@contextmanager
def _root_logging_kept() -> Iterator[None]:
    """SGLang replaces the root logger's handlers and level with its own: put the process's back."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        root.handlers[:], root.level = handlers, level
