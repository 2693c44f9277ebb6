"""The weighting `tempered`: weight 1 at conversion, and a router that can say more in training."""

from __future__ import annotations

from typing import Any

from moesaic.construct.weighting import Weighting
from moesaic.construct.weightings import WEIGHTINGS


@WEIGHTINGS.register
class Tempered(Weighting):
    """Weight 1 at conversion; in training K times a softmax whose temperature is learned.

    At conversion nothing is weighed, so all experts on are the dense model; in training each
    expert's exponent leaves zero (`gates.tempered`). No noise: it would undo a fitted router.
    """

    def fields(self, *, routed: int, selects: int) -> dict[str, Any]:
        """Fields of the config."""
        return {
            "gate_weighting": "tempered",
            "multiply_gate_scores": True,
            "score_scale_factor": 1.0,
            "gate_add_noise": False,
        }
