"""OpenMoE (arXiv 2402.01739): experts in every n-th layer, with a capacity and a third sublayer.

What differs from LLaMA: every MLP is gated twice, down((a * silu(b)) * up(x)) with (a, b) the
halves of gate(x); attention scores are not scaled by 1/sqrt(head_dim); keys are cached before they
are rotated, and a key's angle follows from its place in the cache, whatever `position_ids` say; the
first place of the cache is visible to every query even when it is padding; an expert takes a
limited number of the tokens of the whole flattened batch, padding included, and a token beyond it
loses that choice. So results depend on the batch, and decoding with a cache, one token a step,
drops less than a full pass does.

Tensor names, config fields and class names are those of the released checkpoints.

Notation: B batch, S sequence, T = B*S tokens, D hidden size, I expert width, E experts, K = 2
experts a token, V vocabulary, P places in the cache, d head size.
"""

# transformers' base classes, decorators and re-exports are untyped
# mypy: disable-error-code="no-untyped-call, untyped-decorator, attr-defined, misc"

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
)
from transformers.generation import GenerationMixin
from transformers.integrations.moe import use_experts_implementation
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    eager_attention_forward,
    rotate_half,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from moesaic.core.errors import UserError, unknown
from moesaic.models.balance import balance_loss, router_z_loss, share_of_step, valid_tokens
from moesaic.models.family import Family
from moesaic.models.pretrained import PreTrainedMoE

LossReduction = Literal["mean", "original"]
_ROPE_BASE = 1e4  # fixed in the original, whatever config.rope_theta says


class HFOpenMoeConfig(PreTrainedConfig):
    """Shape and routing of an OpenMoE model, with the released configs' names.

    Other fields of released files (`dropout_rate`, `enable_kernel`, `load_balance_*`, ...) are kept
    and mean nothing, as in the original. Raises UserError for what the original cannot do either.
    """

    model_type = "openmoe"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "num_experts_per_tok": "router_topk",
        "router_aux_loss_coef": "router_aux_loss_factor",
    }

    vocab_size: int = 256384
    hidden_size: int = 2048
    intermediate_size: int = 8192
    """Width of one expert, of a dense MLP and of an extra MLP."""
    num_hidden_layers: int = 24
    num_attention_heads: int = 24
    num_key_value_heads: int | None = None
    head_dim: int = 128
    hidden_act: str = "swiglu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    tie_word_embeddings: bool = False

    num_experts: int = 32
    moe_layer_interval: int = 6
    """Layer i, from 0, has experts when (i + 1) is a multiple of this."""
    router_topk: int = 2
    router_capacity_factor_train: float = 1.25
    router_capacity_factor_eval: float = 2.0
    router_min_capacity: int = 4
    router_drop_tks: bool = True
    """Read by nothing, as in the original: tokens over capacity are always dropped."""
    router_noisy_policy: str | None = None
    router_aux_loss_factor: float = 0.01
    """Weight of the balance loss, in the loss when `output_router_logits`."""
    router_z_loss_factor: float = 1e-4
    """Weight of the routers' z-loss, in the loss when `output_router_logits`."""
    label_smoothing: float = 1e-3
    z_loss_factor: float = 0.01
    """Weight of log(Z)^2 of the vocabulary in the language loss."""
    loss_reduction: LossReduction = "mean"
    """"mean" over targets, or "original": their sum over a sequence, averaged over the batch."""
    output_router_logits: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("auto_map", None)
        kwargs.pop("rope_scaling", None)
        self.num_key_value_heads = self.key_value_heads
        super().__post_init__(**kwargs)
        for field, value, wanted in (
            ("router_topk", self.router_topk, 2),
            ("hidden_act", self.hidden_act, "swiglu"),
            ("router_noisy_policy", self.router_noisy_policy, None),
        ):
            if value != wanted:
                raise UserError(f"{field}={value!r}: OpenMoE has only {wanted!r}. Leave it out.")
        if self.loss_reduction not in ("mean", "original"):
            raise unknown("loss_reduction", str(self.loss_reduction), ("mean", "original"))
        if self.num_experts < 2:
            raise UserError(
                f"num_experts={self.num_experts} but a token uses 2. Give 2 or more experts."
            )
        if self.num_attention_heads % self.key_value_heads:
            raise UserError(
                f"{self.key_value_heads} key-value heads do not divide "
                f"{self.num_attention_heads} heads. Give num_key_value_heads that does."
            )

    @property
    def key_value_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_key_value_heads or self.num_attention_heads

    def has_experts(self, layer: int) -> bool:
        """Whether this layer, counted from 0, is an MoE layer."""
        return (layer + 1) % self.moe_layer_interval == 0

    def capacity(self, tokens: int, *, training: bool) -> int:
        """Tokens that an expert takes of a batch of `tokens`: even, and at least the minimum."""
        factor = self.router_capacity_factor_train if training else self.router_capacity_factor_eval
        capacity = math.floor(self.router_topk * factor * tokens / self.num_experts)
        return max(capacity + capacity % 2, self.router_min_capacity)


