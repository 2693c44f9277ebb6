"""Yuan2.0-M32 (arXiv 2405.17976): localized filtering before attention, routers that attend.

What differs from LLaMA: queries and keys (not values) come from a filter over the present and the
two previous inputs of the attention, which the cache keeps; the projection may be wider than the
hidden size, of which the first hidden_size / heads dimensions of each head are rotated, by angles
computed in bfloat16 (above 256, several positions share one); a head's query and key lie next to
each other in the joined outputs of q_proj and k_proj; every layer has experts, and their router is
an attention among the experts' scores; embeddings are tied unless the config says otherwise.

The original ignores attention masks, so its padding changes results. Here a mask [B, past + S] is
kept: padding is neither attended to nor filtered, and positions count from the first token, so that
a padded sequence gives what it gives alone. Without padding both are the same.

Tensor names, config fields and class names are those of the released checkpoints.

Notation: B batch, S sequence, T = B*S tokens, D hidden size, I expert width, E experts, K experts a
token, d head size, V vocabulary.
"""

# transformers' base classes, decorators and re-exports are untyped
# mypy: disable-error-code="no-untyped-call, untyped-decorator, attr-defined, misc"

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.core_model_loading import MergeModulelist, WeightConverter
from transformers.generation import GenerationMixin
from transformers.integrations.moe import use_experts_implementation
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GradientCheckpointingLayer,
)
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

from moesaic.core.errors import UserError
from moesaic.models.balance import balance_loss, share_of_step, valid_tokens
from moesaic.models.family import Family
from moesaic.models.pretrained import PreTrainedMoE

_REACH = 2
"""Inputs before the present one that reach the filter's output: its two convolutions' taps."""
_ROPE_BASE = 10000.0
_FILTER_EPS = 1e-6  # the filter's norm has its own, whatever config.rms_norm_eps says
_MOE = {
    "moe_num_experts": 32,
    "moe_top_k": 2,
    "norm_topk_prob": True,
    "gated_linear_unit": True,
    "ffn_hidden_size": 8192,
}


class YuanConfig(PreTrainedConfig):
    """Shape and routing of a Yuan2.0-M32 model, with the released configs' names.

    Other fields of released files (`use_flash_attention`, `use_moe`, ...) are kept and mean
    nothing here. Raises UserError for variants of the original code that no release uses.
    """

    model_type = "yuan"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 135040
    hidden_size: int = 2048
    intermediate_size: int = 8192
    """Of the dense layers of other Yuan models; the experts' width is in `moe_config`."""
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    attention_projection_size: int | None = None
    """Width of queries, keys and values over all heads; None: hidden_size."""
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    model_max_length: int = 8192
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = 77185
    bos_token_id: int | None = 77185
    eos_token_id: int | list[int] | None = 77185
    eod_token: int = 77185
    """The end of a document, for `reset_attention_mask`."""
    tie_word_embeddings: bool = True
    causal_mask: bool = True
    reset_position_ids: bool = True
    """The original's switch for masks made from `eod_token`; positions are never reset by it."""
    reset_attention_mask: bool = False
    """Hide a document's tokens from later documents (in training, or with `reset_position_ids`)."""
    use_loss_mask: bool = False

    moe_config: dict[str, Any] | None = None
    """moe_num_experts, moe_top_k, norm_topk_prob, gated_linear_unit, ffn_hidden_size."""
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.0
    """Weight of the balance loss (the original has none), added when `output_router_logits`."""

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("auto_map", None)
        self.moe_config = {**_MOE, **(self.moe_config or {})}
        super().__post_init__(**kwargs)
        for field, value, wanted in (
            ("causal_mask", self.causal_mask, True),
            ("use_loss_mask", self.use_loss_mask, False),
            ("use_shareqk", getattr(self, "use_shareqk", False), False),
            ("moe_config.gated_linear_unit", self.moe_config["gated_linear_unit"], True),
        ):
            if value != wanted:
                raise UserError(
                    f"{field}={value!r}: only {wanted!r} is supported, which is what Yuan2.0-M32 "
                    "has. Leave it out."
                )
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise UserError(
                f"moe_config.moe_top_k={self.num_experts_per_tok} but the model has "
                f"{self.num_experts} experts. Give 1 to {self.num_experts}."
            )
        heads, width = self.num_attention_heads, self.projection_size
        if width % heads or self.hidden_size % heads or width < self.hidden_size:
            raise UserError(
                f"attention_projection_size={width} and hidden_size={self.hidden_size} do not fit "
                f"{heads} heads. Both must be multiples of it, the first at least the second."
            )

    @property
    def projection_size(self) -> int:
        """Width of queries, keys and values over all heads."""
        return self.attention_projection_size or self.hidden_size

    @property
    def num_experts(self) -> int:
        """Experts of a layer (E)."""
        return int(self.moe_config["moe_num_experts"])  # type: ignore[index]

    @property
    def num_experts_per_tok(self) -> int:
        """Experts a token uses (K)."""
        return int(self.moe_config["moe_top_k"])  # type: ignore[index]

    @property
    def layer_types(self) -> list[str]:
        """What transformers' caches keep for each layer: keys, values and the filter's inputs."""
        return ["hybrid"] * self.num_hidden_layers


