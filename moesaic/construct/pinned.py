"""Always-on experts whose number differs by layer, in models whose layers are of one shape.

Every layer keeps all E experts behind its router and uses K of them; the always-on ones have logits
above any of the others, so that they are among the K for every token. With weights of 1 that is the
sum of a layer's n shared experts and the best K - n of the rest (arXiv 2602.15521, section 3.2).
Notation: T tokens, D hidden size, E experts of which the first n are always on.
"""

from __future__ import annotations

import torch

from moesaic.core.errors import UserError

__all__ = ["pin"]

TOP = 40.0
"""The logit of an always-on expert."""
ROOM = 20.0
"""Bound of the others' logits on the calibration text. Their probabilities, exp(-60) at the least,
are then numbers that float32 tells apart; logits may be told apart by them."""


def pin(
    router: dict[str, torch.Tensor], x_TD: torch.Tensor, always: int, *, weighting: str
) -> dict[str, torch.Tensor]:
    """The router, its rows scaled, with the first `always` experts chosen for every token.

    A common factor brings |w_e x + b_e| <= |w_e| |x| + |b_e| below `ROOM` for every x no longer
    than the longest of x_TD; behind a norm all are of nearly one length, and up to twice that the
    order holds. Raises UserError for a router that is not one matrix, and for a weighting in which
    the logits say more than the choice.
    """
    if "weight" not in router:
        raise UserError(
            "Always-on experts that differ by layer need a router of one matrix. Choose another "
            "router, such as mean-gate."
        )
    if weighting == "scores":
        raise UserError(
            "Always-on experts that differ by layer need weights of 1 at conversion. Use "
            "weighting: one or tempered."
        )
    weight_ED = router["weight"].clone()
    bias_E = router["bias"].clone() if "bias" in router else weight_ED.new_zeros(len(weight_ED))
    bound = float((weight_ED.norm(dim=1) * x_TD.norm(dim=1).max() + bias_E.abs())[always:].max())
    factor = ROOM / bound if bound > 0 else 1.0
    weight_ED *= factor
    bias_E *= factor
    weight_ED[:always] = 0.0
    bias_E[:always] = TOP
    return {"weight": weight_ED, "bias": bias_E}
