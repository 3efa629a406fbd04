"""A tiny mixture of experts with random weights, for what only such a model can show."""

import shutil
from pathlib import Path
from typing import Final

LAYERS: Final = 2
EXPERTS: Final = 8
EXPERTS_A_TOKEN: Final = 2
TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def make(out: Path, tokenizer: Path, vocab_tokens: int = 49_152) -> None:
    """Write a Qwen3-MoE as a Hugging Face folder in bfloat16, with the tokenizer of another folder."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=EXPERTS,
        num_experts_per_tok=EXPERTS_A_TOKEN,
        vocab_size=vocab_tokens,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
    )
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(out)
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer / name, out / name)
