"""The LRU policy: the expert that was not asked for the longest leaves."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesaic.routing.caches import CACHES
from moesaic.routing.compiled import compiled
from moesaic.routing.policy import Policy
from moesaic.routing.requests import Requests


@CACHES.register
class LRU(Policy):
    """Least recently used: the expert not asked for the longest leaves."""

    def first_sizes(self, requests: Requests) -> NDArray[np.int32]:
        """Count requests by how many distinct experts were asked for since the last time."""
        first_SE = np.zeros((len(requests.ids_SQ), requests.experts), dtype=np.int32)
        _lru(requests.ids_SQ, requests.starts_ST, first_SE)
        return first_SE


@compiled
def _lru(ids_SQ, starts_ST, first_SE):  # type: ignore[no-untyped-def]
    experts = first_SE.shape[1]
    recent = np.empty(experts + ids_SQ.shape[1], dtype=np.int32)  # the oldest first
    place_E = np.empty(experts, dtype=np.int32)
    for s in range(ids_SQ.shape[0]):
        place_E[:] = -1
        known = 0
        for t in range(starts_ST.shape[1] - 1):
            start, stop = starts_ST[s, t], starts_ST[s, t + 1]
            distinct = known
            oldest = known
            for q in range(start, stop):
                place = place_E[ids_SQ[s, q]]
                if place >= 0:
                    first_SE[s, known - 1 - place] += 1
                    oldest = min(oldest, place)
                else:
                    first_SE[s, distinct] += 1
                    distinct += 1
            end = known
            for q in range(start, stop):
                recent[end] = ids_SQ[s, q]
                place_E[ids_SQ[s, q]] = end
                end += 1
            known = oldest
            for place in range(oldest, end):
                expert = recent[place]
                if place_E[expert] == place:  # not its older entry
                    recent[known] = expert
                    place_E[expert] = known
                    known += 1
