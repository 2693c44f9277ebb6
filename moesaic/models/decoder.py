"""What our own decoder-only families share: experts, routers, layer, decoder, language model.

A family's file says what is its own (config, routing, scalings, balance loss) and takes the rest
from here. Attention, norms and rotary embedding are transformers'.

Notation: B batch, S sequence, T = B*S tokens, D hidden size, I expert width, E experts, K experts a
token, V vocabulary.
"""

# transformers' base classes, decorators and re-exports are untyped
# mypy: disable-error-code="no-untyped-call, untyped-decorator, attr-defined, misc"

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.integrations.moe import use_experts_implementation
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
)
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from moesaic.core.errors import UserError
from moesaic.kernels.router import Scheme
from moesaic.models.balance import layer_balance, pooled_balance, sum_losses
from moesaic.models.padding import share_of_step, valid_tokens
from moesaic.models.pretrained import PreTrainedMoE


class Decision(NamedTuple):
    """What a router gives: logits [T, E] before the softmax, weights and ids [T, K]."""

    logits: torch.Tensor
    weights: torch.Tensor
    ids: torch.Tensor


class Router(nn.Module):
    """A linear router; a family's own scoring overrides `choose`."""

    is_moe_router = True

    def __init__(self, hidden: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.empty(experts, hidden))

    def forward(self, x_TD: torch.Tensor) -> Decision:
        """Route every row; leading dimensions are flattened."""
        logits_TE = self.score(x_TD.flatten(0, -2))
        weights_TK, ids_TK = self.choose(logits_TE)
        return Decision(logits_TE, weights_TK.to(x_TD.dtype), ids_TK)

    def score(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Logits [T, E] before any softmax."""
        return F.linear(x_TD, self.weight)

    def choose(self, logits_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and ids [T, K]."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        experts, hidden = self.weight.shape
        return f"hidden={hidden}, experts={experts}, top_k={self.top_k}"


class SoftmaxRouter(Router):
    """Softmax over all experts, the best K; weights divided by (their sum + `epsilon`), or not.

    Probabilities are taken in float32: in bf16, ties among many experts change the choice.
    """

    def __init__(
        self, hidden: int, experts: int, top_k: int, *, renormalise: bool, epsilon: float = 0.0
    ) -> None:
        super().__init__(hidden, experts, top_k)
        self.renormalise = renormalise
        self.epsilon = epsilon

    def choose(self, logits_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The K largest probabilities (float32), largest first."""
        weights_TK, ids_TK = logits_TE.softmax(-1, dtype=torch.float32).topk(self.top_k, dim=-1)
        if self.renormalise:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + self.epsilon)
        return weights_TK, ids_TK

    def scheme(self) -> Scheme:
        """What `choose` does, for `kernels.fuse_routers`."""
        return Scheme(self.top_k, renormalise=self.renormalise, epsilon=self.epsilon)


@use_experts_implementation
class Experts(nn.Module):
    """The experts of one layer: `gate_up_proj` [E, 2I, D], gate rows first; `down_proj` [E, D, I].

    `config` gives the activation and the implementation.
    """

    def __init__(self, config: Any, *, experts: int, width: int) -> None:
        super().__init__()
        self.num_experts = experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = width
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(experts, self.hidden_dim, width))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Run the experts one by one ("eager"): x_TD, ids_TK, weights_TK to out_TD."""
        # float32: two experts adding into one bf16 token lose bits
        out_TD = torch.zeros_like(hidden_states, dtype=torch.float32)
        for expert in top_k_index.unique().tolist():
            token_N, choice_N = torch.where(top_k_index == expert)
            gate_up_NJ = F.linear(hidden_states[token_N], self.gate_up_proj[expert])
            gate_NI, up_NI = gate_up_NJ.chunk(2, dim=-1)
            y_ND = F.linear(self.act_fn(gate_NI) * up_NI, self.down_proj[expert])
            weighted_ND = y_ND * top_k_weights[token_N, choice_N, None]
            out_TD = out_TD.index_add(0, token_N, weighted_ND.float())
        return out_TD.to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return (
            f"experts={self.num_experts}, hidden={self.hidden_dim}, width={self.intermediate_dim}"
        )


class DenseMLP(nn.Module):
    """A SwiGLU layer that every token visits: a dense layer, or the shared experts as one."""

    def __init__(self, config: Any, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """down(act(gate(x)) * up(x)), of any leading shape."""
        y: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return y


class MoEBlock(nn.Module):
    """`gate` chooses experts, `experts` run; `shared_experts`, where there are any, are added.

    A family whose files name these parts otherwise has a block of its own that calls `routed`.
    """

    def __init__(self, gate: Router, experts: nn.Module, shared: nn.Module | None = None) -> None:
        super().__init__()
        self.gate = gate
        self.experts = experts
        if shared is not None:
            self.shared_experts = shared

    def forward(self, x_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Route and compute."""
        return routed(x_BSD, self.gate, self.experts, getattr(self, "shared_experts", None))


