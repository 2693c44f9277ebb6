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

All requests of a token are known before it, so they go down together: PASSES of them through a
place while its keys are in a register, and TIER places before the next tier, which only those reach
that have not come to their expert yet. At every place they come in their order still.

Notation: E experts, S sequences (lanes), T tokens, Q requests (of a token, where keys are meant).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from moesaic.routing.compiled import compiled
from moesaic.routing.requests import Requests

__all__ = ["LANES", "belady_sizes", "sch_sizes"]

# with 32-bit keys, a lane row is a vector of 64 bytes; targets and carries take 16 registers
LANES = 16
PASSES = 8
TIER = 64


def belady_sizes(requests: Requests) -> NDArray[np.int32]:
    """Count requests by their place in the stack of Belady's policy: int32 [S, E].

    A key is (how soon the next request comes, expert).
    """
    first_SE = np.zeros((len(requests.ids_SQ), requests.experts), dtype=np.int32)
    id_bits = int(requests.experts).bit_length()
    latest = requests.ids_SQ.shape[1] + requests.experts + 2
    list_ES, empty = _list(requests.experts, latest << id_bits)
    most = _most(requests)
    _belady(requests.ids_SQ, requests.starts_ST, latest, id_bits, empty, most, list_ES, first_SE)
    return first_SE


def sch_sizes(requests: Requests, window: int) -> NDArray[np.int32]:
    """Count requests by their place in the stack of the SCH policy: int32 [S, E].

    A key is (requests in the window, number of the last request).
    """
    first_SE = np.zeros((len(requests.ids_SQ), requests.experts), dtype=np.int32)
    window = min(window, requests.starts_ST.shape[1] - 1)
    most = _most(requests)
    bits = int(requests.ids_SQ.shape[1]).bit_length()
    list_ES, empty = _list(requests.experts, (window + 1) << bits)
    _sch(requests.ids_SQ, requests.starts_ST, window, bits, empty, most, list_ES, first_SE)
    return first_SE


def _list(experts: int, above_keys: int) -> tuple[NDArray[Any], int]:
    """Room for the list, in the smallest type where keys fit, and the number of an empty place."""
    kinds = (np.int16, np.int32, np.int64)
    kind = next(kind for kind in kinds if above_keys < np.iinfo(kind).max - 3)
    return np.empty((experts + 1, LANES), dtype=kind), int(np.iinfo(kind).max) - 1


def _most(requests: Requests) -> int:
    """Requests of a token, at most."""
    return int(np.diff(requests.starts_ST, axis=1).max(initial=0))


