"""Two tiny embedding models with random weights: one that reads both ways, one that reads forward and can be cut."""

import json
import shutil
from pathlib import Path
from typing import Final

TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer_config.json")
VOCAB_TOKENS: Final = 49_152
DIMENSIONS: Final = 64
CONTEXT_TOKENS: Final = 256


def make_bert(out: Path, tokenizer: Path) -> None:
    """Write a BERT that is pooled over all tokens, with the tokenizer of another folder."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=DIMENSIONS,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCAB_TOKENS,
        max_position_embeddings=CONTEXT_TOKENS,
        initializer_range=0.2,  # else all vectors are nearly one
        position_embedding_type="absolute",  # SGLang asks for it
    )
    BertModel(config).save_pretrained(out)
    (out / "1_Pooling").mkdir()
    (out / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    _copy(tokenizer, out)


def make_qwen2(out: Path, tokenizer: Path) -> None:
    """Write a Qwen2 that says of itself that its vectors can be cut."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=DIMENSIONS,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB_TOKENS,
        max_position_embeddings=CONTEXT_TOKENS,
        initializer_range=0.2,
        is_matryoshka=True,
        matryoshka_dimensions=[16, 32],
    )
    Qwen2ForCausalLM(config).save_pretrained(out)
    _copy(tokenizer, out)


def _copy(tokenizer: Path, out: Path) -> None:
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer / name, out / name)
