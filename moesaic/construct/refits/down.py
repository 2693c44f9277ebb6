"""The refit `down`: ridge regression of the down projection on what the experts' neurons give."""

from __future__ import annotations

import torch
from pydantic import Field

from moesaic.construct.free.ridge import STRENGTHS, Moments, solve
from moesaic.construct.refit import Refit, RefitInputs
from moesaic.construct.refits import REFITS
from moesaic.core.console import note

_PART = 8192
ENOUGH = 16
"""Tokens a neuron below which the refit is warned about."""


@REFITS.register
class Down(Refit):
    """Fit W_down so that the chosen experts give what the whole dense layer gives.

    Ridge towards the weights as they are; the strength is chosen on an eighth of the tokens, held
    back, and the fit is left out where no strength helps there. `blend` moves the target from the
    dense layer's output on the converted model's own inputs (0) to the residual stream of the
    dense model (1), which also makes up for what earlier layers lost.
    """

    blend: float = Field(default=0.75, ge=0, le=1)
    """Part of the way from the layer's own target to the dense model's stream."""
    strengths: tuple[float, ...] = STRENGTHS
    """Ridge strengths tried, in units of the mean square of a neuron."""

    def solve(self, inputs: RefitInputs) -> torch.Tensor:
        """The new down projection, [P, D]."""
        target_TD = torch.lerp(inputs.own_TD, inputs.full_TD, self.blend)
        neurons, hidden = inputs.down_PD.shape
        if inputs.tokens < ENOUGH * neurons and inputs.layer == 0:
            note(
                f"refit: {inputs.tokens:,} calibration tokens for {neurons:,} neurons a layer; "
                f"under {ENOUGH * neurons:,} the refit may overfit. Give more text or tokens."
            )
        fitted, held = (Moments(neurons, hidden, device=target_TD.device) for _ in range(2))
        for start in range(0, inputs.tokens, _PART):
            part = slice(start, min(start + _PART, inputs.tokens))
            h_TP, y_TD, held_T = inputs.features(part), target_TD[part], inputs.held_T[part]
            fitted.add(h_TP[~held_T], y_TD[~held_T])
            held.add(h_TP[held_T], y_TD[held_T])
        found = solve(fitted, held, start_PQ=inputs.down_PD, strengths=self.strengths)
        inputs.facts["refit"] = {
            "strength": found.strength if found.strength < float("inf") else None,
            "missed_before": found.missed_before,
            "missed_after": found.missed_after,
        }
        return found.weights_PQ
