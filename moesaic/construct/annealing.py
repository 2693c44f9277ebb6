"""Annealing of balanced clusters: points belong to all clusters in shares that harden step by step.

Notation: N points, E clusters, M = N/E points a cluster. `share_NE` sums to 1 per point.
"""

import numpy as np

from moesaic.construct.points import Floats, Ids, Points

__all__ = ["anneal", "harden"]


def anneal(points: Points, share_NE: Floats, coldness: Floats) -> Ids:
    """Cool shares, one step per value of `coldness`, until they can be rounded: order_EM.

    A step sets a point's shares to the softmax of M * (<x, C_e> - |C_e|^2 / 2), times the coldness,
    where C_e is the mean of cluster e under the present shares and the point's own part of it is
    left out; then prices on clusters are raised or lowered until all are about equally large. Below
    E / (largest sum of squares along a direction), equal shares are the only solution; beyond it
    clusters form, first along the directions of most variance. This is the mean-field annealing of
    Peterson and Soderberg (1989), and Rose's deterministic annealing (1998), with equal sizes.
    """
    count, clusters = share_NE.shape
    size = count / clusters
    own_N1 = points.squares_N[:, None]
    price_E = np.zeros(clusters, np.float32)
    for cold in coldness:
        held_E = np.maximum(share_NE.sum(0), 1e-2)
        means_ED = points.combine_ED(share_NE.T) / held_E[:, None]
        pull_NE = points.products_NE(means_ED) - np.square(means_ED).sum(1) / 2
        pull_NE -= share_NE * own_N1 / held_E
        pull_NE *= size * cold
        pull_NE -= price_E
        share_NE = np.exp(pull_NE - pull_NE.max(1, keepdims=True))
        share_NE /= share_NE.sum(1, keepdims=True)
        for _ in range(3):
            excess_E = np.maximum(share_NE.sum(0), 1e-2) / np.float32(size)
            price_E += np.log(excess_E)
            share_NE /= excess_E
            share_NE /= share_NE.sum(1, keepdims=True)
    return harden(share_NE)


def harden(share_NE: Floats) -> Ids:
    """Give every point to one cluster, the one it has the largest share in where there is room."""
    count, clusters = share_NE.shape
    size = count // clusters
    labels_N = share_NE.argmax(1)
    by_label = np.lexsort((-share_NE.max(1), labels_N))
    counts_E = np.bincount(labels_N, minlength=clusters)
    place = np.arange(count) - (np.cumsum(counts_E) - counts_E)[labels_N[by_label]]
    extra = by_label[place >= size]
    room_E = size - np.minimum(counts_E, size)
    labels_N[extra] = -1
    for wish in np.argsort(-share_NE[extra], axis=None, kind="stable").tolist():
        point, cluster = extra[wish // clusters], wish % clusters
        if room_E[cluster] and labels_N[point] < 0:
            labels_N[point] = cluster
            room_E[cluster] -= 1
    return np.argsort(labels_N, kind="stable").reshape(clusters, size)
