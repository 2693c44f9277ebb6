"""Tiny dense models of every family that experts are made of, with what is special in each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCABULARY = 61
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": LLAMA3_ROPE, "head_dim": 16},
    "mistral": {"sliding_window": 8},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 16, "final_logit_softcapping": 3.0},
    "gemma3_text": {
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "head_dim": 16,
    },
    "phi3": {"partial_rotary_factor": 0.5},
    "olmo2": {},
    "smollm3": {"no_rope_layers": [1, 0, 1], "rope_parameters": LLAMA3_ROPE},
    "deepseek_v3": {
        "first_k_dense_replace": 3,
        "q_lora_rank": 8,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_group": 1,
        "topk_group": 1,
    },
}
"""model_type -> the fields in which its tiny model differs."""


def family_config(kind: str, **fields: Any) -> Any:
    """The config of a tiny model: D=32, F=48, 3 layers, 4 heads, 2 of keys and values."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if kind == "deepseek_v3" else 2,
        "max_position_embeddings": 64,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,
    }
    return CONFIG_MAPPING[kind](**{**sizes, **FAMILIES[kind], **fields})


def write_family(
    path: Path,
    kind: str,
    *,
    dtype: torch.dtype = torch.float32,
    shard: str = "1GB",
    seed: int = 0,
    **fields: Any,
) -> Path:
    """Make and save a tiny dense model whose every tensor is random, biases and norms too."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(family_config(kind, **fields))
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2 + (parameter.dim() == 1)
    model.to(dtype).save_pretrained(path, max_shard_size=shard)
    return path
