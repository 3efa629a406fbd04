"""torchvision importable with a CPU build of torch.

PyPI's torchvision wheel is built for CUDA. Without torch's CUDA libraries its extension does not load, and
its Python part then fails at import because `torchvision::nms` and `torchvision::qnms` are unknown. transformers
imports torchvision for the class names of its image processors even where no image is ever seen, so the two
operators are declared, without a kernel: a call still fails, by name.
"""

import importlib.util
from pathlib import Path
from typing import Any, Final

_SCHEMAS: Final = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[Any] = []  # the torch library holding the operators; they go when it does


def declare_operators() -> None:
    """Declare torchvision's operators where its own extension cannot. Idempotent; imports torch."""
    import torch

    spec = importlib.util.find_spec("torchvision")
    if _declared or spec is None or spec.origin is None:
        return
    try:
        torch.ops.load_library(str(Path(spec.origin).with_name("_C.so")))
    except OSError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in _SCHEMAS:
            library.define(schema)
        _declared.append(library)
