"""How often experts are active in windows of tokens: the counts behind segment routing.

A window is `m` consecutive tokens of one sample, stride 1. For every expert of every layer, c of
its m tokens chose the expert. `window_counts` counts the windows with each c from 0 to m.

An expert's activity is a row of bits, one a token. The count of the window at p changes to that of
p + 1 only where bit p differs from bit p + m, so the kernel jumps from change to change.

Notation: N samples, L layers, E experts; S = sum of (m + 1) over the segment lengths, the columns
of one length behind those of another (`columns`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from moesaic.routing.compiled import compiled, spread
from moesaic.routing.samples import Samples

__all__ = ["columns", "position_changes", "window_counts"]


def columns(segments: Sequence[int]) -> list[slice]:
    """Return where the counts of each segment length are among the S columns."""
    ends = np.cumsum([m + 1 for m in segments]).tolist()
    return [slice(end - m - 1, end) for m, end in zip(segments, ends, strict=True)]


def window_counts(
    samples: Samples, segments: Sequence[int], *, each_expert: bool = False
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Count windows by how many of their tokens chose an expert.

    Returns int32 [N, L, S], summed over the experts ([N, L * E, S] for `each_expert`), and int64
    [L, E, S], summed over the samples.
    """
    lengths = np.array(segments, dtype=np.int64)
    width = int((lengths + 1).sum())
    groups = samples.layers * (samples.num_experts if each_expert else 1)
    by_sample_NLS = np.zeros((len(samples), groups, width), dtype=np.int32)

    def work(start: int, stop: int) -> NDArray[np.int64]:
        by_expert_LES = np.zeros((samples.layers, samples.num_experts, width), dtype=np.int64)
        _count_windows(
            samples.experts_NTLK[start:stop],
            samples.lengths_N[start:stop],
            lengths,
            by_sample_NLS[start:stop],
            by_expert_LES,
        )
        return by_expert_LES

    parts = spread(work, len(samples))
    return by_sample_NLS, sum(parts[1:], start=parts[0])


def position_changes(
    samples: Samples, segment: int, positions: int, *, pooled: bool = False
) -> NDArray[np.int64]:
    """Count, per layer and window start p, how the number of (sample, expert) pairs at c changes.

    Returns int64 [L, positions, m + 1], or [1, ...] for all layers together where `pooled`; its
    running sum over the positions is the number of pairs whose window at p has c active tokens.
    Samples too short for a window at p are not among them.
    """

    def work(start: int, stop: int) -> NDArray[np.int64]:
        layers = 1 if pooled else samples.layers
        changes_LPC = np.zeros((layers, positions + 1, segment + 1), dtype=np.int64)
        _count_changes(
            samples.experts_NTLK[start:stop],
            samples.lengths_N[start:stop],
            samples.num_experts,
            segment,
            changes_LPC,
        )
        return changes_LPC

    parts = spread(work, len(samples))
    return sum(parts[1:], start=parts[0])[:, :positions]


def _count_ones(typing_context: Any, word: Any) -> Any:
    """Count the set bits of a uint64."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), build


def _count_zeros(typing_context: Any, word: Any) -> Any:
    """Number of the lowest set bit of a uint64 that is not 0."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], context.get_constant(types.boolean, True))

    return types.uint64(types.uint64), build


_ones: Any = intrinsic(_count_ones)
_trailing_zeros: Any = intrinsic(_count_zeros)


@compiled
def _set_bits(ids_TK, length, bits_EW):  # type: ignore[no-untyped-def]
    bits_EW[:] = 0
    for t in range(length):
        word = t >> 6
        bit = np.uint64(1) << np.uint64(t & 63)
        for k in range(ids_TK.shape[1]):
            expert = ids_TK[t, k]
            if expert >= 0:
                bits_EW[expert, word] |= bit


