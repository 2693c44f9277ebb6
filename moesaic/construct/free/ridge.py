"""Ridge regression from moments, its strength chosen on tokens that were held back.

Notation: T tokens, P inputs, Q outputs, x_TP inputs, y_TQ targets; the weights are w_PQ in y ≈ x w.
Only the moments xᵀx [P, P] and xᵀy [P, Q] are kept, so tokens may come in parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from moesaic.core.errors import UserError

__all__ = ["STRENGTHS", "Factors", "Moments", "Solution", "regress", "solve"]

Factors = dict[tuple[int, float], torch.Tensor]
"""Cholesky factors by the number of tokens and the damping."""

STRENGTHS = (1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 10.0)
"""Ridge strengths tried, in units of the mean diagonal of xᵀx."""
_PART = 8192


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
    factors: Factors | None = None,
) -> Solution:
    """Fit on `fitted`, choose the strength by the error on `held`, then fit on both.

    The weights shrink towards `start_PQ` (zero by default). When no strength beats the start on the
    held-back tokens, the start is returned with strength infinity. `factors` keeps the Cholesky
    factors for other targets of the same inputs.

    Raises UserError for moments that are not finite, as those of activations that overflowed, and
    for a Gram matrix that is not positive definite at any strength.
    """
    for name, value in (("inputs", fitted.xx_PP), ("targets", fitted.xy_PQ)):
        if not bool(torch.isfinite(value).all()):
            raise UserError(
                f"The calibration {name} hold NaN or infinite values, so that their Gram matrix is "
                "not positive definite. Repair the checkpoint, or calibrate on other text."
            )
    scale = float(fitted.xx_PP.diagonal().double().mean()) / max(1, fitted.tokens)
    w_PQ = torch.zeros_like(fitted.xy_PQ) if start_PQ is None else start_PQ
    before = held.error(w_PQ)
    error, strength = before, float("inf")
    ridge = _Ridge([fitted], start_PQ, factors)
    solved = 0
    for candidate in strengths if scale > 0 else ():
        tried_PQ = ridge.weights(candidate * scale)
        if tried_PQ is None:  # rounding in float32 outweighs so little damping
            continue
        solved += 1
        missed = held.error(tried_PQ)
        if missed < error:
            error, strength, w_PQ = missed, candidate, tried_PQ
    if strengths and scale > 0 and not solved:
        raise UserError(
            f"The Gram matrix of {fitted.tokens:,} calibration tokens and "
            f"{fitted.inputs:,} inputs is not positive definite, even with a ridge of "
            f"{max(strengths):g} times its mean diagonal. Give more or other calibration text, or "
            "a larger strength."
        )
    share = (before / max(held.yy, 1e-30), error / max(held.yy, 1e-30))
    if strength < float("inf") and held is not fitted:
        del ridge
        both_PQ = _Ridge([fitted, held], start_PQ, factors).weights(strength * scale)
        w_PQ = w_PQ if both_PQ is None else both_PQ
    return Solution(w_PQ, strength, *share)


def regress(
    x_TP: torch.Tensor,
    y_TQ: torch.Tensor,
    held_T: torch.Tensor,
    *,
    start_PQ: torch.Tensor,
    strengths: tuple[float, ...] = STRENGTHS,
) -> Solution:
    """`solve` on tokens that are all there; `held_T` marks those that choose the strength."""
    sizes = (x_TP.shape[1], y_TQ.shape[1])
    fitted, held = (Moments(*sizes, device=x_TP.device) for _ in range(2))
    parts = (whole.split(_PART) for whole in (x_TP, y_TQ, held_T))
    for some_x_TP, some_y_TQ, back_T in zip(*parts, strict=True):
        fitted.add(some_x_TP[~back_T], some_y_TQ[~back_T])
        held.add(some_x_TP[back_T], some_y_TQ[back_T])
    return solve(fitted, held, start_PQ=start_PQ, strengths=strengths)


class _Ridge:
    """The normal equations of some tokens, divided by their number: a strength then means the
    same on a part and on the whole.
    """

    def __init__(
        self,
        parts: Sequence[Moments],
        start_PQ: torch.Tensor | None,
        factors: Factors | None,
    ) -> None:
        self.parts, self.start_PQ, self.factors = parts, start_PQ, factors
        self.tokens = max(1, sum(part.tokens for part in parts))
        # float64: the squares of a Gram matrix's condition are beyond float32
        self.rest_PQ = _sum([part.xy_PQ for part in parts]).div_(self.tokens)
        if start_PQ is not None:
            self.rest_PQ -= self.matrix_PP @ start_PQ.double()

    @cached_property
    def matrix_PP(self) -> torch.Tensor:
        """xᵀx; not made where no start and no new factor asks for it."""
        return _sum([part.xx_PP for part in self.parts]).div_(self.tokens)

    def weights(self, damping: float) -> torch.Tensor | None:
        """The solution with `damping` on the diagonal; None where that is not positive definite."""
        key = (self.tokens, damping)
        factor_PP = None if self.factors is None else self.factors.get(key)
        if factor_PP is None:
            damped_PP = self.matrix_PP.clone()
            damped_PP.diagonal().add_(damping)
            factor_PP, failed = torch.linalg.cholesky_ex(damped_PP)
            if bool(failed):
                return None
            if self.factors is not None:
                self.factors[key] = factor_PP
        found_PQ = torch.cholesky_solve(self.rest_PQ, factor_PP).float()
        return found_PQ if self.start_PQ is None else self.start_PQ + found_PQ


def _sum(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """A new tensor in float64."""
    total = parts[0].to(torch.float64, copy=True)
    for part in parts[1:]:
        total += part
    return total
