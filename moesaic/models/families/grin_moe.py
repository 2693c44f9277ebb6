"""GRIN-MoE (arXiv 2409.12136): two experts a token, chosen and trained by SparseMixer-v2.

Phi-3.5-MoE's shape (LLaMA's attention with biases, LayerNorms, a head with a bias) with plain
rotary embeddings and a sliding window. `sliding_window` w lets a query see w + 1 keys: itself and w
before it, as the original program does; transformers' own masks and caches count w in all, so the
mask is made here and the cache keeps every key. Tensor names are the released ones.
"""

# transformers' base classes are untyped
# mypy: disable-error-code="misc"

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import create_causal_mask, sliding_window_overlay
from transformers.models.llama.modeling_llama import LlamaAttention

from moesaic.core.errors import UserError
from moesaic.models.decoder import (
    Experts,
    MoEDecoder,
    MoEDecoderLayer,
    MoEForCausalLM,
    MoEPreTrainedModel,
    Router,
    routed,
)
from moesaic.models.family import Family
from moesaic.models.layouts import mixtral_layout


class GRINMoEConfig(PreTrainedConfig):
    """Shape and routing of a GRIN-MoE, with the released config's names.

    LLaMA's fields mean what they mean in `transformers.LlamaConfig`; `intermediate_size` is the
    width of one expert and `rms_norm_eps` the LayerNorms' epsilon. `hidden_dropout` is stored and,
    as in the original program, not used.

    Raises UserError (a ValueError) for sizes that do not fit together and for more or fewer than
    two experts a token, which SparseMixer does not know.
    """

    model_type = "grinmoe"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "aux_loss"]
    attribute_map: ClassVar[dict[str, str]] = {"num_experts": "num_local_experts"}

    vocab_size: int = 32064
    hidden_size: int = 4096
    intermediate_size: int = 6400
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 8
    head_dim: int | None = None
    num_local_experts: int = 16
    num_experts_per_tok: int = 2
    router_jitter_noise: float | int = 0.01
    """An expert takes part in the softmax if its logit is within twice this share of the best."""
    input_jitter_noise: float | int = 0.0
    """In training, a routed layer's input is multiplied by U(1 - this, 1 + this)."""
    router_aux_loss_coef: float = 0.0
    """Coefficient of the balance loss, which is in the loss when router logits are asked for."""
    output_router_logits: bool = False
    sliding_window: int | None = None
    """Keys before its own position that a query sees; None: all."""
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    lm_head_bias: bool = False
    attention_dropout: float | int | None = 0.0
    hidden_dropout: float | int | None = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("auto_map", None)
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)
        if self.num_experts_per_tok != 2:
            raise UserError(
                f"num_experts_per_tok={self.num_experts_per_tok}: SparseMixer chooses 2 experts."
            )
        if self.num_local_experts < 2:
            raise UserError(f"num_local_experts={self.num_local_experts}: give at least 2.")

    @property
    def layer_types(self) -> list[str]:
        """What a cache keeps of each layer: all keys (see the module's docstring)."""
        return ["full_attention"] * self.num_hidden_layers

    @property
    def visible_keys(self) -> int | None:
        """Keys that a query sees at most, its own included."""
        return None if self.sliding_window is None else self.sliding_window + 1


