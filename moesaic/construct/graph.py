"""Co-activation graphs: neurons that are active on the same tokens, linked and cut into experts.

Notation: T tokens, F neurons, E experts. `together_FF` adds up, over shards of text, the products
f(H)^T f(H) of the neurons' values H [T, F] under a kernel f.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moesaic.core.errors import MoesaicError, UserError

__all__ = [
    "Graph",
    "co_activation",
    "equalise",
    "metis_text",
    "partition",
    "percentile_graph",
    "strongest_graph",
]

Kernel = Literal["plain", "l1", "l2"]
Floats = NDArray[np.float32]
Ids = NDArray[np.int64]

_BLOCK = 1024  # neurons: rows of [F, F] worked on at once, so that only one such matrix is held


@dataclass(frozen=True)
class Graph:
    """An undirected graph with whole-number weights, in compressed rows; both directions listed."""

    starts: Ids
    """Neuron i's links are links[starts[i]:starts[i+1]]: int64 [F + 1]."""
    links: Ids
    weights: Ids

    @property
    def nodes(self) -> int:
        """F."""
        return len(self.starts) - 1


def co_activation(
    shards: Iterable[Floats], *, kernel: Kernel = "l1", threshold: float = float("inf")
) -> Floats:
    """Add up how strongly neurons are active together, over shards [T, F] of their values: [F, F].

    A pair gains at most `threshold` from one shard. Source: LLaMA-MoE's graph split, where it gains
    at most 1. Raises UserError without a shard.
    """
    together_FF: Floats | None = None
    for values_TF in shards:
        acts_TF = np.asarray(values_TF, np.float32)
        if kernel != "plain":
            acts_TF = np.abs(acts_TF) if kernel == "l1" else np.square(acts_TF)
        width = acts_TF.shape[1]
        if together_FF is None:
            together_FF = np.zeros((width, width), np.float32)
        for first in range(0, width, _BLOCK):
            part = slice(first, first + _BLOCK)
            together_FF[part] += np.minimum(acts_TF[:, part].T @ acts_TF, threshold)
    if together_FF is None:
        raise UserError("There is no text to see neurons active on. Give more data or more tokens.")
    return together_FF


def percentile_graph(together_FF: Floats, *, sign: Literal["fixed", "original"] = "fixed") -> Graph:
    """Link the pairs above a low percentile of all sums; weights are multiples of it, rounded down.

    The percentile is the first of the 10th, 20th, ... 100th that is not zero, less one hundredth.
    It may be negative under the plain kernel: LLaMA-MoE then links neurons that oppose each other
    (`original`); `fixed` takes the first that is positive.
    """
    levels = np.percentile(together_FF.ravel(), range(10, 101, 10))
    usable = levels[levels > 0] if sign == "fixed" else levels[levels != 0]
    if not len(usable):
        raise UserError("The neurons are never active together on this text. Give more text.")
    scale = np.float32(usable[0] * 0.99)
    rows, columns, weights = [], [], []
    for first in range(0, len(together_FF), _BLOCK):
        part_BF = together_FF[first : first + _BLOCK] / scale
        row, column = np.nonzero(part_BF >= 1)
        other = row + first != column
        rows.append(row[other] + first)
        columns.append(column[other])
        weights.append(part_BF[row[other], column[other]].astype(np.int64))
    return _graph(len(together_FF), *map(np.concatenate, (rows, columns, weights)))


