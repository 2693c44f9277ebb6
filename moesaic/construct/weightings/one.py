"""The weighting `one`: a chosen expert counts once, as its neurons did in the dense model."""

from __future__ import annotations

from moesaic.construct.weighting import StartingAtOne
from moesaic.construct.weightings import WEIGHTINGS


@WEIGHTINGS.register
class One(StartingAtOne):
    """Weight 1 at conversion, 1 + u_e * s_e in training: s softmax over all experts, u from zero.

    CMoE's (arXiv 2502.04416); nothing is renormalised.
    """
