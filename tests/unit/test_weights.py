"""Whether other weights fit is told from the headers of their files, before SGLang reads them."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline.engine.sglang.weights import check
from pipeline.errors import InvalidRequest

SHAPES = {f"layers.{index}.weight": (4, 2) for index in range(5)} | {"norm.weight": (2,)}


def model(folder: Path, shapes: dict[str, tuple[int, ...]], files: int = 2) -> str:
    folder.mkdir()
    for index in range(files):
        part = {name: np.zeros(shape) for name, shape in list(shapes.items())[index::files]}
        save_file(part, folder / f"model-{index}.safetensors")
    return str(folder)


async def test_weights_of_the_same_shapes_fit_however_they_are_parted(tmp_path: Path):
    running = model(tmp_path / "running", SHAPES)
    await check(running, model(tmp_path / "same", SHAPES, files=1))
    await check(running, model(tmp_path / "more", SHAPES | {"extra": (1,)}))
    await check("org/of-the-hub", running)


async def test_what_does_not_fit_is_named(tmp_path: Path):
    running = model(tmp_path / "running", SHAPES)
    with pytest.raises(InvalidRequest, match="there is no folder"):
        await check(running, str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidRequest, match=r"has no \*.safetensors files"):
        await check(running, str(tmp_path / "empty"))
    fewer = model(tmp_path / "fewer", {"norm.weight": (2,)}, files=1)
    with pytest.raises(InvalidRequest, match=r"lacks layers\.0\.weight, .* and 2 more tensors"):
        await check(running, fewer)
    other = model(tmp_path / "other", SHAPES | {"norm.weight": (3,)})
    with pytest.raises(InvalidRequest, match=r"norm.weight is \[3\] instead of \[2\]"):
        await check(running, other)
    (tmp_path / "other" / "model-0.safetensors").write_bytes(b"no tensors")
    with pytest.raises(InvalidRequest, match=r"model-0.safetensors cannot be read"):
        await check(running, other)
