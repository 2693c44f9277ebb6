"""LLaMA-MoE: a LLaMA whose feed-forward layers are experts behind a gate (arXiv 2406.16554).

Attention, norms and rotary embedding are transformers' LLaMA; the feed-forward block, its
statistics and its setters are here. The released checkpoints are read and written with their own
tensor names (`expert_weights`).

Notation: B batch, S sequence, T = B*S tokens, D hidden size, I expert width (the widest of a
layer), E experts, K experts a token (`num_selects`, of a layer), L layers, V vocabulary.
"""

# transformers' base classes, decorators and re-exports are untyped
# mypy: disable-error-code="no-untyped-call, untyped-decorator, attr-defined, misc"

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationMixin
from transformers.integrations.moe import use_experts_implementation
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.utils import ModelOutput, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from moesaic.core.errors import UserError, unknown
from moesaic.models.calculators import (
    CALCULATORS,
    DroppedPadding,
    UniversalCalculator,
    WeightNorm,
)
from moesaic.models.expert_weights import layer_of
from moesaic.models.gates import (
    GATES,
    Gate,
    GateNetwork,
    GateOutput,
    LoadRule,
    NoiseWeight,
    ScoreRule,
    TopKBalancedNoisyGate,
    Weighting,
)
from moesaic.models.padding import last_tokens, share_of_step, valid_tokens
from moesaic.models.pretrained import PreTrainedMoE
from moesaic.models.randomness import Randomness
from moesaic.models.selects import Selects, check_selects, selects_of, together


