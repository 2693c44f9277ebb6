"""The LFU policy: the expert that was asked for least often leaves.

Experts are ranked by (requests so far, last time), the best rank being 1. LFU is no stack policy: a
rare expert, just admitted, is in the cache of C experts beside the C - 1 most frequent ones. So the
cache of C experts holds ranks 1 to C - 1 and one more of rank `last_C[C]` >= C, which never falls
as C grows. A request that moves an expert from rank p (E when it is new) up to rank q makes it the
last one of all caches of fewer than q experts, and gives those of q to p experts ranks 1 to C.
"""

from __future__ import annotations

import numpy as np
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


@compiled
def _lfu(ids_SQ, starts_ST, first_SE):  # type: ignore[no-untyped-def]
    experts = first_SE.shape[1]
    expert_R = np.empty(experts + 1, dtype=np.int32)  # the expert of each rank
    rank_E = np.empty(experts, dtype=np.int32)
    uses_E = np.empty(experts, dtype=np.int32)
    # more_U[u]: experts with more than u requests, so the rank above which a new one with u goes
    more_U = np.empty(ids_SQ.shape[1] + 2, dtype=np.int32)
    last_C = np.empty(experts + 2, dtype=np.int32)
    for s in range(ids_SQ.shape[0]):
        rank_E[:] = 0
        uses_E[:] = 0
        more_U[:] = 0
        for size in range(experts + 2):
            last_C[size] = size
        for t in range(starts_ST.shape[1] - 1):
            start, stop = starts_ST[s, t], starts_ST[s, t + 1]
            distinct = more_U[0]
            for q in range(start, stop):
                rank = rank_E[ids_SQ[s, q]]
                if rank:
                    low, high = 1, rank  # the smallest size whose last one ranks so or later
                    while low < high:
                        middle = (low + high) >> 1
                        if last_C[middle] >= rank:
                            high = middle
                        else:
                            low = middle + 1
                    size = low if last_C[low] == rank else rank + 1
                    first_SE[s, size - 1] += 1
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
                for size in range(1, new):
                    last_C[size] = new
                for size in range(new, full + 1):
                    last_C[size] = size
