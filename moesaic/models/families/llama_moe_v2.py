"""LLaMA-MoE-v2: a LLaMA whose feed-forward layers, and if wanted attention, are experts.

Source: arXiv 2411.15708 and the original program. Routed outputs are multiplied by `scale_factor`;
a residual model adds an MLP that every token visits; the first and last layers may stay dense
(contract layers); attention experts are in `moesaic.models.attention_moe`. Released files call
themselves mixtral and lack nothing a Mixtral has, so they are known by the fields that a Mixtral
has not (`recognises`); what is saved says llama_moe_v2.

Notation: B batch, S sequence, T = B*S tokens, D hidden size, I expert width, E experts, K experts a
token, L layers, V vocabulary.
"""

# transformers' base classes, decorators and re-exports are untyped
# mypy: disable-error-code="no-untyped-call, untyped-decorator, attr-defined, misc"

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.core_model_loading import ConversionOps, MergeModulelist, WeightConverter
from transformers.generation import GenerationMixin
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.utils import ModelOutput, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from moesaic.core.errors import UserError, unknown
from moesaic.models.attention_moe import (
    AttentionExperts,
    ExpertAttention,
    SoftmaxRouter,
    prepare_cache,
)
from moesaic.models.family import Family

DEFAULT_EXPERTS = "moesaic"
"""The experts implementation unless another is asked for: it takes every expert width."""
BALANCE_LOSSES = ("switch", "constant-original")
MARKS = (
    "scale_factor",
    "moe_type",
    "num_moe_contract_layers",
    "use_attn_moe",
    "intermediate_size_residual",
    "add_rescale_bias",
)
"""Fields of the released configs that a Mixtral has not."""
LAYOUTS = ("modulelist", "megablocks", "scattermoe")