def _several_passes(
    typing_context: Any,
    list_ES: Any,
    start: Any,
    stop: Any,
    carry_QS: Any,
    target_QS: Any,
    turn: Any,
) -> Any:
    """Take places start to stop through the steps of PASSES requests, from `turn` on.

    Built by hand, for a loop over lanes that numba compiles keeps its vectors in memory.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = context.get_value_type(list_ES.dtype)
        lanes = ir.VectorType(kind, LANES)
        align = list_ES.dtype.bitwidth // 8
        number = arguments[1].type
        data = [
            builder.bitcast(
                context.make_array(signature.args[at])(context, builder, arguments[at]).data,
                lanes.as_pointer(),
            )
            for at in (0, 3, 4)
        ]
        rows, carries, targets = data
        rest = ir.Constant(lanes, [-1] * LANES)

        def load(base: Any, row: Any) -> Any:
            value = builder.load(builder.gep(base, [row]))
            value.align = align
            return value

        def store(value: Any, base: Any, row: Any) -> None:
            builder.store(value, builder.gep(base, [row])).align = align

        turns = [builder.add(arguments[5], ir.Constant(number, turn)) for turn in range(PASSES)]
        target_R = [load(targets, turn) for turn in turns]
        before_R = [load(carries, turn) for turn in turns]
        before = builder.block
        body = builder.append_basic_block("place")
        after = builder.append_basic_block("after")
        builder.branch(body)
        builder.position_at_end(body)
        place = builder.phi(number)
        carry_R = [builder.phi(lanes) for _ in turns]
        keys = load(rows, place)
        last_R = []
        for carry, target in zip(carry_R, target_R, strict=True):
            # the expert asked for leaves its place to the one carried, and nothing is carried on
            keys = builder.select(builder.icmp_signed("==", keys, target), rest, keys)
            less = builder.icmp_signed("<", keys, carry)
            last_R.append(builder.select(less, keys, carry))
            keys = builder.select(less, carry, keys)
        store(keys, rows, place)
        following = builder.add(place, ir.Constant(number, 1))
        place.add_incoming(arguments[1], before)
        place.add_incoming(following, body)
        for carry, given, last in zip(carry_R, before_R, last_R, strict=True):
            carry.add_incoming(given, before)
            carry.add_incoming(last, body)
        builder.cbranch(builder.icmp_signed("<", following, arguments[2]), body, after)
        builder.position_at_end(after)
        for turn, last in zip(turns, last_R, strict=True):
            store(last, carries, turn)
        return context.get_dummy_value()

    number = types.int64
    return types.void(list_ES, number, number, carry_QS, target_QS, number), build


_go_down: Any = intrinsic(_several_passes)


@compiled
def _serve(list_ES, target_QS, fresh_QS, turns, rows, carry_QS, left_S):  # type: ignore[no-untyped-def]
    """Serve the requests of a token: the entries of target_QS leave, those of fresh_QS come.

    A lane without a request in some turn has the target -2.
    """
    left_S[:] = 0
    for turn in range(turns):
        for s in range(LANES):
            target = target_QS[turn, s]
            if target != -2:
                carry = list_ES[0, s]
                list_ES[0, s] = fresh_QS[turn, s]
                left = left_S[s]
                carry_QS[left, s] = carry
                target_QS[left, s] = target
                left_S[s] = left + np.uint64(carry != target)
    for start in range(1, rows, TIER):
        turns = np.int64(left_S.max())
        for s in range(LANES):
            for turn in range(left_S[s], turns + PASSES):
                carry_QS[turn, s] = -1
                target_QS[turn, s] = -2
        for turn in range(0, turns, PASSES):
            _go_down(list_ES, start, min(start + TIER, rows), carry_QS, target_QS, turn)
        if start + TIER >= rows:
            break
        # those of a lane that still carry close ranks, so that few go on
        left_S[:] = 0
        for turn in range(turns):
            for s in range(LANES):
                carry = carry_QS[turn, s]
                left = left_S[s]
                carry_QS[left, s] = carry
                target_QS[left, s] = target_QS[turn, s]
                left_S[s] = left + np.uint64(carry >= 0)


@compiled
def _belady(ids_SQ, starts_ST, latest, id_bits, empty, most, list_ES, first_SE):  # type: ignore[no-untyped-def]
    experts = first_SE.shape[1]
    tokens = starts_ST.shape[1] - 1
    which = (1 << id_bits) - 1
    carry_QS = np.empty((most + PASSES, LANES), dtype=list_ES.dtype)
    target_QS = np.empty((most + PASSES, LANES), dtype=list_ES.dtype)
    fresh_QS = np.empty((most + PASSES, LANES), dtype=list_ES.dtype)
    left_S = np.empty(LANES, dtype=np.uint64)
    key_SE = np.empty((LANES, experts), dtype=list_ES.dtype)
    place_E = np.empty(experts, dtype=np.int32)
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
            turns, rows = 0, 0
            target_QS[:] = -2
            for s in range(lanes):
                start, stop = starts_ST[first + s, t], starts_ST[first + s, t + 1]
                turns = max(turns, stop - start)
                known = known_S[s]
                for place in range(known):
                    place_E[list_ES[place, s] & which] = place
                for q in range(start, stop):
                    expert = ids_SQ[first + s, q]
                    key = key_SE[s, expert]
                    if key < 0:  # new: it takes the first empty place
                        first_SE[first + s, known] += 1
                        key = empty + 1
                        list_ES[known, s] = key
                        known += 1
                    else:
                        first_SE[first + s, place_E[expert]] += 1
                    fresh = ((latest - next_SQ[s, q]) << id_bits) | expert
                    key_SE[s, expert] = fresh
                    target_QS[q - start, s] = key
                    fresh_QS[q - start, s] = fresh
                known_S[s] = known
                rows = max(rows, known)
            _serve(list_ES, target_QS, fresh_QS, turns, rows, carry_QS, left_S)


@compiled
def _sch(ids_SQ, starts_ST, window, clock_bits, empty, most, list_ES, first_SE):  # type: ignore[no-untyped-def]
    experts = first_SE.shape[1]
    tokens = starts_ST.shape[1] - 1
    clock = np.uint64((1 << clock_bits) - 1)
    carry_QS = np.empty((most + PASSES, LANES), dtype=list_ES.dtype)
    target_QS = np.empty((most + PASSES, LANES), dtype=list_ES.dtype)
    fresh_QS = np.empty((most + PASSES, LANES), dtype=list_ES.dtype)
    left_S = np.empty(LANES, dtype=np.uint64)
    ahead_SE = np.empty((LANES, experts), dtype=np.int32)
    key_SE = np.empty((LANES, experts), dtype=list_ES.dtype)
    place_E = np.empty(experts, dtype=np.int32)
    known_S = np.empty(LANES, dtype=np.int64)
    for first in range(0, ids_SQ.shape[0], LANES):
        lanes = min(LANES, ids_SQ.shape[0] - first)
        list_ES[:] = empty
        key_SE[:] = -1
        ahead_SE[:] = 0
        known_S[:] = 0
        for t in range(tokens):
            turns, rows = 0, 0
            target_QS[:] = -2
            for s in range(lanes):
                start, stop = starts_ST[first + s, t], starts_ST[first + s, t + 1]
                turns = max(turns, stop - start)
                known = known_S[s]
                for place in range(known):
                    place_E[ids_SQ[first + s, np.uint64(list_ES[place, s]) & clock]] = place
                # the window moves: at first it is filled
                enters = starts_ST[first + s, min(t + window - 1, tokens)] if t else 0
                for q in range(enters, starts_ST[first + s, min(t + window, tokens)]):
                    expert = ids_SQ[first + s, q]
                    ahead_SE[s, expert] += 1
                    if key_SE[s, expert] >= 0:
                        key_SE[s, expert] += 1 << clock_bits
                        list_ES[place_E[expert], s] = key_SE[s, expert]
                for q in range(start, stop):
                    expert = ids_SQ[first + s, q]
                    key = key_SE[s, expert]
                    if key < 0:  # new: it takes the first empty place
                        first_SE[first + s, known] += 1
                        key = empty + 1
                        list_ES[known, s] = key
                        known += 1
                    else:
                        first_SE[first + s, place_E[expert]] += 1
                    ahead_SE[s, expert] -= 1
                    fresh = (ahead_SE[s, expert] << clock_bits) | q
                    key_SE[s, expert] = fresh
                    target_QS[q - start, s] = key
                    fresh_QS[q - start, s] = fresh
                known_S[s] = known
                rows = max(rows, known)
            _serve(list_ES, target_QS, fresh_QS, turns, rows, carry_QS, left_S)