class LocalizedFiltering(nn.Module):
    """Two convolutions over time, each of the present and the previous step, around a residual.

    With c = conv1(x) and y = conv2(c), the result is norm(y + x). Before the sequence's start both
    x and c are zero, so that c there has no bias either.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(hidden_size, hidden_size // 2, (2, 1))
        self.conv2 = nn.Conv2d(hidden_size // 2, hidden_size, (2, 1))
        self.output_layernorm = LlamaRMSNorm(hidden_size, eps=_FILTER_EPS)

    def forward(
        self,
        x_BDS: torch.Tensor,
        past_BDR: torch.Tensor | None = None,
        real_BS: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Filter inputs [B, D, S], zero where they are padding; return [B, S, D].

        `past_BDR`: the two inputs before, if there are any. `real_BS`: False for padding; with
        a past, [B, 1 + S], beginning with the step before.
        """
        # with a past, conv1 gives the step before the first one too
        before = x_BDS.new_zeros(*x_BDS.shape[:2], 1) if past_BDR is None else past_BDR
        c_BCS = self.conv1(torch.cat([before, x_BDS], dim=-1).unsqueeze(-1))
        if real_BS is not None:
            c_BCS = c_BCS * real_BS[:, None, :, None].to(c_BCS)
        if past_BDR is None:
            c_BCS = F.pad(c_BCS, (0, 0, 1, 0))
        y_BDS = self.conv2(c_BCS).squeeze(-1)
        out_BSD: torch.Tensor = self.output_layernorm((y_BDS + x_BDS).transpose(1, 2))
        return out_BSD


