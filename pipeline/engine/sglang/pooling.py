"""How token states become one vector: as the model's own files say, in float32.

SGLang pools encoders (BERT, RoBERTa) at their first token whatever they were trained for, and normalizes in the model's
dtype, so that a bfloat16 vector is up to 0.3 % longer or shorter than 1. A model that sentence-transformers published
says in `1_Pooling/config.json` how it was trained; all-MiniLM-L6-v2 for one is pooled over all tokens, and its vectors
pooled at the first token are others'. SGLang's own mean is a difference of running sums over the whole batch, of which
bfloat16 keeps little. The processes of an embedding engine learn of it by an environment variable.
"""

import json
import os
from pathlib import Path
from typing import Any, Final, Literal

from pipeline.errors import EngineStartError

VARIABLE: Final = "SGLANG_NATS_POOLING"
Pooling = Literal["cls", "last", "mean", "model"]
"""`model`: as SGLang has it for the model's architecture."""
_MODES: Final[dict[str, Pooling]] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_mean_tokens": "mean",
}
_PREFIX: Final = "pooling_mode_"
_TARGET: Final = "sglang.srt.layers.pooler.pool_hidden_states"


def of_model(folder: Path) -> Pooling:
    """A model's pooling by its files; `model` where they say nothing.

    Raises EngineStartError for a file that cannot be read, and for a pooling that is none of these.
    """
    file = folder / "1_Pooling" / "config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return "model"
    except (OSError, ValueError) as problem:
        raise EngineStartError(f"cannot read {file}: {problem}") from problem
    chosen = [name for name, on in settings.items() if name.startswith(_PREFIX) and on is True]
    if len(chosen) == 1 and chosen[0] in _MODES:
        return _MODES[chosen[0]]
    raise EngineStartError(
        f"{file} asks for {' and '.join(chosen) or 'no pooling'}; one of {', '.join(_MODES)} is known"
    )


def announce(folder: Path | None) -> None:
    """Tell the processes of the engine that starts next; None: it generates."""
    os.environ.pop(VARIABLE, None)
    if folder is not None:
        os.environ[VARIABLE] = of_model(folder)


def install() -> None:
    """Where an embedding engine asked for it, pool as announced. In each of SGLang's processes, by its plugin."""
    if VARIABLE in os.environ:
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        HookRegistry.register(_TARGET, pool, HookType.AROUND)


def pool(original: Any, pooling_type: Any, hidden_states: Any, forward_batch: Any) -> Any:
    """Around `pool_hidden_states`: float[num_tokens, hidden] of all inputs in a row to float32[num_inputs, hidden]."""
    pooling = os.environ[VARIABLE]
    if pooling == "mean":
        return _mean(hidden_states.float(), forward_batch.extend_seq_lens)
    if pooling != "model":
        pooling_type = type(pooling_type)[pooling.upper()]
    return original(pooling_type, hidden_states, forward_batch).float()


def _mean(states: Any, lengths: Any) -> Any:
    """float32[num_inputs, hidden]. Rows behind the last input, which pad a batch, count for none."""
    import torch

    positions = torch.arange(len(states), device=states.device)
    of_input = torch.searchsorted(torch.cumsum(lengths, dim=0), positions, right=True)
    sums = states.new_zeros(len(lengths) + 1, states.shape[1]).index_add_(0, of_input, states)
    return sums[:-1] / lengths.unsqueeze(-1)
