"""The cluster split: neurons with similar weights together, by balanced k-means."""

from collections.abc import Iterator
from typing import Literal

import numpy as np

from moesaic.construct.balanced_kmeans import balanced_kmeans
from moesaic.construct.method import LayerSplit, Projection, SplitInputs, SplitMethod
from moesaic.construct.points import scale_to_unit
from moesaic.construct.splits import SPLITS


@SPLITS.register
class Cluster(SplitMethod):
    """Neurons with similar weights together (balanced k-means); every neuron once.

    LLaMA-MoE's Independent-Clustering (arXiv 2406.16554, section 3.1): a neuron's vector is its row
    of one projection, scaled to length 1. Neurons ascend inside an expert.
    """

    metric: Literal["l2", "cos"] = "l2"
    """Distance: Euclidean, or the cosine about the mean of all neurons."""
    projection: Projection = "up"
    """The projection whose rows stand for the neurons."""

    def divide(self, inputs: SplitInputs) -> Iterator[LayerSplit]:
        """Yield the split of every layer in order; keeps the figures reached per layer."""
        reached = inputs.facts.setdefault("layers", [])
        for layer in range(inputs.layers):
            rows_FD = inputs.rows(layer, self.projection)
            scale_to_unit(rows_FD)
            found = balanced_kmeans(
                rows_FD, inputs.experts, metric=self.metric, seed=inputs.seed + layer
            )
            figures = {"within_ss": found.within_ss, "total_ss": found.total_ss}
            reached.append({**figures, "mean_cosine": found.mean_cosine})
            parts = [np.flatnonzero(found.labels == expert) for expert in range(inputs.experts)]
            yield LayerSplit(parts, [])
