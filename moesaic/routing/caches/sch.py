"""The SCH policy: the expert asked for least often in the tokens just ahead leaves.

Segment cache best hit rate, arXiv 2505.16056, section 3.2. While token t is served, the window is
tokens t to t + m - 1, less the requests of t already served; among equals the expert not asked for
the longest leaves. An oracle that knows frequencies only; m = 1 is nearly LRU.

A key is (requests in the window, recency). Recency is a place in the list of known experts, oldest
first, to which the requests of the current token are appended; it is made anew after every token,
when the window moves.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesaic.core.errors import UserError
from moesaic.routing.caches import CACHES
from moesaic.routing.compiled import compiled
from moesaic.routing.policy import Policy
from moesaic.routing.requests import Requests
from moesaic.routing.stacks import LANES, sweep


@CACHES.register
class SCH(Policy):
    """Segment cache best: the expert least asked for in the next tokens leaves (an oracle)."""

    takes_window = True

    def __init__(self, *, window: int) -> None:
        if isinstance(window, bool) or not isinstance(window, (int, np.integer)) or window < 1:
            raise UserError(f"window={window!r} was given. Give a number of tokens, 1 or more.")
        self.window = int(window)

    def first_sizes(self, requests: Requests) -> NDArray[np.int32]:
        """Count requests by their place in the stack."""
        first_SE = np.zeros((len(requests.ids_SQ), requests.experts), dtype=np.int32)
        tokens = requests.starts_ST.shape[1] - 1
        window = min(self.window, tokens)
        most = int(np.diff(requests.starts_ST, axis=1).max(initial=0))
        bits = int(requests.experts + most).bit_length()
        kind = np.int32 if (window + 1) << bits < 2**31 - 4 else np.int64
        list_ES = np.empty((requests.experts + 1, LANES), dtype=kind)
        empty = np.iinfo(kind).max - 1
        _sch(
            requests.ids_SQ, requests.starts_ST, window, most, bits, kind(empty), list_ES, first_SE
        )
        return first_SE


@compiled
def _sch(ids_SQ, starts_ST, window, most, bits, empty, list_ES, first_SE):  # type: ignore[no-untyped-def]
    experts = first_SE.shape[1]
    tokens = starts_ST.shape[1] - 1
    mask = (1 << bits) - 1
    carry_S = np.empty(LANES, dtype=list_ES.dtype)
    target_S = np.empty(LANES, dtype=list_ES.dtype)
    key_SE = np.empty((LANES, experts), dtype=list_ES.dtype)
    place_SE = np.empty((LANES, experts), dtype=np.int32)
    ahead_SE = np.empty((LANES, experts), dtype=np.int32)
    recent_SR = np.empty((LANES, experts + most), dtype=np.int32)
    recency_SE = np.empty((LANES, experts), dtype=np.int32)
    moved_SR = np.empty((LANES, experts + most), dtype=np.int32)
    known_S = np.empty(LANES, dtype=np.int64)
    before_S = np.empty(LANES, dtype=np.int64)  # known before the token
    for first in range(0, ids_SQ.shape[0], LANES):
        lanes = min(LANES, ids_SQ.shape[0] - first)
        list_ES[:] = empty
        recency_SE[:] = -1
        known_S[:] = 0
        before_S[:] = 0
        ahead_SE[:] = 0
        for s in range(lanes):
            for q in range(starts_ST[first + s, window]):
                ahead_SE[s, ids_SQ[first + s, q]] += 1
        for t in range(tokens):
            turns = 0
            for s in range(lanes):
                start, stop = starts_ST[first + s, t], starts_ST[first + s, t + 1]
                turns = max(turns, stop - start)
                distinct = known_S[s]
                for q in range(start, stop):
                    expert = ids_SQ[first + s, q]
                    if recency_SE[s, expert] >= 0:
                        first_SE[first + s, place_SE[s, expert]] += 1
                    else:
                        first_SE[first + s, distinct] += 1
                        distinct += 1
            rows = 0
            for turn in range(turns):
                for s in range(LANES):
                    carry_S[s] = -1
                    target_S[s] = -2
                for s in range(lanes):
                    q = starts_ST[first + s, t] + turn
                    if q < starts_ST[first + s, t + 1]:
                        expert = ids_SQ[first + s, q]
                        target = key_SE[s, expert]
                        if recency_SE[s, expert] < 0:  # new: it takes the first empty place
                            target = empty + 1
                            list_ES[known_S[s], s] = target
                            known_S[s] += 1
                        recency = before_S[s] + turn
                        recent_SR[s, recency] = expert
                        recency_SE[s, expert] = recency
                        ahead_SE[s, expert] -= 1
                        fresh = (ahead_SE[s, expert] << bits) | recency
                        if list_ES[0, s] != target:
                            carry_S[s] = list_ES[0, s]
                        target_S[s] = target
                        list_ES[0, s] = fresh
                        key_SE[s, expert] = fresh
                    rows = max(rows, known_S[s])
                sweep(list_ES, carry_S, target_S, rows)
            for s in range(lanes):
                asked = starts_ST[first + s, t + 1] - starts_ST[first + s, t]
                if t + window < tokens:
                    enter, end = starts_ST[first + s, t + window], starts_ST[first + s, t + window + 1]
                    for q in range(enter, end):
                        ahead_SE[s, ids_SQ[first + s, q]] += 1
                kept = 0
                for recency in range(before_S[s] + asked):
                    expert = recent_SR[s, recency]
                    if recency_SE[s, expert] == recency:  # not its older entry
                        moved_SR[s, recency] = kept
                        recent_SR[s, kept] = expert
                        recency_SE[s, expert] = kept
                        kept += 1
                before_S[s] = kept
            for place in range(rows):
                for s in range(lanes):
                    if list_ES[place, s] != empty:
                        recency = moved_SR[s, list_ES[place, s] & mask]
                        expert = recent_SR[s, recency]
                        key = (ahead_SE[s, expert] << bits) | recency
                        list_ES[place, s] = key
                        key_SE[s, expert] = key
                        place_SE[s, expert] = place
