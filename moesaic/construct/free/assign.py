"""Neurons to experts of equal size, so that the neurons' gains add up to the most.

Notation: F neurons, E experts, gain_FE what neuron f is worth in expert e.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["assign"]


def assign(gain_FE: NDArray[np.floating], *, rounds: int = 200) -> NDArray[np.int64]:
    """Return the expert of every neuron, int64 [F]: F / E neurons each, the largest total gain.

    Starts from a greedy division under prices that fill the experts evenly, and cancels negative
    cycles among the E experts: an edge a -> b is the cheapest neuron to move from a to b; while
    some cycle gains, its neurons move. That ends at the optimum of the transport problem with
    memory F x E and no F x F matrix, or after `rounds` * E cycles.
    """
    count, experts = gain_FE.shape
    size = count // experts
    assert count == experts * size
    exact_FE = np.asarray(gain_FE).astype(np.float64)
    labels = _greedy(exact_FE - _prices(exact_FE, size), size)
    least = 1e-9 * max(float(np.abs(exact_FE).max(initial=0.0)), 1e-300)
    cost_EE = np.full((experts, experts), np.inf)
    move_EE = np.zeros((experts, experts), np.int64)
    stale = list(range(experts))
    for _ in range(rounds * experts):
        for here in stale:
            cost_EE[here], move_EE[here] = _moves(exact_FE, labels, here)
        cycle = _negative_cycle(cost_EE, least)
        if cycle is None:
            break
        for here, there in zip(cycle, [*cycle[1:], cycle[0]], strict=True):
            labels[move_EE[here, there]] = there
        stale = cycle  # the other experts hold what they held
    return labels


def _prices(gain_FE: NDArray[np.float64], size: int, *, sweeps: int = 3) -> NDArray[np.float64]:
    """What an expert costs, [E], so that about `size` neurons want each: the dual of the problem.

    One expert's price at a time: half way between the last neuron that should come and the next.
    """
    count, experts = gain_FE.shape
    price_E = np.zeros(experts)
    net_EF = np.ascontiguousarray(gain_FE.T)  # rows of neurons: experts are few
    for _ in range(sweeps if experts > 1 else 0):
        for expert in range(experts):
            others_EF = np.delete(net_EF, expert, 0)
            margin_F = net_EF[expert] + price_E[expert] - others_EF.max(0)
            next_one, last_one = np.partition(margin_F, [count - size - 1, count - size])[
                count - size - 1 : count - size + 1
            ]
            price = (next_one + last_one) / 2
            net_EF[expert] += price_E[expert] - price
            price_E[expert] = price
    return price_E


def _greedy(gain_FE: NDArray[np.float64], size: int) -> NDArray[np.int64]:
    """Each neuron to its best expert; where too many want one, the less decided go elsewhere."""
    gain_EF = np.ascontiguousarray(gain_FE.T)
    experts = len(gain_EF)
    labels = gain_EF.argmax(0)
    if experts == 1:
        return labels
    margin_F = np.diff(np.partition(gain_EF, experts - 2, axis=0)[-2:], axis=0)[0]
    room = np.full(experts, size)
    turned_away = []
    for expert in range(experts):
        wanted = np.flatnonzero(labels == expert)
        if len(wanted) > size:
            order = np.argsort(-margin_F[wanted], kind="stable")
            turned_away.append(wanted[order[size:]])
        room[expert] -= min(size, len(wanted))
    for neuron in np.concatenate(turned_away) if turned_away else ():
        labels[neuron] = expert = int(np.where(room > 0, gain_EF[:, neuron], -np.inf).argmax())
        room[expert] -= 1
    return labels


def _moves(
    gain_FE: NDArray[np.float64], labels: NDArray[np.int64], here: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Loss of the cheapest move from one expert to every other, and the neuron that makes it."""
    members = np.flatnonzero(labels == here)
    loss_ME = gain_FE[members, here][:, None] - gain_FE[members]
    first_E = loss_ME.argmin(0)
    cost_E = loss_ME[first_E, np.arange(gain_FE.shape[1])]
    cost_E[here] = np.inf
    return cost_E, members[first_E]


def _negative_cycle(cost_EE: NDArray[np.float64], least: float) -> list[int] | None:
    """Bellman-Ford from a root joined to every expert: a cycle whose costs sum below zero."""
    experts = len(cost_EE)
    reach = np.zeros(experts)
    parent = np.full(experts, -1)
    changed = -1
    for _ in range(experts):
        through = reach[:, None] + cost_EE
        best = through.argmin(0)
        value = through[best, np.arange(experts)]
        better = value < reach - least
        if not better.any():
            return None
        reach[better] = value[better]
        parent[better] = best[better]
        changed = int(np.flatnonzero(better)[0])
    node = changed
    for _ in range(experts):
        node = int(parent[node])
    cycle = [node]
    at = int(parent[node])
    while at != node:
        cycle.append(at)
        at = int(parent[at])
    cycle.reverse()
    return cycle