def strongest_graph(together_FF: Floats, *, neighbours: int) -> Graph:
    """Link each neuron with those it is most often active with, for how active both are.

    The weight of a link is 1000 times the sum over sqrt(own sum of one * own sum of the other), the
    cosine of their activity. Neurons that are never active have no links.
    """
    width = len(together_FF)
    neighbours = min(neighbours, width - 1)
    own_F = np.sqrt(np.maximum(together_FF.diagonal(), 0))
    scale_F = np.divide(1, own_F, out=np.zeros_like(own_F), where=own_F > 0)
    rows, columns, weights = [], [], []
    for first in range(0, width, _BLOCK):
        part_BF = together_FF[first : first + _BLOCK] * scale_F
        part_BF *= scale_F[first : first + _BLOCK, None]
        inner = np.arange(len(part_BF))
        part_BF[inner, first + inner] = -np.inf
        column = np.argpartition(-part_BF, neighbours - 1, axis=1)[:, :neighbours]
        rows.append(np.repeat(first + inner, neighbours))
        columns.append(column.ravel())
        weights.append(np.take_along_axis(part_BF, column, axis=1).ravel())
    row, column = np.concatenate(rows), np.concatenate(columns)
    weight = np.rint(1000 * np.concatenate(weights)).astype(np.int64)
    kept = weight > 0
    # Both directions, each pair once: a link may have been chosen from one side only.
    row, column = (
        np.concatenate([row[kept], column[kept]]),
        np.concatenate([column[kept], row[kept]]),
    )
    pairs, where = np.unique(row * width + column, return_index=True)
    return _graph(width, pairs // width, pairs % width, np.tile(weight[kept], 2)[where])


def metis_text(graph: Graph) -> str:
    """The graph as a METIS file: a header, then a line of `neighbour weight` pairs per neuron."""
    lines = [f"{graph.nodes} {len(graph.links) // 2} 001"]
    for first, last in zip(graph.starts[:-1].tolist(), graph.starts[1:].tolist(), strict=True):
        pairs = np.stack([graph.links[first:last] + 1, graph.weights[first:last]], axis=1)
        lines.append(" ".join(map(str, pairs.ravel().tolist())))
    return "\n".join(lines) + "\n"


def partition(graph: Graph, experts: int, *, seed: int) -> Ids:
    """Cut the graph into parts of about equal size with few and weak links between: part ids [F].

    Uses METIS (Karypis and Kumar 1998). Raises UserError when its Python binding is missing.
    """
    try:
        import pymetis
    except ImportError as error:
        raise UserError(
            "The co-activation split needs the METIS binding pymetis, which is not installed. "
            "Run: pip install 'moesaic[construct]'"
        ) from error
    if experts == 1 or not len(graph.links):
        return np.arange(graph.nodes) % experts
    _, parts = pymetis.part_graph(
        experts,
        xadj=graph.starts,
        adjncy=graph.links,
        eweights=graph.weights,
        options=pymetis.Options(seed=seed % 2**31, ufactor=1),
    )
    labels_F = np.asarray(parts, np.int64)
    if len(labels_F) != graph.nodes:
        raise MoesaicError(f"METIS returned {len(labels_F)} parts for {graph.nodes} neurons.")
    return labels_F


def equalise(labels_F: Ids, graph: Graph, experts: int, *, seed: int) -> Ids:
    """Make all parts equally large by moving only the surplus of those that are too large: [F].

    The neurons with the weakest links inside leave a part that is too large, and go, strongest link
    first, to a part with room. Equal links are ordered by the seed.
    """
    size = len(labels_F) // experts
    rng = np.random.default_rng(seed)
    held_F = np.repeat(np.arange(graph.nodes), np.diff(graph.starts))
    pairs = held_F * experts + labels_F[graph.links]
    total_FE = np.bincount(pairs, weights=graph.weights, minlength=graph.nodes * experts)
    total_FE = total_FE.reshape(graph.nodes, experts)
    labels_F = labels_F.copy()
    pool: list[int] = []
    for part in range(experts):
        members = rng.permutation(np.flatnonzero(labels_F == part))
        surplus = max(0, len(members) - size)
        pool += members[np.argsort(total_FE[members, part], kind="stable")][:surplus].tolist()
    room_E = size - np.bincount(labels_F, minlength=experts)
    room_E = np.maximum(room_E, 0)
    waiting = rng.permutation(np.array(pool, np.int64))
    wishes = total_FE[waiting].ravel()
    for wish in np.argsort(-wishes, kind="stable").tolist():
        neuron, part = waiting[wish // experts], wish % experts
        if room_E[part] and neuron in pool:
            labels_F[neuron] = part
            room_E[part] -= 1
            pool.remove(neuron)
    return labels_F


def _graph(nodes: int, rows: Ids, links: Ids, weights: Ids) -> Graph:
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=nodes))])
    return Graph(starts, links.astype(np.int64), weights)
