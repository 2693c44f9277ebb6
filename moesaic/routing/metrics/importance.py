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
from moesaic.routing.compiled import compiled, spread
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
        sums = [self.sums[name][domain] for name in ("weights", "entropy", "largest", "tokens")]

        def work(start: int, stop: int) -> None:
            part = slice(start, stop)
            _add_weights(
                samples.experts_NTLK[:, :, part],
                samples.weights_NTLK[:, :, part],  # type: ignore[index]  # not None, see above
                *(each[part] for each in sums),
            )

        spread(work, samples.layers)

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


@compiled
def _add_weights(ids_NTLK, weights_NTLK, weights_LE, entropy_L, largest_L, tokens_L):  # type: ignore[no-untyped-def]
    samples, length, layers, top_k = ids_NTLK.shape
    most = np.log(max(2, top_k))  # one expert a token: entropy 0
    for n in range(samples):
        for layer in range(layers):
            entropy, largest, tokens = 0.0, 0.0, 0
            for t in range(length):
                total, top, logs = 0.0, 0.0, 0.0
                for k in range(top_k):
                    expert = ids_NTLK[n, t, layer, k]
                    weight = np.float64(weights_NTLK[n, t, layer, k])
                    if expert >= 0 and weight > 0:
                        weights_LE[layer, expert] += weight
                        total += weight
                        top = max(top, weight)
                        logs += weight * np.log(weight)
                if total > 0:
                    # of the shares w / total
                    entropy += np.log(total) - logs / total
                    largest += top / total
                    tokens += 1
            entropy_L[layer] += max(0.0, entropy) / most
            largest_L[layer] += largest
            tokens_L[layer] += tokens
