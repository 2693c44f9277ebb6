"""k-means with bounds on the clusters' sizes: Lloyd's algorithm whose assignment keeps the bounds.

Every cluster e has a price p_e, and a point goes where distance + price is least. A cluster that is
too full becomes dearer by just what sends its surplus away, one that is too empty cheaper. These
are steps of coordinate ascent on the dual of the minimum-cost flow that the original
(k-means-constrained) solves; at the prices found, the assignment is that flow's up to ties. The
prices also place points that were not among those clustered.

Notation: N points, D columns, E clusters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from moesaic.core.errors import UserError

__all__ = ["SizedClusters", "costs", "nearest", "size_bounds", "sized_kmeans"]

Distance = Literal["l2", "cos"]
_ROUNDS = 12  # in a step of Lloyd; the prices carry over to the next step


@dataclass(frozen=True)
class SizedClusters:
    """Clusters and what they cost."""

    centers_ED: torch.Tensor
    """Means of the clusters' points, float32; not scaled to length 1 for `cos` either."""
    labels_N: torch.Tensor
    """Cluster of every point, int64."""
    prices_E: torch.Tensor
    """What is added to the distance from a cluster so that sizes keep their bounds."""
    inertia: float
    """Sum of squared (l2) or cosine (cos) distances to the centers."""


def size_bounds(points: int, clusters: int, jitter: float) -> tuple[int, int]:
    """Least and largest size of a cluster: N / E less and more the share `jitter`."""
    mean = points / clusters
    return max(0, math.floor(mean * (1 - jitter))), min(points, math.ceil(mean * (1 + jitter)))


@torch.inference_mode()
def sized_kmeans(
    x_ND: torch.Tensor,
    clusters: int,
    *,
    smallest: int,
    largest: int,
    metric: Distance = "l2",
    starts: int = 4,
    steps: int = 30,
    seed: int = 0,
) -> SizedClusters:
    """Divide points into clusters of `smallest` to `largest` points; the best of some starts.

    Starts are drawn by k-means++. Raises UserError when the bounds allow no division, or there are
    fewer points than clusters.
    """
    count = len(x_ND)
    if count < clusters or not smallest * clusters <= count <= largest * clusters:
        raise UserError(
            f"{count} points cannot make {clusters} clusters of {smallest} to {largest}. Give more "
            "points, fewer clusters or wider bounds."
        )
    generator = torch.Generator().manual_seed(seed)
    best: SizedClusters | None = None
    for _ in range(max(1, starts)):
        found = _lloyd(
            x_ND, _start(x_ND, clusters, metric, generator), smallest, largest, metric, steps
        )
        if best is None or found.inertia < best.inertia:
            best = found
    assert best is not None
    return best


def costs(x_ND: torch.Tensor, centers_ED: torch.Tensor, metric: Distance) -> torch.Tensor:
    """Squared or cosine distance of every point from every center: [N, E]."""
    if metric == "cos":
        unit_ND = torch.nn.functional.normalize(x_ND, dim=1)
        return 1 - unit_ND @ torch.nn.functional.normalize(centers_ED, dim=1).T
    squares = x_ND.square().sum(1, keepdim=True) + centers_ED.square().sum(1)
    return (squares - 2 * x_ND @ centers_ED.T).clamp(min=0)


def nearest(
    x_ND: torch.Tensor, centers_ED: torch.Tensor, prices_E: torch.Tensor, metric: Distance
) -> torch.Tensor:
    """The cluster of every point at these prices: int64 [N]."""
    return (costs(x_ND, centers_ED, metric) + prices_E).argmin(1)


