"""Pseudorandom numbers and permutations that can be entered at any point, without replay.

Everything is computed from its position with 64-bit integer arithmetic: the same on every machine
and with every library version, and a cursor is a handful of integers.
"""

from __future__ import annotations

import hashlib

_MASK = (1 << 64) - 1


def key(*parts: object) -> int:
    """Return a 64-bit key for `parts` (a seed, a name, an epoch)."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def mix(key: int, position: int) -> int:
    """Return 64 pseudorandom bits for `position`. Source: splitmix64 (Steele and others, 2014)."""
    x = (key + (position + 1) * 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def uniform(key: int, position: int) -> float:
    """Return a number in [0, 1) for `position`."""
    return (mix(key, position) >> 11) * 2.0**-53


class Permutation:
    """A pseudorandom order of range(n): `order[i]` in constant time and memory.

    A Feistel network permutes the numbers below the next power of four; numbers that fall outside
    range(n) are sent through it again (cycle walking), 4 times at most on average.
    """

    def __init__(self, n: int, key: int) -> None:
        self.n = n
        self._half = max(1, ((n - 1).bit_length() + 1) // 2)
        self._keys = [mix(key, round_) for round_ in range(6)]

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.n:
            raise IndexError(f"{index} is outside 0..{self.n - 1}")
        mask = (1 << self._half) - 1
        while True:
            left, right = index >> self._half, index & mask
            for round_key in self._keys:
                left, right = right, left ^ (mix(round_key, right) >> 17 & mask)
            index = left << self._half | right
            if index < self.n:
                return index
