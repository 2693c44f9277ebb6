"""Layer-wise distillation: experts and router of one layer follow the dense layer's output.

No gradient leaves a layer, so nothing is trained end to end. The choice of experts is a step; its
gradient is taken straight through the router's softmax.
Notation: T tokens, D hidden size, E routed experts, I neurons of an expert, K chosen experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import Field
from torch.nn import functional

from moesaic.core.config import Config
from moesaic.core.errors import UserError

__all__ = ["Distillation", "ExpertWeights", "distil"]


class Distillation(Config):
    """Settings of `refine: layerwise`."""

    passes: float = Field(default=3.0, gt=0)
    """Passes over the calibration tokens."""
    batch: int = Field(default=4096, ge=1)
    """Tokens of a step."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Highest rate of Adam; warms up over a twentieth of the steps and falls as a cosine."""
    router_rate: float = Field(default=1e-3, gt=0)
    """The router's rate."""


_LEARNED = ("gate_EID", "up_EID", "down_EID", "router_ED", "bias_E")


@dataclass
class ExpertWeights:
    """The weights of one layer's routed experts and of their linear router."""

    gate_EID: torch.Tensor
    up_EID: torch.Tensor
    down_EID: torch.Tensor
    """Row i of expert e is its neuron's column of W_down."""
    router_ED: torch.Tensor
    bias_E: torch.Tensor
    activation: Callable[[torch.Tensor], torch.Tensor] = functional.silu
    """What follows the gate rows."""
    gate_bias_EI: torch.Tensor | None = None
    """The dense model's biases, where it has them, stay as they are."""
    up_bias_EI: torch.Tensor | None = None

    def tensors(self) -> list[torch.Tensor]:
        """What is learned, experts first."""
        return [self.gate_EID, self.up_EID, self.down_EID, self.router_ED, self.bias_E]

    def with_tensors(self, tensors: list[torch.Tensor]) -> ExpertWeights:
        """The same layer with other learned weights, in the order of `tensors`."""
        changed: dict[str, Any] = dict(zip(_LEARNED, tensors, strict=True))
        return replace(self, **changed)

    def choose(self, x_TD: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Chosen experts [T, K] and their softmax shares [T, K]."""
        shares_TE = (x_TD @ self.router_ED.T + self.bias_E).softmax(1)
        shares_TK, ids_TK = shares_TE.topk(top_k, dim=1)
        return ids_TK, shares_TK

    def forward(self, x_TD: torch.Tensor, top_k: int) -> torch.Tensor:
        """Sum of the chosen experts, weight 1 each; the router's gradient straight through."""
        ids_TK, shares_TK = self.choose(x_TD, top_k)
        weights_TK = 1 + (shares_TK - shares_TK.detach())
        flat_N = ids_TK.flatten()
        order_N = flat_N.argsort(stable=True)
        token_N = order_N // top_k
        counts = torch.bincount(flat_N, minlength=len(self.gate_EID)).tolist()
        parts = []
        for expert, rows_ND in enumerate(x_TD[token_N].split(counts)):
            gate_I = None if self.gate_bias_EI is None else self.gate_bias_EI[expert]
            up_I = None if self.up_bias_EI is None else self.up_bias_EI[expert]
            h_NI = self.activation(functional.linear(rows_ND, self.gate_EID[expert], gate_I))
            h_NI = h_NI * functional.linear(rows_ND, self.up_EID[expert], up_I)
            parts.append(h_NI @ self.down_EID[expert])
        out_ND = torch.cat(parts) * weights_TK.flatten()[order_N, None]
        return torch.zeros_like(x_TD).index_add(0, token_N, out_ND)


def distil(
    start: ExpertWeights,
    x_TD: torch.Tensor,
    target_TD: torch.Tensor,
    held_T: torch.Tensor,
    *,
    top_k: int,
    settings: Distillation,
    seed: int,
) -> tuple[ExpertWeights, dict[str, float]]:
    """Return weights whose layer is nearer to `target_TD`, and the squares missed before and after.

    The share of the target's squares that is missed is measured on the tokens held back; when it
    does not fall, the start is returned. Raises UserError when the loss is not finite.
    """
    train_N = torch.nonzero(~held_T).flatten()
    held_N = torch.nonzero(held_T).flatten()
    before = _missed(start, x_TD, target_TD, held_N, top_k)
    made = start.with_tensors([w.detach().clone().requires_grad_() for w in start.tensors()])
    *experts, router, bias = made.tensors()
    optimizer = torch.optim.Adam(
        [
            {"params": experts, "lr": settings.learning_rate},
            {"params": [router, bias], "lr": settings.router_rate},
        ],
        betas=(0.9, 0.98),
    )
    size = min(settings.batch, len(train_N))
    steps = max(1, math.ceil(settings.passes * len(train_N) / size))
    warm = max(1, steps // 20)

    def rate(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    generator = torch.Generator().manual_seed(seed)
    scale = float(target_TD.square().mean()) + 1e-30
    order: list[torch.Tensor] = []
    for _ in range(steps):
        if not order:
            mixed_N = torch.randperm(len(train_N), generator=generator).to(train_N.device)
            order = list(train_N[mixed_N].split(size))
        rows = order.pop()
        loss = (made.forward(x_TD[rows], top_k) - target_TD[rows]).square().mean() / scale
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    if not math.isfinite(float(loss.detach())):
        raise UserError(
            f"The layer-wise distillation diverged at learning_rate={settings.learning_rate}. "
            "Lower it."
        )
    found = made.with_tensors([w.detach() for w in made.tensors()])
    after = _missed(found, x_TD, target_TD, held_N, top_k)
    if after >= before:
        return start, {"missed_before": before, "missed_after": before}
    return found, {"missed_before": before, "missed_after": after}


@torch.no_grad()
def _missed(
    weights: ExpertWeights,
    x_TD: torch.Tensor,
    target_TD: torch.Tensor,
    held_N: torch.Tensor,
    top_k: int,
) -> float:
    missed = total = 0.0
    for rows in held_N.split(8192):
        y_TD = target_TD[rows]
        missed += float((weights.forward(x_TD[rows], top_k) - y_TD).square().sum())
        total += float(y_TD.square().sum())
    return missed / max(total, 1e-30)
