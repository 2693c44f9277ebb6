"""Stack policies: caches of all sizes in one list, for many sequences side by side.

Where a policy evicts the resident with the lowest priority, and priorities do not depend on the
size, the content of the cache of C experts is the first C entries of one list (Mattson et al.,
1970). A request for x at place p: carry the entry of place 0 down; wherever an entry has a lower
priority than the one carried, they change places; put the last one carried at p, and x at place 0.

An entry is a key: its priority as a number from 0 on, unique, and with the expert in it. So the
step at place i is `list[i], carry = max(list[i], carry), min(list[i], carry)`, and LANES sequences
go through it together, one in each lane of the vector unit. The list has one row per place and one
column per lane; empty places hold a number above all keys. A new expert's place is the first empty
one, marked with a number above that.

Notation: E experts, S sequences, T tokens, Q requests, R places in the list of recency.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.routing.compiled import compiled
from moesaic.routing.requests import Requests

__all__ = ["LANES", "belady_sizes", "sch_sizes"]

LANES = 32


def belady_sizes(requests: Requests) -> NDArray[np.int32]:
    """Count requests by their place in the stack of Belady's policy: int32 [S, E].

    A key is (how soon the next request comes, expert).
    """
    first_SE = np.zeros((len(requests.ids_SQ), requests.experts), dtype=np.int32)
    id_bits = int(requests.experts).bit_length()
    latest = requests.ids_SQ.shape[1] + requests.experts + 2
    list_ES, empty = _list(requests.experts, latest << id_bits)
    _belady(requests.ids_SQ, requests.starts_ST, latest, id_bits, empty, list_ES, first_SE)
    return first_SE


def sch_sizes(requests: Requests, window: int) -> NDArray[np.int32]:
    """Count requests by their place in the stack of the SCH policy: int32 [S, E].

    A key is (requests in the window, recency). Recency is a place in the list of known experts,
    oldest first, to which the requests of the current token are appended; it is made anew after
    every token, when the window moves.
    """
    first_SE = np.zeros((len(requests.ids_SQ), requests.experts), dtype=np.int32)
    window = min(window, requests.starts_ST.shape[1] - 1)
    most = int(np.diff(requests.starts_ST, axis=1).max(initial=0))
    bits = int(requests.experts + most).bit_length()
    list_ES, empty = _list(requests.experts, (window + 1) << bits)
    _sch(requests.ids_SQ, requests.starts_ST, window, most, bits, empty, list_ES, first_SE)
    return first_SE


def _list(experts: int, above_keys: int) -> tuple[NDArray[Any], int]:
    """Room for the list, in int32 where keys fit, and the number of an empty place."""
    kind = np.int32 if above_keys < 2**31 - 4 else np.int64
    return np.empty((experts + 1, LANES), dtype=kind), int(np.iinfo(kind).max) - 1


@compiled
def _sweep(list_ES, carry_S, target_S, rows):  # type: ignore[no-untyped-def]
    """Carry down from place 1 to the place of each lane's target; a lane with carry -1 rests."""
    for start in range(1, rows, 32):
        stop = min(start + 32, rows)
        for place in range(start, stop):
            for s in range(LANES):
                key = list_ES[place, s]
                carry = carry_S[s]
                found = key == target_S[s]
                list_ES[place, s] = carry if found else max(key, carry)
                carry_S[s] = -1 if found else min(key, carry)
        busy = carry_S[0]
        for s in range(LANES):
            busy = max(busy, carry_S[s])
        if busy < 0:
            break


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
                _sweep(list_ES, carry_S, target_S, rows)
            for place in range(rows):
                for s in range(lanes):
                    key = list_ES[place, s]
                    if key != empty:
                        place_SE[s, key & which] = place


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
                _sweep(list_ES, carry_S, target_S, rows)
            for s in range(lanes):
                asked = starts_ST[first + s, t + 1] - starts_ST[first + s, t]
                if t + window < tokens:
                    enters = t + window
                    for q in range(starts_ST[first + s, enters], starts_ST[first + s, enters + 1]):
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