@compiled
def _first_count(bits_W, m):  # type: ignore[no-untyped-def]
    """Active tokens among the first m."""
    count = 0
    for word in range(m >> 6):
        count += _ones(bits_W[word])
    if m & 63:
        count += _ones(bits_W[m >> 6] & ((np.uint64(1) << np.uint64(m & 63)) - np.uint64(1)))
    return count


@compiled
def _later(bits_W, word, m):  # type: ignore[no-untyped-def]
    """The word of bits that lies m tokens later."""
    ahead = word + (m >> 6)
    shift = np.uint64(m & 63)
    found = bits_W[ahead] >> shift
    if shift:
        found |= bits_W[ahead + 1] << (np.uint64(64) - shift)
    return found


@compiled
def _count_windows(ids_NTLK, lengths_N, segments, by_sample_NLS, by_expert_LES):  # type: ignore[no-untyped-def]
    one = np.uint64(1)
    experts = by_expert_LES.shape[1]
    pooled = by_sample_NLS.shape[1] == ids_NTLK.shape[2]
    longest = 0
    for m in segments:
        longest = max(longest, m)
    words = (ids_NTLK.shape[1] >> 6) + (longest >> 6) + 3
    bits_EW = np.zeros((experts, words), dtype=np.uint64)
    for n in range(ids_NTLK.shape[0]):
        length = lengths_N[n]
        for layer in range(ids_NTLK.shape[2]):
            _set_bits(ids_NTLK[n, :, layer], length, bits_EW)
            for e in range(experts):
                bits_W = bits_EW[e]
                total_S = by_expert_LES[layer, e]
                sample_S = by_sample_NLS[n, layer if pooled else layer * experts + e]
                column = 0
                for m in segments:
                    windows = length - m + 1
                    if windows > 0:
                        # unsigned: numba spends instructions on signed indices, which may be -1
                        count = np.uint64(column + _first_count(bits_W, m))
                        last = np.int64(0)
                        changes = windows - 1  # steps from one window to the next
                        for word in range((changes + 63) >> 6):
                            here = bits_W[word]
                            differ = here ^ _later(bits_W, word, m)
                            if (word + 1) << 6 > changes:
                                differ &= (one << np.uint64(changes & 63)) - one
                            base = (word << 6) + 1
                            while differ:
                                bit = _trailing_zeros(differ)
                                differ &= differ - one
                                at = base + np.int64(bit)
                                total_S[count] += at - last
                                sample_S[count] += at - last
                                last = at
                                count += one - (((here >> bit) & one) << one)
                        total_S[count] += windows - last
                        sample_S[count] += windows - last
                    column += m + 1


@compiled
def _count_changes(ids_NTLK, lengths_N, experts, m, changes_LPC):  # type: ignore[no-untyped-def]
    words = (ids_NTLK.shape[1] >> 6) + (m >> 6) + 3
    bits_EW = np.zeros((experts, words), dtype=np.uint64)
    for n in range(ids_NTLK.shape[0]):
        length = lengths_N[n]
        windows = length - m + 1
        if windows <= 0:
            continue
        for layer in range(ids_NTLK.shape[2]):
            _set_bits(ids_NTLK[n, :, layer], length, bits_EW)
            own = layer if changes_LPC.shape[0] > 1 else 0
            for e in range(experts):
                bits_W = bits_EW[e]
                count = _first_count(bits_W, m)
                changes_LPC[own, 0, count] += 1
                changes = windows - 1
                for word in range((changes + 63) >> 6):
                    here = bits_W[word]
                    differ = here ^ _later(bits_W, word, m)
                    if (word + 1) << 6 > changes:
                        differ &= (np.uint64(1) << np.uint64(changes & 63)) - np.uint64(1)
                    while differ:
                        bit = _trailing_zeros(differ)
                        differ &= differ - np.uint64(1)
                        at = (word << 6) + 1 + np.int64(bit)
                        changes_LPC[own, at, count] -= 1
                        count += 1 - 2 * np.int64((here >> bit) & np.uint64(1))
                        changes_LPC[own, at, count] += 1
                changes_LPC[own, windows, count] -= 1
