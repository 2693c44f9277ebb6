"""The weighting `one`: a chosen expert counts once, as its neurons did in the dense model."""

from __future__ import annotations

from typing import Any

from moesaic.construct.weighting import Weighting
from moesaic.construct.weightings import WEIGHTINGS


@WEIGHTINGS.register
class One(Weighting):
    """Weight 1 at conversion, 1 + u_e * s_e in training: s softmax over all experts, u from zero.

    CMoE's (arXiv 2502.04416). Nothing is renormalised, so all experts on are the dense model. No
    noise: it would undo a fitted router.
    """

    def fields(self, *, routed: int, selects: int) -> dict[str, Any]:
        """Fields of the config."""
        return {
            "gate_weighting": "one",
            "multiply_gate_scores": True,
            "score_scale_factor": 1.0,
            "gate_add_noise": False,
        }
