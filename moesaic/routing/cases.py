"""Case studies: one short sample, and the layer in which its tokens route most consistently.

For an expert with figures SRP, rho and activation in segments of 16 tokens, the weight is
activation (1 + rho); a layer's consistency is the weighted mean of its experts' SRP. Source:
arXiv 2505.16056, appendix on case studies.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.routing.metrics.segment_routing import SegmentRouting
from moesaic.routing.samples import Samples, Space

__all__ = ["CASE_SEGMENT", "consistency"]

CASE_SEGMENT = 16


def consistency(samples: Samples, *, segment: int = CASE_SEGMENT) -> NDArray[np.float64]:
    """Return how consistently each layer routes the samples, [L]; 0 where nothing is chosen.

    Samples shorter than `segment` are looked at with the longest segment that fits.
    """
    fitting = max(1, min(segment, int(samples.lengths_N.max())))
    metric = SegmentRouting(Space(samples.num_experts, samples.layers), segments=(fitting,))
    metric.update(samples)
    figures = metric.at(fitting, "expert")
    weight_LE = np.nan_to_num(figures.activation) * (1 + figures.rho)
    total_L = weight_LE.sum(axis=1)
    found: NDArray[Any] = (figures.srp * weight_LE).sum(axis=1) / np.where(total_L > 0, total_L, 1)
    return found
