"""XVERSE-MoE (XVERSE-MoE-A4.2B): fine-grained experts and shared experts, a router in float32.

LLaMA's attention; every layer is routed. The dense XVERSE models bear the same model_type and are
not this family. Tensor names are the released ones.
"""

# transformers' base classes are untyped
# mypy: disable-error-code="misc"

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm

from moesaic.core.errors import UserError
from moesaic.models.decoder import (
    DenseMLP,
    Experts,
    MoEDecoder,
    MoEDecoderLayer,
    MoEForCausalLM,
    MoEPreTrainedModel,
    SoftmaxRouter,
    routed,
)
from moesaic.models.family import Family
from moesaic.models.layouts import qwen_layout


class XverseConfig(PreTrainedConfig):
    """Shape and routing of an XVERSE-MoE, with the released config's names.

    LLaMA's fields mean what they mean in `transformers.LlamaConfig`, except that
    `intermediate_size` is the width of one expert; the shared experts are one layer
    `num_shared_experts` times as wide.

    Raises UserError (a ValueError) for sizes that do not fit together.
    """

    model_type = "xverse"
    default_theta = 500_000.0
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "aux_loss"]
    attribute_map: ClassVar[dict[str, str]] = {"num_experts_per_tok": "moe_top_k"}

    vocab_size: int = 100534
    hidden_size: int = 2560
    intermediate_size: int = 1728
    num_hidden_layers: int = 28
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    num_experts: int = 64
    moe_top_k: int = 6
    num_shared_experts: int | None = 2
    router_aux_loss_coef: float = 0.01
    """Coefficient of the balance loss, which is in the loss when router logits are asked for."""
    output_router_logits: bool = False
    hidden_act: str = "silu"
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = 1
    bos_token_id: int | None = 2
    eos_token_id: int | list[int] | None = 3
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    attention_dropout: float | int | None = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("auto_map", None)
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)
        if not 1 <= self.moe_top_k <= self.num_experts:
            raise UserError(
                f"moe_top_k={self.moe_top_k} but the model has {self.num_experts} experts. "
                f"Give 1 to {self.num_experts}."
            )


class XverseRouter(SoftmaxRouter):
    """Softmax over all experts in float32, whatever the model's dtype."""

    def __init__(self, config: XverseConfig) -> None:
        super().__init__(
            config.hidden_size,
            config.num_experts,
            config.moe_top_k,
            renormalise=True,
            epsilon=1e-6,
        )

    def score(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Logits [T, E] in float32."""
        with torch.autocast(x_TD.device.type, enabled=False):
            return F.linear(x_TD.float(), self.weight.float())


class XverseMoEBlock(nn.Module):
    """`router` chooses experts; the shared experts are added."""

    def __init__(self, config: XverseConfig) -> None:
        super().__init__()
        width = config.intermediate_size
        self.router = XverseRouter(config)
        self.experts = Experts(config, experts=config.num_experts, width=width)
        self.shared_experts: DenseMLP | None = None
        if config.num_shared_experts:
            self.shared_experts = DenseMLP(config, width * config.num_shared_experts)

    def forward(self, x_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Route and compute: see `decoder.routed`."""
        return routed(x_BSD, self.router, self.experts, self.shared_experts)


class XverseDecoderLayer(MoEDecoderLayer):
    """LLaMA's layer with experts."""

    def __init__(self, config: XverseConfig, layer_idx: int) -> None:
        super().__init__()
        like_llama: Any = config  # it has every field that LLaMA's own layers read
        self.self_attn = LlamaAttention(config=like_llama, layer_idx=layer_idx)
        self.mlp = XverseMoEBlock(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class XversePreTrainedModel(MoEPreTrainedModel):
    """What every XVERSE-MoE class has; routers stay in float32 when loaded in another dtype."""

    config: XverseConfig
    config_class = XverseConfig
    _no_split_modules: ClassVar[list[str]] = ["XverseDecoderLayer"]
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["router"]


class XverseModel(XversePreTrainedModel, MoEDecoder):
    """The decoder without a head."""

    layer_class = XverseDecoderLayer


class XverseForCausalLM(XversePreTrainedModel, MoEForCausalLM):
    """The language model."""

    model_class = XverseModel


def _is_dense(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == "xverse" and "num_experts" not in config


def _refuse(config: Mapping[str, Any]) -> dict[str, Any]:
    raise UserError(
        "config.json has no num_experts: this is a dense XVERSE model, and only XVERSE-MoE is "
        "supported."
    )


FAMILY = Family(
    config=XverseConfig,
    models={"AutoModel": XverseModel, "AutoModelForCausalLM": XverseForCausalLM},
    recognises=_is_dense,
    read=_refuse,
    conversion=qwen_layout,
    harmless=("rotary_emb.inv_freq",),
)
