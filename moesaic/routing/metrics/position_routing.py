"""Position-wise segment routing: SRP of the segments that start at the same place in their sample.

The figures are those of `segment_routing`; the population is all (sample, expert) pairs at one
window start p, of a model or of each layer. The middle of a segment is at p + m // 2.

Notation: D domains, L layers, P window starts, C = m + 1 counts. Memory: 8 D L P C bytes for each
segment length m (8 D P C for the model alone).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moesaic.core.errors import UserError
from moesaic.routing.metric import Metric
from moesaic.routing.metrics import METRICS
from moesaic.routing.metrics.segment_routing import (
    Level,
    SegmentFigures,
    best_threshold,
    check_segments,
)
from moesaic.routing.samples import Samples, Space
from moesaic.routing.windows import position_changes


@METRICS.register
class PositionRouting(Metric):
    """SRP, rho and activation by where the segment starts."""

    def __init__(
        self,
        space: Space,
        *,
        tokens: int,
        segments: Sequence[int] = (4, 16, 64, 256),
        level: Level = "model",
    ) -> None:
        """Count for samples of at most `tokens` tokens; `level` is "model" or "layer"."""
        super().__init__(space)
        self.segments = check_segments(segments)
        if level not in ("model", "layer"):
            raise UserError(f"level='{level}' is not counted by position. Use model or layer.")
        if tokens < 1:
            raise UserError(f"tokens={tokens} was given. Give the length of the longest sample.")
        self.level: Level = level
        self.tokens = tokens
        groups = 1 if level == "model" else space.layers
        for m in self.segments:
            # what changes from one start to the next
            self.sums[f"changes {m}"] = np.zeros(
                (len(space.domains), groups, max(0, tokens - m + 1), m + 1), dtype=np.int64
            )

    def add(self, domain: int, rows_N: NDArray[np.int64], samples: Samples) -> None:
        """Add samples of one domain."""
        longest = int(samples.lengths_N.max(initial=0))
        if longest > self.tokens:
            raise UserError(
                f"a sample of {longest} tokens arrived, but tokens={self.tokens}. Give the length "
                "of the longest sample."
            )
        for m in self.segments:
            sums_GPC = self.sums[f"changes {m}"][domain]
            if sums_GPC.shape[1]:
                pooled = self.level == "model"
                sums_GPC += position_changes(samples, m, sums_GPC.shape[1], pooled=pooled)

    def result(self) -> dict[int, SegmentFigures]:
        """Return the figures of all domains together for every segment length."""
        return {m: self.at(m) for m in self.segments}

    def at(self, segment: int, *, domain: str | None = None) -> SegmentFigures:
        """Return the figures [P] or [L, P] of one segment length, of one domain or all together.

        P is tokens - segment + 1, or 0. Starts that no sample reaches have no windows.
        """
        if segment not in self.segments or domain not in (None, *self.space.domains):
            raise UserError(
                f"segment={segment} of the domain '{domain}' was not counted. Segments: "
                f"{', '.join(map(str, self.segments))}; domains: {', '.join(self.space.domains)}."
            )
        sums_DGPC = self.sums[f"changes {segment}"]
        if domain is not None:
            sums_DGPC = sums_DGPC[[self.space.domains.index(domain)]]
        figures = best_threshold(sums_DGPC.sum(axis=0).cumsum(axis=1))
        return figures[0] if self.level == "model" else figures
