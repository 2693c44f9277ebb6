"""Co-activation: which experts of a layer the same token chooses, and what tokens share.

    together_LEE   tokens that choose both experts; the diagonal is the tokens that choose one
    overlap_LEE    together / tokens that choose either (Jaccard): 1 always together
    lift_LEE       together / what independent choices would give: above 1 attract, below 1 avoid
    kept_L         share of a token's experts that the token before it chose too
    next_LEE       tokens that choose expert i in layer l and expert j in layer l + 1, [L - 1, E, E]

Notation: D domains, L layers, E experts. Memory: 16 D L E^2 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.routing.compiled import compiled, spread
from moesaic.routing.metric import Metric
from moesaic.routing.metrics import METRICS
from moesaic.routing.samples import Samples, Space


@dataclass(frozen=True, eq=False)
class CoactivationFigures:
    """Pairs of experts, of all domains together or of one."""

    together_LEE: NDArray[np.int64]
    overlap_LEE: NDArray[np.float64]
    lift_LEE: NDArray[np.float64]
    kept_L: NDArray[np.float64]
    next_LEE: NDArray[np.int64]


@METRICS.register
class Coactivation(Metric):
    """Pairs of experts that the same token, the next token or the next layer chooses."""

    def __init__(self, space: Space) -> None:
        super().__init__(space)
        domains, layers, experts = len(space.domains), space.layers, space.num_experts
        self.sums["together"] = np.zeros((domains, layers, experts, experts), dtype=np.int64)
        self.sums["next"] = np.zeros((domains, layers - 1, experts, experts), dtype=np.int64)
        self.sums["kept"] = np.zeros((domains, layers, 2), dtype=np.int64)
        self.sums["tokens"] = np.zeros((domains, layers), dtype=np.int64)

    def add(self, domain: int, rows_N: NDArray[np.int64], samples: Samples) -> None:
        """Add samples of one domain."""

        def work(start: int, stop: int) -> None:  # layers: each thread has its own
            for layer in range(start, stop):
                _count_pairs(
                    samples.experts_NTLK,
                    samples.lengths_N,
                    layer,
                    self.sums["together"][domain, layer],
                    self.sums["kept"][domain, layer],
                    self.sums["tokens"][domain],
                )
                if layer + 1 < samples.layers:
                    _count_next(
                        samples.experts_NTLK,
                        samples.lengths_N,
                        layer,
                        self.sums["next"][domain, layer],
                    )

        spread(work, samples.layers)

    def result(self) -> dict[str, CoactivationFigures]:
        """Return the figures of every domain, and of ``all`` together."""
        return {name: _figures(sums) for name, sums in self.pooled()}


def _figures(sums: dict[str, NDArray[Any]]) -> CoactivationFigures:
    together_LEE = sums["together"]
    alone_LE = np.diagonal(together_LEE, axis1=1, axis2=2)
    rows_LEE, columns_LEE = alone_LE[:, :, None], alone_LE[:, None, :]
    either_LEE = rows_LEE + columns_LEE - together_LEE
    expected_LEE = rows_LEE * columns_LEE / np.maximum(sums["tokens"], 1)[:, None, None]
    return CoactivationFigures(
        together_LEE,
        _share(together_LEE, either_LEE),
        _share(together_LEE, expected_LEE),
        _share(sums["kept"][:, 0], sums["kept"][:, 1]),
        sums["next"],
    )


def _share(part: NDArray[np.int64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(whole > 0, part / np.where(whole > 0, whole, 1), np.nan)


@compiled
def _count_pairs(ids_NTLK, lengths_N, layer, together_EE, kept, tokens_L):  # type: ignore[no-untyped-def]
    top_k = ids_NTLK.shape[3]
    for n in range(ids_NTLK.shape[0]):
        for t in range(lengths_N[n]):
            some = 0
            for k in range(top_k):
                one = ids_NTLK[n, t, layer, k]
                if one < 0:
                    continue
                some = 1
                for other in range(top_k):
                    two = ids_NTLK[n, t, layer, other]
                    if two >= 0:
                        together_EE[one, two] += 1
                if t > 0:
                    kept[1] += 1
                    for other in range(top_k):
                        kept[0] += ids_NTLK[n, t - 1, layer, other] == one
            tokens_L[layer] += some


@compiled
def _count_next(ids_NTLK, lengths_N, layer, next_EE):  # type: ignore[no-untyped-def]
    top_k = ids_NTLK.shape[3]
    for n in range(ids_NTLK.shape[0]):
        for t in range(lengths_N[n]):
            for k in range(top_k):
                one = ids_NTLK[n, t, layer, k]
                if one >= 0:
                    for other in range(top_k):
                        two = ids_NTLK[n, t, layer + 1, other]
                        if two >= 0:
                            next_EE[one, two] += 1
