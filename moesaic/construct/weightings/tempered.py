"""The weighting `tempered`: weight 1 at conversion, and a router that can say more in training."""

from __future__ import annotations

from moesaic.construct.weighting import StartingAtOne
from moesaic.construct.weightings import WEIGHTINGS


@WEIGHTINGS.register
class Tempered(StartingAtOne):
    """Weight 1 at conversion; in training K times a softmax whose temperature is learned.

    A layer's exponent leaves zero (`gates.tempered`). After that, stock layouts that renormalise
    hold the mixture exactly.
    """
