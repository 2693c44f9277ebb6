"""Importance: the gate weights that each expert receives, and how sharp a token's weights are.

    importance   share of all gate weights of a layer that an expert receives
    entropy      entropy of the K weights of a token / log K, averaged over the tokens: 1 is even
    largest      the largest of a token's weights / their sum, averaged over the tokens

Weights below 0 and choices that were dropped do not count. Notation: D domains, L layers, E
experts, K experts a token, M choices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesaic.core.errors import UserError
from moesaic.measure.load import load_share
from moesaic.routing.metric import Metric
from moesaic.routing.metrics import METRICS
from moesaic.routing.samples import Samples, Space


@dataclass(frozen=True, eq=False)
class ImportanceFigures:
    """Weights of all domains together or of one."""

    sum_LE: NDArray[np.float64]
    share_LE: NDArray[np.float64]
    entropy_L: NDArray[np.float64]
    largest_L: NDArray[np.float64]


@METRICS.register
class Importance(Metric):
    """Sum of gate weights of every expert; entropy and largest share of a token's weights."""

    def __init__(self, space: Space) -> None:
        super().__init__(space)
        shape = (len(space.domains), space.layers)
        self.sums["weights"] = np.zeros((*shape, space.num_experts))
        for name in ("entropy", "largest", "tokens"):
            self.sums[name] = np.zeros(shape)

    def add(self, domain: int, rows_N: NDArray[np.int64], samples: Samples) -> None:
        """Add samples of one domain. Raises UserError when they have no weights."""
        if samples.weights_NTLK is None:
            raise UserError("importance needs the gate weights, but the samples have none.")
        for layer in range(samples.layers):
            ids_MK = samples.experts_NTLK[:, :, layer].reshape(-1, samples.experts_NTLK.shape[3])
            weights_MK = samples.weights_NTLK[:, :, layer].reshape(ids_MK.shape).astype(np.float64)
            weights_MK = np.where((ids_MK >= 0) & (weights_MK > 0), weights_MK, 0)
            total_M = weights_MK.sum(axis=1)
            some_M = total_M > 0
            self.sums["weights"][domain, layer] += np.bincount(
                ids_MK[ids_MK >= 0], weights_MK[ids_MK >= 0], minlength=self.space.num_experts
            )
            share_MK = weights_MK[some_M] / total_M[some_M, None]
            logs_MK = np.log(share_MK, out=np.zeros(share_MK.shape), where=share_MK > 0)
            most = np.log(max(2, share_MK.shape[1]))  # one expert a token: entropy 0
            self.sums["entropy"][domain, layer] += np.abs((share_MK * logs_MK).sum()) / most
            self.sums["largest"][domain, layer] += share_MK.max(axis=1).sum()
            self.sums["tokens"][domain, layer] += some_M.sum()

    def result(self) -> dict[str, ImportanceFigures]:
        """Return the figures of every domain, and of ``all`` together."""
        found = {}
        for name, sums in self.pooled():
            tokens_L = np.where(sums["tokens"] > 0, sums["tokens"], np.nan)
            found[name] = ImportanceFigures(
                sums["weights"],
                load_share(sums["weights"]),
                sums["entropy"] / tokens_L,
                sums["largest"] / tokens_L,
            )
        return found
