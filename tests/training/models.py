"""Tiny models that the training tests share."""

from __future__ import annotations

import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from moesaic.models import LlamaMoEConfig, LlamaMoEForCausalLM

_SHAPE = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": 2,
}

_DEEPSEEK = {
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}


def dense(seed: int = 0, **fields: object) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**_SHAPE, "intermediate_size": 32, **fields}))


def llama_moe(seed: int = 0, **fields: object) -> LlamaMoEForCausalLM:
    torch.manual_seed(seed)
    options = {"intermediate_size": 32, "num_experts": 4, "num_selects": 2, **fields}
    model = LlamaMoEForCausalLM(LlamaMoEConfig(**{**_SHAPE, **options}))
    spread_routers(model)
    return model


def mixtral(seed: int = 0, **fields: object) -> MixtralForCausalLM:
    torch.manual_seed(seed)
    options = {"intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2, **fields}
    model = MixtralForCausalLM(MixtralConfig(**{**_SHAPE, **options}))
    spread_routers(model)
    return model


def deepseek_v2(seed: int = 0, **fields: object) -> DeepseekV2ForCausalLM:
    torch.manual_seed(seed)
    model = DeepseekV2ForCausalLM(DeepseekV2Config(**{**_SHAPE, **_DEEPSEEK, **fields}))
    spread_routers(model)
    return model


def deepseek_v3(seed: int = 0, **fields: object) -> DeepseekV3ForCausalLM:
    torch.manual_seed(seed)
    options = {"n_group": 1, "topk_group": 1, **fields}
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**{**_SHAPE, **_DEEPSEEK, **options}))
    spread_routers(model)
    return model


@torch.no_grad()
def spread_routers(model: torch.nn.Module) -> None:
    """Make routing decisive: near-zero logits would leave choices to rounding."""
    for name, parameter in model.named_parameters():
        if ".gate." in name and "noise" not in name:
            parameter.normal_(0.0, 1.0)
