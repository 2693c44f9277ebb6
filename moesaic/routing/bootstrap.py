"""Bootstrap intervals: how far a figure moves when the samples are drawn anew.

A replicate draws N of the N samples with replacement; `weights` says how often each was drawn, so
that a sum over samples becomes a matrix product. Intervals are basic (reverse percentile) ones:
[2 theta - theta*_(upper), 2 theta - theta*_(lower)], which may leave [0, 1].

Notation: N samples, B replicates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesaic.core.errors import UserError, check_seed

__all__ = ["Weights", "as_weights", "draw_weights", "interval", "weigh"]

Weights = NDArray[np.uint8]
EXACT = 2**24  # whole numbers up to here are exact in float32


def draw_weights(samples: int, replicates: int = 1000, *, seed: int = 0) -> Weights:
    """Draw how often each sample is in each replicate: uint8 [N, B], every column sums to N."""
    if samples < 1 or replicates < 1:
        raise UserError(f"samples={samples} and replicates={replicates}: give at least 1 of each.")
    generator = np.random.default_rng(check_seed(seed))
    drawn_NB = np.empty((samples, replicates), dtype=np.uint8)
    at_once = max(1, 4_000_000 // samples)
    for start in range(0, replicates, at_once):
        count = min(at_once, replicates - start)
        which = generator.integers(samples, size=(count, samples))
        which += samples * np.arange(count)[:, None]
        times = np.bincount(which.ravel(), minlength=count * samples)
        drawn_NB[:, start : start + count] = times.reshape(count, samples).T
    return drawn_NB


def as_weights(
    bootstrap: int | ArrayLike | Sequence[ArrayLike] | None,
    samples: Sequence[int] | None,
    *,
    domains: int = 1,
    seed: int = 0,
) -> list[NDArray[Any]] | None:
    """Return the weights of each domain: None, [N, B] for all domains, or a list of them.

    A number of replicates draws them, which needs the number of samples of each domain. Raises
    UserError for weights of another shape, negative ones, and too few replicates.
    """
    if bootstrap is None:
        return None
    if isinstance(bootstrap, (int, np.integer)):
        if bootstrap == 0:
            return None
        if samples is None:
            raise UserError(
                f"bootstrap={bootstrap} was given without samples. Give the number of samples of "
                "each domain, so that weights can be drawn before they arrive."
            )
        found = [
            draw_weights(max(1, count), int(bootstrap), seed=seed + domain)
            for domain, count in enumerate(samples)
        ]
    elif isinstance(bootstrap, (list, tuple)) and bootstrap and np.ndim(bootstrap[0]) == 2:
        found = [np.asarray(part) for part in bootstrap]
    else:
        found = [np.asarray(bootstrap)] * domains
    for part in found:
        if part.ndim != 2 or part.size == 0 or part.min() < 0:
            raise UserError(
                f"bootstrap weights have the shape {part.shape}. Give [samples, replicates]: how "
                "often each sample is drawn in each replicate."
            )
    if len(found) != domains or len({part.shape[1] for part in found}) > 1:
        raise UserError(
            f"bootstrap weights for {len(found)} domains were given, of {domains}. Give one array "
            "for each domain, with the same number of replicates."
        )
    return found


def weigh(counts_NG: NDArray[Any], weights_NB: NDArray[Any]) -> NDArray[Any]:
    """Sum whole numbers over the samples, weighted: [N, G] and [N, B] give [G, B], exactly.

    In float32 while every sum stays below 2^24, else in float64.
    """
    drawn = int(weights_NB.sum(axis=0, dtype=np.int64).max(initial=0))
    exact = int(counts_NG.max(initial=0)) * drawn < EXACT
    kind = np.float32 if exact else np.float64
    return np.asarray(counts_NG.T.astype(kind) @ weights_NB.astype(kind))


def interval(
    value: ArrayLike, replicates_B: NDArray[Any], confidence: float = 0.95
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the lower and upper end of the basic interval; replicates lie along the last axis.

    Raises UserError when there are too few replicates for the confidence asked for.
    """
    count = replicates_B.shape[-1]
    lower = round(count * (1 - confidence) / 2)
    upper = count - lower
    if not 0 < confidence < 1 or not 1 <= lower < upper:
        raise UserError(
            f"{count} replicates give no interval of confidence={confidence}. Use a confidence "
            f"below 1 and at least {_fewest(confidence)} replicates."
        )
    parted = np.partition(replicates_B, (lower, upper), axis=-1)
    twice = 2 * np.asarray(value, dtype=np.float64)
    return twice - parted[..., upper], twice - parted[..., lower]


def _fewest(confidence: float) -> int:
    if not 0 < confidence < 1:
        return 20
    return next(b for b in range(3, 10**9) if 1 <= round(b * (1 - confidence) / 2) < b / 2)
