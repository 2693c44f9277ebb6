"""The LFU policy: the expert that was asked for least often leaves.

Not a stack policy: a rare expert, just admitted, is in the cache of C experts beside the C - 1 most
frequent ones. So the cache of C experts holds those of ranks 1 to C - 1 by (requests, last time),
and one more of rank `member_C[C]` >= C, which does not fall when C grows. A request that moves an
expert from rank p (E + 1 when new) up to rank q makes it the last member of all caches of fewer
than q experts, and restores rank C in those of q to p.
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
        clock_bits = int(requests.ids_SQ.shape[1] + 1).bit_length()
        use_bits = int(requests.starts_ST.shape[1]).bit_length()
        kind = np.int32 if clock_bits + use_bits < 32 else np.int64
        keys_E = np.zeros(requests.experts, dtype=kind)
        _lfu(requests.ids_SQ, requests.starts_ST, clock_bits, keys_E, first_SE)
        return first_SE


@compiled
def _above(keys_E, key):  # type: ignore[no-untyped-def]
    """Number of experts that rank before `key`."""
    count = np.int32(0)
    for expert in range(keys_E.shape[0]):
        count += np.int32(keys_E[expert] > key)
    return count


@compiled
def _lfu(ids_SQ, starts_ST, clock_bits, keys_E, first_SE):  # type: ignore[no-untyped-def]
    experts = first_SE.shape[1]
    one_use = 1 << clock_bits
    member_C = np.empty(experts + 2, dtype=np.int32)
    for s in range(ids_SQ.shape[0]):
        keys_E[:] = 0
        for size in range(experts + 2):
            member_C[size] = size
        known = 0
        for t in range(starts_ST.shape[1] - 1):
            start, stop = starts_ST[s, t], starts_ST[s, t + 1]
            distinct = known
            for q in range(start, stop):
                key = keys_E[ids_SQ[s, q]]
                if key:
                    rank = _above(keys_E, key) + 1
                    low, high = 1, rank  # the smallest size whose last member ranks so or later
                    while low < high:
                        middle = (low + high) >> 1
                        if member_C[middle] >= rank:
                            high = middle
                        else:
                            low = middle + 1
                    size = low if member_C[low] == rank else rank + 1
                    first_SE[s, size - 1] += 1
                else:
                    first_SE[s, distinct] += 1
                    distinct += 1
            for q in range(start, stop):
                expert = ids_SQ[s, q]
                key = keys_E[expert]
                fresh = ((key >> clock_bits) * one_use) + one_use + q + 1
                old = _above(keys_E, key) + 1 if key else experts
                new = _above(keys_E, fresh) + 1
                keys_E[expert] = fresh
                known += key == 0
                for size in range(1, new):
                    member_C[size] = new
                for size in range(new, old + 1):
                    member_C[size] = size
