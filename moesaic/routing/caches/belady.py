"""Belady's policy: the expert that is asked for again the latest leaves (an oracle)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesaic.routing.caches import CACHES
from moesaic.routing.compiled import compiled
from moesaic.routing.policy import Policy
from moesaic.routing.requests import Requests
from moesaic.routing.stacks import LANES, sweep


@CACHES.register
class Belady(Policy):
    """The expert asked for again the latest leaves; knows the whole future."""

    def first_sizes(self, requests: Requests) -> NDArray[np.int32]:
        """Count requests by their place in the stack."""
        first_SE = np.zeros((len(requests.ids_SQ), requests.experts), dtype=np.int32)
        id_bits = int(requests.experts).bit_length()
        latest = requests.ids_SQ.shape[1] + requests.experts + 2
        kind = np.int32 if latest << id_bits < 2**31 - 4 else np.int64
        list_ES = np.empty((requests.experts + 1, LANES), dtype=kind)
        empty = np.iinfo(kind).max - 1
        _belady(
            requests.ids_SQ, requests.starts_ST, latest, id_bits, kind(empty), list_ES, first_SE
        )
        return first_SE


@compiled
def _belady(ids_SQ, starts_ST, latest, id_bits, empty, list_ES, first_SE):  # type: ignore[no-untyped-def]
    experts = first_SE.shape[1]
    tokens = starts_ST.shape[1] - 1
    which = (1 << id_bits) - 1
    carry_S = np.empty(LANES, dtype=list_ES.dtype)
    target_S = np.empty(LANES, dtype=list_ES.dtype)
    key_SE = np.empty((LANES, experts), dtype=list_ES.dtype)
    place_SE = np.empty((LANES, experts), dtype=np.int32)
    next_SQ = np.empty((LANES, ids_SQ.shape[1]), dtype=np.int32)
    next_E = np.empty(experts, dtype=np.int32)
    known_S = np.empty(LANES, dtype=np.int64)
    for first in range(0, ids_SQ.shape[0], LANES):
        lanes = min(LANES, ids_SQ.shape[0] - first)
        list_ES[:] = empty
        key_SE[:] = -1
        known_S[:] = 0
        for s in range(lanes):
            asked = starts_ST[first + s, tokens]
            for expert in range(experts):
                next_E[expert] = asked + 1 + expert
            for q in range(asked - 1, -1, -1):
                expert = ids_SQ[first + s, q]
                next_SQ[s, q] = next_E[expert]
                next_E[expert] = q
        for t in range(tokens):
            most = 0
            for s in range(lanes):
                start, stop = starts_ST[first + s, t], starts_ST[first + s, t + 1]
                most = max(most, stop - start)
                distinct = known_S[s]
                for q in range(start, stop):
                    expert = ids_SQ[first + s, q]
                    if key_SE[s, expert] >= 0:
                        first_SE[first + s, place_SE[s, expert]] += 1
                    else:
                        first_SE[first + s, distinct] += 1
                        distinct += 1
            rows = 0
            for turn in range(most):
                for s in range(LANES):
                    carry_S[s] = -1
                    target_S[s] = -2
                for s in range(lanes):
                    q = starts_ST[first + s, t] + turn
                    if q < starts_ST[first + s, t + 1]:
                        expert = ids_SQ[first + s, q]
                        target = key_SE[s, expert]
                        if target < 0:  # new: it takes the first empty place
                            target = empty + 1
                            list_ES[known_S[s], s] = target
                            known_S[s] += 1
                        fresh = ((latest - next_SQ[s, q]) << id_bits) | expert
                        if list_ES[0, s] != target:
                            carry_S[s] = list_ES[0, s]
                        target_S[s] = target
                        list_ES[0, s] = fresh
                        key_SE[s, expert] = fresh
                    rows = max(rows, known_S[s])
                sweep(list_ES, carry_S, target_S, rows)
            for place in range(rows):
                for s in range(lanes):
                    key = list_ES[place, s]
                    if key != empty:
                        place_SE[s, key & which] = place
