"""Tiny random models for the tests here."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moesaic.models.llama_moe import LlamaMoEConfig, LlamaMoEForCausalLM
from moesaic.models.llama_moe_residual import LlamaMoEResidualConfig

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
RAGGED = [[8, 24, 16, 16], [16, 16, 20, 12]]


def config(**fields: Any) -> LlamaMoEConfig:
    """Four experts of width 16, two a token, two layers."""
    return LlamaMoEConfig(**{**SHAPE, "num_experts": 4, "num_selects": 2, **fields})


def residual_config(**fields: Any) -> LlamaMoEResidualConfig:
    """Three routed experts of width 16 of which one is used, and one or more that are always on."""
    given = {
        "num_experts": 3,
        "num_selects": 1,
        "num_experts_residual": 2,
        "intermediate_size_moe": 48,
        "intermediate_size_residual": 16,
        **fields,
    }
    return LlamaMoEResidualConfig(**{**SHAPE, **given})


def build(model_class: type, model_config: Any, *, seed: int = 0) -> Any:
    """A model with random weights that differ in every place, in eval mode."""
    torch.manual_seed(seed)
    return model_class(model_config).eval()


def ids(batch: int = 2, length: int = 12, *, seed: int = 0) -> torch.Tensor:
    """Random token ids without the padding id."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 96, (batch, length), generator=generator)


def split_of(dense: LlamaForCausalLM, sizes: list[list[int]], **fields: Any) -> LlamaMoEForCausalLM:
    """The dense model's neurons dealt to experts in order, all experts on, scores off."""
    known = {
        key: value
        for key, value in dense.config.to_dict().items()
        if key not in ("model_type", "architectures", "transformers_version", "dtype")
    }
    moe_config = LlamaMoEConfig(
        **{
            **known,
            "size_experts": sizes,
            "num_experts": len(sizes[0]),
            "num_selects": len(sizes[0]),
            "multiply_gate_scores": False,
            **fields,
        }
    )
    moe = build(LlamaMoEForCausalLM, moe_config)
    source = dense.state_dict()
    target = moe.state_dict()
    for key in target:
        if key in source:
            target[key].copy_(source[key])
    for layer, row in enumerate(sizes):
        start, prefix = 0, f"model.layers.{layer}.mlp."
        experts = moe.model.layers[layer].mlp.calculator.experts
        width = experts.intermediate_dim
        for e, size in enumerate(row):
            neurons = slice(start, start + size)
            start += size
            for part, name in ((0, "gate_proj"), (width, "up_proj")):
                rows = slice(part, part + size)
                experts.gate_up_proj.data[e, rows] = source[f"{prefix}{name}.weight"][neurons]
                if moe.config.mlp_bias:
                    bias = source[f"{prefix}{name}.bias"][neurons]
                    experts.gate_up_proj_bias.data[e, rows] = bias
            down = source[f"{prefix}down_proj.weight"]
            experts.down_proj.data[e, :, :size] = down[:, neurons]
        if moe.config.mlp_bias:
            bias = source[f"{prefix}down_proj.bias"]
            moe.model.layers[layer].mlp.calculator.bias_down.data.copy_(bias)
    return moe


def dense(**fields: Any) -> LlamaForCausalLM:
    """A dense LLaMA of the same shape, biases random too."""
    model = build(LlamaForCausalLM, LlamaConfig(**{**SHAPE, **fields}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model
