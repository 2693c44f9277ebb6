"""Load: how many tokens choose each expert, and how even that is overall and inside a sample.

    load        share of the choices of a layer that go to an expert; sums to 1 over the experts
    cv          standard deviation / mean of the load over the experts (0 even, sqrt(E - 1) at most)
    entropy     entropy of the load / log E: 1 even, 0 one expert
    violation   load of the busiest expert / the mean - 1
    dead        experts that nobody chooses

Global balance looks at the load of all text, local balance at the load inside each sample, averaged
over the samples: a model can be even overall and uneven at every place. Segment routing is at odds
with the local one only.

Notation: D domains, L layers, E experts, N samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.measure.load import dead_experts, entropy, load_share, variation
from moesaic.routing.metric import Metric
from moesaic.routing.metrics import METRICS
from moesaic.routing.samples import Samples, Space

FIGURES = ("cv", "entropy", "violation")


@dataclass(frozen=True, eq=False)
class LoadFigures:
    """Load of all domains together or of one."""

    counts_LE: NDArray[np.int64]
    tokens: int
    share_LE: NDArray[np.float64]
    balance: dict[str, NDArray[np.float64]]
    """Global: cv, entropy and violation [L]."""
    local: dict[str, NDArray[np.float64]]
    """The same of each sample, averaged [L]."""
    dead_L: NDArray[np.int64]


@METRICS.register
class Load(Metric):
    """Load of every expert, and how even it is globally and inside samples."""

    def __init__(self, space: Space) -> None:
        super().__init__(space)
        shape = (len(space.domains), space.layers)
        self.sums["counts"] = np.zeros((*shape, space.num_experts), dtype=np.int64)
        self.sums["tokens"] = np.zeros(shape[0], dtype=np.int64)
        self.sums["local"] = np.zeros((*shape, len(FIGURES)))
        self.sums["samples"] = np.zeros(shape, dtype=np.int64)

    def add(self, domain: int, rows_N: NDArray[np.int64], samples: Samples) -> None:
        """Add samples of one domain."""
        counts_NLE = sample_counts(samples)
        self.sums["counts"][domain] += counts_NLE.sum(axis=0)
        self.sums["tokens"][domain] += samples.lengths_N.sum()
        some_NL = counts_NLE.any(axis=2)
        self.sums["samples"][domain] += some_NL.sum(axis=0)
        figures = _balance(counts_NLE)
        for place, name in enumerate(FIGURES):
            self.sums["local"][domain, :, place] += (figures[name] * some_NL).sum(axis=0)

    def result(self) -> dict[str, LoadFigures]:
        """Return the figures of every domain, and of ``all`` together."""
        return {name: _figures(sums) for name, sums in self.pooled()}


def _figures(sums: dict[str, NDArray[Any]]) -> LoadFigures:
    counts_LE = sums["counts"]
    samples_L = sums["samples"]
    local_LF = sums["local"] / np.maximum(samples_L, 1)[:, None]
    local_LF = np.where(samples_L[:, None] > 0, local_LF, np.nan)
    return LoadFigures(
        counts_LE,
        int(sums["tokens"]),
        load_share(counts_LE),
        _balance(counts_LE),
        dict(zip(FIGURES, local_LF.T, strict=True)),
        dead_experts(counts_LE),
    )


def sample_counts(samples: Samples) -> NDArray[np.int64]:
    """Count how often each sample chooses each expert: int64 [N, L, E]."""
    count, _, layers, _ = samples.experts_NTLK.shape
    experts = samples.num_experts
    found = np.empty((count, layers, experts), dtype=np.int64)
    # one place more, for -1; sample by sample, for the temporary arrays
    offset_L1 = (experts + 1) * np.arange(layers)[:, None] + 1
    for n in range(count):
        flat = (samples.experts_NTLK[n] + offset_L1).ravel()
        counts = np.bincount(flat, minlength=layers * (experts + 1))
        found[n] = counts.reshape(layers, experts + 1)[:, 1:]
    return found


def _balance(counts: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
    mean = counts.mean(axis=-1)
    most = counts.max(axis=-1)
    violation = np.divide(most, mean, out=np.ones(mean.shape), where=mean > 0) - 1
    return {"cv": variation(counts), "entropy": entropy(counts), "violation": violation}
