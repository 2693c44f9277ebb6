"""Ridge regression from moments, its strength chosen on tokens that were held back.

Notation: T tokens, P inputs, Q outputs, x_TP inputs, y_TQ targets; the weights are w_PQ in y ≈ x w.
Only the moments xᵀx [P, P] and xᵀy [P, Q] are kept, so tokens may come in parts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from moesaic.core.errors import UserError

__all__ = ["STRENGTHS", "Moments", "Solution", "solve"]

STRENGTHS = (1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 10.0)
"""Ridge strengths tried, in units of the mean diagonal of xᵀx."""


@dataclass
class Moments:
    """Sums over tokens: xᵀx, xᵀy, and the sum of y² (what a prediction of zero misses)."""

    inputs: int
    outputs: int
    tokens: int = 0
    device: torch.device | str = "cpu"
    xx_PP: torch.Tensor = field(init=False)
    xy_PQ: torch.Tensor = field(init=False)
    yy: float = 0.0

    def __post_init__(self) -> None:
        self.xx_PP = torch.zeros(self.inputs, self.inputs, device=self.device)
        self.xy_PQ = torch.zeros(self.inputs, self.outputs, device=self.device)

    def add(self, x_TP: torch.Tensor, y_TQ: torch.Tensor) -> None:
        """Count these tokens."""
        self.tokens += len(x_TP)
        self.xx_PP.addmm_(x_TP.T, x_TP)
        self.xy_PQ.addmm_(x_TP.T, y_TQ)
        self.yy += float(y_TQ.square().sum())

    def __add__(self, other: Moments) -> Moments:
        both = Moments(self.inputs, self.outputs, self.tokens + other.tokens, self.device)
        both.xx_PP = self.xx_PP + other.xx_PP
        both.xy_PQ = self.xy_PQ + other.xy_PQ
        both.yy = self.yy + other.yy
        return both

    def error(self, w_PQ: torch.Tensor) -> float:
        """Sum of squared errors of the prediction x w on these tokens."""
        explained = (w_PQ * (2 * self.xy_PQ - self.xx_PP @ w_PQ)).double().sum()
        return max(0.0, self.yy - float(explained))


@dataclass(frozen=True)
class Solution:
    """Weights, the strength chosen, and the share of the held-back squares that they miss."""

    weights_PQ: torch.Tensor
    strength: float
    missed_before: float
    missed_after: float


def solve(
    fitted: Moments,
    held: Moments,
    *,
    start_PQ: torch.Tensor | None = None,
    strengths: tuple[float, ...] = STRENGTHS,
) -> Solution:
    """Fit on `fitted`, choose the strength by the error on `held`, then fit on both.

    The weights shrink towards `start_PQ` (zero by default). When no strength beats the start on the
    held-back tokens, the start is returned with strength infinity. UserError for moments that are
    not finite, as those of activations that overflowed.
    """
    start_PQ = torch.zeros_like(fitted.xy_PQ) if start_PQ is None else start_PQ
    for name, value in (("inputs", fitted.xx_PP), ("targets", fitted.xy_PQ)):
        if not bool(torch.isfinite(value).all()):
            raise UserError(
                f"The calibration {name} hold NaN or infinite values, so that their Gram matrix is "
                "not positive definite. Repair the checkpoint, or calibrate on other text."
            )
    # Divided by the tokens, so that a strength means the same on a part and on the whole.
    values_P, vectors_PP = torch.linalg.eigh(fitted.xx_PP.double() / max(1, fitted.tokens))
    scale = float(values_P.clamp(min=0).mean())
    rest_PQ = fitted.xy_PQ.double() / max(1, fitted.tokens)
    rest_PQ = rest_PQ - (fitted.xx_PP.double() / max(1, fitted.tokens)) @ start_PQ.double()
    turned_PQ = vectors_PP.T @ rest_PQ
    before = held.error(start_PQ)
    best = (before, float("inf"), start_PQ)
    for strength in strengths if scale > 0 else ():
        damped_P1 = (values_P.clamp(min=0) + strength * scale)[:, None]
        w_PQ = start_PQ + (vectors_PP @ (turned_PQ / damped_P1)).float()
        error = held.error(w_PQ)
        if error < best[0]:
            best = (error, strength, w_PQ)
    error, strength, w_PQ = best
    missed = (before / max(held.yy, 1e-30), error / max(held.yy, 1e-30))
    if strength < float("inf") and held is not fitted:
        both = fitted + held
        matrix_PP = both.xx_PP.double() / both.tokens
        rest_PQ = both.xy_PQ.double() / both.tokens - matrix_PP @ start_PQ.double()
        matrix_PP.diagonal().add_(strength * scale)
        w_PQ = start_PQ + torch.linalg.solve(matrix_PP, rest_PQ).float()
    return Solution(w_PQ, strength, *missed)
