"""The weighting `softmax`: LLaMA-MoE's, a softmax over the chosen experts times a factor."""

from __future__ import annotations

from typing import Any, Literal

from moesaic.construct.weighting import Weighting
from moesaic.construct.weightings import WEIGHTINGS
from moesaic.core.errors import UserError


@WEIGHTINGS.register
class Softmax(Weighting):
    """The chosen experts' softmax times `scale`, as LLaMA-MoE v1 and v2 are released."""

    scale: float | Literal["auto"] = "auto"
    """Factor on the weighted sum; "auto" is experts / chosen, as in the released models."""

    def fields(self, *, routed: int, selects: int) -> dict[str, Any]:
        """Fields of the config."""
        scale = routed / selects if self.scale == "auto" else self.scale
        if not 0 < scale < float("inf"):
            raise UserError(f"scale={scale} was given. Use a positive number, or auto.")
        return {"gate_weighting": "scores", "score_scale_factor": scale}