def assign(
    cost_NE: torch.Tensor, smallest: int, largest: int, prices_E: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels of low total cost whose clusters keep the bounds, and the prices: [N], [E]."""
    count, clusters = cost_NE.shape
    prices_E = prices_E.clone()
    if clusters == 1:
        return torch.zeros(count, dtype=torch.long), prices_E
    for _ in range(_ROUNDS):
        dear_NE = cost_NE + prices_E
        labels_N = dear_NE.argmin(1)
        sizes_E = labels_N.bincount(minlength=clusters)
        excess_E = (sizes_E - largest).clamp(min=0) - (smallest - sizes_E).clamp(min=0)
        worst = int(excess_E.abs().argmax())
        moves = int(excess_E[worst])
        if not moves:
            return labels_N, prices_E
        own_N = dear_NE[:, worst].clone()
        dear_NE[:, worst] = torch.inf
        gap_N = dear_NE.min(1).values - own_N  # > 0: the cluster is the point's cheapest
        if moves > 0:
            held_M = gap_N[labels_N == worst]
            step = _between(held_M, moves)
        else:
            missed_M = -gap_N[labels_N != worst]
            step = -_between(missed_M, -moves)
        prices_E[worst] += step
    return _repair(cost_NE + prices_E, labels_N, smallest, largest), prices_E


def _between(gap_M: torch.Tensor, moves: int) -> float:
    """A price step that exactly the `moves` smallest gaps fall below, ties aside."""
    if moves >= len(gap_M):
        return float(gap_M.max()) + 1e-6 * (1 + abs(float(gap_M.max())))
    low, high = gap_M.topk(moves + 1, largest=False).values[-2:].tolist()
    return low + (high - low) / 2 if high > low else low + 1e-6 * (1 + abs(low))


def _repair(
    dear_NE: torch.Tensor, labels_N: torch.Tensor, smallest: int, largest: int
) -> torch.Tensor:
    """Move points, the cheapest first, cluster by cluster, until every cluster keeps its bounds."""
    labels_N = labels_N.clone()
    clusters = dear_NE.shape[1]
    while True:
        sizes_E = labels_N.bincount(minlength=clusters)
        surplus_E, need_E = sizes_E - largest, smallest - sizes_E
        if int(surplus_E.max()) > 0:  # the fullest gives to whatever has room, the neediest first
            giver = int(surplus_E.argmax())
            from_M = (labels_N == giver).nonzero().flatten()
            takers = (sizes_E < (smallest if int(need_E.max()) > 0 else largest)).nonzero()
            room_E = (smallest if int(need_E.max()) > 0 else largest) - sizes_E
            moves = int(surplus_E[giver])
            extra_MP = dear_NE[from_M][:, takers.flatten()]
            extra_M, place_M = (extra_MP - dear_NE[from_M, giver][:, None]).min(1)
            order_M = extra_M.argsort()[:moves]
            for place, taker in enumerate(takers.flatten().tolist()):
                mine = order_M[place_M[order_M] == place][: int(room_E[taker])]
                labels_N[from_M[mine]] = taker
        elif int(need_E.max()) > 0:  # the neediest takes from whatever can spare
            taker = int(need_E.argmax())
            moves = int(need_E[taker])
            own_N = dear_NE.gather(1, labels_N[:, None]).flatten()
            extra_N = dear_NE[:, taker] - own_N
            extra_N[sizes_E[labels_N] <= smallest] = torch.inf
            best_M = extra_N.topk(moves, largest=False).indices
            for giver in labels_N[best_M].unique().tolist():
                spare = int(sizes_E[giver]) - smallest
                labels_N[best_M[labels_N[best_M] == giver][:spare]] = taker
        else:
            return labels_N


def _lloyd(
    x_ND: torch.Tensor,
    centers_ED: torch.Tensor,
    smallest: int,
    largest: int,
    metric: Distance,
    steps: int,
) -> SizedClusters:
    prices_E = torch.zeros(len(centers_ED))
    spread = float(x_ND.var(0, correction=0).mean())
    for _ in range(max(1, steps)):
        labels_N, prices_E = assign(costs(x_ND, centers_ED, metric), smallest, largest, prices_E)
        moved_ED = means(x_ND, labels_N, centers_ED)
        shift = float((moved_ED - centers_ED).square().sum())
        centers_ED = moved_ED
        if shift <= 1e-3 * spread:  # as the original (tol)
            break
    cost_NE = costs(x_ND, centers_ED, metric)
    labels_N, prices_E = assign(cost_NE, smallest, largest, prices_E)
    inertia = float(cost_NE.gather(1, labels_N[:, None]).double().sum())
    return SizedClusters(centers_ED, labels_N, prices_E, inertia)


def means(x_ND: torch.Tensor, labels_N: torch.Tensor, before_ED: torch.Tensor) -> torch.Tensor:
    """Mean of every cluster's points, [E, D]; an empty cluster keeps its center."""
    sums_ED = torch.zeros_like(before_ED).index_add_(0, labels_N, x_ND)
    sizes_E = labels_N.bincount(minlength=len(before_ED))[:, None]
    return torch.where(sizes_E > 0, sums_ED / sizes_E.clamp(min=1), before_ED)


def _start(
    x_ND: torch.Tensor, clusters: int, metric: Distance, generator: torch.Generator
) -> torch.Tensor:
    """k-means++: points drawn in proportion to their distance from those drawn before."""
    chosen = [int(torch.randint(len(x_ND), (1,), generator=generator))]
    far_N = torch.full((len(x_ND),), torch.inf)
    while len(chosen) < clusters:
        far_N = torch.minimum(far_N, costs(x_ND, x_ND[chosen[-1:]], metric).flatten())
        # cumulated in float64: torch.multinomial takes no more than 2^24 points
        sums_N = far_N.double().clamp(min=1e-30).cumsum(0)
        at = torch.rand(1, generator=generator, dtype=torch.float64) * sums_N[-1]
        chosen.append(int(torch.searchsorted(sums_N, at).clamp(max=len(x_ND) - 1)))
    return x_ND[chosen].clone()
