"""A Llama model in one GGUF file, written as a Hugging Face folder: bf16 weights, configuration, tokenizer.

Only what the built-in model needs: architecture "llama", a byte-level BPE tokenizer of the "smollm" kind.
Without torch and transformers it takes three seconds where transformers' own GGUF import takes forty.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import json
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from pipeline.errors import EngineStartError

_SCALARS: Final = dict(enumerate(("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?"))) | {10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_CONTROL_TOKEN: Final = 3
_LAYER_NAMES: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAMES: Final = {"token_embd": "embed_tokens", "output_norm": "norm"}


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file; `raw` is a view of its mapped bytes."""

    name: str  # e.g. "blk.0.attn_q.weight"
    shape: tuple[int, ...]  # outermost dimension first
    kind: gguf.GGMLQuantizationType
    raw: np.ndarray  # u8[bytes]

    def values(self) -> np.ndarray:
        """float32[*shape]"""
        return gguf.dequantize(self.raw.view(np.float32) if self.kind.name == "F32" else self.raw, self.kind)


@dataclass(frozen=True)
class GgufFile:
    """A whole file: its settings by name, its tensors in file order."""

    settings: dict[str, Any]
    tensors: tuple[Tensor, ...]


class _Cursor:
    """Reads little-endian values from bytes, one after the other."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content, self.at = content, 0

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self._content, self.at)
        self.at += struct.calcsize(form)
        return value

    def text(self) -> str:
        length = self.number("<Q")
        self.at += length
        return self._content[self.at - length : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            item, length = self.number("<I"), self.number("<Q")
            return [self.value(item) for _ in range(length)]
        return self.number(_SCALARS[kind])


def read(path: Path) -> GgufFile:
    """Map a GGUF file of version 2 or 3. Raises EngineStartError where it is something else."""
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if content[:4] != b"GGUF":
        raise EngineStartError(f"{path} is not a GGUF file")
    cursor = _Cursor(content)
    cursor.at = 4
    version, num_tensors, num_settings = (cursor.number(form) for form in ("<I", "<Q", "<Q"))
    if version not in (2, 3):
        raise EngineStartError(f"{path} is GGUF version {version}; versions 2 and 3 are read")
    settings = {cursor.text(): cursor.value(cursor.number("<I")) for _ in range(num_settings)}
    headers = [_header(cursor) for _ in range(num_tensors)]
    alignment = settings.get("general.alignment", 32)
    base = -(-cursor.at // alignment) * alignment
    whole = np.frombuffer(content, np.uint8)
    return GgufFile(settings, tuple(_tensor(whole, base, *header) for header in headers))


def _header(cursor: _Cursor) -> tuple[str, tuple[int, ...], gguf.GGMLQuantizationType, int]:
    name = cursor.text()
    shape = tuple(cursor.number("<Q") for _ in range(cursor.number("<I")))[::-1]
    return name, shape, gguf.GGMLQuantizationType(cursor.number("<I")), cursor.number("<Q")


def _tensor(
    whole: np.ndarray, base: int, name: str, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType, offset: int
) -> Tensor:
    rows = gguf.quant_shape_to_byte_shape(shape, kind)
    start = base + offset
    return Tensor(name, shape, kind, whole[start : start + int(np.prod(rows))].reshape(rows))


def write_folder(source: GgufFile, into: Path, step: Callable[[str, float], None]) -> None:
    """Write config.json, generation_config.json, model.safetensors and the tokenizer's files into a folder.

    `step` is told what is being done and the share done. Raises EngineStartError for another architecture.
    """
    kinds = (source.settings["general.architecture"], source.settings["tokenizer.ggml.pre"])
    if kinds != ("llama", "smollm"):
        raise EngineStartError(f"cannot convert the GGUF architecture and tokenizer {kinds}")
    step("writing the tokenizer", 0.0)
    _write_tokenizer(source.settings, into)
    _write_json(into / "config.json", _configuration(source))
    _write_json(into / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2})
    _write_safetensors(source, into / "model.safetensors", step)


def _write_safetensors(source: GgufFile, path: Path, step: Callable[[str, float], None]) -> None:
    """Every weight as bf16: a u64 length, a JSON header, the values. https://github.com/huggingface/safetensors"""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in source.tensors:
        start, end = end, end + 2 * int(np.prod(tensor.shape))
        header[_weight_name(tensor)] = {
            "dtype": "BF16",
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for done, tensor in enumerate(source.tensors):
            step("unpacking the weights", 0.2 + 0.8 * done / len(source.tensors))
            file.write(_bfloat16(_weight(tensor, source.settings)))


def _weight_name(tensor: Tensor) -> str:
    """The Hugging Face name: "blk.0.attn_q.weight" -> "model.layers.0.self_attn.q_proj.weight"."""
    *layer, part, suffix = tensor.name.split(".")
    prefix = f"layers.{layer[1]}.{_LAYER_NAMES[part]}" if layer else _NAMES[part]
    return f"model.{prefix}.{suffix}"


def _weight(tensor: Tensor, settings: dict[str, Any]) -> np.ndarray:
    """float32[*tensor.shape], in Hugging Face's order of rows."""
    if ".attn_q." in tensor.name:
        return _unpermuted(tensor.values(), settings["llama.attention.head_count"])
    if ".attn_k." in tensor.name:
        return _unpermuted(tensor.values(), settings["llama.attention.head_count_kv"])
    return tensor.values()


def _unpermuted(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Rotary halves as Hugging Face stores them; llama.cpp interleaves them. float32[out, in] -> same."""
    rows, columns = values.shape
    pairs = values.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _bfloat16(values: np.ndarray) -> np.ndarray:
    """float32[*shape] -> the bits of bfloat16, u16[*shape], rounded to nearest even as torch does."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _configuration(source: GgufFile) -> dict[str, Any]:
    settings = source.settings
    heads = settings["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": len(settings["tokenizer.ggml.tokens"]),
        "hidden_size": settings["llama.embedding_length"],
        "intermediate_size": settings["llama.feed_forward_length"],
        "num_hidden_layers": settings["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": settings["llama.attention.head_count_kv"],
        "head_dim": settings["llama.embedding_length"] // heads,
        "hidden_act": "silu",
        "max_position_embeddings": settings["llama.context_length"],
        "rms_norm_eps": settings["llama.attention.layer_norm_rms_epsilon"],
        "rope_parameters": {"rope_type": "default", "rope_theta": settings["llama.rope.freq_base"]},
        "rope_theta": settings["llama.rope.freq_base"],
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in source.tensors),
        "bos_token_id": settings["tokenizer.ggml.bos_token_id"],
        "eos_token_id": settings["tokenizer.ggml.eos_token_id"],
        "pad_token_id": settings["tokenizer.ggml.padding_token_id"],
    }


def _write_tokenizer(settings: dict[str, Any], into: Path) -> None:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    tokens: list[str] = settings["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in settings["tokenizer.ggml.merges"]]
    tokenizer = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    # "smollm": every digit is a token of its own, the rest is split as GPT-2 does.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = settings["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [
            tokenizers.AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == _CONTROL_TOKEN
        ]
    )
    tokenizer.save(str(into / "tokenizer.json"))
    _write_json(
        into / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokens[settings["tokenizer.ggml.bos_token_id"]],
            "eos_token": tokens[settings["tokenizer.ggml.eos_token_id"]],
            "pad_token": tokens[settings["tokenizer.ggml.padding_token_id"]],
            "unk_token": tokens[settings["tokenizer.ggml.unknown_token_id"]],
            "clean_up_tokenization_spaces": False,
            "model_max_length": settings["llama.context_length"],
        },
    )
    (into / "chat_template.jinja").write_text(settings["tokenizer.chat_template"])


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
