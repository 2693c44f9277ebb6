"""The LFU policy: the expert that was asked for least often leaves.

Experts are ranked by (requests so far, last time), the best rank being 1. LFU is no stack policy: a
rare expert, just admitted, is in the cache of C experts beside the C - 1 most frequent ones. So the
cache of C experts holds ranks 1 to C - 1 and one more of rank `last(C)` >= C, which never falls as
C grows and is C itself or that of C + 1: a set of ranks says it all, `last(C)` is the smallest of
them from C on. A request that moves an expert from rank p (E when it is new) up to rank q makes it
the last one of all caches of fewer than q experts, and gives those of q to p experts ranks 1 to C:
ranks before q leave the set, those from q to p enter it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from moesaic.routing.caches import CACHES
from moesaic.routing.compiled import compiled
from moesaic.routing.policy import Policy
from moesaic.routing.requests import Requests


@CACHES.register
class LFU(Policy):
    """Least frequently used in this sample so far; the less recent one among equals."""

    def first_sizes(self, requests: Requests) -> NDArray[np.int32]:
        """Count requests by the smallest cache that holds the expert asked for."""
        first_SE = np.zeros((len(requests.ids_SQ), requests.experts), dtype=np.int32)
        _lfu(requests.ids_SQ, requests.starts_ST, first_SE)
        return first_SE


def _count_leading_zeros(typing_context: Any, word: Any) -> Any:
    """Zeros above the highest set bit of a uint64 that is not 0."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctlz(arguments[0], context.get_constant(types.boolean, True))

    return types.uint64(types.uint64), build


_leading_zeros: Any = intrinsic(_count_leading_zeros)


@compiled
def _size_of(rank, lasts_W):  # type: ignore[no-untyped-def]
    """The smallest cache that holds the expert of this rank."""
    one = np.uint64(1)
    word = rank >> 6
    bit = one << np.uint64(rank & 63)
    if not lasts_W[word] & bit:
        return rank + 1
    below = lasts_W[word] & (bit - one)
    while not below:
        if word == 0:
            return 1
        word -= 1
        below = lasts_W[word]
    return (word << 6) + 64 - np.int64(_leading_zeros(below))


@compiled
def _move_lasts(new, full, lasts_W):  # type: ignore[no-untyped-def]
    """Take out the ranks before `new`, put in those from `new` to `full`."""
    every = ~np.uint64(0)
    first, end = new >> 6, full >> 6
    from_new = every << np.uint64(new & 63)
    to_full = every >> np.uint64(63 - (full & 63))
    lasts_W[:first] = 0
    if first == end:
        lasts_W[end] = from_new & (lasts_W[end] | to_full)
    else:
        lasts_W[first] = from_new
        lasts_W[first + 1 : end] = every
        lasts_W[end] |= to_full


@compiled
def _lfu(ids_SQ, starts_ST, first_SE):  # type: ignore[no-untyped-def]
    experts = first_SE.shape[1]
    expert_R = np.empty(experts + 1, dtype=np.int32)  # the expert of each rank
    rank_E = np.empty(experts, dtype=np.int32)
    uses_E = np.empty(experts, dtype=np.int32)
    # more_U[u]: experts with more than u requests, so the rank above which a new one with u goes
    more_U = np.empty(ids_SQ.shape[1] + 2, dtype=np.int32)
    lasts_W = np.empty((experts >> 6) + 1, dtype=np.uint64)  # bits
    for s in range(ids_SQ.shape[0]):
        rank_E[:] = 0
        uses_E[:] = 0
        more_U[:] = 0
        lasts_W[:] = ~np.uint64(0)
        for t in range(starts_ST.shape[1] - 1):
            start, stop = starts_ST[s, t], starts_ST[s, t + 1]
            distinct = more_U[0]
            for q in range(start, stop):
                rank = rank_E[ids_SQ[s, q]]
                if rank:
                    first_SE[s, _size_of(rank, lasts_W) - 1] += 1
                else:
                    first_SE[s, distinct] += 1
                    distinct += 1
            for q in range(start, stop):
                expert = ids_SQ[s, q]
                uses = uses_E[expert]
                old = rank_E[expert]
                full = old if uses else experts
                if not uses:
                    old = more_U[0] + 1
                uses_E[expert] = uses + 1
                new = more_U[uses + 1] + 1  # before all with as many: it is the most recent
                more_U[uses] += 1
                for rank in range(old, new, -1):
                    other = expert_R[rank - 1]
                    expert_R[rank] = other
                    rank_E[other] = rank
                expert_R[new] = expert
                rank_E[expert] = new
                _move_lasts(new, full, lasts_W)
