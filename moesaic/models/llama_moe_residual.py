"""LLaMA-MoE with residual experts: some run on every token, the others behind a gate.

Source: arXiv 2406.16554 (shared experts) and the original program.

y = routed(x) + residual(x). The residual experts have a linear gate that mixes all of them with a
softmax; with one residual expert its weight is 1. Made by the Sharing-Inter split; stored as
`mlp.moe_layer.*` and `mlp.residual_block.*`.

Notation: as in llama_moe; R residual experts.
"""

# transformers' base classes are untyped
# mypy: disable-error-code="no-untyped-call, misc"

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from moesaic.core.errors import UserError
from moesaic.models.calculators import UniformCalculator
from moesaic.models.expert_weights import layer_of
from moesaic.models.gates import UniformLearnableGate
from moesaic.models.llama_moe import (
    BlockOutput,
    LlamaMoEBlock,
    LlamaMoEConfig,
    LlamaMoEDecoderLayer,
    LlamaMoEForCausalLM,
    LlamaMoEForQuestionAnswering,
    LlamaMoEForSequenceClassification,
    LlamaMoEModel,
    check_expert_sizes,
    make_experts,
)


class LlamaMoEResidualConfig(LlamaMoEConfig):
    """Shape and routing of a LLaMA-MoE with residual experts, with the original names and defaults.

    The fields of LlamaMoEConfig describe the routed experts, whose widths sum to
    `intermediate_size_moe` in each layer; the fields that end in `_residual` describe the others.
    `intermediate_size` is only informative.
    """

    model_type = "llama_moe_residual"

    intermediate_size_moe: int = 9632
    intermediate_size_residual: int = 1376
    num_experts: int = 14
    num_selects: int | list[int] = 2
    num_experts_residual: int = 2
    size_experts_residual: list[list[int]] | None = None
    """Width of each residual expert of each layer, [L][R]; None: all equal."""
    gate_use_softmax_residual: bool = True
    multiply_gate_scores_residual: bool = True
    score_scale_factor_residual: float | int = 1.0
    use_weighting: bool = False
    """Weight the two parts by the softmax of a learned linear map D -> 2 instead of adding them."""

    def _check(self) -> None:
        super()._check()
        if self.num_experts_residual < 1:
            raise UserError(
                f"num_experts_residual={self.num_experts_residual}; a residual model has some. "
                "Use llama_moe for a model without residual experts."
            )
        check_expert_sizes(
            self,
            "size_experts_residual",
            self.num_experts_residual,
            self.intermediate_size_residual,
        )

    def _routed_width(self) -> int:
        return self.intermediate_size_moe

    def residual_sizes(self, layer: int) -> tuple[int, ...]:
        """Widths of the residual experts of a layer."""
        if self.size_experts_residual is not None:
            return tuple(self.size_experts_residual[layer])
        width = self.intermediate_size_residual // self.num_experts_residual
        return (width,) * self.num_experts_residual

    def expert_sizes(self, block: str | int) -> tuple[int, ...]:
        """Widths of a block's experts; in a name, `residual_block` means the residual ones."""
        if isinstance(block, str) and "residual_block." in block:
            return self.residual_sizes(layer_of(block))
        return super().expert_sizes(block)


class ResidualBlock(nn.Module):
    """The experts that run on every token."""

    def __init__(self, config: LlamaMoEResidualConfig, layer_idx: int) -> None:
        super().__init__()
        sizes = config.residual_sizes(layer_idx)
        self.gate = UniformLearnableGate(
            config.hidden_size,
            len(sizes),
            len(sizes),
            network="linear",
            use_softmax=config.gate_use_softmax_residual,
            use_balance=False,
            add_noise=False,
        )
        self.calculator = UniformCalculator(
            make_experts(config, sizes),
            multiply_gate_scores=config.multiply_gate_scores_residual,
            score_scale_factor=float(config.score_scale_factor_residual),
            bias_size=config.hidden_size if config.mlp_bias else None,
        )

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """Map x [B, S, D] to its residual experts' weighted sum, same shape."""
        x_TD = x_BSD.flatten(0, -2)
        decision = self.gate(x_TD, statistics=False)
        y_TD, _ = self.calculator(x_TD, decision.ids, decision.weights)
        y_BSD: torch.Tensor = y_TD.view_as(x_BSD)
        return y_BSD


class LlamaMoEResidualBlock(nn.Module):
    """The feed-forward layer: routed experts plus residual experts."""

    def __init__(self, config: LlamaMoEResidualConfig, layer_idx: int) -> None:
        super().__init__()
        self.moe_layer = LlamaMoEBlock(config, layer_idx)
        self.residual_block = ResidualBlock(config, layer_idx)
        self.weighting_network = (
            nn.Sequential(nn.Linear(config.hidden_size, 2, bias=False), nn.Softmax(dim=-1))
            if config.use_weighting
            else None
        )

    @property
    def routed(self) -> LlamaMoEBlock:
        """The part that the model's setters act on."""
        return self.moe_layer

    def forward(
        self, x_BSD: torch.Tensor, valid_T: torch.Tensor | None = None, statistics: bool = True
    ) -> BlockOutput:
        """Route and compute; the report is that of the routed part."""
        routed, decision, num_dropped = self.moe_layer(x_BSD, valid_T, statistics)
        residual = self.residual_block(x_BSD)
        if self.weighting_network is not None:
            part_BS2 = self.weighting_network(x_BSD)
            routed, residual = routed * part_BS2[..., :1], residual * part_BS2[..., 1:]
        return BlockOutput(routed + residual, decision, num_dropped)


class LlamaMoEResidualDecoderLayer(LlamaMoEDecoderLayer):
    """Attention and the routed-plus-residual block."""

    block_class = LlamaMoEResidualBlock


class LlamaMoEResidualModel(LlamaMoEModel):
    """The decoder without a head."""

    config: LlamaMoEResidualConfig
    config_class = LlamaMoEResidualConfig
    layer_class = LlamaMoEResidualDecoderLayer
    _no_split_modules: ClassVar[list[str]] = ["LlamaMoEResidualDecoderLayer"]


class LlamaMoEResidualForCausalLM(LlamaMoEForCausalLM):
    """The language model."""

    config: LlamaMoEResidualConfig
    config_class = LlamaMoEResidualConfig
    model_class = LlamaMoEResidualModel
    _no_split_modules: ClassVar[list[str]] = ["LlamaMoEResidualDecoderLayer"]


class LlamaMoEResidualForSequenceClassification(LlamaMoEForSequenceClassification):
    """Class scores of a sequence."""

    config: LlamaMoEResidualConfig
    config_class = LlamaMoEResidualConfig
    model_class = LlamaMoEResidualModel
    _no_split_modules: ClassVar[list[str]] = ["LlamaMoEResidualDecoderLayer"]


class LlamaMoEResidualForQuestionAnswering(LlamaMoEForQuestionAnswering):
    """Start and end scores of an answer's span."""

    config: LlamaMoEResidualConfig
    config_class = LlamaMoEResidualConfig
    model_class = LlamaMoEResidualModel
    _no_split_modules: ClassVar[list[str]] = ["LlamaMoEResidualDecoderLayer"]
