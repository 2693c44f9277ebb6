"""DeepSeekMoE v1 (deepseek-moe-16b, arXiv 2401.06066): fine-grained experts and shared experts.

LLaMA's attention; the first layers dense, then softmax routing over all experts without scaling,
and one SwiGLU layer of the shared experts' width beside them. Tensor names are the released ones.
"""

# transformers' base classes are untyped
# mypy: disable-error-code="misc"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm

from moesaic.core.errors import UserError, unknown
from moesaic.models.balance import layer_balance, sum_losses
from moesaic.models.decoder import (
    DenseMLP,
    Experts,
    MoEBlock,
    MoEDecoder,
    MoEDecoderLayer,
    MoEForCausalLM,
    MoEPreTrainedModel,
    SoftmaxRouter,
)
from moesaic.models.family import Family
from moesaic.models.layouts import qwen_layout


class DeepseekConfig(PreTrainedConfig):
    """Shape and routing of a DeepSeekMoE v1, with the released config's names.

    LLaMA's fields mean what they mean in `transformers.LlamaConfig`. Layer i is routed when
    `n_routed_experts` is given, i >= `first_k_dense_replace` and `moe_layer_freq` divides i; the
    others are dense, `intermediate_size` wide.

    Raises UserError (a ValueError) for sizes that do not fit together.
    """

    model_type = "deepseek"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "aux_loss"]
    attribute_map: ClassVar[dict[str, str]] = {
        "num_experts": "n_routed_experts",
        "router_aux_loss_coef": "aux_loss_alpha",
    }

    vocab_size: int = 102400
    hidden_size: int = 4096
    intermediate_size: int = 11008
    moe_intermediate_size: int = 1407
    """Width of one routed expert, and of one shared."""
    num_hidden_layers: int = 30
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    n_shared_experts: int | None = None
    n_routed_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_layer_freq: int = 1
    first_k_dense_replace: int = 0
    norm_topk_prob: bool = False
    """Divide the chosen probabilities by their sum (only when several are chosen)."""
    scoring_func: str = "softmax"
    aux_loss_alpha: float = 0.001
    """Coefficient of the balance loss in training."""
    seq_aux: bool = True
    """Balance within each sequence (the mean of their losses), not over the batch."""
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 100000
    eos_token_id: int | list[int] | None = 100001
    pretraining_tp: int | None = 1
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    attention_dropout: float | int | None = 0.0
    output_router_logits: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("auto_map", None)
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)
        if self.scoring_func != "softmax":
            raise unknown("scoring_func", self.scoring_func, ("softmax",))
        experts, chosen = self.n_routed_experts, self.num_experts_per_tok
        if experts is not None and not 1 <= (chosen or 0) <= experts:
            raise UserError(
                f"num_experts_per_tok={chosen} but the model has {experts} routed experts. "
                f"Give 1 to {experts}."
            )

    def routed(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return (
            self.n_routed_experts is not None
            and layer >= self.first_k_dense_replace
            and layer % self.moe_layer_freq == 0
        )


class DeepseekDecoderLayer(MoEDecoderLayer):
    """LLaMA's layer with a dense or a routed feed-forward part."""

    def __init__(self, config: DeepseekConfig, layer_idx: int) -> None:
        super().__init__()
        like_llama: Any = config  # it has every field that LLaMA's own layers read
        self.self_attn = LlamaAttention(config=like_llama, layer_idx=layer_idx)
        self.mlp = (
            _routed(config)
            if config.routed(layer_idx)
            else DenseMLP(config, config.intermediate_size)
        )
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


def _routed(config: DeepseekConfig) -> MoEBlock:
    experts, chosen = config.n_routed_experts, config.num_experts_per_tok
    assert experts is not None
    assert chosen is not None
    width, shared = config.moe_intermediate_size, config.n_shared_experts
    return MoEBlock(
        SoftmaxRouter(
            config.hidden_size,
            experts,
            chosen,
            renormalise=config.norm_topk_prob and chosen > 1,
            epsilon=1e-20,
        ),
        Experts(config, experts=experts, width=width),
        DenseMLP(config, width * shared) if shared else None,
    )


class DeepseekPreTrainedModel(MoEPreTrainedModel):
    """What every DeepSeekMoE class has."""

    config: DeepseekConfig
    config_class = DeepseekConfig
    _no_split_modules: ClassVar[list[str]] = ["DeepseekDecoderLayer"]


class DeepseekModel(DeepseekPreTrainedModel, MoEDecoder):
    """The decoder without a head."""

    layer_class = DeepseekDecoderLayer
    balance_in_training = True

    def balance_loss(
        self,
        logits: Sequence[torch.Tensor],
        ids: Sequence[torch.Tensor],
        valid_T: torch.Tensor | None,
        batch: int,
    ) -> torch.Tensor:
        """Sum over layers of the loss of each, within sequences if `seq_aux` (section 3.3).

        The original program adds the same gradient in training but hides the loss; here it is in
        the loss and is reported, and padding does not count.
        """
        groups = batch if self.config.seq_aux else 1
        return sum_losses(
            [
                layer_balance(logits_TE, ids_TK, valid_T, groups=groups)
                for logits_TE, ids_TK in zip(logits, ids, strict=True)
            ]
        )


class DeepseekForCausalLM(DeepseekPreTrainedModel, MoEForCausalLM):
    """The language model."""

    model_class = DeepseekModel


FAMILY = Family(
    config=DeepseekConfig,
    models={"AutoModel": DeepseekModel, "AutoModelForCausalLM": DeepseekForCausalLM},
    conversion=qwen_layout,
    harmless=("rotary_emb.inv_freq",),
)
