"""Tiny dense models with random weights, written as ordinary Hugging Face directories."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 61


def write_dense(
    path: Path,
    *,
    family: str = "Llama",
    head: str = "ForCausalLM",
    dtype: torch.dtype = torch.float32,
    shard: str = "1GB",
    seed: int = 0,
    **fields: Any,
) -> Path:
    """Make and save a dense model: D=32, F=48, 2 layers, 4 heads, 2 key-value heads by default."""
    import transformers

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "pad_token_id": None,
    }
    if family == "Mistral":
        sizes["sliding_window"] = None
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**{**sizes, **fields})
    model = getattr(transformers, f"{family}{head}")(config)
    for parameter in model.parameters():  # biases and norms too: zeros and ones hide mistakes
        parameter.data = torch.randn_like(parameter) * 0.2 + (parameter.dim() == 1)
    model.to(dtype).save_pretrained(path, max_shard_size=shard)
    return path


def edit_config(path: Path, **fields: Any) -> None:
    """Set fields of config.json; None removes one."""
    file = path / "config.json"
    config = json.loads(file.read_text())
    config.update(fields)
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def to_bin(path: Path) -> Path:
    """Turn the safetensors of a directory into pytorch_model.bin files, sharded as they were."""
    from safetensors.torch import load_file

    for file in sorted(path.glob("*.safetensors")):
        name = file.name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")
        torch.save(load_file(file), path / name)
        file.unlink()
    index = path / "model.safetensors.index.json"
    if index.exists():
        text = index.read_text().replace("model-", "pytorch_model-").replace("safetensors", "bin")
        (path / "pytorch_model.bin.index.json").write_text(text)
        index.unlink()
    return path


def write_text_tokenizer(path: Path) -> None:
    """Put a tokenizer of single letters beside a model."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: number for number, letter in enumerate("#abcdefghijklmnopqrstuvwxyz .")}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="#"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="#").save_pretrained(path)


def changed_dense(path: Path, change: Callable[[Any], None], **fields: Any) -> Path:
    """A dense model with a tokenizer whose weights `change` was given before it was written."""
    import moesaic

    write_dense(path, **fields)
    write_text_tokenizer(path)
    model = moesaic.load(path, dtype=torch.float32)
    with torch.no_grad():
        change(model)
    model.save_pretrained(path)
    return path
