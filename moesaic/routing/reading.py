"""A trace as blocks of samples, checked, domain by domain, in bounded memory.

Pages of the memory-mapped files are given back after every block, so that what a process holds does
not grow with the trace.

Notation: N samples of a block, T tokens of its longest, L layers, K experts a token.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.core.errors import UserError
from moesaic.routing.samples import Samples, read_samples
from moesaic.routing.trace import Trace

__all__ = ["Borders", "blocks", "borders_of", "read_block"]

_BLOCK_CHOICES = 8_000_000
"""Choices (tokens x L x K) of a block, at most: 16 MB of ids, 32 MB of weights."""
_AT_ONCE = 1 << 20  # rows of the small arrays


@dataclass(frozen=True, eq=False)
class Borders:
    """Where the samples of a trace begin and end, and the domain of each."""

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    domain: NDArray[np.int64]

    def of(self, domain: int) -> NDArray[np.int64]:
        """Return the numbers of a domain's samples, in the order of the trace."""
        return np.flatnonzero(self.domain == domain)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sample."""
        return self.ends - self.starts


def borders_of(trace: Trace) -> Borders:
    """Find the samples of a trace.

    Raises UserError for a trace without a token, one that begins inside a sample, a sample of two
    domains, and a domain that has no name.
    """
    if trace.rows == 0:
        raise UserError(
            f"{trace.directory} holds no token"
            + ("." if trace.complete else " yet.")
            + " Record some with `moesaic route record MODEL --data ... --tokens N -o DIR`."
        )
    starts, changes = [], []
    last: tuple[int, int] | None = None  # position and domain of the row before
    for start in range(0, trace.rows, _AT_ONCE):
        stop = min(trace.rows, start + _AT_ONCE)
        position = trace.position[start:stop].astype(np.int64)
        domain = trace.domain[start:stop].astype(np.int64)
        if domain.max() >= len(trace.domains):
            row = start + int(domain.argmax())
            raise _damaged(
                trace,
                f"row {row} is of domain {domain.max()}, but there are {len(trace.domains)}",
            )
        before = np.append(-2 if last is None else last[0], position[:-1])
        jumps = (position != 0) & (position != before + 1)
        if jumps.any():
            row = int(jumps.argmax())
            raise _damaged(trace, f"row {start + row} has position {position[row]} in its sample")
        starts.append(start + np.flatnonzero(position == 0))
        other = domain != np.append(domain[0] if last is None else last[1], domain[:-1])
        changes.append(start + np.flatnonzero(other & (position != 0)))
        last = int(position[-1]), int(domain[-1])
    if len(wrong := np.concatenate(changes)):
        raise _damaged(trace, f"row {wrong[0]} is of another domain than the rest of its sample")
    starts_N = np.concatenate(starts).astype(np.int64)
    ends_N = np.append(starts_N[1:], trace.rows)
    return Borders(starts_N, ends_N, trace.domain[starts_N].astype(np.int64))


def blocks(
    trace: Trace, borders: Borders, domain: int, *, first: int = 0
) -> Iterator[tuple[int, Samples]]:
    """Yield (samples of the domain that are done after it, block) from the `first` sample on.

    Where blocks begin depends on the trace alone, so that a pass that goes on adds the same sums in
    the same order. Raises UserError for ids of experts that a layer does not have.
    """
    rows = borders.of(domain)
    lengths = borders.lengths
    most = max(1, _BLOCK_CHOICES // (len(trace.layers) * trace.top_k))
    start = 0
    while start < len(rows):
        stop, longest = start, 0
        while stop < len(rows):
            longest = max(longest, int(lengths[rows[stop]]))
            if stop > start and longest * (stop + 1 - start) > most:
                break
            stop += 1
        if start >= first:
            yield stop, read_block(trace, borders, rows[start:stop], index=np.arange(start, stop))
            release(trace)
        start = stop


def read_block(
    trace: Trace,
    borders: Borders,
    rows: NDArray[np.int64],
    *,
    index: NDArray[np.int64] | None = None,
) -> Samples:
    """Read some samples of a trace, by their numbers, with weights and words."""
    lengths_N = borders.lengths[rows]
    starts_N, ends_N = borders.starts[rows], borders.ends[rows]
    longest = int(lengths_N.max())
    whole = bool((lengths_N == longest).all() and (starts_N[1:] == ends_N[:-1]).all())

    def take(array: Any, fill: int) -> NDArray[Any]:
        if whole:
            part = array[starts_N[0] : ends_N[-1]]
            return np.asarray(part).reshape(len(rows), longest, *array.shape[1:])
        found = np.full((len(rows), longest, *array.shape[1:]), fill, dtype=array.dtype)
        for row, start, end in zip(found, starts_N, ends_N, strict=True):
            row[: end - start] = array[start:end]
        return found

    raw_NTLK = take(trace.experts, trace.nothing)
    ids_NTLK = raw_NTLK.astype(np.int16)
    ids_NTLK[raw_NTLK == trace.nothing] = -1
    most_L = ids_NTLK.max(axis=(0, 1, 3))
    for layer, most, experts in zip(trace.layers, most_L, trace.shape.num_experts, strict=True):
        if most >= experts:
            raise _damaged(
                trace,
                f"experts.bin names expert {most} in layer {layer}, which has {experts} "
                f"(rows {starts_N[0]} to {ends_N[-1]})",
            )
    ids_NT = take(trace.token_ids, 0).astype(np.int64)
    predicted_NT = None if trace.predicted is None else take(trace.predicted, 0).astype(np.int64)
    return read_samples(
        ids_NTLK,
        num_experts=trace.num_experts,
        lengths=lengths_N,
        weights=take(trace.weights, 0),
        tokens=ids_NT,
        predicted=predicted_NT,
        index=index,
    )


def release(trace: Trace) -> None:
    """Give the pages of a trace's files back to the system: they are read again when needed."""
    for array in (
        trace.experts, trace.weights, trace.token_ids, trace.position, trace.document,
        trace.domain, trace.predicted, trace.loss,
    ):  # fmt: skip
        base = getattr(array, "base", None)
        if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            base.madvise(mmap.MADV_DONTNEED)


def _damaged(trace: Trace, what: str) -> UserError:
    return UserError(f"{trace.directory} is damaged: {what}. Record the trace again.")
