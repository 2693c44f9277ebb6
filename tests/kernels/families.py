"""Tiny random models of the families that the kernels are tested on."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import moesaic.models  # noqa: F401 - registers llama_moe and "moesaic"

LATENT = {  # DeepSeek's attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "n_shared_experts": 1,
    "n_routed_experts": 6,
    "head_dim": None,
}
FAMILIES = {  # what each config calls its sizes; "width" is filled in
    "mixtral": {"intermediate_size": "width", "num_local_experts": 6},
    "qwen2_moe": {
        "moe_intermediate_size": "width",
        "shared_expert_intermediate_size": 40,
        "intermediate_size": 64,
        "num_experts": 6,
    },
    "qwen3_moe": {"moe_intermediate_size": "width", "intermediate_size": 64, "num_experts": 6},
    "deepseek_v2": {
        **LATENT,
        "moe_intermediate_size": "width",
        "intermediate_size": 64,
        "topk_method": "greedy",
    },
    "deepseek_v3": {**LATENT, "moe_intermediate_size": "width", "intermediate_size": 64},
    "olmoe": {"intermediate_size": "width", "num_experts": 6},
    "granitemoe": {
        "intermediate_size": "width",
        "num_local_experts": 6,
        "output_router_logits": False,  # breaks its forward pass in transformers 5.17
    },
    "phimoe": {"intermediate_size": "width", "num_local_experts": 6},
    "jamba": {
        "intermediate_size": "width",
        "num_experts": 6,
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
        "attn_layer_period": 2,
        "attn_layer_offset": 0,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "gpt_oss": {"intermediate_size": "width", "num_local_experts": 6},
    "llama_moe": {"intermediate_size": "all widths", "num_experts": 6, "num_selects": 2},
}


def tiny(
    family: str, *, width: int = 24, hidden: int = 32, layers: int = 2, **extra: object
) -> torch.nn.Module:
    """Build a causal LM of `family` with random float32 weights, in eval mode."""
    sizes = {
        "vocab_size": 97,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if family.startswith("deepseek") else 2,
        "head_dim": hidden // 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "router_aux_loss_coef": 0.01,
        "output_router_logits": True,
    }
    given = {
        name: {"width": width, "all widths": 6 * width}.get(value, value)
        if isinstance(value, str)
        else value
        for name, value in {**sizes, **FAMILIES[family], **extra}.items()
    }
    torch.manual_seed(0)
    given = {name: value for name, value in given.items() if value is not None}
    config = CONFIG_MAPPING[family](**given)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # gradients of a size that rounding cannot hide
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model.eval()
