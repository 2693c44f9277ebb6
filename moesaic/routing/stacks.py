"""Stack policies: caches of all sizes in one list, for many sequences side by side.

Where a policy evicts the resident with the lowest priority, and priorities do not depend on the
size, the content of the cache of C experts is the first C entries of one list (Mattson et al.,
1970). A request for x at place p: carry the entry of place 0 down; wherever an entry has a lower
priority than the one carried, they change places; put the last one carried at p, and x at place 0.

An entry is its priority as a number, unique and with the expert in it, so the step at place i is
`list[i], carry = max(list[i], carry), min(list[i], carry)`. LANES sequences go through it together,
one in each lane of the vector unit. The list has one row per place and one column per lane.

Notation: E experts, S sequences.
"""

from __future__ import annotations

from moesaic.routing.compiled import compiled

__all__ = ["LANES", "sweep"]

LANES = 32


@compiled
def sweep(list_ES, carry_S, target_S, rows):  # type: ignore[no-untyped-def]
    """Carry down from place 1 to the place of each lane's target; a lane with carry -1 rests.

    Keys are from 0 on; empty places hold a number above all keys.
    """
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