class LlamaMoEConfig(PreTrainedConfig):
    """Shape and routing of a LLaMA-MoE model, with the released configs' names and defaults.

    LLaMA's fields mean what they mean in `transformers.LlamaConfig`. `rope_theta` defaults to
    10000, which the released hub code uses whatever the config says; here `rope_parameters` (or
    `rope_theta` and `rope_scaling` of older files) is honoured. Attributes of the original that
    mean nothing (`gates`, `auto_map`) are dropped.

    Raises UserError (a ValueError) for names that do not exist and for sizes that do not fit
    together.
    """

    model_type = "llama_moe"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "past_key_values",
        "balance_loss",
        "num_dropped_tokens",
        "gate_load",
        "gate_importance",
    ]
    attribute_map: ClassVar[dict[str, str]] = {"num_experts_per_tok": "num_selects"}

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    """Sum of the widths of a layer's experts: the dense layer's width when none is shared."""
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pretraining_tp: int | None = 1
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    attention_dropout: float | int | None = 0.0
    mlp_bias: bool = False
    """Biases of gate, up and down projections, as in some dense LLaMAs; the original has none."""

    num_experts: int = 16
    num_selects: int | list[int] = 4
    """Experts a token uses (K), one number for all layers or a list of L."""
    size_experts: list[list[int]] | None = None
    """Width of each expert of each layer, [L][E]; None: all intermediate_size / num_experts."""
    gate_type: str = "TopKBalancedNoisyGate"
    """A name of `gates.GATES`."""
    gate_network: GateNetwork = "mlp"
    """"mlp" (D -> E, tanh, E -> E), "linear" (D -> E) or "glu" (one gated neuron an expert)."""
    gate_bias: bool = False
    """Whether a "linear" network has a bias."""
    gate_weighting: Weighting = "scores"
    """Weight of a chosen expert: its score, or `gates.near_one` ("one") or `gates.tempered`."""
    gate_use_softmax: bool = True
    gate_use_balance: bool = True
    gate_balance_loss_weight: float = 1e-2
    gate_add_noise: bool = True
    gate_noise_epsilon: float = 1e-2
    calculator_type: str = "UniversalCalculator"
    """A name of `calculators.CALCULATORS`."""
    multiply_gate_scores: bool = True
    score_scale_factor: float | int | list[float] = 1.0
    """Factor on the scores, one for all layers or a list of L (released models: E/K)."""
    add_weight_norm: bool = False
    """Learn the scale factor, starting from score_scale_factor."""
    drop_tokens: bool = True
    dropped_padding: DroppedPadding = "zero"
    """What a dropped token gives: "zero" or "input" (SwitchDropTokenCalculator)."""
    capacity_factor: float = 1.25

    load_rule: LoadRule = "shazeer"
    """"original" counts load as the original program did (see TopKBalancedNoisyGate)."""
    score_rule: ScoreRule = "probability"
    """"original" scores Switch and random gates as the original did (see SwitchBalancedGate)."""
    count_padding: bool = False
    """Count padding in load, importance, balance loss and capacity, as the original did."""
    output_router_logits: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("auto_map", None)
        kwargs.pop("gates", None)
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)
        self._check()

    def _check(self) -> None:
        for field, names in (("gate_type", GATES), ("calculator_type", CALCULATORS)):
            if getattr(self, field) not in names:
                raise unknown(field, str(getattr(self, field)), names)
        for field, choices in (
            ("gate_network", ("mlp", "linear", "glu")),
            ("gate_weighting", get_args(Weighting)),
            ("dropped_padding", ("zero", "input")),
            ("load_rule", ("shazeer", "original")),
            ("score_rule", ("probability", "original")),
        ):
            if getattr(self, field) not in choices:
                raise unknown(field, str(getattr(self, field)), choices)
        if self.gate_weighting != "scores" and self.gate_type != "TopKBalancedNoisyGate":
            raise UserError(
                f"gate_weighting={self.gate_weighting!r} with {self.gate_type}. "
                "Use gate_type='TopKBalancedNoisyGate', or gate_weighting='scores'."
            )
        if self.gate_bias and self.gate_network != "linear":
            raise UserError(
                f"gate_bias with gate_network={self.gate_network!r}. Use gate_network='linear'."
            )
        self.check_selects()
        self._check_dispatch()
        check_expert_sizes(self, "size_experts", self.num_experts, self._routed_width())
        scale = self.score_scale_factor
        if isinstance(scale, (list, tuple)) and len(scale) != self.num_hidden_layers:
            raise UserError(
                f"score_scale_factor has {len(scale)} values but the model has "
                f"{self.num_hidden_layers} layers. Give one number, or one for each layer."
            )

    def check_selects(self) -> None:
        """Raise UserError unless num_selects is 1 to num_experts, or that for every layer."""
        check_selects(
            "num_selects",
            self.num_selects,
            layers=self.num_hidden_layers,
            experts=self.num_experts,
            advice="Lower num_selects or split into more experts.",
        )

    def _check_dispatch(self) -> None:
        """Some gates choose a number of experts of their own; some calculators take only one."""
        taken = {"UniformCalculator": self.num_experts, "SwitchDropTokenCalculator": 1}
        for layer in range(self.num_hidden_layers):
            if self.gate_type == "SwitchBalancedGate":
                chosen = 1
            elif self.gate_type.startswith("Uniform"):
                chosen = self.num_experts
            else:
                chosen = self.selects(layer)
            if chosen != taken.get(self.calculator_type, chosen):
                raise UserError(
                    f"{self.calculator_type} takes {taken[self.calculator_type]} expert(s) a token "
                    f"but {self.gate_type} chooses {chosen}. Use "
                    "calculator_type='UniversalCalculator', or another gate or num_selects."
                )

    def _routed_width(self) -> int:
        """Sum of the widths of one layer's routed experts."""
        return self.intermediate_size

    def expert_sizes(self, block: str | int) -> tuple[int, ...]:
        """Widths of a layer's experts, given its index or the name of something in it."""
        layer = block if isinstance(block, int) else layer_of(block)
        if self.size_experts is not None:
            return tuple(self.size_experts[layer])
        return (self._routed_width() // self.num_experts,) * self.num_experts

    def selects(self, layer: int) -> int:
        """Experts a token uses in a layer."""
        return selects_of(self.num_selects, layer)

    def scale_factor(self, layer: int) -> float:
        """Scale factor of a layer's scores."""
        scale = self.score_scale_factor
        return float(scale[layer] if isinstance(scale, (list, tuple)) else scale)


def check_expert_sizes(config: LlamaMoEConfig, field: str, experts: int, width: int) -> None:
    """Raise UserError unless `field` is None or [L][experts] positive sizes summing to width."""
    sizes = getattr(config, field)
    if sizes is None:
        if width % experts:
            raise UserError(
                f"{experts} experts do not divide a width of {width}. "
                f"Give {field}, or a number of experts that divides it."
            )
        return
    if len(sizes) != config.num_hidden_layers or any(len(row) != experts for row in sizes):
        raise UserError(
            f"{field} has {len(sizes)} rows of {sorted({len(row) for row in sizes})} sizes. "
            f"Give {config.num_hidden_layers} rows of {experts} sizes."
        )
    for layer, row in enumerate(sizes):
        if min(row) < 1 or sum(row) != width:
            raise UserError(
                f"{field}[{layer}] = {list(row)} sums to {sum(row)}; the widths of a layer's "
                f"experts must be positive and sum to {width}."
            )


@dataclass
class LlamaMoEModelOutput(ModelOutput):
    """Output of the model without a head.

    `balance_loss` is the sum over layers (scalar float32, with a gradient). `num_dropped_tokens`,
    `gate_load` and `gate_importance` are tuples over the L layers: a scalar (-1 where nothing can
    be dropped), [E] and [E], without gradients. `router_logits`, when asked for: L clean logits [T,
    E] in float32. The statistics are None when they were not asked for (`output_gate_stats=False`).
    """

    last_hidden_state: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    balance_loss: torch.Tensor | None = None
    num_dropped_tokens: tuple[torch.Tensor, ...] | None = None
    gate_load: tuple[torch.Tensor, ...] | None = None
    gate_importance: tuple[torch.Tensor, ...] | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None


@dataclass
class LlamaMoECausalLMOutput(ModelOutput):
    """Output of the language model: logits [B, S, V], loss = lm_loss (cross entropy) + balance.

    The other fields are those of `LlamaMoEModelOutput`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    balance_loss: torch.Tensor | None = None
    num_dropped_tokens: tuple[torch.Tensor, ...] | None = None
    gate_load: tuple[torch.Tensor, ...] | None = None
    gate_importance: tuple[torch.Tensor, ...] | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    lm_loss: torch.Tensor | None = None


@dataclass
class LlamaMoESequenceClassifierOutput(ModelOutput):
    """Output of the classifier: logits [B, num_labels], loss = task loss + balance loss."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    balance_loss: torch.Tensor | None = None
    num_dropped_tokens: tuple[torch.Tensor, ...] | None = None
    gate_load: tuple[torch.Tensor, ...] | None = None
    gate_importance: tuple[torch.Tensor, ...] | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None


@dataclass
class LlamaMoEQuestionAnsweringOutput(ModelOutput):
    """Output of the span head: logits [B, S] twice, loss = mean cross entropy + balance loss."""

    loss: torch.Tensor | None = None
    start_logits: torch.Tensor | None = None
    end_logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    balance_loss: torch.Tensor | None = None
    num_dropped_tokens: tuple[torch.Tensor, ...] | None = None
    gate_load: tuple[torch.Tensor, ...] | None = None
    gate_importance: tuple[torch.Tensor, ...] | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None


class Experts(nn.Module):
    """The experts of one layer as two 3-D parameters; narrower ones end in zeros.

    `gate_up_proj` [E, 2I, D] (gate rows first), `down_proj` [E, D, I]. `sizes` are the true widths.
    With biases also `gate_up_proj_bias` [E, 2I]; the down projection's bias belongs to the layer
    and is added there, once, so `down_proj_bias` [E, D], which transformers' functions ask for, is
    zeros.
    """

    down_proj_bias: torch.Tensor

    def __init__(self, config: LlamaMoEConfig, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.sizes = sizes
        self.num_experts = len(sizes)
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = max(sizes)
        experts, hidden, width = self.num_experts, self.hidden_dim, self.intermediate_dim
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))
        self.gate_up_proj_bias: nn.Parameter | None = None
        if config.mlp_bias:
            self.gate_up_proj_bias = nn.Parameter(torch.empty(experts, 2 * width))
            self.register_buffer("down_proj_bias", torch.zeros(experts, hidden), persistent=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Run the experts one by one ("eager"): x_TD, ids_TK, weights_TK to out_TD."""
        # float32: two experts adding into one bf16 token lose bits
        out_TD = torch.zeros_like(hidden_states, dtype=torch.float32)
        for expert in top_k_index.unique().tolist():
            token_N, choice_N = torch.where(top_k_index == expert)
            bias = None if self.gate_up_proj_bias is None else self.gate_up_proj_bias[expert]
            gate_up = F.linear(hidden_states[token_N], self.gate_up_proj[expert], bias)
            gate_NI, up_NI = gate_up.chunk(2, dim=-1)
            y_ND = F.linear(self.act_fn(gate_NI) * up_NI, self.down_proj[expert])
            weighted_ND = y_ND * top_k_weights[token_N, choice_N, None]
            out_TD = out_TD.index_add(0, token_N, weighted_ND.float())
        return out_TD.to(hidden_states.dtype)

    @torch.no_grad()
    def zero_padding(self) -> None:
        """Zero what lies past each expert's width; its gradients being zero, it stays so."""
        for expert, size in enumerate(self.sizes):
            for rows in (self.gate_up_proj, self.gate_up_proj_bias):
                if rows is not None:
                    rows[expert, size : self.intermediate_dim] = 0
                    rows[expert, self.intermediate_dim + size :] = 0
            self.down_proj[expert, :, size:] = 0

    def extra_repr(self) -> str:
        widths = self.sizes[0] if len(set(self.sizes)) == 1 else list(self.sizes)
        return f"experts={self.num_experts}, hidden={self.hidden_dim}, width={widths}"


@use_experts_implementation
class LlamaMoEExperts(Experts):
    """Experts without biases, as in the released models."""


@use_experts_implementation(has_bias=True)
class LlamaMoEBiasedExperts(Experts):
    """Experts cut from a dense model with `mlp_bias`."""


def make_experts(config: LlamaMoEConfig, sizes: tuple[int, ...]) -> Experts:
    """Build the experts of these widths, with biases where the config has them."""
    return (LlamaMoEBiasedExperts if config.mlp_bias else LlamaMoEExperts)(config, sizes)


class BlockOutput(NamedTuple):
    """Output of a feed-forward block: hidden [B, S, D] and what its gate and calculator report."""

    hidden_states: torch.Tensor
    gate: GateOutput
    num_dropped: torch.Tensor


class LlamaMoEBlock(nn.Module):
    """The feed-forward layer: `gate` chooses experts, `calculator` runs them."""

    def __init__(self, config: LlamaMoEConfig, layer_idx: int) -> None:
        super().__init__()
        self.gate = GATES[config.gate_type](
            config.hidden_size,
            config.num_experts,
            config.selects(layer_idx),
            network=config.gate_network,
            use_softmax=config.gate_use_softmax,
            use_balance=config.gate_use_balance,
            balance_loss_weight=config.gate_balance_loss_weight,
            add_noise=config.gate_add_noise,
            noise_epsilon=config.gate_noise_epsilon,
            load_rule=config.load_rule,
            score_rule=config.score_rule,
            bias=config.gate_bias,
            weighting=config.gate_weighting,
        )
        self.calculator = CALCULATORS[config.calculator_type](
            make_experts(config, config.expert_sizes(layer_idx)),
            multiply_gate_scores=config.multiply_gate_scores,
            score_scale_factor=config.scale_factor(layer_idx),
            add_weight_norm=config.add_weight_norm,
            drop_tokens=config.drop_tokens,
            dropped_padding=config.dropped_padding,
            capacity_factor=config.capacity_factor,
            bias_size=config.hidden_size if config.mlp_bias else None,
        )

    @property
    def routed(self) -> LlamaMoEBlock:
        """The part that the model's setters act on."""
        return self

    def forward(
        self, x_BSD: torch.Tensor, valid_T: torch.Tensor | None = None, statistics: bool = True
    ) -> BlockOutput:
        """Route and compute; `valid_T` (bool) says which tokens count in the statistics."""
        x_TD = x_BSD.flatten(0, -2)
        decision = self.gate(x_TD, valid_T, statistics)
        y_TD, num_dropped = self.calculator(x_TD, decision.ids, decision.weights, valid_T)
        return BlockOutput(y_TD.view_as(x_BSD), decision, num_dropped)


class LlamaMoEDecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward block, each after a norm and added to its input."""

    block_class: ClassVar[type[nn.Module]] = LlamaMoEBlock

    def __init__(self, config: LlamaMoEConfig, layer_idx: int) -> None:
        super().__init__()
        like_llama: Any = config  # it has every field that LLaMA's own layers read
        self.self_attn = LlamaAttention(config=like_llama, layer_idx=layer_idx)
        self.mlp = self.block_class(config, layer_idx)
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
        statistics: bool = True,
        **kwargs: Any,
    ) -> tuple[torch.Tensor | None, ...]:
        """Return hidden states, router logits, balance loss, dropped tokens, load, importance.

        One flat tuple, so that both kinds of gradient checkpointing carry the gradient of each.
        """
        attended, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        hidden_states = hidden_states + attended
        block = self.mlp(self.post_attention_layernorm(hidden_states), valid_T, statistics)
        return (
            hidden_states + block.hidden_states,
            block.gate.logits,
            block.gate.balance_loss,
            block.num_dropped,
            block.gate.load,
            block.gate.importance,
        )


class LlamaMoEPreTrainedModel(PreTrainedMoE):
    """Loading, initialisation and the original program's setters, for every LLaMA-MoE class."""

    config: LlamaMoEConfig
    config_class = LlamaMoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["LlamaMoEDecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "hidden_states": LlamaMoEDecoderLayer,
        "attentions": LlamaAttention,
    }
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [
        r"rotary_emb\.inv_freq$",  # derived from the config, in files of old versions
        r"gate\.weight_noise\.weight$",  # of a checkpoint whose config turns the noise off
    ]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Experts):
            for weight in (module.gate_up_proj, module.down_proj):
                init.normal_(weight, mean=0.0, std=self.config.initializer_range)
            if module.gate_up_proj_bias is not None:
                init.zeros_(module.gate_up_proj_bias)
                init.zeros_(module.down_proj_bias)
            module.zero_padding()
        elif isinstance(module, NoiseWeight):
            init.zeros_(module.weight)
        elif isinstance(module, Gate):
            if module.correction is not None:
                init.zeros_(module.correction)
        elif isinstance(module, WeightNorm):
            init.constant_(module.weight, module.scale)
        elif isinstance(module, UniversalCalculator) and module.bias_down is not None:
            init.zeros_(module.bias_down)
        else:
            super()._init_weights(module)

    # The original's setters follow. They change every layer at once, and the config with them.

    def moe_blocks(self) -> Iterator[Any]:
        """Yield each layer's routed block, in order: it has `gate` and `calculator`."""
        decoder: Any = self.base_model
        for layer in decoder.layers:
            yield layer.mlp.routed

    def gate_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the gates' parameters with their names.

        Use this rather than a search for "gate" in names, which finds the experts' gate rows too.
        """
        for name, module in self.named_modules():
            if isinstance(module, Gate):
                yield from module.named_parameters(prefix=name)

    def freeze_gate(self, frozen: bool = True) -> None:
        """Exclude the gates from training, and nothing else; `frozen=False` includes them again."""
        for _, parameter in self.gate_parameters():
            parameter.requires_grad_(not frozen)

    def set_randomness(self, randomness: Randomness) -> None:
        """Let every gate and calculator draw from `randomness`."""
        for module in self.modules():
            if isinstance(module, (Gate, UniversalCalculator)):
                module.randomness = randomness

    def set_moe_num_selects(self, num_selects: Selects) -> None:
        """Experts a token uses, one number or one a layer; UserError unless 1 to num_experts."""
        check_selects(
            "num_selects",
            num_selects,
            layers=self.config.num_hidden_layers,
            experts=self.config.num_experts,
            advice=f"Give 1 to {self.config.num_experts}.",
        )
        for layer, block in enumerate(self.moe_blocks()):
            block.gate.num_selects = selects_of(num_selects, layer)
        self.config.num_selects = num_selects if isinstance(num_selects, int) else list(num_selects)

    def set_moe_gate_use_softmax(self, use_softmax: bool) -> None:
        """Whether scores are a softmax over the chosen logits, or the logits."""
        self._set_gates("use_softmax", use_softmax)

    def set_moe_gate_use_balance(self, use_balance: bool) -> None:
        """Whether there is a balance loss (0 otherwise)."""
        self._set_gates("use_balance", use_balance)

    def set_moe_gate_balance_loss_weight(self, balance_loss_weight: float) -> None:
        """Factor of the balance loss."""
        self._set_gates("balance_loss_weight", balance_loss_weight)

    def set_moe_gate_add_noise(self, add_noise: bool) -> None:
        """Whether routing is noisy in training; a gate without noise weights gets zeros."""
        self._set_gates("add_noise", add_noise)
        if add_noise:
            for block in self.moe_blocks():
                if isinstance(block.gate, TopKBalancedNoisyGate):
                    block.gate.enable_noise()

    def set_moe_gate_noise_epsilon(self, noise_epsilon: float) -> None:
        """Smallest standard deviation of the noise."""
        self._set_gates("noise_epsilon", noise_epsilon)

    def set_moe_gate_load_rule(self, load_rule: LoadRule) -> None:
        """How load is counted: "shazeer", or "original" as the original program did."""
        if load_rule not in ("shazeer", "original"):
            raise unknown("load_rule", str(load_rule), ("shazeer", "original"))
        self._set_gates("load_rule", load_rule, field="load_rule")

    def set_moe_gate_score_rule(self, score_rule: ScoreRule) -> None:
        """How Switch and random gates score: "probability", or "original"."""
        if score_rule not in ("probability", "original"):
            raise unknown("score_rule", str(score_rule), ("probability", "original"))
        self._set_gates("score_rule", score_rule, field="score_rule")

    def set_moe_calculator_multiply_gate_scores(self, multiply_gate_scores: bool) -> None:
        """Whether experts are weighted by scores and scale factor, or simply added."""
        self._set_calculators("multiply_gate_scores", multiply_gate_scores)

    def set_moe_calculator_score_scale_factor(
        self, score_scale_factor: float | list[float], layer_index: int | None = None
    ) -> None:
        """Factor on the scores of all layers (one number, or one a layer), or of one layer."""
        layers = self.config.num_hidden_layers
        scales = [self.config.scale_factor(layer) for layer in range(layers)]
        if layer_index is not None:
            scales[layer_index] = float(score_scale_factor)  # type: ignore[arg-type]
            self.config.score_scale_factor = scales
        else:
            given = score_scale_factor if isinstance(score_scale_factor, list) else None
            if given is not None and len(given) != layers:
                raise UserError(
                    f"{len(given)} scale factors for {layers} layers. Give one, or one a layer."
                )
            scales = given or [float(score_scale_factor)] * layers  # type: ignore[arg-type]
            self.config.score_scale_factor = score_scale_factor
        for block, scale in zip(self.moe_blocks(), scales, strict=True):
            block.calculator.score_scale_factor = float(scale)
            if block.calculator.mlp_norm is not None:
                nn.init.constant_(block.calculator.mlp_norm.weight, float(scale))

    def set_moe_calculator_drop_tokens(self, drop_tokens: bool) -> None:
        """Whether an expert over its capacity drops tokens (SwitchDropTokenCalculator)."""
        self._set_calculators("drop_tokens", drop_tokens)

    def set_moe_calculator_dropped_padding(self, dropped_padding: DroppedPadding) -> None:
        """What a dropped token gives: "zero" or "input"."""
        if dropped_padding not in ("zero", "input"):
            raise unknown("dropped_padding", str(dropped_padding), ("zero", "input"))
        self._set_calculators("dropped_padding", dropped_padding)

    def set_moe_calculator_capacity_factor(self, capacity_factor: float) -> None:
        """Capacity of an expert in units of an even share of the tokens."""
        self._set_calculators("capacity_factor", capacity_factor)

    def reset_gate_network(self) -> None:
        """Draw new gate weights, as in a new model: N(0, initializer_range), noise weights zero."""
        for block in self.moe_blocks():
            self._redraw(block.gate)

    def reset_experts(self) -> None:
        """Draw new expert weights, as in a new model: N(0, initializer_range)."""
        for block in self.moe_blocks():
            self._redraw(block.calculator.experts)

    def update_config(self) -> None:
        """Write the present settings of gates and calculators into the config."""
        blocks = list(self.moe_blocks())
        gate, calculator = blocks[0].gate, blocks[0].calculator
        self.config.num_selects = together([block.gate.num_selects for block in blocks])
        for name in (
            "use_softmax",
            "use_balance",
            "balance_loss_weight",
            "add_noise",
            "noise_epsilon",
        ):
            setattr(self.config, f"gate_{name}", getattr(gate, name))
        for name in ("multiply_gate_scores", "drop_tokens", "dropped_padding", "capacity_factor"):
            setattr(self.config, name, getattr(calculator, name))
        scales = [block.calculator.score_scale_factor for block in blocks]
        self.config.score_scale_factor = scales[0] if len(set(scales)) == 1 else scales

    def _set_gates(self, name: str, value: Any, *, field: str | None = None) -> None:
        for block in self.moe_blocks():
            setattr(block.gate, name, value)
        setattr(self.config, field or f"gate_{name}", value)

    def _set_calculators(self, name: str, value: Any) -> None:
        for block in self.moe_blocks():
            setattr(block.calculator, name, value)
        setattr(self.config, name, value)

    def _redraw(self, module: nn.Module) -> None:
        for part in module.modules():
            for parameter in part.parameters(recurse=False):
                parameter._is_hf_initialized = False
            self._init_weights(part)


class LlamaMoEModel(LlamaMoEPreTrainedModel):
    """The decoder without a head: token ids or embeddings to hidden states and statistics."""

    layer_class: ClassVar[type[LlamaMoEDecoderLayer]] = LlamaMoEDecoderLayer

    def __init__(self, config: LlamaMoEConfig) -> None:
        super().__init__(config)
        config.check_selects()  # it may have been changed since the config was made
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [self.layer_class(config, layer) for layer in range(config.num_hidden_layers)]
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
        output_gate_stats: bool = True,
        **kwargs: Any,
    ) -> LlamaMoEModelOutput:
        """Run the decoder.

        Give `input_ids` [B, S] or `inputs_embeds` [B, S, D], not both. `attention_mask` [B, past +
        S]: 1 for tokens, 0 for padding on either side (a prepared 4-D mask is passed on as it is;
        all tokens then count in the statistics). `position_ids` [B, S]. `output_gate_stats=False`
        skips balance loss, load and importance. Also takes `output_hidden_states`,
        `output_attentions`, `return_dict`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        given_positions = position_ids
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen
            position_ids = position_ids.unsqueeze(0)
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits

        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            # Only positions of the caller's can mark packed sequences; looking for those in ours
            # would make a GPU wait.
            position_ids=given_positions,
        )
        valid_T = None if self.config.count_padding else valid_tokens(attention_mask, inputs_embeds)
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
                statistics=output_gate_stats,
                **kwargs,
            )
            reports.append(report)
        logits, balance_losses, dropped, loads, importances = zip(*reports, strict=True)
        balance_loss = None
        if output_gate_stats:
            balance_loss = sum(loss.to(hidden_states.device) for loss in balance_losses)
        return LlamaMoEModelOutput(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values,
            balance_loss=balance_loss,
            num_dropped_tokens=dropped,
            gate_load=loads if output_gate_stats else None,
            gate_importance=importances if output_gate_stats else None,
            router_logits=logits if output_router_logits else None,
        )


