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
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.utils import ModelOutput, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from moesaic.core.console import note
from moesaic.core.errors import UserError, unknown
from moesaic.models.attention_moe import (
    AttentionExperts,
    ExpertAttention,
    ExpertBias,
    prepare_cache,
)
from moesaic.models.balance import layer_balance, pooled_balance
from moesaic.models.decoder import Experts, MoEPreTrainedModel, SoftmaxRouter
from moesaic.models.family import Family
from moesaic.models.llama_moe_v2_layouts import conversion
from moesaic.models.padding import last_tokens, share_of_step, valid_tokens

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
        experts, heads = self.attn_experts or 0, self.num_attention_heads
        kv = self.num_key_value_heads or heads
        if experts < 1 or experts % kv or heads % experts:
            raise UserError(
                f"attn_experts={self.attn_experts} does not fit {heads} heads and {kv} key/value "
                f"heads. Give a multiple of {kv} that divides {heads}."
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

    When router logits are asked for: `router_logits` and `attn_router_logits` are tuples over the L
    layers of [T, E], None for layers without such a router; `aux_loss` and `attn_aux_loss` are the
    balance losses of the MLPs' and of the attention's routers (scalars, not yet weighted).
    """

    last_hidden_state: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    router_logits: tuple[torch.Tensor | None, ...] | None = None
    attn_router_logits: tuple[torch.Tensor | None, ...] | None = None
    aux_loss: torch.Tensor | None = None
    attn_aux_loss: torch.Tensor | None = None


@dataclass
class LlamaMoEV2CausalLMOutput(LlamaMoEV2ModelOutput):
    """Output of the language model: logits [B, S, V]."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None


@dataclass
class LlamaMoEV2SequenceClassifierOutput(LlamaMoEV2CausalLMOutput):
    """Output of the classifier: logits [B, num_labels]."""


@dataclass
class LlamaMoEV2QuestionAnsweringOutput(LlamaMoEV2ModelOutput):
    """Output of the span head: logits [B, S] twice."""

    loss: torch.Tensor | None = None
    start_logits: torch.Tensor | None = None
    end_logits: torch.Tensor | None = None


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
            config.hidden_size,
            config.num_local_experts,
            config.num_experts_per_tok,
            renormalise=True,
        )
        self.experts = Experts(
            config, experts=config.num_local_experts, width=config.intermediate_size
        )
        self.output_bias = (
            ExpertBias(config.num_local_experts, config.hidden_size)
            if config.add_rescale_bias
            else None
        )

    def forward(self, x_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the output [B, S, D], the router's logits [T, E] and the ids [T, K]."""
        x_TD = x_BSD.flatten(0, -2)
        logits_TE, weights_TK, ids_TK = self.gate(x_TD)
        if self.config.scale_factor is not None:
            weights_TK = weights_TK * self.config.scale_factor
        y_TD = self.experts(x_TD, ids_TK, weights_TK)
        if self.output_bias is not None:
            y_TD = y_TD + self.output_bias(ids_TK, weights_TK)
        return y_TD.view_as(x_BSD), logits_TE, ids_TK


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
        """Return hidden states; logits and ids of the MLP's router and of the attention's, or None.

        One flat tuple, so that both kinds of gradient checkpointing carry the logits' gradients.
        """
        normed = self.input_layernorm(hidden_states)
        if isinstance(self.self_attn, ExpertAttention):
            attended, *attn_routing = self.self_attn(
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
            attn_routing = [None, None]
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        added = self.block_sparse_moe(normed)
        y_BSD, *routing = added if self.is_moe else (added, None, None)
        if self.mlp_residual is not None:
            y_BSD = y_BSD + self.mlp_residual(normed)
        return hidden_states + y_BSD, *routing, *attn_routing


class LlamaMoEV2PreTrainedModel(MoEPreTrainedModel):
    """Loading and initialisation of every LLaMA-MoE-v2 class."""

    config: LlamaMoEV2Config
    config_class = LlamaMoEV2Config
    _no_split_modules: ClassVar[list[str]] = ["LlamaMoEV2DecoderLayer"]
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "hidden_states": LlamaMoEV2DecoderLayer,
        "attentions": MistralAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, AttentionExperts):
            for projection in (module.q_proj, module.k_proj, module.v_proj, module.o_proj):
                init.normal_(projection, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, ExpertBias):
            init.zeros_(module.weight)
        else:
            super()._init_weights(module)


class LlamaMoEV2Model(LlamaMoEV2PreTrainedModel):
    """The decoder without a head: token ids or embeddings to hidden states."""

    def __init__(self, config: LlamaMoEV2Config) -> None:
        super().__init__(config)
        asked = config._attn_implementation
        if config.use_attn_moe and asked not in (None, "eager", "sdpa"):
            note(f"attention experts run on sdpa, not {asked}: each has tokens of its own.")
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
        `position_ids` [B, S]; without a mask and past, a step other than 1 begins a new document
        that does not see those before it. Also takes `output_hidden_states`, `output_attentions`
        (not of attention experts), `return_dict`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if self.config.use_attn_moe and past_key_values is not None:
            past_key_values = prepare_cache(past_key_values, self.config.num_hidden_layers)
        masks = self._masks(inputs_embeds, attention_mask, position_ids, past_key_values)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen
            position_ids = position_ids.unsqueeze(0)
        if use_cache and past_key_values is None:
            past_key_values = (
                prepare_cache(None, self.config.num_hidden_layers)
                if self.config.use_attn_moe
                else DynamicCache(config=self.config)
            )
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        reports = []
        for layer in self.layers:
            hidden_states, *report = layer(
                hidden_states,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **masks,
                **kwargs,
            )
            reports.append(report)
        extra: dict[str, Any] = {}
        if output_router_logits:
            logits, ids, attn_logits, attn_ids = zip(*reports, strict=True)
            counted_T = valid_tokens(attention_mask, inputs_embeds)
            extra["router_logits"] = logits
            extra["aux_loss"] = balance_loss(self.config, logits, ids, counted_T)
            if self.config.use_attn_moe:
                extra["attn_router_logits"] = attn_logits
                extra["attn_aux_loss"] = balance_loss(self.config, attn_logits, attn_ids, counted_T)
        return LlamaMoEV2ModelOutput(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values, **extra
        )

    def _masks(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        past_key_values: Cache | None,
    ) -> dict[str, Any]:
        """What tells a layer which tokens see which, from the caller's arguments.

        Only positions of the caller's can mark packed documents; looking for those in ours would
        make a GPU wait.
        """
        if self.config.use_attn_moe:
            valid_T = valid_tokens(attention_mask, inputs_embeds)
            if attention_mask is not None and valid_T is None:
                raise UserError(
                    "attention_mask is not [batch, past + sequence] of 0 and 1, the only form that "
                    "attention experts take: each has a mask of its own."
                )
            document_BS = None
            if position_ids is not None and attention_mask is None and past_key_values is None:
                document_BS = _documents(position_ids, len(inputs_embeds))
            return {"valid_T": valid_T, "document_BS": document_BS}
        make_mask = (
            create_causal_mask
            if self.config.sliding_window is None
            else create_sliding_window_causal_mask
        )
        return {
            "attention_mask": make_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
        }


def _documents(position_ids: torch.Tensor, batch: int) -> torch.Tensor | None:
    """Number the documents packed into rows of tokens: [B, S], or None where there is only one."""
    starts = F.pad((position_ids.diff(dim=1) != 1).long(), (1, 0))
    return starts.cumsum(dim=1).expand(batch, -1) if starts.any() else None


def balance_loss(
    config: LlamaMoEV2Config,
    logits: Sequence[torch.Tensor | None],
    ids: Sequence[torch.Tensor | None],
    valid_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """Balance loss (scalar float32) of the routers of all layers: logits [T, E], ids [T, K].

    E * sum over experts of share of choices * mean probability, over the tokens of `valid_T`; 1
    when balanced (arXiv 2101.03961, section 2.2). `config.use_layer_wise_balance` takes the mean
    over layers of each layer's loss, otherwise shares and probabilities are those of all layers
    together. Under "constant-original" it is what the original's formula comes to, E / K. Layers
    without a router are None; without any router the loss is 0.
    """
    layers = [pair for pair in zip(logits, ids, strict=True) if pair[0] is not None]
    if not layers:
        return torch.zeros(())
    present, chosen = zip(*layers, strict=True)
    experts, top_k = present[0].shape[-1], chosen[0].shape[-1]
    if config.balance_loss == "constant-original":
        return torch.tensor(experts / top_k, dtype=torch.float32, device=present[0].device)
    if config.use_layer_wise_balance:
        losses = [layer_balance(*layer, valid_T) for layer in zip(present, chosen, strict=True)]
        return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()
    return pooled_balance(present, chosen, valid_T) / top_k


class _WithHead(LlamaMoEV2PreTrainedModel):
    """What the classes with a head share."""

    model: LlamaMoEV2Model

    def _run(self, **kwargs: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        """Run the decoder: its hidden states [B, S, D] and what a head passes on besides."""
        carried = dict(self.model(return_dict=True, **kwargs).items())
        return carried.pop("last_hidden_state"), carried

    def _with_balance(
        self, loss: torch.Tensor, carried: Mapping[str, Any], share: torch.Tensor | float = 1.0
    ) -> torch.Tensor:
        """Add the weighted balance losses, where there are any."""
        for field in ("aux_loss", "attn_aux_loss"):
            if carried.get(field) is not None:
                weighted = self.config.router_aux_loss_coef * share * carried[field]
                loss = loss + weighted.to(loss.device)
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
        hidden, carried = self._run(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
            share = share_of_step(labels, kwargs.get("num_items_in_batch"))
            loss = self._with_balance(loss, carried, share)
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
        hidden, carried = self._run(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        pad = self.config.pad_token_id
        last_B = last_tokens(input_ids, attention_mask, hidden, pad_token_id=pad)
        pooled = self.score(hidden[torch.arange(len(hidden), device=hidden.device), last_B])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=pooled, labels=labels, pooled_logits=pooled, config=self.config
            )
            loss = self._with_balance(loss, carried)
        return LlamaMoEV2SequenceClassifierOutput(loss=loss, logits=pooled, **carried)


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
        hidden, carried = self._run(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        start_BS, end_BS = self.qa_outputs(hidden).unbind(dim=-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_BS, end_BS, start_positions, end_positions, **kwargs)
            loss = self._with_balance(loss, carried)
        return LlamaMoEV2QuestionAnsweringOutput(
            loss=loss,
            start_logits=start_BS.contiguous(),
            end_logits=end_BS.contiguous(),
            **carried,
        )


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
