"""Calculators of LLaMA-MoE: run the chosen experts on each token and add up what they give.

Source: LLaMA-MoE (arXiv 2406.16554) section 3; capacity from Switch Transformers (arXiv
2101.03961). The product score * scale goes into the routing weights, so every experts
implementation of transformers applies.

Notation: T tokens, D hidden size, E experts, K chosen experts of a token.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from moesaic.core.errors import UserError, unknown
from moesaic.models.randomness import Randomness

DroppedPadding = Literal["zero", "input"]


class WeightNorm(nn.Module):
    """One learned number that takes the place of the constant scale factor; starts there."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.full((1,), scale))


class UniversalCalculator(nn.Module):
    """Add up score * scale * expert(x) of the chosen experts; without scores, the plain sum.

    `experts` is a module called as `experts(x_TD, ids_TK, weights_TK)`. `add_weight_norm` makes the
    scale a learned scalar; it needs `multiply_gate_scores`. `bias_size=D` adds one learned vector
    to every token's sum: the bias of the dense model's down projection, which belongs to no neuron.
    """

    def __init__(
        self,
        experts: nn.Module,
        *,
        multiply_gate_scores: bool = True,
        score_scale_factor: float = 1.0,
        add_weight_norm: bool = False,
        drop_tokens: bool = True,
        dropped_padding: DroppedPadding = "zero",
        capacity_factor: float = 1.25,
        bias_size: int | None = None,
    ) -> None:
        super().__init__()
        if dropped_padding not in ("zero", "input"):
            raise unknown("dropped_padding", str(dropped_padding), ("zero", "input"))
        self.experts = experts
        self.multiply_gate_scores = multiply_gate_scores
        self.score_scale_factor = score_scale_factor
        self.drop_tokens = drop_tokens
        self.dropped_padding = dropped_padding
        self.capacity_factor = capacity_factor
        self.randomness = Randomness()
        learned = multiply_gate_scores and add_weight_norm
        self.mlp_norm = WeightNorm(score_scale_factor) if learned else None
        self.bias_down = None if bias_size is None else nn.Parameter(torch.zeros(bias_size))

    def forward(
        self,
        x_TD: torch.Tensor,
        ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        valid_T: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return y_TD and the number of dropped tokens: -1, since this calculator never drops."""
        y_TD = self.experts(x_TD, ids_TK, self._scaled(weights_TK))
        return self._with_bias(y_TD), _nothing_to_drop(ids_TK)

    def _scaled(self, weights_TK: torch.Tensor) -> torch.Tensor:
        if not self.multiply_gate_scores:
            return torch.ones_like(weights_TK)
        if self.mlp_norm is not None:
            return weights_TK * self.mlp_norm.weight.to(weights_TK.dtype)
        return weights_TK * self.score_scale_factor

    def _with_bias(self, y_TD: torch.Tensor) -> torch.Tensor:
        return y_TD if self.bias_down is None else y_TD + self.bias_down

    def extra_repr(self) -> str:
        return f"multiply_gate_scores={self.multiply_gate_scores}, scale={self.score_scale_factor}"


class UniformCalculator(UniversalCalculator):
    """Every expert on every token: for the uniform gates, which choose all of them."""

    def forward(
        self,
        x_TD: torch.Tensor,
        ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        valid_T: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As UniversalCalculator.forward, with K = E."""
        experts = int(self.experts.num_experts)  # type: ignore[arg-type]
        if ids_TK.shape[1] != experts:
            raise UserError(
                f"UniformCalculator got {ids_TK.shape[1]} of {experts} experts a token; it runs "
                "all of them. Use a uniform gate, or calculator_type='UniversalCalculator'."
            )
        return super().forward(x_TD, ids_TK, weights_TK, valid_T)


class SwitchDropTokenCalculator(UniversalCalculator):
    """One expert a token, at most int(capacity_factor * T / E) tokens an expert, the rest dropped.

    Which tokens of an over-full expert are kept is random. A dropped token gives zero, or its input
    with `dropped_padding="input"`, times score * scale like the others. Padding takes no capacity
    and is not counted.
    """

    def forward(
        self,
        x_TD: torch.Tensor,
        ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        valid_T: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return y_TD and the number of dropped tokens of all experts (-1 when dropping is off)."""
        if ids_TK.shape[1] != 1:
            raise UserError(
                f"SwitchDropTokenCalculator got {ids_TK.shape[1]} experts a token; it takes 1. "
                "Use SwitchBalancedGate or num_selects=1."
            )
        weights_T1 = self._scaled(weights_TK)
        if not self.drop_tokens:
            y_TD = self.experts(x_TD, ids_TK, weights_T1)
            return self._with_bias(y_TD), _nothing_to_drop(ids_TK)
        dropped_T = self._dropped(ids_TK[:, 0], valid_T)
        kept_T1 = ~dropped_T[:, None]
        y_TD = self.experts(x_TD, ids_TK, weights_T1 * kept_T1)
        if self.dropped_padding == "input":
            y_TD = torch.where(kept_T1, y_TD, x_TD * weights_T1)
        return self._with_bias(y_TD), dropped_T.sum()

    def _dropped(self, ids_T: torch.Tensor, valid_T: torch.Tensor | None) -> torch.Tensor:
        """Which tokens are over their expert's capacity: bool [T], decided in a random order of the
        tokens.
        """
        experts = int(self.experts.num_experts)  # type: ignore[arg-type]
        if valid_T is None:
            tokens = torch.full((), len(ids_T), device=ids_T.device)
        else:
            tokens = valid_T.sum()
            ids_T = torch.where(valid_T, ids_T, experts)  # padding queues at an expert of its own
        capacity = (self.capacity_factor * tokens.double() / experts).floor()
        order_T = self.randomness.permutation(len(ids_T), ids_T.device)
        by_expert_T = order_T[ids_T[order_T].argsort(stable=True)]
        sorted_T = ids_T[by_expert_T].contiguous()
        place_T = torch.arange(len(ids_T), device=ids_T.device)
        rank_T = place_T - torch.searchsorted(sorted_T, sorted_T)
        over_T = (rank_T >= capacity) & (sorted_T < experts)
        return torch.zeros_like(over_T).scatter(0, by_expert_T, over_T)


CALCULATORS: dict[str, type[UniversalCalculator]] = {
    calculator.__name__: calculator
    for calculator in (UniversalCalculator, UniformCalculator, SwitchDropTokenCalculator)
}
"""The names that a config's `calculator_type` may have (those of the original program)."""


def _nothing_to_drop(ids_TK: torch.Tensor) -> torch.Tensor:
    return torch.full((), -1, device=ids_TK.device)