def angles(
    position_ids: torch.Tensor, width: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin [B, 1, S, width] of positions [B, S], computed in bfloat16 throughout.

    The released model was trained so: a position above 256 is rounded to 8 bits, and so is the
    angle. Exact angles would be another model's.
    """
    even = torch.arange(0, width, 2, dtype=torch.float32, device=position_ids.device)
    frequency = (1.0 / _ROPE_BASE ** (even / width)).bfloat16()
    turns = position_ids[:, None, :, None].bfloat16() * frequency
    turns = torch.cat([turns, turns], dim=-1)
    return turns.cos().to(dtype), turns.sin().to(dtype)


def rotate(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate the first dimensions of [B, heads, S, d], as many as `angles` gave."""
    cos, sin = rotary
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return torch.cat([turned * cos + rotate_half(turned) * sin, rest], dim=-1)


class YuanAttention(nn.Module):
    """Causal attention whose queries and keys see filtered inputs."""

    def __init__(self, config: YuanConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.head_dim = config.projection_size // config.num_attention_heads
        self.num_key_value_groups = 1
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        hidden, width = config.hidden_size, config.projection_size
        self.lf_gate = LocalizedFiltering(hidden)
        self.q_proj = nn.Linear(hidden, width, bias=False)
        self.k_proj = nn.Linear(hidden, width, bias=False)
        self.v_proj = nn.Linear(hidden, width, bias=False)
        self.o_proj = nn.Linear(width, hidden, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        real_BS: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the output [B, S, D] and, where the implementation gives them, the weights."""
        filtered = self._filter(hidden_states, real_BS, past_key_values)
        rows = hidden_states.shape[:-1]
        # of 2A columns, head j has [2dj, 2dj + 2d): its query, then its key
        joined = torch.cat([self.q_proj(filtered), self.k_proj(filtered)], dim=-1)
        query, key = joined.view(*rows, self.num_heads, -1).transpose(1, 2).chunk(2, dim=-1)
        value = self.v_proj(hidden_states).view(*rows, self.num_heads, -1).transpose(1, 2)
        query, key = rotate(query, rotary), rotate(key, rotary)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attended, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(attended.reshape(*rows, -1)), weights

    def _filter(
        self, x_BSD: torch.Tensor, real_BS: torch.Tensor | None, cache: Cache | None
    ) -> torch.Tensor:
        """Filter the inputs behind those in the cache, and leave the last two there."""
        x_BDS = x_BSD.transpose(1, 2)
        if real_BS is not None:
            x_BDS = x_BDS * real_BS[:, None, -x_BSD.shape[1] :].to(x_BDS)
        past_BDR = None
        if cache is not None:
            started = cache.has_previous_state(self.layer_idx)
            held = cache.update_conv_state(x_BDS.detach(), self.layer_idx, conv_kernel_size=_REACH)
            past_BDR = held[..., -x_BDS.shape[-1] - _REACH : -x_BDS.shape[-1]] if started else None
        filtered: torch.Tensor = self.lf_gate(x_BDS, past_BDR, real_BS)
        return filtered


class ParallelAttentionRouter(nn.Module):
    """Choose experts by logits that the experts' scores form by attending to each other.

    With q, k, v the E scores that a token has under three matrices: logit_i = sum_j a_ij v_j, where
    a_i = softmax_j(q_i k_j).
    """

    is_moe_router: ClassVar[bool] = True

    def __init__(self, config: YuanConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.normalize = bool(config.moe_config["norm_topk_prob"])  # type: ignore[index]
        self.query = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.key = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.value = nn.Linear(config.hidden_size, config.num_experts, bias=False)

    def forward(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return logits_TE, weights_TK and ids_TK, the highest weight first; floats in float32."""
        # float32 from here: in bf16, ties among experts change the choice
        query_TE, key_TE = self.query(x_TD).float(), self.key(x_TD).float()
        value_TE = self.value(x_TD).float()
        mix_TEE = (query_TE[:, :, None] * key_TE[:, None, :]).softmax(dim=-1)
        logits_TE = (mix_TEE @ value_TE[:, :, None]).squeeze(-1)
        weights_TK, ids_TK = logits_TE.softmax(dim=-1).topk(self.top_k, dim=-1)
        if self.normalize:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        return logits_TE, weights_TK, ids_TK


@use_experts_implementation
class YuanExperts(nn.Module):
    """The experts of one layer: `gate_up_proj` [E, 2I, D] (w1), `down_proj` [E, D, I] (w2)."""

    def __init__(self, config: YuanConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = int(config.moe_config["ffn_hidden_size"])  # type: ignore[index]
        experts, hidden, width = self.num_experts, self.hidden_dim, self.intermediate_dim
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Run the experts one by one ("eager"): x_TD, ids_TK, weights_TK to out_TD."""
        # float32: two experts adding into one bf16 token lose bits
        out_TD = torch.zeros_like(hidden_states, dtype=torch.float32)
        for expert in top_k_index.unique().tolist():
            token_N, choice_N = torch.where(top_k_index == expert)
            gate_up = F.linear(hidden_states[token_N], self.gate_up_proj[expert])
            gate_NI, up_NI = gate_up.chunk(2, dim=-1)
            y_ND = F.linear(self.act_fn(gate_NI) * up_NI, self.down_proj[expert])
            weighted_ND = y_ND * top_k_weights[token_N, choice_N, None]
            out_TD = out_TD.index_add(0, token_N, weighted_ND.float())
        return out_TD.to(hidden_states.dtype)


class YuanMoeLayer(nn.Module):
    """The feed-forward part of a layer: router `gate` and `experts`."""

    def __init__(self, config: YuanConfig) -> None:
        super().__init__()
        self.gate = ParallelAttentionRouter(config)
        self.experts = YuanExperts(config)

    def forward(self, x_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the experts' sum and the router's logits_TE."""
        x_TD = x_BSD.flatten(0, -2)
        logits_TE, weights_TK, ids_TK = self.gate(x_TD)
        return self.experts(x_TD, ids_TK, weights_TK).view_as(x_BSD), logits_TE


class YuanDecoderLayer(GradientCheckpointingLayer):
    """Attention and experts, each after a norm and added to its input."""

    def __init__(self, config: YuanConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = YuanAttention(config, layer_idx)
        self.mlp = YuanMoeLayer(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, hidden_states: torch.Tensor, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return hidden states and router logits.

        As outputs, so that both kinds of gradient checkpointing carry the gradient of each.
        """
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        mixed, logits_TE = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + mixed, logits_TE


class YuanPreTrainedModel(PreTrainedMoE):
    """Loading and initialisation of every Yuan class."""

    config: YuanConfig
    config_class = YuanConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["YuanDecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "hidden_states": YuanDecoderLayer,
        "attentions": YuanAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, YuanExperts):
            for weight in (module.gate_up_proj, module.down_proj):
                init.normal_(weight, mean=0.0, std=self.config.initializer_range)
        else:
            super()._init_weights(module)


class YuanModel(YuanPreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: YuanConfig) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [YuanDecoderLayer(config, layer) for layer in range(config.num_hidden_layers)]
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
    ) -> MoeModelOutputWithPast:
        """Run the decoder on `input_ids` [B, S] or `inputs_embeds` [B, S, D], not both.

        `attention_mask` [B, past + S]: 1 for tokens, 0 for padding on either side. `position_ids`
        [B, S] default to each token's place among those that are not padding. `past_key_values`
        must be made from the config (`DynamicCache(config=model.config)`).
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("Give exactly one of input_ids and inputs_embeds.")
        if attention_mask is not None and attention_mask.dim() != 2:
            raise UserError(
                f"attention_mask has {attention_mask.dim()} dimensions. Give one of 2 [batch, past "
                "+ sequence]: the filter has to know which tokens are padding."
            )
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        length, device = inputs_embeds.shape[1], inputs_embeds.device
        seen = _seen(past_key_values)
        if attention_mask is not None and attention_mask.shape[1] != seen + length:
            raise UserError(
                f"attention_mask has {attention_mask.shape[1]} columns for {length} tokens after "
                f"{seen} in the cache. Give one column for each of the {seen + length}."
            )
        real_BS = None if attention_mask is None else attention_mask.to(device).bool()
        if position_ids is None and real_BS is not None:
            position_ids = (real_BS.cumsum(dim=-1) - 1).clamp_min(0)[:, -length:]
        elif position_ids is None:
            position_ids = (torch.arange(length, device=device) + seen).unsqueeze(0)
        if real_BS is not None:
            real_BS = real_BS[:, -length - (1 if seen else 0) :]
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            and_mask_function=self._same_document(input_ids, seen),
        )
        width = self.config.hidden_size // self.config.num_attention_heads
        rotary = angles(position_ids, width, inputs_embeds.dtype)

        hidden_states, router_logits = inputs_embeds, []
        for layer in self.layers:
            hidden_states, logits_TE = layer(
                hidden_states,
                rotary=rotary,
                attention_mask=causal_mask,
                real_BS=real_BS,
                past_key_values=past_key_values,
                **kwargs,
            )
            router_logits.append(logits_TE)
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        return MoeModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values,
            router_logits=tuple(router_logits) if output_router_logits else None,
        )

    def _same_document(
        self, input_ids: torch.Tensor | None, seen: int
    ) -> Callable[..., torch.Tensor] | None:
        """What `reset_attention_mask` adds to the causal mask: keys after the last end before."""
        config = self.config
        if not (config.reset_attention_mask and (self.training or config.reset_position_ids)):
            return None
        if input_ids is None or seen or "flash" in config._attn_implementation:
            raise UserError(
                "reset_attention_mask hides earlier documents, which takes all token ids at once "
                "and a mask. Give input_ids, use_cache=False and attn_implementation='sdpa'."
            )
        ends_BS = input_ids == config.eod_token
        document_BS = ends_BS.cumsum(dim=-1) - ends_BS.long()  # an end belongs to what it ends

        def same(batch: Any, head: Any, query: Any, key: Any) -> torch.Tensor:
            return document_BS[batch, query] == document_BS[batch, key]

        return same


def _seen(cache: Cache | None) -> int:
    """Tokens in the cache, which must be one that holds the filter's inputs."""
    if cache is None:
        return 0
    if not cache.layers or not all(hasattr(layer, "conv_states") for layer in cache.layers):
        raise UserError(
            "This cache has no room for the filter's inputs. Make it from the model's config: "
            "DynamicCache(config=model.config)."
        )
    return int(cache.get_seq_length())


class YuanForCausalLM(YuanPreTrainedModel, GenerationMixin):
    """The language model: next-token logits, generation, and a balance loss if asked for."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: YuanConfig) -> None:
        super().__init__(config)
        self.model = YuanModel(config)
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
    ) -> MoeCausalLMOutputWithPast:
        """Run the model; arguments not named here are those of `YuanModel.forward`.

        `labels` [B, S], -100 where there is no target, shifted inside. The loss is cross entropy,
        and with `output_router_logits` also router_aux_loss_coef * aux_loss, the balance loss.
        `logits_to_keep`: only the last n positions' logits (0: all), or the positions of an index
        tensor.
        """
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
        loss = aux_loss = None
        if outputs.router_logits:
            valid_T = valid_tokens(attention_mask, outputs.last_hidden_state)
            top_k = self.config.num_experts_per_tok
            aux_loss = balance_loss(outputs.router_logits, valid_T, top_k=top_k)
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
            if aux_loss is not None:
                share = share_of_step(labels, kwargs.get("num_items_in_batch"))
                routing = self.config.router_aux_loss_coef * aux_loss * share
                loss = loss + routing.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
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


class YuanForSequenceClassification(GenericForSequenceClassification, YuanPreTrainedModel):
    """Class scores of a sequence, read at its last token that is not `pad_token_id`."""


def released_layout() -> list[WeightConverter]:
    """How released files name the experts: `mlp.experts.{e}.{w1,w2}.weight`."""
    return [
        WeightConverter(
            f"mlp.experts.*.{released}.weight",
            f"mlp.experts.{ours}",
            operations=[MergeModulelist(dim=0)],
        )
        for released, ours in (("w1", "gate_up_proj"), ("w2", "down_proj"))
    ]


FAMILY = Family(
    config=YuanConfig,
    models={
        "AutoModel": YuanModel,
        "AutoModelForCausalLM": YuanForCausalLM,
        "AutoModelForSequenceClassification": YuanForSequenceClassification,
    },
    conversion=released_layout,
)