def routed(
    x_BSD: torch.Tensor, router: nn.Module, experts: nn.Module, shared: nn.Module | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what a routed layer adds [B, S, D], its logits [T, E] and the experts' ids [T, K]."""
    x_TD = x_BSD.flatten(0, -2)
    logits_TE, weights_TK, ids_TK = router(x_TD)
    y_BSD = experts(x_TD, ids_TK, weights_TK).view_as(x_BSD)
    if shared is not None:
        y_BSD = y_BSD + shared(x_BSD)
    return y_BSD, logits_TE, ids_TK


class MoEDecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward layer, each after a norm and added to its input.

    A family's `__init__` makes `self_attn`, `mlp` (a `MoEBlock` or a `DenseMLP`),
    `input_layernorm` and `post_attention_layernorm`.
    """

    residual_scale: float = 1.0
    """Factor on what is added to the residual stream."""

    self_attn: nn.Module
    mlp: nn.Module
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor | None, ...]:
        """Return hidden states, router logits and ids (None where the layer is dense).

        A tuple, so that both kinds of gradient checkpointing carry the gradient of the logits.
        """
        attended, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        hidden_states = hidden_states + attended * self.residual_scale
        added = self.feed_forward(self.post_attention_layernorm(hidden_states))
        y_BSD, *routing = added if isinstance(added, tuple) else (added, None, None)
        return hidden_states + y_BSD * self.residual_scale, *routing

    def feed_forward(self, x_BSD: torch.Tensor) -> Any:
        """What `MoEBlock` or `DenseMLP` gives."""
        return self.mlp(x_BSD)


@dataclass
class MoEDecoderOutput(MoeModelOutputWithPast):
    """transformers' output of a routed decoder, and `aux_loss`.

    `aux_loss`: scalar float32 with a gradient, not yet weighted by `config.router_aux_loss_coef`;
    None when not asked for. `router_logits`: [T, E] of each routed layer, in order.
    """

    aux_loss: torch.Tensor | None = None


class MoEPreTrainedModel(PreTrainedMoE):
    """What every class of these families has."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "hidden_states": MoEDecoderLayer,
        "attentions": LlamaAttention,
    }
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [
        r"rotary_emb\.inv_freq$",  # derived from the config, in files of old versions
    ]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, Experts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, Router):
            init.normal_(module.weight, mean=0.0, std=std)
        else:
            super()._init_weights(module)


