"""The centroid router init: each expert is found by the mean direction of its neurons."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moesaic.construct.method import Projection
from moesaic.construct.router import RouterInputs, RouterMethod
from moesaic.construct.routers import ROUTERS


@ROUTERS.register
class Centroids(RouterMethod):
    """Row e is the mean of the L2-normalised neuron rows of expert e; needs no data.

    A token's logit for an expert is then the mean cosine between the token and the expert's
    neurons, times the token's length: with a clustered split, the cluster the token points to wins.
    An `mlp` router gets the centroids as its first layer and the identity as its second, so tanh
    keeps their order. The same first layer starts the original's trained gate (spec 1.7).
    """

    projection: Projection = "gate"
    """Whose rows: `gate` decides whether a neuron fires, `up` what it adds."""

    def build(self, inputs: RouterInputs) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the router weights of every layer."""
        for layer in range(inputs.split.layers):
            gate, up, _ = inputs.dense.ffn(layer)
            rows = inputs.dense.read(gate if self.projection == "gate" else up)
            means = centroids(rows, inputs.split.experts[layer])
            if inputs.gate == "linear":
                yield {"weight": means}
            else:
                yield {"0.weight": means, "2.weight": torch.eye(len(means))}


def centroids(rows_FD: torch.Tensor, experts: Sequence[NDArray[np.integer[Any]]]) -> torch.Tensor:
    """Mean of the L2-normalised rows of each expert, float32 [E, D]; a zero row counts as zero."""
    means = []
    for ids in experts:
        chosen = rows_FD[torch.from_numpy(np.asarray(ids, np.int64))].float()
        means.append(torch.nn.functional.normalize(chosen, dim=1, eps=1e-12).mean(0))
    return torch.stack(means)
