"""Balanced k-means: clusters of exactly equal size, at the cost of a few passes over the data.

With E clusters of M = N/E rows and cluster sums S_e of the rows about their mean, the sum of
squares within clusters is a constant minus sum_e |S_e|^2 / M, so only the sums matter:

1. Rows are projected on their leading principal directions (`Points.sketch`), where a step costs a
   thirtieth of what it costs on rows of 4096 numbers.
2. There, starts are improved, and the best is kept. Every other start is random, the others are
   annealed (`annealing`): rows belong to clusters in shares that harden step by step. Then pairs of
   clusters exchange rows (`exchange`: a step of Lloyd's algorithm that keeps the sizes), and pairs
   are pooled and cut in two afresh from several directions (`resplit`), which moves whole groups of
   rows where no single row would move.
3. Exchanges go on with the full rows. Where those tell much that the sketch did not, the clusters
   are first melted and annealed again.

A row's own part of its cluster's sum holds it back: on 11008 rows of 4096 random numbers, by 2.4
standard deviations of what pulls it elsewhere. Lloyd's algorithm stops there, far from the best.
`anneal` leaves that part out. `exchange` discounts it by a factor `release`: 0 is Lloyd, which
never makes things worse; 1 is right for a row that moves alone, but not for thousands at once.

Notation: N rows, D columns, E clusters, M rows a cluster, P pairs of clusters, R directions tried.
`order_EM` holds the row numbers of each cluster.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from moesaic.construct.annealing import anneal
from moesaic.construct.points import (
    Floats,
    Ids,
    Metric,
    Points,
    labels_of,
    one_thread,
    product,
)
from moesaic.core.errors import UserError

__all__ = ["BalancedClusters", "balanced_kmeans"]


@dataclass(frozen=True)
class BalancedClusters:
    """Clusters of equal size, and how tight they are."""

    labels: Ids
    """Cluster of every row, int64 [N]."""
    within_ss: float
    """Sum of squared distances of the rows to the mean of their cluster."""
    total_ss: float
    """Sum of squared distances of the rows to the mean of all rows."""
    mean_cosine: float
    """Mean over the rows of the cosine to the mean of their cluster, both about the mean of all."""


def balanced_kmeans(
    rows_ND: Floats,
    clusters: int,
    *,
    metric: Metric = "l2",
    seed: int = 0,
    starts: int | Literal["auto"] = "auto",
    steps: int | Literal["auto"] = "auto",
) -> BalancedClusters:
    """Divide rows into `clusters` groups of exactly N / clusters rows.

    `l2` minimises the sum of squares within clusters. `cos` takes the rows about their mean and
    scaled to length 1, and maximises the sum of cosines between rows and the mean of their cluster.
    `starts` is the number of starts, of which the best is refined ("auto": 2 for tens of thousands
    of rows, up to 16 for fewer). `steps` is the number of annealing steps on the full rows ("auto":
    240 / clusters, between 10 and 30); each reads the matrix twice. Rows in writable float32 are
    not copied.

    Raises UserError when `clusters` does not divide N, or a value is NaN or infinite.
    """
    count = len(rows_ND)
    if clusters < 1 or count % clusters:
        raise UserError(
            f"{count} rows cannot make {clusters} clusters of equal size. "
            f"Give a number that divides {count}."
        )
    tried = min(max(2, 16384 // count), 16) if starts == "auto" else max(1, starts)
    cooling = min(max(10, 240 // clusters), 30) if steps == "auto" else steps
    with one_thread():
        points = Points.centred(np.require(rows_ND, np.float32, ["C", "W"]), metric)
        return measure(points, divide(points, clusters, seed, tried, cooling))


def divide(points: Points, clusters: int, seed: int, starts: int, steps: int) -> Ids:
    """Search on a sketch, refine on the full rows, annealed where these tell more: order_EM."""
    rng = np.random.default_rng(seed)
    sketch = points.sketch(max(128, 8 * clusters), rng)
    order_EM = search(sketch, clusters, rng, starts)
    if steps and sketch is not points:
        seen = float(np.square(sketch.sums_ED(order_EM)).sum())
        order_EM = refine(points, order_EM, 1)
        sums_ED = points.sums_ED(order_EM)
        # Where the sketch shows nearly all of the sums' lengths, it has shown what can be found.
        if float(np.square(sums_ED).sum()) > 1.15 * seen:
            share_NE = np.full((order_EM.size, clusters), 0.5 / clusters, np.float32)
            share_NE[order_EM, np.arange(clusters)[:, None]] += 0.5
            coldness = np.geomspace(1, 6, steps, dtype=np.float32) * clusters / sketch.spread_D()[0]
            annealed_EM = anneal(points, share_NE, coldness)
            if points.value(points.sums_ED(annealed_EM)) > points.value(sums_ED):
                order_EM = annealed_EM
    return refine(points, order_EM, 24)


def search(sketch: Points, clusters: int, rng: np.random.Generator, starts: int) -> Ids:
    """The best of some starts, random and annealed in turn, then improved: order_EM."""
    count = len(sketch.rows_ND)
    spread_D = sketch.spread_D()
    cold = clusters / np.maximum(spread_D[[0, min(clusters, len(spread_D)) - 1]], 1e-9)
    coldness = np.geomspace(cold[0], 3 * cold[1], 40, dtype=np.float32)
    tries = max(4, 128 // clusters)
    found: tuple[float, Ids] | None = None
    for start in range(starts):
        if start % 2 == 0:
            order_EM = rng.permutation(count).reshape(clusters, -1)
        else:
            share_NE = 1 + 0.3 * rng.standard_normal((count, clusters), dtype=np.float32)
            order_EM = anneal(sketch, np.abs(share_NE) / clusters, coldness)
        for _ in range(8):
            sums_ED = sketch.sums_ED(order_EM)
            if not exchange(sketch, sums_ED, order_EM, release=0.5):
                break
        value = sketch.value(sketch.sums_ED(order_EM))
        for _ in range(6):
            resplit(sketch, order_EM, rng, tries)
            before, value = value, sketch.value(sketch.sums_ED(order_EM))
            if value <= before * 1.003:
                break
        if found is None or value > found[0]:
            found = value, order_EM
    assert found is not None
    return found[1]


def refine(points: Points, order_EM: Ids, steps: int) -> Ids:
    """Exchange rows between clusters until a step gains less than two thousandths: order_EM."""
    best_EM = order_EM
    best_ED = points.sums_ED(best_EM)
    best = points.value(best_ED)
    release = 0.6
    for _ in range(steps):
        order_EM = best_EM.copy()
        if not exchange(points, best_ED, order_EM, release):
            if release == 0:
                break
            release = 0.0
            continue
        sums_ED = points.moved_sums_ED(best_ED, best_EM, order_EM)
        value = points.value(sums_ED)
        gain = value / best - 1 if best else 0.0
        if gain > 0:
            best_EM, best_ED, best = order_EM, sums_ED, value
        if gain < 2e-3:
            if release == 0:
                break
            release = 0.0 if release < 0.2 else release / 2
    return best_EM


def exchange(points: Points, sums_ED: Floats, order_EM: Ids, release: float) -> int:
    """Let every pair of clusters exchange the rows that both sides gain from; changes order_EM.

    Between clusters a and b, the rows of a that want most to b are paired with the rows of b that
    want most to a, as long as a pair gains. All gains are measured against the sums as they were.
    Returns the number of pairs exchanged.
    """
    clusters = len(order_EM)
    pull_E = points.pull_E(sums_ED)
    products_NE = points.products_NE(sums_ED) * pull_E
    products_EEM = np.ascontiguousarray(products_NE[order_EM].transpose(0, 2, 1))
    held_EM = release * points.squares_N[order_EM]
    least = 1e-6 * float(np.abs(products_NE).max(initial=0.0))
    exchanged = 0
    for a_P, b_P in rounds(clusters):
        leave_PM = products_EEM[a_P, b_P] - products_EEM[a_P, a_P]
        enter_PM = products_EEM[b_P, a_P] - products_EEM[b_P, b_P]
        leave_PM += held_EM[a_P] * pull_E[a_P, None]
        enter_PM += held_EM[b_P] * pull_E[b_P, None]
        first_PM, second_PM = np.argsort(-leave_PM, axis=1), np.argsort(-enter_PM, axis=1)
        gain_PM = np.take_along_axis(leave_PM, first_PM, 1)
        gain_PM += np.take_along_axis(enter_PM, second_PM, 1)
        for pair, moves in enumerate((gain_PM > least).sum(1)):
            if moves:
                here = a_P[pair], first_PM[pair, :moves]
                there = b_P[pair], second_PM[pair, :moves]
                for table in (order_EM, held_EM, products_EEM.transpose(0, 2, 1)):
                    table[here], table[there] = table[there], table[here]
                exchanged += int(moves)
    return exchanged


def resplit(points: Points, order_EM: Ids, rng: np.random.Generator, tries: int) -> int:
    """Pool every pair of clusters and cut it in two again where that is better; changes order_EM.

    Each try follows a direction: half of the rows on either side of the median along it, then the
    difference of the halves' sums as the next direction, five times. The first direction of one try
    is the present difference, that of the others is random. Returns the number of pairs changed.
    """
    clusters, size = order_EM.shape
    rows_ND = (points.rows_ND - points.shift_D) * points.scale_N[:, None]
    changed = 0
    for a_P, b_P in rounds(clusters):
        ids_PM = np.concatenate([order_EM[a_P], order_EM[b_P]], axis=1)  # M is 2 clusters' here
        rows_PMD = rows_ND[ids_PM]
        total_PD = rows_PMD.sum(1)
        first_PD = rows_PMD[:, :size].sum(1)
        ways_PDR = rng.standard_normal((*total_PD.shape, tries), dtype=np.float32)
        ways_PDR[:, :, 0] = 2 * first_PD - total_PD
        for _ in range(5):
            along_PRM = np.ascontiguousarray(product(rows_PMD, ways_PDR).transpose(0, 2, 1))
            middle_PR1 = np.partition(along_PRM, size, axis=2)[:, :, size, None]
            sums_PRD = product((along_PRM >= middle_PR1).astype(np.float32), rows_PMD)
            ways_PDR = (2 * sums_PRD - total_PD[:, None]).transpose(0, 2, 1)
        value_PR = points.tightness(sums_PRD) + points.tightness(total_PD[:, None] - sums_PRD)
        now_P = points.tightness(first_PD) + points.tightness(total_PD - first_PD)
        for pair, best in enumerate(value_PR.argmax(1)):
            cut_M = np.argpartition(-along_PRM[pair, best], size - 1)
            half_D = rows_PMD[pair, cut_M[:size]].sum(0)
            value = points.tightness(half_D) + points.tightness(total_PD[pair] - half_D)
            if value > now_P[pair] * (1 + 1e-6):
                order_EM[a_P[pair]] = ids_PM[pair, cut_M[:size]]
                order_EM[b_P[pair]] = ids_PM[pair, cut_M[size:]]
                changed += 1
    return changed


def rounds(clusters: int) -> Iterator[tuple[Ids, Ids]]:
    """Every pair of clusters once, in rounds of disjoint pairs (circle method of tournaments)."""
    seats = list(range(clusters + clusters % 2))
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        pairs = [
            (a, b)
            for a, b in zip(seats[:half], reversed(seats[half:]), strict=True)
            if max(a, b) < clusters
        ]
        if pairs:
            yield np.array([a for a, _ in pairs]), np.array([b for _, b in pairs])
        seats = [seats[0], seats[-1], *seats[1:-1]]


def measure(points: Points, order_EM: Ids) -> BalancedClusters:
    """Figures of the clusters, on the rows without the scale of `cos`."""
    labels_N = labels_of(order_EM)
    plain = Points(points.rows_ND, points.shift_D, np.ones_like(points.scale_N), "l2")
    sums_ED = plain.sums_ED(order_EM).astype(np.float64)
    squares_N = plain.squares_N.astype(np.float64)
    between = float((sums_ED**2).sum()) / order_EM.shape[1]
    lengths_E = np.sqrt((sums_ED**2).sum(1))
    products_NE = plain.products_NE(sums_ED.astype(np.float32))
    own_N = products_NE[np.arange(len(labels_N)), labels_N]
    norm_N = np.sqrt(squares_N) * lengths_E[labels_N]
    cosines_N = own_N / np.where(norm_N > 0, norm_N, 1)
    total = float(squares_N.sum())
    return BalancedClusters(labels_N, total - between, total, float(cosines_N.mean()))
