"""The entry functions of SGLang's child processes.

A spawned process first unpickles the function that it shall run, and so imports this module before anything of
SGLang. That is the moment for what has to come before SGLang's import; see `cpu_platform`.
"""

import inspect
import logging
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.engine.sglang import cpu_platform, series

cpu_platform.prepare()


def run_scheduler(*args: Any, last_words: Path, outlet: socket.socket, **kwargs: Any) -> Any:
    """SGLang's scheduler; what it dies of is left in the file `last_words`, its metrics go to `outlet`."""
    _keep_last_words("sglang.srt.managers.scheduler", last_words)
    from sglang.srt.managers.scheduler import run_scheduler_process

    series.send_from(outlet, _rank(run_scheduler_process, args, kwargs))
    return run_scheduler_process(*args, **kwargs)


def run_detokenizer(*args: Any, last_words: Path, outlet: socket.socket, **kwargs: Any) -> Any:
    """SGLang's detokenizer; what it dies of is left in the file `last_words`, its metrics go to `outlet`."""
    _keep_last_words("sglang.srt.managers.detokenizer_manager", last_words)
    from sglang.srt.managers.detokenizer_manager import run_detokenizer_process

    series.send_from(outlet, "detokenizer")
    return run_detokenizer_process(*args, **kwargs)


def _rank(entry: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """A scheduler's place among those of its engine, from what SGLang starts it with."""
    given = inspect.signature(entry).bind(*args, **kwargs).arguments
    return f"scheduler dp{given['dp_rank'] or 0} pp{given['pp_rank']} tp{given['tp_rank']}"


def run_data_parallel_controller(*args: Any, **kwargs: Any) -> Any:
    """SGLang's controller of several schedulers."""
    from sglang.srt.managers.data_parallel_controller import run_data_parallel_controller_process

    return run_data_parallel_controller_process(*args, **kwargs)


class _LastWords(logging.Handler):
    """Writes the last line of each error to a file: SGLang logs the reason of a death and nothing else.

    The file's folder is there while the engine starts. An error here would keep SGLang from telling of the death.
    """

    def __init__(self, file: Path) -> None:
        super().__init__(logging.ERROR)
        self._file = file

    def emit(self, record: logging.LogRecord) -> None:
        lines = record.getMessage().strip().splitlines()
        if lines and self._file.parent.is_dir():
            with suppress(OSError):
                self._file.write_text(lines[-1])


def _keep_last_words(logger: str, file: Path) -> None:
    logging.getLogger(logger).addHandler(_LastWords(file))