@dataclass
class OpenMoeModelOutput(MoeModelOutputWithPast):
    """Output of the decoder; `router_logits`, when asked for: [T, E] of each MoE layer."""


@dataclass
class OpenMoeCausalLMOutput(MoeCausalLMOutputWithPast):
    """Output of the language model: logits [B, S, V], in float32 when labels are given.

    loss = language loss + router_aux_loss_factor * aux_loss + router_z_loss_factor * router_z_loss;
    the last two are scalars, present with `output_router_logits`.
    """

    router_z_loss: torch.Tensor | None = None


class HFOpenMoeMLP(nn.Module):
    """A dense feed-forward layer: `gate_proj` gives both factors of the gate, [2I, D]."""

    def __init__(self, config: HFOpenMoeConfig) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(hidden, 2 * width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.gate_proj(x).chunk(2, dim=-1)
        out: torch.Tensor = self.down_proj(a * F.silu(b) * self.up_proj(x))
        return out


class HFOpenMoeTop2Router(nn.Module):
    """Choose two experts a token, first come first served up to each expert's capacity.

    All first choices of an expert come before its second choices; inside each, tokens come in the
    order of the flattened batch. Weights are probabilities over all experts, not renormalised, and
    zero where the choice was dropped.
    """

    is_moe_router: ClassVar[bool] = True

    def __init__(self, config: HFOpenMoeConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(
        self, x_TD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return logits_TE (float32), weights_TK, ids_TK and kept_TK (bool)."""
        # float32 whatever the model's dtype: in bf16, ties among experts change the choice
        logits_TE = F.linear(x_TD.float(), self.weight.float())
        probs_TE = logits_TE.softmax(dim=-1)
        first_T = probs_TE.argmax(dim=-1)
        others_TE = probs_TE.detach().scatter(1, first_T[:, None], -torch.inf)
        ids_TK = torch.stack([first_T, others_TE.argmax(dim=-1)], dim=1)
        capacity = self.config.capacity(len(x_TD), training=self.training)
        kept_TK = self._places(ids_TK) < capacity
        return logits_TE, probs_TE.gather(1, ids_TK) * kept_TK, ids_TK, kept_TK

    def _places(self, ids_TK: torch.Tensor) -> torch.Tensor:
        """Place of every choice in its expert's queue, from 0."""
        queue_N = ids_TK.T.reshape(-1)  # every first choice, then every second
        place_NE = F.one_hot(queue_N, self.config.num_experts).cumsum(dim=0)
        return place_NE.gather(1, queue_N[:, None]).view(2, -1).T - 1


@use_experts_implementation
class HFOpenMoeExperts(nn.Module):
    """The experts of one layer: `gate_up_proj` [E, 3I, D] (a, b, up rows), `down_proj` [E, D, I].

    Every implementation that asks the module for its gating computes them; kernels for plain
    SwiGLU pass them on to one that does.
    """

    def __init__(self, config: HFOpenMoeConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.hidden_dim, self.intermediate_dim = config.hidden_size, config.intermediate_size
        experts, hidden, width = self.num_experts, self.hidden_dim, self.intermediate_dim
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 3 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))
        self.act_fn = nn.SiLU()

    def _apply_gate(self, gate_up_out: torch.Tensor) -> torch.Tensor:
        a, b, up = gate_up_out.chunk(3, dim=-1)
        return a * self.act_fn(b) * up

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Run the experts one by one ("eager"): x_TD, ids_TK, weights_TK to out_TD."""
        # float32: two experts adding into one bf16 token lose bits
        out_TD = torch.zeros_like(hidden_states, dtype=torch.float32)
        for expert in top_k_index.unique().tolist():
            token_N, choice_N = torch.where(top_k_index == expert)
            gated_NI = self._apply_gate(F.linear(hidden_states[token_N], self.gate_up_proj[expert]))
            y_ND = F.linear(gated_NI, self.down_proj[expert])
            weighted_ND = y_ND * top_k_weights[token_N, choice_N, None]
            out_TD = out_TD.index_add(0, token_N, weighted_ND.float())
        return out_TD.to(hidden_states.dtype)


class HFOpenMoeSparseMLP(nn.Module):
    """The feed-forward part of an MoE layer: router `gate` and `experts`."""

    def __init__(self, config: HFOpenMoeConfig) -> None:
        super().__init__()
        self.gate = HFOpenMoeTop2Router(config)
        self.experts = HFOpenMoeExperts(config)

    def forward(self, x_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the experts' sum and the router's logits_TE."""
        x_TD = x_BSD.flatten(0, -2)
        logits_TE, weights_TK, ids_TK, _ = self.gate(x_TD)
        # a dropped choice is computed with weight 0: exact, and every implementation can do it
        return self.experts(x_TD, ids_TK, weights_TK).view_as(x_BSD), logits_TE


def angles(places: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin [places, d] in float32, both halves of d alike."""
    even = torch.arange(0, head_dim, 2, dtype=torch.float32, device=places.device)
    turns = places.float()[:, None] * (1.0 / _ROPE_BASE ** (even / head_dim))
    turns = torch.cat([turns, turns], dim=-1)
    return turns.cos(), turns.sin()


def rotate(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate [B, heads, places, d] by `angles` of the places."""
    cos, sin = (part.to(x) for part in rotary)
    turned: torch.Tensor = x * cos + rotate_half(x) * sin
    return turned


class HFOpenMoeAttention(nn.Module):
    """Causal attention with unscaled scores; the cache holds keys before rotation."""

    def __init__(self, config: HFOpenMoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.key_value_heads
        self.is_causal = True
        hidden, queries = config.hidden_size, config.num_attention_heads * config.head_dim
        keys = config.key_value_heads * config.head_dim
        self.q_proj = nn.Linear(hidden, queries, bias=False)
        self.k_proj = nn.Linear(hidden, keys, bias=False)
        self.v_proj = nn.Linear(hidden, keys, bias=False)
        self.o_proj = nn.Linear(queries, hidden, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        query_rotary: tuple[torch.Tensor, torch.Tensor],
        key_rotary: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the output [B, S, D] and, where the implementation gives them, the weights."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attended, weights = attend(
            self,
            rotate(query, query_rotary),
            rotate(key, key_rotary),
            value,
            attention_mask,
            dropout=0.0,
            scaling=1.0,
            **kwargs,
        )
        return self.o_proj(attended.reshape(*hidden_states.shape[:-1], -1)), weights


class HFOpenMoeDecoderLayer(GradientCheckpointingLayer):
    """Attention, then an MLP or experts, then, after experts, an extra MLP; a norm before each."""

    def __init__(self, config: HFOpenMoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.moe = config.has_experts(layer_idx)
        self.self_attn = HFOpenMoeAttention(config, layer_idx)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = HFOpenMoeSparseMLP(config) if self.moe else HFOpenMoeMLP(config)
        if self.moe:
            self.pre_extra_mlp_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.extra_mlp = HFOpenMoeMLP(config)

    def forward(
        self, hidden_states: torch.Tensor, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return hidden states and router logits (None in a dense layer).

        As outputs, so that both kinds of gradient checkpointing carry the gradient of each.
        """
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        x_BSD = self.post_attention_layernorm(hidden_states)
        if not self.moe:
            return hidden_states + self.mlp(x_BSD), None
        mixed, logits_TE = self.mlp(x_BSD)
        hidden_states = hidden_states + mixed
        extra = self.extra_mlp(self.pre_extra_mlp_layernorm(hidden_states))
        return hidden_states + extra, logits_TE


class HFOpenMoePreTrainedModel(PreTrainedMoE):
    """Loading and initialisation of every OpenMoE class."""

    config: HFOpenMoeConfig
    config_class = HFOpenMoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["HFOpenMoeDecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "hidden_states": HFOpenMoeDecoderLayer,
        "attentions": HFOpenMoeAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, HFOpenMoeExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, HFOpenMoeTop2Router):
            init.normal_(module.weight, mean=0.0, std=std)
        else:
            super()._init_weights(module)


class HFOpenMoeModel(HFOpenMoePreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: HFOpenMoeConfig) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [HFOpenMoeDecoderLayer(config, layer) for layer in range(config.num_hidden_layers)]
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> OpenMoeModelOutput:
        """Run the decoder on `input_ids` [B, S] or `inputs_embeds` [B, S, D], not both.

        `attention_mask` [B, past + S]: 1 for tokens, 0 for padding on either side; padding is
        routed and counts in capacity. (A prepared 4-D mask is used as it is.) `position_ids` are
        taken and ignored, as in the original: positions are places in the cache.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        length, device = inputs_embeds.shape[1], inputs_embeds.device
        seen, places = 0, length
        if past_key_values is not None:
            seen = past_key_values.get_seq_length()
            places, _ = past_key_values.get_mask_sizes(length, 0)
        if attention_mask is not None and attention_mask.dim() == 2:
            # the first place is visible to every query, padding or not
            attention_mask = F.pad(attention_mask[:, 1:], (1, 0), value=1)
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
        )
        query_rotary = angles(torch.arange(length, device=device) + seen, self.config.head_dim)
        key_rotary = angles(torch.arange(places, device=device), self.config.head_dim)

        hidden_states, router_logits = inputs_embeds, []
        for layer in self.layers:
            hidden_states, logits_TE = layer(
                hidden_states,
                query_rotary=query_rotary,
                key_rotary=key_rotary,
                attention_mask=causal_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
            if logits_TE is not None:
                router_logits.append(logits_TE)
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        return OpenMoeModelOutput(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values,
            router_logits=tuple(router_logits) if output_router_logits else None,
        )


def smoothed_cross_entropy(
    logits_BSV: torch.Tensor, targets_BS: torch.Tensor, *, smoothing: float, z_factor: float
) -> torch.Tensor:
    """Return each target's loss [B, S]: smoothed cross entropy plus z_factor * log(Z)^2.

    The target has 1 - smoothing and the V - 1 others share the rest; the entropy of that
    distribution is subtracted, so the best cross entropy is 0. The original means this and computes
    another thing: its smoothed targets are made of booleans and come out as 1 everywhere.
    """
    vocab = logits_BSV.shape[-1]
    right, wrong = 1.0 - smoothing, smoothing / (vocab - 1)
    log_z_BS = logits_BSV.logsumexp(dim=-1)
    target_BS = logits_BSV.gather(-1, targets_BS.unsqueeze(-1)).squeeze(-1)
    # sum of target distribution times logits, without building the distribution
    expected_BS = (right - wrong) * target_BS + wrong * logits_BSV.sum(dim=-1)
    entropy = -sum(n * p * math.log(p) for n, p in ((1, right), (vocab - 1, wrong)) if p > 0)
    return log_z_BS - expected_BS - entropy + z_factor * log_z_BS.square()


class HFOpenMoeForCausalLM(HFOpenMoePreTrainedModel, GenerationMixin):
    """The language model: next-token logits, generation and the training loss."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: HFOpenMoeConfig) -> None:
        super().__init__(config)
        self.model = HFOpenMoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
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
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> OpenMoeCausalLMOutput:
        """Run the model; arguments not named here are those of `HFOpenMoeModel.forward`.

        `labels` [B, S], -100 where there is no target, shifted inside. The loss is
        `smoothed_cross_entropy`, reduced as `config.loss_reduction` says (with
        `num_items_in_batch`, the sum over that many targets), and with `output_router_logits` the
        balance loss and the routers' z-loss by their factors. `logits_to_keep`: only the last n
        positions' logits (0: all), or the positions of an index tensor.
        """
        items = kwargs.pop("num_items_in_batch", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = aux_loss = z_loss = None
        if outputs.router_logits:
            valid_T = valid_tokens(attention_mask, outputs.last_hidden_state)
            aux_loss = balance_loss(outputs.router_logits, valid_T, top_k=self.config.router_topk)
            z_loss = router_z_loss(outputs.router_logits, valid_T)
        if labels is not None:
            logits = logits.float()
            loss, share = self._language_loss(logits, labels, items)
            if aux_loss is not None and z_loss is not None:
                routing = self.config.router_aux_loss_factor * aux_loss
                routing = routing + self.config.router_z_loss_factor * z_loss
                loss = loss + (routing * share).to(loss.device)
        return OpenMoeCausalLMOutput(
            loss=loss,
            aux_loss=aux_loss,
            router_z_loss=z_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As transformers does; without router logits, which generation reads only if asked to."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)
        inputs.setdefault("output_router_logits", False)
        return inputs

    @staticmethod
    def create_masks_for_generate(
        *, attention_mask: torch.Tensor | None = None, **_: Any
    ) -> torch.Tensor | None:
        """Leave the mask as it is: transformers would make it 4-D for static caches."""
        return attention_mask

    def _language_loss(
        self, logits: torch.Tensor, labels: torch.Tensor, items: int | torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Return the reduced loss, and this call's share of the optimizer step's targets."""
        targets_BS = labels[:, 1:].to(logits.device)
        here_BS = targets_BS != -100
        losses_BS = smoothed_cross_entropy(
            logits[:, :-1],
            targets_BS.clamp_min(0),
            smoothing=self.config.label_smoothing,
            z_factor=self.config.z_loss_factor,
        )
        total = torch.where(here_BS, losses_BS, 0.0).sum()
        if items is not None:
            items = items.to(logits.device) if isinstance(items, torch.Tensor) else items
            return total / items, share_of_step(labels, items)
        if self.config.loss_reduction == "original":
            return total / len(labels), 1.0
        return total / here_BS.sum(), 1.0


class JoinGateAndUp(Concatenate):
    """Join stacked gate rows [E, 2I, D] and up rows [E, I, D] to [E, 3I, D]."""

    @property
    def reverse_op(self) -> ConversionOps:
        return CutGateAndUp()


class CutGateAndUp(ConversionOps):
    """Cut [E, 3I, D] into the gate's two thirds and the up projection's third."""

    @torch.no_grad()
    def convert(  # type: ignore[override]  # as transformers' own operations do
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **_: Any,
    ) -> dict[str, torch.Tensor]:
        """Take {source: [the parameter]}; return {gate's name: tensor, up's name: tensor}."""
        (tensors,) = input_dict.values()
        joined = tensors[0] if isinstance(tensors, list) else tensors
        width = joined.shape[1] // 3
        parts = joined.split([2 * width, width], dim=1)
        return {name: part.contiguous() for name, part in zip(target_patterns, parts, strict=True)}

    @property
    def reverse_op(self) -> ConversionOps:
        return JoinGateAndUp(dim=1)


def released_layout() -> list[WeightConverter]:
    """How released files name the experts: `mlp.experts.{e}.{gate,up,down}_proj.weight`."""
    return [
        WeightConverter(
            ["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            "mlp.experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), JoinGateAndUp(dim=1)],
        ),
        WeightConverter(
            "mlp.experts.*.down_proj.weight",
            "mlp.experts.down_proj",
            operations=[MergeModulelist(dim=0)],
        ),
    ]


FAMILY = Family(
    config=HFOpenMoeConfig,
    models={"AutoModel": HFOpenMoeModel, "AutoModelForCausalLM": HFOpenMoeForCausalLM},
    conversion=released_layout,
)