class MoEDecoder(MoEPreTrainedModel):
    """The decoder without a head: token ids or embeddings to hidden states.

    A family names its layer, and its balance loss if that is not the one over all layers.
    """

    layer_class: ClassVar[type[MoEDecoderLayer]]
    balance_form: ClassVar[Literal["pooled", "layer"]] = "pooled"
    """Which balance loss: `pooled_balance` or `layer_balance`."""
    balance_in_training: ClassVar[bool] = False
    """Whether training adds the balance loss without being asked, as the original program did."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [self.layer_class(config, layer) for layer in range(config.num_hidden_layers)]
        )
        self.norm = self.make_norm(config)
        self.rotary_emb = self.make_rotary(config)
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
    ) -> MoEDecoderOutput:
        """Run the decoder.

        Give `input_ids` [B, S] or `inputs_embeds` [B, S, D], not both. `attention_mask` [B, past +
        S]: 1 for tokens, 0 for padding on either side, which the balance loss leaves out (a
        prepared 4-D mask is passed on as it is). `position_ids` [B, S]. Also takes
        `output_hidden_states`, `output_attentions`, `return_dict`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        given_positions = position_ids
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen
            position_ids = position_ids.unsqueeze(0)
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits

        hidden_states = inputs_embeds
        given = {
            "attention_mask": self.causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                # Only positions of the caller's can mark packed sequences; looking for those in
                # ours would make a GPU wait.
                position_ids=given_positions,
            ),
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "position_embeddings": self.rotary_emb(hidden_states, position_ids=position_ids),
        }
        wanted = output_router_logits or (self.training and self.balance_in_training)
        logits, ids = [], []
        for layer in self.layers:
            hidden_states, logits_TE, ids_TK = layer(hidden_states, **given, **kwargs)
            if wanted and logits_TE is not None:
                logits.append(logits_TE)
                ids.append(ids_TK)
        aux_loss = None
        if logits:
            valid_T = valid_tokens(attention_mask, inputs_embeds)
            aux_loss = self.balance_loss(logits, ids, valid_T, inputs_embeds.shape[0])
        return MoEDecoderOutput(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values,
            router_logits=tuple(logits) if output_router_logits else None,
            aux_loss=aux_loss,
        )

    def make_norm(self, config: Any) -> nn.Module:
        """The last norm."""
        return LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def make_rotary(self, config: Any) -> nn.Module:
        """What gives cos and sin of positions."""
        return LlamaRotaryEmbedding(config=config)

    def embed(self, input_ids: torch.Tensor | None) -> torch.Tensor:
        """Embeddings [B, S, D] of ids [B, S]."""
        embedded: torch.Tensor = self.embed_tokens(input_ids)
        return embedded

    @staticmethod
    def causal_mask(**given: Any) -> Any:
        """The attention mask; arguments of transformers' `create_causal_mask`."""
        return create_causal_mask(**given)

    def balance_loss(
        self,
        logits: Sequence[torch.Tensor],
        ids: Sequence[torch.Tensor],
        valid_T: torch.Tensor | None,
        batch: int,
    ) -> torch.Tensor:
        """The balance loss of all routed layers, before its coefficient (scalar float32)."""
        if self.balance_form == "pooled":
            return pooled_balance(logits, ids, valid_T)
        losses = [layer_balance(*layer, valid_T) for layer in zip(logits, ids, strict=True)]
        return sum_losses(losses)


class MoEForCausalLM(MoEPreTrainedModel, GenerationMixin):
    """The language model: next-token logits and generation."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    model_class: ClassVar[type[MoEDecoder]]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = self.make_head(config)
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
        """Run the model; arguments not named here are those of the decoder's `forward`.

        `labels` [B, S], -100 where there is no target, shifted inside. `aux_loss` is the balance
        loss before its coefficient; `weighted_balance` says when it is part of `loss`.
        `logits_to_keep`: only the last n positions' logits (0: all), or those of an index tensor.
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
        logits = self.lm_head(self.scale_hidden(outputs.last_hidden_state[:, kept, :]))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
            share = share_of_step(labels, kwargs.get("num_items_in_batch"))
            loss = loss + weighted_balance(self.model, outputs.aux_loss, share).to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=outputs.aux_loss,
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

    def make_head(self, config: Any) -> nn.Linear:
        """The output projection."""
        return nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def scale_hidden(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the output projection takes."""
        return hidden


def weighted_balance(
    decoder: MoEDecoder, aux_loss: torch.Tensor | None, share: torch.Tensor | float = 1.0
) -> torch.Tensor:
    """Return what the balance loss adds to a task's loss: coefficient x share x aux_loss, or zero.

    A family whose original program trains with it always (`balance_in_training`) adds it in
    training, and never in eval mode, where it is only reported; the others whenever router logits
    are asked for, as transformers does. `share` is this call's part of an optimizer step's targets,
    so that the sum over micro-batches does not grow with their number.
    """
    if aux_loss is None or (decoder.balance_in_training and not decoder.training):
        return torch.zeros(())
    return aux_loss * decoder.config.router_aux_loss_coef * share