def sparsemixer(
    logits_TE: torch.Tensor, *, jitter: float, training: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose two experts a token: weights and ids [T, 2] (SparseMixer-v2, section 2).

    First choice: over the experts whose logit s is near the best one m, in that
    (m - s) / max(|s|, m) <= 2 * jitter, a softmax; in eval mode the best expert, in training one
    drawn from it (Gumbel). The weight is its probability. Second choice: the same without the
    first. The two weights are independent and do not sum to 1.

    In training a weight is cut to a third, in value and not in gradient, for three quarters of the
    draws that are not the most likely expert (Heun's third-order rule); the gradient is that of the
    probability.
    """
    best_T2, ids_T2 = [], []
    allowed_TE = logits_TE
    for _ in range(2):
        weight_T1, id_T1 = _choose_one(logits_TE, allowed_TE, jitter=jitter, training=training)
        best_T2.append(weight_T1)
        ids_T2.append(id_T1)
        allowed_TE = allowed_TE.scatter(1, id_T1, float("-inf"))
    return torch.cat(best_T2, dim=1), torch.cat(ids_T2, dim=1)


def _choose_one(
    logits_TE: torch.Tensor, allowed_TE: torch.Tensor, *, jitter: float, training: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """One choice among the `allowed` logits (-inf elsewhere): weight and id [T, 1]."""
    with torch.no_grad():
        best_T1, id_T1 = allowed_TE.max(dim=1, keepdim=True)
        far_TE = (best_T1 - logits_TE) / logits_TE.abs().clamp(min=best_T1) > 2 * jitter
    near_TE = allowed_TE.masked_fill(far_TE, float("-inf"))
    probs_TE = near_TE.softmax(dim=1)
    if not training:
        return probs_TE.gather(1, id_T1), id_T1
    with torch.no_grad():
        gumbel_TE = -torch.empty_like(near_TE).exponential_().log()
        drawn_T1 = (near_TE + gumbel_TE).argmax(dim=1, keepdim=True)
        likeliest_T1 = probs_TE.argmax(dim=1, keepdim=True)
        whole_T1 = (drawn_T1 == likeliest_T1) | (torch.rand_like(best_T1) > 0.75)
    prob_T1 = probs_TE.gather(1, drawn_T1)
    cut_T1 = torch.where(whole_T1, 0.0, prob_T1.detach() * (2 / 3))
    return prob_T1 - cut_T1, drawn_T1


class GRINMoERouter(Router):
    """A linear router whose two experts SparseMixer chooses, in float32."""

    def __init__(self, config: GRINMoEConfig) -> None:
        super().__init__(config.hidden_size, config.num_local_experts, 2)
        self.jitter = config.router_jitter_noise

    def choose(self, logits_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The first choice first; drawn in training."""
        return sparsemixer(logits_TE.float(), jitter=self.jitter, training=self.training)


class GRINMoEBlock(nn.Module):
    """`gate` chooses two experts; in training the input is jittered."""

    def __init__(self, config: GRINMoEConfig) -> None:
        super().__init__()
        self.gate = GRINMoERouter(config)
        self.experts = Experts(
            config, experts=config.num_local_experts, width=config.intermediate_size
        )
        self.input_jitter = config.input_jitter_noise

    def forward(self, x_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Route and compute: see `decoder.routed`."""
        if self.training and self.input_jitter > 0:
            low, high = 1 - self.input_jitter, 1 + self.input_jitter
            x_BSD = x_BSD * torch.empty_like(x_BSD).uniform_(low, high)
        return routed(x_BSD, self.gate, self.experts)


class GRINMoEDecoderLayer(MoEDecoderLayer):
    """LLaMA's attention and a routed layer, each after a LayerNorm."""

    def __init__(self, config: GRINMoEConfig, layer_idx: int) -> None:
        super().__init__()
        like_llama: Any = config  # it has every field that LLaMA's own layers read
        self.self_attn = LlamaAttention(config=like_llama, layer_idx=layer_idx)
        self.block_sparse_moe = GRINMoEBlock(config)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.visible_keys = config.visible_keys

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, **kwargs: Any
    ) -> tuple[torch.Tensor | None, ...]:
        """As `MoEDecoderLayer`; the window is for attention that makes its own mask (flash)."""
        return super().forward(hidden_states, sliding_window=self.visible_keys, **kwargs)

    def feed_forward(self, x_BSD: torch.Tensor) -> Any:
        """The routed layer, under its released name."""
        return self.block_sparse_moe(x_BSD)


def windowed_mask(**given: Any) -> Any:
    """Make the causal mask with `config.visible_keys`; arguments of `create_causal_mask`."""
    window = given["config"].visible_keys
    if window is None:
        return create_causal_mask(**given)
    past = given.get("past_key_values")
    seen = 0 if past is None else past.get_seq_length()
    if isinstance(seen, int) and seen + given["inputs_embeds"].shape[1] <= window:
        return create_causal_mask(**given)  # nothing is out of sight: attention may take a shortcut
    return create_causal_mask(**given, and_mask_function=sliding_window_overlay(window))


class GRINMoEPreTrainedModel(MoEPreTrainedModel):
    """What every GRIN-MoE class has."""

    config: GRINMoEConfig
    config_class = GRINMoEConfig
    _no_split_modules: ClassVar[list[str]] = ["GRINMoEDecoderLayer"]

    @staticmethod
    def create_masks_for_generate(
        config: GRINMoEConfig,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Any,
        position_ids: torch.Tensor | None = None,
        **_: Any,
    ) -> Any:
        """The mask that `generate` makes ahead for a static cache."""
        return windowed_mask(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )


class GRINMoEModel(GRINMoEPreTrainedModel, MoEDecoder):
    """The decoder without a head."""

    layer_class = GRINMoEDecoderLayer

    def make_norm(self, config: Any) -> nn.Module:
        """The last norm."""
        return nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps)

    @staticmethod
    def causal_mask(**given: Any) -> Any:
        """The attention mask with the window."""
        return windowed_mask(**given)


class GRINMoEForCausalLM(GRINMoEPreTrainedModel, MoEForCausalLM):
    """The language model."""

    model_class = GRINMoEModel

    def make_head(self, config: Any) -> nn.Linear:
        """The output projection."""
        return nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)


def _layout() -> list[Any]:
    return mixtral_layout("block_sparse_moe")


def _is_released(config: Mapping[str, Any]) -> bool:
    """The class name "GRIN-MoE", under whatever model_type."""
    return (config.get("architectures") or [None])[0] == "GRIN-MoE"


FAMILY = Family(
    config=GRINMoEConfig,
    models={"AutoModel": GRINMoEModel, "AutoModelForCausalLM": GRINMoEForCausalLM},
    recognises=_is_released,
    conversion=_layout,
    harmless=("rotary_emb.inv_freq",),
)
