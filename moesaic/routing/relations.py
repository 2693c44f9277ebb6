"""How routing figures go together: over domains, over experts, over models.

Pure functions of figures that the metrics return. Notation: D domains, L layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesaic.core.errors import UserError

__all__ = [
    "DomainFigures",
    "correlation",
    "domain_correlations",
    "domain_specialisation",
    "relative_difference",
    "spread_of_load",
]

LEAST_ACTIVE = 1e-5
"""An expert's activation in a domain counts above this, as in the routing study."""


def correlation(first: ArrayLike, second: ArrayLike) -> float:
    """Return Pearson's correlation over the pairs that are both finite; NaN without spread."""
    one, two = np.ravel(np.asarray(first, dtype=float)), np.ravel(np.asarray(second, dtype=float))
    if one.shape != two.shape:
        raise UserError(f"a correlation of {one.size} with {two.size} numbers. Give pairs.")
    both = np.isfinite(one) & np.isfinite(two)
    one, two = one[both], two[both]
    if len(one) < 2:
        return float("nan")
    one, two = one - one.mean(), two - two.mean()
    size = np.sqrt((one**2).sum() * (two**2).sum())
    return float((one * two).sum() / size) if size > 0 else float("nan")


@dataclass(frozen=True, eq=False)
class DomainFigures:
    """Domain specialisation: how much an expert's activation varies over domains."""

    specialisation_LE: NDArray[np.float64]
    """NaN where an expert is active in fewer than two domains."""
    mean: float


def domain_specialisation(activation_DLE: ArrayLike) -> DomainFigures:
    """Return how unequally domains use each expert: standard deviation (D - 1) / mean.

    `activation_DLE` is the activation of every expert in segments of 16 tokens, by domain (the
    `activation` of `SegmentRouting.at(16, "expert", domain=...)`). Domains in which an expert is
    hardly ever active (1e-5) are left out, as in the routing study. With one domain, all is NaN.
    """
    values = np.asarray(activation_DLE, dtype=float)
    if values.ndim != 3:
        raise UserError(
            f"activation has the shape {values.shape}. Give [domains, layers, experts]."
        )
    counts = values > LEAST_ACTIVE
    number = counts.sum(axis=0)
    kept = np.where(counts, values, 0)
    mean = kept.sum(axis=0) / np.maximum(number, 1)
    square = (np.where(counts, values - mean, 0) ** 2).sum(axis=0) / np.maximum(number - 1, 1)
    some = (number > 1) & (mean > 0)
    special = np.where(some, np.sqrt(square) / np.where(some, mean, 1), np.nan)
    return DomainFigures(special, float(special[some].mean()) if some.any() else float("nan"))


def domain_correlations(values_DLE: ArrayLike) -> NDArray[np.float64]:
    """Return Pearson's correlation over all experts between every two domains: [D, D]."""
    flat = np.asarray(values_DLE, dtype=float)
    flat = flat.reshape(len(flat), -1)
    return np.array([[correlation(one, two) for two in flat] for one in flat])


def relative_difference(value: ArrayLike, reference: ArrayLike) -> NDArray[np.float64]:
    """Return (value - reference) / reference; NaN where the reference is 0."""
    given, base = np.asarray(value, dtype=float), np.asarray(reference, dtype=float)
    return np.where(base != 0, (given - base) / np.where(base != 0, base, 1), np.nan)


def spread_of_load(activation_LE: ArrayLike) -> float:
    """Return the standard deviation (n - 1) of the activation over all experts of a model."""
    values = np.ravel(np.asarray(activation_LE, dtype=float))
    return float(values.std(ddof=1)) if values.size > 1 else float("nan")