class LlamaMoEV2Config(PreTrainedConfig):
    """Shape and routing of a LLaMA-MoE-v2 model, with the original's names and defaults.

    LLaMA's fields mean what they mean in `transformers.LlamaConfig`; like the original there are no
    biases in attention and MLP but those of `add_rescale_bias`. A sliding window of 4096 and a
    rope_theta of 1e6 are the original's defaults: write `sliding_window=None` for a LLaMA that has
    none. Raises UserError (a ValueError) for sizes that do not fit together.
    """

    model_type = "llama_moe_v2"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "past_key_values",
        "aux_loss",
        "attn_aux_loss",
    ]
    attribute_map: ClassVar[dict[str, str]] = {"num_experts": "num_local_experts"}
    default_theta = 1000000.0

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    """Width of one routed expert."""
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 8
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 131072
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    attention_dropout: float | int | None = 0.0
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = 4096
    """Keys that a query sees; at attention experts, keys of its expert."""

    num_local_experts: int = 8
    """Routed experts of a layer (E)."""
    num_experts_per_tok: int = 2
    """Routed experts a token uses (K)."""
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.001
    intermediate_size_residual: int | None = None
    """Width of the MLP that every token visits; None: there is none."""
    scale_factor: float | int | None = 1.0
    """Factor on every routed expert's output, whose weights sum to 1."""
    moe_type: str = "modulelist"
    """How files name the experts; other layouts are read and written as modulelist."""
    num_moe_contract_layers: int = 0
    """How many of the first, and of the last, layers have a dense MLP."""
    intermediate_size_dense: int | None = None
    """Width of those dense MLPs (our own field); None: num_local_experts * intermediate_size."""
    use_attn_moe: bool = False
    top_k_attn: int | None = None
    """Attention experts a token uses."""
    attn_experts: int | None = None
    """Attention experts: a multiple of num_key_value_heads that divides num_attention_heads; None:
    num_key_value_heads."""
    scale_factor_attn: float | int | None = None
    """Factor on every attention expert's output; None: 1."""
    use_layer_wise_balance: bool = False
    """Balance every layer by itself; otherwise only the sum over layers is balanced."""
    add_rescale_bias: bool = False
    """Biases on the outputs of routed and attention experts."""
    balance_loss: str = "switch"
    """"switch": E * sum over experts of share of choices * mean probability, 1 when balanced.
    "constant-original": E / K, whatever the routing, as the original program computes it."""

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("auto_map", None)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.use_attn_moe and self.attn_experts is None:
            self.attn_experts = self.num_key_value_heads
        super().__post_init__(**kwargs)
        self._check()

    def _check(self) -> None:
        if self.moe_type not in LAYOUTS:
            raise unknown("moe_type", str(self.moe_type), LAYOUTS)
        if self.balance_loss not in BALANCE_LOSSES:
            raise unknown("balance_loss", str(self.balance_loss), BALANCE_LOSSES)
        _check_top_k("num_experts_per_tok", self.num_experts_per_tok, self.num_local_experts)
        if not 0 <= self.num_moe_contract_layers <= self.num_hidden_layers:
            raise UserError(
                f"num_moe_contract_layers={self.num_moe_contract_layers} but the model has "
                f"{self.num_hidden_layers} layers. Give 0 (all layers have experts) to "
                f"{self.num_hidden_layers // 2}."
            )
        if self.attention_bias or self.mlp_bias:
            raise UserError(
                "attention_bias and mlp_bias: LLaMA-MoE-v2 has no such biases. Use a model without "
                "them."
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise UserError(
                f"sliding_window={self.sliding_window}. Give the number of keys that a query sees, "
                "or null for all."
            )
        if self.use_attn_moe:
            self._check_attention()

    def _check_attention(self) -> None:
        experts, heads, kv = self.attn_experts, self.num_attention_heads, self.num_key_value_heads
        if not experts or experts % kv or heads % experts:
            raise UserError(
                f"attn_experts={experts} does not fit {heads} heads and {kv} key/value heads. Give "
                f"a multiple of {kv} that divides {heads}."
            )
        if self.top_k_attn is None:
            raise UserError(f"use_attn_moe is on but top_k_attn is not given. Give 1 to {experts}.")
        _check_top_k("top_k_attn", self.top_k_attn, experts)

    def is_moe(self, layer: int) -> bool:
        """Whether a layer's MLP is made of experts."""
        contract = self.num_moe_contract_layers
        return contract <= layer < self.num_hidden_layers - contract

    @property
    def dense_width(self) -> int:
        """Width of the MLP of a contract layer."""
        if self.intermediate_size_dense is not None:
            return self.intermediate_size_dense
        return self.intermediate_size * self.num_local_experts


def _check_top_k(field: str, top_k: int, experts: int) -> None:
    if not 1 <= top_k <= experts:
        raise UserError(
            f"{field}={top_k} but the model has {experts} experts. Give 1 to {experts}."
        )


def recognises(config: Mapping[str, Any]) -> bool:
    """Whether a config.json that says mixtral is a LLaMA-MoE-v2."""
    return config.get("model_type") == "mixtral" and any(key in config for key in MARKS)


def read(config: Mapping[str, Any]) -> dict[str, Any]:
    """Turn an original config.json into arguments of LlamaMoEV2Config.

    What the original program ignores is dropped: RoPE scaling, a head size of its own, biases; and
    `scale_factor` where moe_type is not modulelist.
    """
    ignored = ("auto_map", "rope_scaling", "head_dim", "attention_bias", "mlp_bias")
    fields = {key: value for key, value in config.items() if key not in ignored}
    if fields.get("moe_type", "modulelist") in LAYOUTS[1:]:
        fields |= {"moe_type": "modulelist", "scale_factor": 1.0}
    return fields


@dataclass
class LlamaMoEV2ModelOutput(ModelOutput):
    """Output of the model without a head.

    `router_logits` and `attn_router_logits`, when asked for: a tuple over the L layers of [T, E],
    None for layers without such a router.
    """

    last_hidden_state: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    router_logits: tuple[torch.Tensor | None, ...] | None = None
    attn_router_logits: tuple[torch.Tensor | None, ...] | None = None


@dataclass
class LlamaMoEV2CausalLMOutput(LlamaMoEV2ModelOutput):
    """Output of the language model: logits [B, S, V].

    `aux_loss` and `attn_aux_loss` (scalars, before router_aux_loss_coef) are the balance losses of
    the MLPs' and the attention's routers, there when router logits are asked for.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    attn_aux_loss: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None


@dataclass
class LlamaMoEV2SequenceClassifierOutput(LlamaMoEV2CausalLMOutput):
    """Output of the classifier: logits [B, num_labels]."""


@dataclass
class LlamaMoEV2QuestionAnsweringOutput(LlamaMoEV2ModelOutput):
    """Output of the span head: logits [B, S] twice."""

    loss: torch.Tensor | None = None
    start_logits: torch.Tensor | None = None
    end_logits: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    attn_aux_loss: torch.Tensor | None = None


@use_experts_implementation
class LlamaMoEV2Experts(nn.Module):
    """The routed experts of a layer: `gate_up_proj` [E, 2I, D] (gate first), `down_proj` [E, D, I].

    `output_bias` [E, D], where asked for, belongs to each expert's output and is added by the block
    with the routing weights, so that every implementation takes these experts.
    """

    def __init__(self, config: LlamaMoEV2Config) -> None:
        super().__init__()
        self.num_experts = config.num_local_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.intermediate_size
        experts, hidden, width = self.num_experts, self.hidden_dim, self.intermediate_dim
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))
        self.output_bias = (
            nn.Parameter(torch.empty(experts, hidden)) if config.add_rescale_bias else None
        )
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

    def extra_repr(self) -> str:
        return (
            f"experts={self.num_experts}, hidden={self.hidden_dim}, width={self.intermediate_dim}"
        )


class LlamaMoEV2MLP(nn.Module):
    """A dense MLP w2(act(w1 x) * w3 x): of a contract layer, or beside the experts."""

    def __init__(self, config: LlamaMoEV2Config, width: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, width, bias=False)
        self.w2 = nn.Linear(width, config.hidden_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, width, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        y_BSD: torch.Tensor = self.w2(self.act_fn(self.w1(x_BSD)) * self.w3(x_BSD))
        return y_BSD


class LlamaMoEV2SparseBlock(nn.Module):
    """The routed MLP: `gate` chooses experts, whose weighted outputs are scaled and added."""

    def __init__(self, config: LlamaMoEV2Config) -> None:
        super().__init__()
        self.config = config
        self.gate = SoftmaxRouter(
            config.hidden_size, config.num_local_experts, config.num_experts_per_tok
        )
        self.experts = LlamaMoEV2Experts(config)

    @property
    def scale_factor(self) -> float:
        """Factor on every expert's output."""
        scale = self.config.scale_factor
        return 1.0 if scale is None else float(scale)

    def forward(self, x_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the output, [B, S, D], and the router's logits, [T, E]."""
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        logits_TE, weights_TK, ids_TK = self.gate(x_TD)
        weights_TK = weights_TK * self.scale_factor
        y_TD = self.experts(x_TD, ids_TK, weights_TK)
        bias_ED = self.experts.output_bias
        if bias_ED is not None:
            share_TE = torch.zeros_like(weights_TK[:, :1]).expand(-1, len(bias_ED))
            share_TE = share_TE.scatter(1, ids_TK, weights_TK)
            y_TD = y_TD + share_TE.to(bias_ED.dtype) @ bias_ED
        return y_TD.view_as(x_BSD), logits_TE


class LlamaMoEV2DecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP, each after a norm and added to its input."""

    def __init__(self, config: LlamaMoEV2Config, layer_idx: int) -> None:
        super().__init__()
        like_mistral: Any = config  # it has every field that Mistral's attention reads
        self.self_attn = (
            ExpertAttention(config, layer_idx)
            if config.use_attn_moe
            else MistralAttention(like_mistral, layer_idx)
        )
        self.is_moe = config.is_moe(layer_idx)
        self.block_sparse_moe = (
            LlamaMoEV2SparseBlock(config)
            if self.is_moe
            else LlamaMoEV2MLP(config, config.dense_width)
        )
        self.mlp_residual = (
            LlamaMoEV2MLP(config, config.intermediate_size_residual)
            if self.is_moe and config.intermediate_size_residual is not None
            else None
        )
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        valid_T: torch.Tensor | None = None,
        document_BS: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor | None, ...]:
        """Return hidden states, the MLP router's logits and the attention router's, or None."""
        normed = self.input_layernorm(hidden_states)
        attn_logits_TE = None
        if isinstance(self.self_attn, ExpertAttention):
            attended, attn_logits_TE = self.self_attn(
                normed,
                position_embeddings=position_embeddings,
                valid_T=valid_T,
                document_BS=document_BS,
                past_key_values=past_key_values,
            )
        else:
            attended, _ = self.self_attn(
                hidden_states=normed,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        hidden_states = hidden_states + attended
        normed, logits_TE = self.post_attention_layernorm(hidden_states), None
        if self.is_moe:
            y_BSD, logits_TE = self.block_sparse_moe(normed)
        else:
            y_BSD = self.block_sparse_moe(normed)
        if self.mlp_residual is not None:
            y_BSD = y_BSD + self.mlp_residual(normed)
        return hidden_states + y_BSD, logits_TE, attn_logits_TE


class LlamaMoEV2PreTrainedModel(PreTrainedModel):
    """Loading and initialisation of every LLaMA-MoE-v2 class."""

    config: LlamaMoEV2Config
    config_class = LlamaMoEV2Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["LlamaMoEV2DecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "hidden_states": LlamaMoEV2DecoderLayer,
        "attentions": MistralAttention,
    }
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"rotary_emb\.inv_freq$"]

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers searches the class's source file for the decorator, caching it on a base
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        if requested_experts is None:
            requested_experts = (
                DEFAULT_EXPERTS if DEFAULT_EXPERTS in ALL_EXPERTS_FUNCTIONS else "eager"
            )
        return super().get_correct_experts_implementation(requested_experts)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (LlamaMoEV2Experts, AttentionExperts, SoftmaxRouter)):
            for name, parameter in module.named_parameters(recurse=False):
                if name == "output_bias":
                    init.zeros_(parameter)
                else:
                    init.normal_(parameter, mean=0.0, std=self.config.initializer_range)
        else:
            super()._init_weights(module)


class LlamaMoEV2Model(LlamaMoEV2PreTrainedModel):
    """The decoder without a head: token ids or embeddings to hidden states."""

    def __init__(self, config: LlamaMoEV2Config) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [LlamaMoEV2DecoderLayer(config, layer) for layer in range(config.num_hidden_layers)]
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        like_llama: Any = config
        self.rotary_emb = LlamaRotaryEmbedding(config=like_llama)
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
    ) -> LlamaMoEV2ModelOutput:
        """Run the decoder.

        Give `input_ids` [B, S] or `inputs_embeds` [B, S, D], not both. `attention_mask` [B, past +
        S]: 1 for tokens, 0 for padding on either side (attention experts take no other form).
        `position_ids` [B, S]; without a mask and cache, a step other than 1 begins a new document
        that does not see those before it. Also takes `output_hidden_states`, `output_attentions`
        (not of attention experts), `return_dict`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if self.config.use_attn_moe and (use_cache or past_key_values is not None):
            past_key_values = prepare_cache(past_key_values, self.config.num_hidden_layers)
        elif use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        given_positions = position_ids
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen
            position_ids = position_ids.unsqueeze(0)
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits

        causal_mask, valid_T, document_BS = None, None, None
        if self.config.use_attn_moe:
            valid_T = _valid_tokens(attention_mask, inputs_embeds)
            if attention_mask is not None and valid_T is None:
                raise UserError(
                    "attention_mask is not [batch, past + sequence] of 0 and 1, the only form that "
                    "attention experts take: each has a mask of its own."
                )
            if given_positions is not None and attention_mask is None and past_key_values is None:
                document_BS = _documents(given_positions, len(inputs_embeds))
        else:
            make_mask = (
                create_causal_mask
                if self.config.sliding_window is None
                else create_sliding_window_causal_mask
            )
            causal_mask = make_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                # Only positions of the caller's can mark packed sequences; looking for those in
                # ours would make a GPU wait.
                position_ids=given_positions,
            )
        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        reports = []
        for layer in self.layers:
            hidden_states, *report = layer(
                hidden_states,
                attention_mask=causal_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                valid_T=valid_T,
                document_BS=document_BS,
                **kwargs,
            )
            reports.append(report)
        logits, attn_logits = zip(*reports, strict=True)
        return LlamaMoEV2ModelOutput(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values,
            router_logits=logits if output_router_logits else None,
            attn_router_logits=(
                attn_logits if output_router_logits and self.config.use_attn_moe else None
            ),
        )


def _valid_tokens(
    attention_mask: torch.Tensor | None, inputs_embeds: torch.Tensor
) -> torch.Tensor | None:
    """Which of the present tokens are not padding: bool [T], or None when nothing says so."""
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        return None
    batch, length = inputs_embeds.shape[:2]
    if attention_mask.shape[0] != batch or attention_mask.shape[1] < length:
        return None
    return attention_mask[:, -length:].to(inputs_embeds.device).bool().flatten()


def _documents(position_ids: torch.Tensor, batch: int) -> torch.Tensor | None:
    """Number the documents packed into rows of tokens: [B, S], or None where there is only one."""
    starts = F.pad((position_ids.diff(dim=1) != 1).long(), (1, 0))
    return starts.cumsum(dim=1).expand(batch, -1) if starts.any() else None


def balance_loss(
    logits: Sequence[torch.Tensor],
    top_k: int,
    valid_T: torch.Tensor | None = None,
    *,
    layer_wise: bool = False,
    rule: Literal["switch", "constant-original"] = "switch",
) -> torch.Tensor:
    """Balance loss (scalar float32) of the routers whose logits [T, E] are given.

    E * sum_e f_e P_e, where f_e is the share of choices that fell on expert e and P_e its mean
    probability over the tokens of `valid_T` (arXiv 2101.03961, section 2.2); 1 when balanced.
    f and P are means over layers, or with `layer_wise` the loss is the mean over layers. The rule
    "constant-original" is what the original program's formula comes to: E / top_k without gradient.
    """
    experts, device = logits[0].shape[-1], logits[0].device
    if rule == "constant-original":
        return torch.tensor(experts / top_k, dtype=torch.float32, device=device)
    shares, means = [], []
    for logits_TE in logits:
        probs_TE = logits_TE.float().softmax(dim=-1)
        chosen_TE = torch.zeros_like(probs_TE).scatter(1, probs_TE.topk(top_k, dim=-1).indices, 1.0)
        count: int | torch.Tensor = len(probs_TE)
        if valid_T is not None:
            valid_T1 = valid_T.to(probs_TE.device)[:, None]
            probs_TE, chosen_TE = probs_TE * valid_T1, chosen_TE * valid_T1
            count = valid_T1.sum().clamp(min=1)
        shares.append((chosen_TE.sum(dim=0) / (count * top_k)).to(device))
        means.append((probs_TE.sum(dim=0) / count).to(device))
    share_LE, mean_LE = torch.stack(shares), torch.stack(means)
    if not layer_wise:
        share_LE, mean_LE = share_LE.mean(dim=0), mean_LE.mean(dim=0)
    return experts * (share_LE * mean_LE).sum(dim=-1).mean()


class _WithHead(LlamaMoEV2PreTrainedModel):
    """What the classes with a head share: the decoder and the balance losses."""

    def _run(
        self,
        attention_mask: torch.Tensor | None,
        input_ids: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[LlamaMoEV2ModelOutput, dict[str, Any]]:
        """Return the decoder's output, and what a head passes on of it with the balance losses."""
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **kwargs
        )
        carried = {key: value for key, value in outputs.items() if key != "last_hidden_state"}
        config = self.config
        valid_T = _valid_tokens(attention_mask, outputs.last_hidden_state)
        for field, logits, top_k in (
            ("aux_loss", outputs.router_logits, config.num_experts_per_tok),
            ("attn_aux_loss", outputs.attn_router_logits, config.top_k_attn),
        ):
            present = [logits_TE for logits_TE in logits or () if logits_TE is not None]
            if present:
                carried[field] = balance_loss(
                    present,
                    top_k,
                    valid_T,
                    layer_wise=config.use_layer_wise_balance,
                    rule=config.balance_loss,
                )
        return outputs, carried

    def _add_balance(
        self, loss: torch.Tensor, carried: Mapping[str, Any], share: torch.Tensor | float = 1.0
    ) -> torch.Tensor:
        """Add the weighted balance losses, where there are any."""
        for field in ("aux_loss", "attn_aux_loss"):
            if field in carried:
                balance = carried[field].to(loss.device)
                loss = loss + self.config.router_aux_loss_coef * share * balance
        return loss


class LlamaMoEV2ForCausalLM(_WithHead, GenerationMixin):
    """The language model: next-token logits, generation, and the balance loss in its loss."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LlamaMoEV2Config) -> None:
        super().__init__(config)
        self.model = LlamaMoEV2Model(config)
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
    ) -> LlamaMoEV2CausalLMOutput:
        """Run the model; arguments not named here are those of `LlamaMoEV2Model.forward`.

        `labels` [B, S], -100 where there is no target, shifted inside. The loss is cross entropy
        plus, when router logits are asked for, router_aux_loss_coef times the balance losses. With
        `num_items_in_batch` (targets of a whole optimizer step, as transformers' Trainer passes it)
        both are this call's share of the step's mean. `logits_to_keep`: only the last n positions'
        logits (0: all), or the positions of an index tensor.
        """
        outputs, carried = self._run(
            attention_mask,
            input_ids,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
            share: torch.Tensor | float = 1.0
            if (items := kwargs.get("num_items_in_batch")) is not None:
                items = items.to(labels.device) if isinstance(items, torch.Tensor) else items
                share = ((labels[..., 1:] != -100).sum() / items).to(loss.device)
            loss = self._add_balance(loss, carried, share)
        return LlamaMoEV2CausalLMOutput(loss=loss, logits=logits, **carried)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As transformers does; generation reads no balance loss, so none is computed."""
        return {
            **super().prepare_inputs_for_generation(*args, **kwargs),
            "output_router_logits": False,
        }


class LlamaMoEV2ForSequenceClassification(_WithHead):
    """Class scores of a sequence, read at its last token that is not padding."""

    def __init__(self, config: LlamaMoEV2Config) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels or 0
        self.model = LlamaMoEV2Model(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> LlamaMoEV2SequenceClassifierOutput:
        """Classify; the arguments not named here are those of `LlamaMoEV2Model.forward`.

        `labels` [B] (int: cross entropy; float with one label: squared error) or [B, num_labels]
        (float). The last token is the last 1 of `attention_mask`, else the last id that is not
        `pad_token_id`, else the last position; padding may be on either side.
        """
        outputs, carried = self._run(
            attention_mask, input_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        hidden = outputs.last_hidden_state
        last_B = self._last_tokens(input_ids, attention_mask, hidden)
        pooled = self.score(hidden[torch.arange(len(hidden), device=hidden.device), last_B])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=pooled, labels=labels, pooled_logits=pooled, config=self.config
            )
            loss = self._add_balance(loss, carried)
        return LlamaMoEV2SequenceClassifierOutput(loss=loss, logits=pooled, **carried)

    def _last_tokens(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        hidden: torch.Tensor,
    ) -> torch.Tensor:
        """Position of each sequence's last token: int64 [B]."""
        batch, length = hidden.shape[:2]
        pad = self.config.pad_token_id
        if attention_mask is not None and attention_mask.dim() == 2:
            present_BS = attention_mask[:, -length:] != 0
        elif input_ids is not None and pad is not None:
            present_BS = input_ids != pad
        else:
            if batch > 1 and input_ids is not None:
                raise UserError(
                    "A batch of several sequences needs an attention_mask or config.pad_token_id "
                    "to tell where each one ends."
                )
            return torch.full((batch,), length - 1, device=hidden.device)
        place_S = torch.arange(length, device=hidden.device)
        return (place_S * present_BS.to(hidden.device)).argmax(dim=-1)


class LlamaMoEV2ForQuestionAnswering(_WithHead):
    """Start and end scores of an answer's span, for every position."""

    def __init__(self, config: LlamaMoEV2Config) -> None:
        super().__init__(config)
        self.model = LlamaMoEV2Model(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> LlamaMoEV2QuestionAnsweringOutput:
        """Find spans; the arguments not named here are those of `LlamaMoEV2Model.forward`.

        `start_positions`, `end_positions` [B]; a position past the sequence is ignored. The loss
        needs both.
        """
        outputs, carried = self._run(attention_mask, input_ids, **kwargs)
        start_BS, end_BS = self.qa_outputs(outputs.last_hidden_state).unbind(dim=-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_BS, end_BS, start_positions, end_positions, **kwargs)
            loss = self._add_balance(loss, carried)
        return LlamaMoEV2QuestionAnsweringOutput(
            loss=loss,
            start_logits=start_BS.contiguous(),
            end_logits=end_BS.contiguous(),
            **carried,
        )


class _Read(ConversionOps):
    """Read one parameter from whichever of its layouts a file has; write it as modulelist.

    The layouts are told apart by the names that are there. `part` says which parameter:

    - gate_up [E, 2I, D] from experts.{e}.w1 and .w3 [I, D]; from mlp.w1 and .v1 [E*I, D]
      (megablocks); from experts.experts [E, 2I, D], up rows first (scattermoe).
    - down [E, D, I] from experts.{e}.w2 [D, I]; from mlp.w2 [E*I, D]; from output_experts [E, D, I].
    - dense: one matrix, which the original's converter names as LLaMA does.
    """

    def __init__(self, part: Literal["gate_up", "down", "dense"]) -> None:
        self.part = part

    @torch.no_grad()
    def convert(  # type: ignore[override]  # as transformers' own operations do
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        *,
        config: Any,
        **_: Any,
    ) -> dict[str, torch.Tensor]:
        """Take {source: [tensor, ...]}; return {target: the parameter}."""
        given = {key.replace("\\", ""): input_dict.pop(key) for key in list(input_dict)}
        named = {
            key.removesuffix(".weight").rpartition("experts.")[2]: v for key, v in given.items()
        }
        if self.part == "dense":
            (whole,) = given.values()
            return {target_patterns[0]: whole[0]}
        if self.part == "gate_up":
            merged = _gate_up(named, config.num_local_experts)
        else:
            merged = _down(named, config.num_local_experts)
        return {target_patterns[0]: merged}

    @property
    def reverse_op(self) -> ConversionOps:
        return _Write(self.part)


def _gate_up(named: dict[str, Any], experts: int) -> torch.Tensor:
    if "experts" in named:
        up, gate = named["experts"][0].chunk(2, dim=1)
        return torch.cat([gate, up], dim=1)
    if "mlp.w1" in named:
        halves = (named[name][0].unflatten(0, (experts, -1)) for name in ("mlp.w1", "mlp.v1"))
        return torch.cat(list(halves), dim=1)
    gates, ups = named["*.w1"], named["*.w3"]
    if len(gates) != len(ups):
        raise ValueError(f"{len(gates)} experts have a w1 and {len(ups)} a w3.")
    width, hidden = gates[0].shape
    merged = gates[0].new_empty(len(gates), 2 * width, hidden)
    for expert in range(len(gates)):
        merged[expert, :width], merged[expert, width:] = gates[expert], ups[expert]
        gates[expert] = ups[expert] = None  # freed one by one: never two copies
    return merged


def _down(named: dict[str, Any], experts: int) -> torch.Tensor:
    if "output_experts" in named:
        down: torch.Tensor = named["output_experts"][0]
        return down
    if "mlp.w2" in named:
        return named["mlp.w2"][0].unflatten(0, (experts, -1)).transpose(1, 2).contiguous()
    return torch.stack(named["*.w2"])


class _Write(ConversionOps):
    """Write a parameter under the names of the modulelist layout, whole keys."""

    def __init__(self, part: Literal["gate_up", "down", "dense"]) -> None:
        self.part = part

    @torch.no_grad()
    def convert(  # type: ignore[override]  # as transformers' own operations do
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        *,
        full_layer_name: str,
        **_: Any,
    ) -> dict[str, torch.Tensor]:
        """Take {source: [the parameter]}; return {whole key: tensor}."""
        (tensors,) = input_dict.values()
        merged = tensors[0] if isinstance(tensors, list) else tensors
        if self.part == "dense":
            return {full_layer_name: merged}
        block = full_layer_name[: full_layer_name.index("experts.")] + "experts."
        if self.part == "down":
            return {f"{block}{e}.w2.weight": w.contiguous() for e, w in enumerate(merged)}
        released = {}
        for expert, gate_up in enumerate(merged):
            for name, half in zip(("w1", "w3"), gate_up.chunk(2), strict=True):
                released[f"{block}{expert}.{name}.weight"] = half.contiguous()
        return released

    @property
    def reverse_op(self) -> ConversionOps:
        return _Read(self.part)


def conversion() -> list[Any]:
    """Conversions between the files' tensor names and ours."""
    mlp, attention = "block_sparse_moe", "self_attn"
    dense = zip(("w1", "w2", "w3"), ("gate_proj", "down_proj", "up_proj"), strict=True)
    return [
        WeightConverter(
            [
                f"{mlp}.experts.*.w1.weight",
                f"{mlp}.experts.*.w3.weight",
                f"{mlp}.experts.mlp.w1",
                f"{mlp}.experts.mlp.v1",
                f"{mlp}.experts.experts.weight",
            ],
            f"{mlp}.experts.gate_up_proj",
            operations=[_Read("gate_up")],
        ),
        WeightConverter(
            [
                f"{mlp}.experts.*.w2.weight",
                f"{mlp}.experts.mlp.w2",
                f"{mlp}.experts.output_experts.weight",
            ],
            f"{mlp}.experts.down_proj",
            operations=[_Read("down")],
        ),
        WeightConverter(
            f"{mlp}.experts.*.w2.bias",
            f"{mlp}.experts.output_bias",
            operations=[MergeModulelist(dim=0)],
        ),
        *(
            WeightConverter(
                f"{attention}.{name}_proj.*.weight",
                f"{attention}.experts.{name}_proj",
                operations=[MergeModulelist(dim=0)],
            )
            for name in "qkvo"
        ),
        WeightConverter(
            f"{attention}.o_proj.*.bias",
            f"{attention}.experts.output_bias",
            operations=[MergeModulelist(dim=0)],
        ),
        *(
            WeightConverter(
                [f"{mlp}.{ours}.weight", f"mlp.{llama}.weight"],
                f"{mlp}.{ours}.weight",
                operations=[_Read("dense")],
            )
            for ours, llama in dense
        ),
    ]


FAMILY = Family(
    config=LlamaMoEV2Config,
    models={
        "AutoModel": LlamaMoEV2Model,
        "AutoModelForCausalLM": LlamaMoEV2ForCausalLM,
        "AutoModelForSequenceClassification": LlamaMoEV2ForSequenceClassification,
        "AutoModelForQuestionAnswering": LlamaMoEV2ForQuestionAnswering,
    },
    recognises=recognises,
    read=read,
    conversion=conversion,
    harmless=("rotary_emb.inv_freq",),
)
