"""Points of a large matrix, seen about their mean or scaled to length 1 without being written out.

Notation: N rows, D columns, E clusters, M rows a cluster, C columns of a sketch or points that
moved.
`order_EM` holds the row numbers of each cluster.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from moesaic.core.errors import UserError

__all__ = [
    "Floats",
    "Ids",
    "Metric",
    "Points",
    "labels_of",
    "one_thread",
    "product",
    "scale_to_unit",
]

Metric = Literal["l2", "cos"]
Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Points:
    """The points (row - shift) * scale of a matrix, never written out: the matrix is large."""

    rows_ND: Floats
    shift_D: Floats
    scale_N: Floats
    metric: Metric

    @classmethod
    def centred(cls, rows_ND: Floats, metric: Metric) -> "Points":
        """The rows about their mean; for `cos`, scaled to length 1 as well."""
        shift_D = product(np.full(len(rows_ND), 1 / len(rows_ND), np.float32), rows_ND)
        if not np.isfinite(shift_D).all():
            raise UserError("The rows hold NaN or infinite values. Repair the weights.")
        points = cls(rows_ND, shift_D, np.ones(len(rows_ND), np.float32), metric)
        if metric == "l2":
            return points
        lengths_N = np.sqrt(points.squares_N)
        scale_N = (1 / np.where(lengths_N > 0, lengths_N, 1)).astype(np.float32)
        return cls(rows_ND, shift_D, scale_N, metric)

    @cached_property
    def squares_N(self) -> Floats:
        """Squared length of every point."""
        shift = self.shift_D
        raw_N = squares(self.rows_ND) - 2 * product(self.rows_ND, shift) + product(shift, shift)
        return (np.maximum(raw_N, 0) * self.scale_N**2).astype(np.float32)

    def combine_ED(self, weights_EN: Floats) -> Floats:
        """Weighted sums of the points."""
        scaled_EN = weights_EN * self.scale_N
        sums_ED = product(scaled_EN, self.rows_ND)
        sums_ED -= np.outer(scaled_EN.sum(1), self.shift_D)
        return sums_ED

    def sums_ED(self, order_EM: Ids) -> Floats:
        """Sum of the points of every cluster."""
        weights_EN = np.zeros((len(order_EM), len(self.rows_ND)), np.float32)
        np.put_along_axis(weights_EN, order_EM, 1, axis=1)
        return self.combine_ED(weights_EN)

    def moved_sums_ED(self, sums_ED: Floats, before_EM: Ids, after_EM: Ids) -> Floats:
        """The sums after some points changed cluster; reads only those where they are few."""
        before_N, after_N = labels_of(before_EM), labels_of(after_EM)
        moved_C = np.flatnonzero(before_N != after_N)
        if 4 * len(moved_C) > len(self.rows_ND):
            return self.sums_ED(after_EM)
        weights_EC = np.zeros((len(sums_ED), len(moved_C)), np.float32)
        column_C = np.arange(len(moved_C))
        weights_EC[after_N[moved_C], column_C] = 1
        weights_EC[before_N[moved_C], column_C] = -1
        moved = Points(self.rows_ND[moved_C], self.shift_D, self.scale_N[moved_C], self.metric)
        return sums_ED + moved.combine_ED(weights_EC)

    def products_NE(self, sums_ED: Floats) -> Floats:
        """Inner product of every point with every one of some vectors."""
        products_NE = product(self.rows_ND, sums_ED.T)
        products_NE -= product(sums_ED, self.shift_D)
        products_NE *= self.scale_N[:, None]
        return products_NE

    def sketch(self, columns: int, rng: np.random.Generator) -> "Points":
        """The points in the span of, about, their first principal directions: rows [N, columns].

        One round of randomised subspace iteration (Halko, Martinsson, Tropp 2011, section 4.5).
        """
        if 2 * columns >= self.rows_ND.shape[1]:
            return self
        probe_DC = rng.standard_normal((self.rows_ND.shape[1], columns), dtype=np.float32)
        back_DC = self.combine_ED(self.products_NE(probe_DC.T).T).T
        basis_DC = torch.linalg.qr(torch.from_numpy(back_DC))[0].numpy()
        rows_NC = np.ascontiguousarray(self.products_NE(basis_DC.T))
        ones_N = np.ones_like(self.scale_N)
        return Points(rows_NC, np.zeros(columns, np.float32), ones_N, self.metric)

    def spread_D(self) -> Floats:
        """Sums of squares along the principal directions, falling; meant for sketches."""
        points_ND = (self.rows_ND - self.shift_D) * self.scale_N[:, None]
        gram_DD = torch.from_numpy(product(points_ND.T, points_ND))
        spread_D: Floats = torch.linalg.eigvalsh(gram_DD).flip(0).numpy()
        return spread_D

    def value(self, sums_ED: Floats) -> float:
        """What is maximised: the clusters' tightness together."""
        return float(self.tightness(sums_ED).sum())

    def tightness(self, sums_ED: Floats) -> NDArray[np.float64]:
        """What the metric maximises, per cluster (last axis summed): |S|^2 for l2, |S| for cos."""
        lengths_E = (sums_ED.astype(np.float64) ** 2).sum(-1)
        return lengths_E if self.metric == "l2" else np.sqrt(lengths_E)

    def pull_E(self, sums_ED: Floats) -> Floats:
        """Factor of <x, S_e> in the tightness a cluster gains from x: 1 for l2, 1/|S_e| for cos."""
        if self.metric == "l2":
            return np.ones(len(sums_ED), np.float32)
        return (1 / np.maximum(self.tightness(sums_ED), 1e-12)).astype(np.float32)


def product(left: Floats, right: Floats) -> Floats:
    """Matrix product of float32 arrays by torch, whose threads `one_thread` can hold."""
    result: Floats = (torch.from_numpy(left) @ torch.from_numpy(right)).numpy()
    return result


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Keep matrix products on one thread.

    Products this thin gain nothing from more: threads that wait for one another took 12 CPU seconds
    where one takes 1.8, and no less time.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def scale_to_unit(rows_ND: Floats) -> None:
    """Scale every row to length 1, in place; a row of zeros stays."""
    lengths_N = np.sqrt(squares(rows_ND))
    rows_ND /= np.where(lengths_N > 0, lengths_N, 1)[:, None]


def labels_of(order_EM: Ids) -> Ids:
    """Cluster of every row."""
    labels_N = np.empty(order_EM.size, np.int64)
    labels_N[order_EM] = np.arange(len(order_EM))[:, None]
    return labels_N


def squares(rows_ND: Floats) -> Floats:
    """Squared length of every row."""
    return np.einsum("nd,nd->n", rows_ND, rows_ND)