class LlamaMoEForCausalLM(LlamaMoEPreTrainedModel, GenerationMixin):
    """The language model: next-token logits, generation, and the balance loss in its loss."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    model_class: ClassVar[type[LlamaMoEModel]] = LlamaMoEModel

    def __init__(self, config: LlamaMoEConfig) -> None:
        super().__init__(config)
        self.model = self.model_class(config)
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
        output_gate_stats: bool = True,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> LlamaMoECausalLMOutput:
        """Run the model; arguments not named here are those of `LlamaMoEModel.forward`.

        `labels` [B, S], -100 where there is no target, shifted inside. The loss is cross entropy
        plus balance loss. With `num_items_in_batch` (targets of a whole optimizer step, as
        transformers' Trainer passes it) both are this call's share of the step's mean: the balance
        loss is weighted by this call's share of the targets, so the sum over micro-batches does not
        grow with their number. `balance_loss` in the output is never scaled. `logits_to_keep`: only
        the last n positions' logits (0: all), or the positions of an index tensor.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            output_gate_stats=output_gate_stats or labels is not None,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = lm_loss = None
        if labels is not None:
            lm_loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
            share = share_of_step(labels, kwargs.get("num_items_in_batch"))
            loss = lm_loss + (outputs.balance_loss * share).to(lm_loss.device)
        return LlamaMoECausalLMOutput(
            loss=loss, logits=logits, lm_loss=lm_loss, **_carried(outputs)
        )

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As transformers does; generation reads no statistics, so they are not computed."""
        return {
            **super().prepare_inputs_for_generation(*args, **kwargs),
            "output_gate_stats": False,
        }


def _carried(outputs: LlamaMoEModelOutput) -> dict[str, Any]:
    """What a head passes on from the decoder."""
    return {key: value for key, value in outputs.items() if key != "last_hidden_state"}


class LlamaMoEForSequenceClassification(LlamaMoEPreTrainedModel):
    """Class scores of a sequence, read at its last token that is not padding."""

    model_class: ClassVar[type[LlamaMoEModel]] = LlamaMoEModel

    def __init__(self, config: LlamaMoEConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels or 0
        self.model = self.model_class(config)
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
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> LlamaMoESequenceClassifierOutput:
        """Classify; the arguments not named here are those of `LlamaMoEModel.forward`.

        `labels` [B] (int: cross entropy; float with one label: squared error) or [B, num_labels]
        (float). The last token is the last 1 of `attention_mask`, else the last id that is not
        `pad_token_id`, else the last position; padding may be on either side.
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
        hidden = outputs.last_hidden_state
        last_B = last_tokens(
            input_ids, attention_mask, hidden, pad_token_id=self.config.pad_token_id
        )
        pooled = self.score(hidden[torch.arange(len(hidden), device=hidden.device), last_B])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=pooled, labels=labels, pooled_logits=pooled, config=self.config
            )
            loss = loss + outputs.balance_loss.to(loss.device)
        return LlamaMoESequenceClassifierOutput(loss=loss, logits=pooled, **_carried(outputs))


class LlamaMoEForQuestionAnswering(LlamaMoEPreTrainedModel):
    """Start and end scores of an answer's span, for every position."""

    model_class: ClassVar[type[LlamaMoEModel]] = LlamaMoEModel

    def __init__(self, config: LlamaMoEConfig) -> None:
        super().__init__(config)
        self.model = self.model_class(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> LlamaMoEQuestionAnsweringOutput:
        """Find spans; the arguments not named here are those of `LlamaMoEModel.forward`.

        `start_positions`, `end_positions` [B]; a position past the sequence is ignored. The loss
        needs both.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            output_router_logits=output_router_logits,
            return_dict=True,
            **kwargs,
        )
        start_BS, end_BS = self.qa_outputs(outputs.last_hidden_state).unbind(dim=-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_BS, end_BS, start_positions, end_positions, **kwargs)
            loss = loss + outputs.balance_loss.to(loss.device)
        carried = _carried(outputs)
        carried.pop("past_key_values", None)
        return LlamaMoEQuestionAnsweringOutput(
            loss=loss,
            start_logits=start_BS.contiguous(),
            end_logits=end_BS.contiguous(),
            **carried,
        )
