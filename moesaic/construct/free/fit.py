"""A linear router for experts' energies by ridge regression.

Notation: T tokens, D hidden size, E experts, K chosen; e_TE the energy of each expert's output.
"""

from __future__ import annotations

import torch

from moesaic.construct.free.ridge import Factors, Moments, solve

__all__ = ["RouterFit", "captured", "choose"]


class RouterFit:
    """Fits of routers on the same tokens; the inputs' moments are made once."""

    strengths = (1e-6, 1e-4, 1e-2, 1.0)

    def __init__(self, x_TD: torch.Tensor, held_T: torch.Tensor, *, intercept: bool = True) -> None:
        self.intercept = intercept
        ones_T1 = x_TD.new_ones(len(x_TD), 1)
        self.x_TP = torch.cat([x_TD, ones_T1], dim=1) if intercept else x_TD
        self._parts = [~held_T, held_T]
        self._inputs = [self.x_TP[part] for part in self._parts]
        self._squares = [x.T @ x for x in self._inputs]
        self._factors: Factors = {}

    def log_energy(self, energy_TE: torch.Tensor) -> torch.Tensor:
        """Weights [D + 1, E] that predict log energies; the last row is the intercept.

        Without it, [D, E], they predict how far each expert's is from the mean of a token's: the
        choice is the same, and there is no level to be told by the inputs.
        """
        floor = 1e-3 * float(energy_TE.mean()) + 1e-30
        logs_TE = (energy_TE + floor).log()
        return self.targets(logs_TE if self.intercept else logs_TE - logs_TE.mean(1, keepdim=True))

    def targets(self, target_TE: torch.Tensor) -> torch.Tensor:
        """Weights [D + 1, E] that predict any targets."""
        made = []
        for part, x_TP, xx_PP in zip(self._parts, self._inputs, self._squares, strict=True):
            y_TE = target_TE[part]
            moments = Moments(x_TP.shape[1], y_TE.shape[1], len(x_TP), device=x_TP.device)
            moments.xx_PP, moments.xy_PQ = xx_PP, x_TP.T @ y_TE
            moments.yy = float(y_TE.square().sum())
            made.append(moments)
        return solve(*made, strengths=self.strengths, factors=self._factors).weights_PQ

    def chosen(self, weights_PE: torch.Tensor, top_k: int) -> torch.Tensor:
        """1 for the experts that a router chooses, else 0: [T, E]."""
        return choose(self.x_TP @ weights_PE, top_k)


def choose(scores_TE: torch.Tensor, top_k: int) -> torch.Tensor:
    """1 for the top_k scores of every token, else 0: [T, E]."""
    return torch.zeros_like(scores_TE).scatter_(1, scores_TE.topk(top_k, dim=1).indices, 1.0)


def captured(energy_TE: torch.Tensor, chosen_TE: torch.Tensor) -> float:
    """Share of the routed experts' energy that the chosen ones have."""
    total = float(energy_TE.sum())
    return float((energy_TE * chosen_TE).sum()) / total if total else 1.0
