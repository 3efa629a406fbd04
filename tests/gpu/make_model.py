"""Make a Llama with random weights on the GPU, with an existing tokenizer: for machines that no model reaches.

python tests/gpu/make_model.py --shape 1b --tokenizer FOLDER OUT
"""

import argparse
import shutil
from pathlib import Path
from typing import Final

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SHAPES: Final = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
CONTEXT_TOKENS: Final = 40_960
VOCAB_TOKENS: Final = 49_152  # SmolLM2's
SEED: Final = 0


def make(shape: str, tokenizer: Path, out: Path) -> None:
    """Write the model as a Hugging Face folder in bfloat16."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        **SHAPES[shape],
        num_key_value_heads=8,
        vocab_size=VOCAB_TOKENS,
        max_position_embeddings=CONTEXT_TOKENS,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=shape == "1b",
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    model.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer / name, out / name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    make(given.shape, given.tokenizer, given.out)
