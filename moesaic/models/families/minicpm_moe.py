"""MiniCPM-MoE (MiniCPM-MoE-8x2B, arXiv 2404.06395): Mixtral's experts under muP-style scalings.

Embeddings, what each sub-layer adds, and the hidden states before the head are multiplied by
factors of the config; the rotary embedding is applied in float32. The released config.json has no
model_type: files are recognised by their class and their experts. Tensor names are the released
ones.
"""

# transformers' base classes, decorators and re-exports are untyped
# mypy: disable-error-code="no-untyped-call, untyped-decorator, attr-defined, misc"

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils import can_return_tuple

from moesaic.core.errors import UserError
from moesaic.models.decoder import (
    Experts,
    MoEBlock,
    MoEDecoder,
    MoEDecoderLayer,
    MoEForCausalLM,
    MoEPreTrainedModel,
    SoftmaxRouter,
    weighted_balance,
)
from moesaic.models.family import Family
from moesaic.models.layouts import mixtral_layout
from moesaic.models.padding import last_tokens


class MiniCPMMoEConfig(PreTrainedConfig):
    """Shape, scalings and routing of a MiniCPM-MoE, with the released config's names.

    LLaMA's fields mean what they mean in `transformers.LlamaConfig`; `intermediate_size` is the
    width of one expert. Word embeddings are tied unless the file says otherwise.

    Raises UserError (a ValueError) for sizes that do not fit together.
    """

    model_type = "minicpm_moe"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "aux_loss"]

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    num_experts: int = 8
    num_experts_per_tok: int = 2
    scale_emb: float | int = 1
    """Factor on the embeddings."""
    scale_depth: float | int = 1
    """What a sub-layer adds is multiplied by scale_depth / sqrt(num_hidden_layers)."""
    dim_model_base: int = 1
    """The head sees hidden states divided by hidden_size / dim_model_base."""
    router_aux_loss_coef: float = 1.0
    """Coefficient of the balance loss in training (the original program: 1, not in its config)."""
    output_router_logits: bool = False
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pretraining_tp: int | None = 1
    tie_word_embeddings: bool = True
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
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise UserError(
                f"num_experts_per_tok={self.num_experts_per_tok} but the model has "
                f"{self.num_experts} experts. Give 1 to {self.num_experts}."
            )


class MiniCPMRotaryEmbedding(LlamaRotaryEmbedding):
    """Cosines and sines in float32, whatever the model's dtype."""

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin [B, S, head_dim]; of `x` only the device counts."""
        cos_sin: tuple[torch.Tensor, torch.Tensor] = super().forward(
            x[..., :0].float(), position_ids, **kwargs
        )
        return cos_sin


class MiniCPMAttention(LlamaAttention):
    """LLaMA's attention with queries and keys rotated in float32."""

    def forward(  # type: ignore[override]  # its keyword arguments are a TypedDict
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return what the layer adds [B, S, D], and the attention weights where they are known."""
        assert position_embeddings is not None
        batch, length = hidden_states.shape[:2]
        query, key, value = (
            projection(hidden_states).view(batch, length, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        rotated = apply_rotary_pos_emb(query.float(), key.float(), *position_embeddings)
        query, key = (x.to(value.dtype) for x in rotated)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attended, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(attended.reshape(batch, length, -1)), weights


class MiniCPMDecoderLayer(MoEDecoderLayer):
    """LLaMA's layer with experts, what it adds being scaled by the model's depth."""

    def __init__(self, config: MiniCPMMoEConfig, layer_idx: int) -> None:
        super().__init__()
        like_llama: Any = config  # it has every field that LLaMA's own layers read
        self.self_attn = MiniCPMAttention(config=like_llama, layer_idx=layer_idx)
        self.mlp = MoEBlock(
            SoftmaxRouter(
                config.hidden_size,
                config.num_experts,
                config.num_experts_per_tok,
                renormalise=True,
            ),
            Experts(config, experts=config.num_experts, width=config.intermediate_size),
        )
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.residual_scale = config.scale_depth / config.num_hidden_layers**0.5


class MiniCPMPreTrainedModel(MoEPreTrainedModel):
    """What every MiniCPM-MoE class has."""

    config: MiniCPMMoEConfig
    config_class = MiniCPMMoEConfig
    _no_split_modules: ClassVar[list[str]] = ["MiniCPMDecoderLayer"]


class MiniCPMModel(MiniCPMPreTrainedModel, MoEDecoder):
    """The decoder without a head."""

    layer_class = MiniCPMDecoderLayer
    balance_form = "layer"
    balance_in_training = True

    def make_rotary(self, config: Any) -> nn.Module:
        """The rotary embedding in float32."""
        return MiniCPMRotaryEmbedding(config=config)

    def embed(self, input_ids: torch.Tensor | None) -> torch.Tensor:
        """Embeddings [B, S, D] of ids [B, S], scaled."""
        return super().embed(input_ids) * self.config.scale_emb


class MiniCPMForCausalLM(MiniCPMPreTrainedModel, MoEForCausalLM):
    """The language model."""

    model_class = MiniCPMModel

    def scale_hidden(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states divided by their width in units of the base model's."""
        return hidden / (self.config.hidden_size / self.config.dim_model_base)


class MiniCPMForSequenceClassification(MiniCPMPreTrainedModel):
    """Class scores of a sequence, read at its last token that is not padding."""

    def __init__(self, config: MiniCPMMoEConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels or 0
        self.model = MiniCPMModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Classify: logits [B, num_labels]; arguments not named are those of the decoder.

        `labels` [B] (int: cross entropy; float with one label: squared error) or [B, num_labels]
        (float). In training the balance loss is in the loss.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        last_B = last_tokens(
            input_ids, attention_mask, hidden, pad_token_id=self.config.pad_token_id
        )
        logits = self.score(hidden[torch.arange(len(hidden), device=hidden.device), last_B])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, pooled_logits=logits, config=self.config
            )
            loss = loss + weighted_balance(self.model, outputs.aux_loss).to(loss.device)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _is_released(config: Mapping[str, Any]) -> bool:
    """A MiniCPM class with experts, under no model_type or the dense models' one."""
    classes = config.get("architectures") or []
    return (
        config.get("model_type") in (None, "", "minicpm")
        and any(str(name).startswith("MiniCPM") for name in classes)
        and "num_experts" in config
    )


FAMILY = Family(
    config=MiniCPMMoEConfig,
    models={
        "AutoModel": MiniCPMModel,
        "AutoModelForCausalLM": MiniCPMForCausalLM,
        "AutoModelForSequenceClassification": MiniCPMForSequenceClassification,
    },
    recognises=_is_released,
    conversion=mixtral_layout,
    harmless=("rotary_emb.inv_freq",),
)
