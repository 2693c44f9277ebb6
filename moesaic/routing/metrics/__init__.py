"""Routing metrics: named sums over recorded routing, one file each, and functions for arrays.

A metric is a `moesaic.routing.metric.Metric` decorated with `@METRICS.register`; its key is its
file's name with dashes. The functions here take arrays and return figures; nothing heavy is
imported before one is called.

    from moesaic.routing import metrics
    found = metrics.srp(experts, num_experts=64, segment=16, level="layer")
    found.srp, found.rho, found.activation
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from moesaic.core.registry import Registry

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from moesaic.routing.metric import Metric
    from moesaic.routing.metrics.segment_routing import SegmentFigures

__all__ = ["METRICS", "position_srp", "srp"]

METRICS: Registry[type[Metric]] = Registry("routing metric", "moesaic.routing.metrics")


def srp(
    experts: ArrayLike | Sequence[ArrayLike],
    *,
    num_experts: int,
    segment: int,
    level: Literal["model", "layer", "expert"] = "model",
    mask: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    bootstrap: int | ArrayLike | None = None,
    seed: int = 0,
    confidence: float = 0.95,
) -> SegmentFigures:
    """Return segment routing best performance, rho and activation, of segments of any length.

    `experts`, `mask` and `lengths` are as in `moesaic.routing.samples.read_samples`: [samples,
    tokens, layers, k] or [samples, tokens, k]. The figures are one number for "model", [L] for
    "layer", [L, E] for "expert"; without an axis of layers, one number and [E]. `bootstrap` is a
    number of replicates or weights [samples, B]: how often each sample is drawn; it fills `.low`
    and `.high`. Where no sample has `segment` tokens, `.windows` and `.srp` are 0 and
    `.activation` is NaN. Definitions: `moesaic.routing.metrics.segment_routing`. Raises UserError.
    """
    from moesaic.routing.metrics.segment_routing import SegmentRouting
    from moesaic.routing.samples import Space, read_samples

    samples = read_samples(experts, num_experts=num_experts, mask=mask, lengths=lengths)
    metric = SegmentRouting(
        Space(num_experts, samples.layers),
        segments=(segment,),
        bootstrap=bootstrap,
        intervals=level,
        samples=(len(samples),),
        seed=seed,
        confidence=confidence,
    )
    metric.update(samples)
    figures = metric.at(segment, level)
    return figures[0] if level != "model" and not samples.layered else figures


def position_srp(
    experts: ArrayLike | Sequence[ArrayLike],
    *,
    num_experts: int,
    segment: int,
    level: Literal["model", "layer"] = "model",
    mask: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
) -> SegmentFigures:
    """Return the figures of `srp` by where segments start: [P] for "model", [L, P] for "layer".

    P is the length of the longest sample - segment + 1, or 0. Raises UserError.
    """
    from moesaic.routing.metrics.position_routing import PositionRouting
    from moesaic.routing.samples import Space, read_samples

    samples = read_samples(experts, num_experts=num_experts, mask=mask, lengths=lengths)
    metric = PositionRouting(
        Space(num_experts, samples.layers),
        tokens=int(samples.lengths_N.max()),
        segments=(segment,),
        level=level,
    )
    metric.update(samples)
    figures = metric.at(segment)
    return figures[0] if level == "layer" and not samples.layered else figures
