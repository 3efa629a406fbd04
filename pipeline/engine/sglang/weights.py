"""Whether a folder's weights fit the running model, told from the headers of its files.

SGLang loads tensor after tensor into the running model. One of another shape stops it halfway, a missing one
stays as it was in silence, and its way back reads the new folder again.
"""

import asyncio
from pathlib import Path
from typing import Final

from pipeline.errors import InvalidRequest

Shape = tuple[int, ...]
NAMED_MAX: Final = 3


async def check(running: str, offered: str) -> None:
    """Raises InvalidRequest unless `offered` is a folder with every tensor of `running`, in the same shape.

    Where the running weights are not in safetensors files of a local folder, only the offered ones are read.
    """
    await asyncio.to_thread(_check, Path(running), Path(offered))


def _check(running: Path, offered: Path) -> None:
    if not offered.is_dir():
        raise InvalidRequest(f"model_path: there is no folder {offered} on the worker's machine", field="model_path")
    new = shapes(offered)
    if not new:
        raise InvalidRequest(f"model_path: {offered} has no *.safetensors files", field="model_path")
    old = shapes(running) if running.is_dir() else {}
    missing = sorted(old.keys() - new.keys())
    if missing:
        raise InvalidRequest(f"model_path: {offered} lacks {_some(missing)} of the running model", field="model_path")
    other = sorted(name for name in old if old[name] != new[name])
    if other:
        first = other[0]
        raise InvalidRequest(
            f"model_path: {_some(other)} of {offered} differ in shape from the running model's: {first} is "
            f"{list(new[first])} instead of {list(old[first])}",
            field="model_path",
        )


def shapes(folder: Path) -> dict[str, Shape]:
    """Each tensor's shape, by name. Raises InvalidRequest for a file that cannot be read."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, Shape] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="np") as tensors:
                found |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InvalidRequest(f"model_path: {file} cannot be read: {error}", field="model_path") from None
    return found


def _some(tensors: list[str]) -> str:
    more = len(tensors) - NAMED_MAX
    return ", ".join(tensors[:NAMED_MAX]) + (f" and {more} more tensors" if more > 0 else "")
