"""Segment routing best performance (SRP): how well one set of experts serves a whole segment.

For a segment of m tokens and an expert, c of the tokens chose the expert. "Predict the expert for
the whole segment when c >= j" has, over a population of (sample, segment, expert), the predictions
P_j = m #{c >= j}, the matches M_j = sum of c over {c >= j}, and with A = M_0 true activations

    F1_j = 2 M_j / max(P_j + A, 1)    SRP = max_j F1_j    rho = P_j* / A    activation = A / P_0

where j* is the first best threshold. Segments are all windows of m tokens inside a sample. The
population is a whole model, a layer or an expert, of one domain or of all together: the counts are
added and then maximised. Source: arXiv 2505.16056, section 3.1. Where no window fits, activation is
NaN, SRP and rho are 0; where an expert is never active, SRP and rho are 0.

Notation: D domains, L layers, E experts, C = m + 1 counts, B replicates. Memory, in bytes: 8 D L E
times the sum of m + 1 over the segments, and 8 D B times the same for intervals of the model
(times L for those of layers, times L E for those of experts).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesaic.core.errors import UserError
from moesaic.routing.bootstrap import as_weights, interval, weigh
from moesaic.routing.compiled import compiled, spread
from moesaic.routing.metric import Metric
from moesaic.routing.metrics import METRICS
from moesaic.routing.samples import Samples, Space
from moesaic.routing.windows import columns, window_counts

__all__ = ["Level", "SegmentFigures", "SegmentRouting", "best_threshold", "check_segments"]

Level = Literal["model", "layer", "expert"]
LEVELS: tuple[Level, ...] = ("model", "layer", "expert")


@dataclass(frozen=True, eq=False)
class SegmentFigures:
    """SRP of one or more populations: a number each for a model, [L] for layers, [L, E]."""

    srp: NDArray[np.float64]
    rho: NDArray[np.float64]
    """Experts that the best threshold keeps, over those really active."""
    activation: NDArray[np.float64]
    """Share of the (token, expert) pairs of all windows that are active."""
    threshold: NDArray[np.int64]
    windows: NDArray[np.int64]
    """Number of (window, expert) pairs: 0 where every sample is shorter than the segment."""
    low: NDArray[np.float64] | None = None
    high: NDArray[np.float64] | None = None
    """Bootstrap interval of `srp`."""

    def __getitem__(self, at: Any) -> SegmentFigures:
        def part(array: Any) -> Any:
            return None if array is None else array[at]

        return SegmentFigures(
            self.srp[at],
            self.rho[at],
            self.activation[at],
            self.threshold[at],
            self.windows[at],
            part(self.low),
            part(self.high),
        )


@METRICS.register
class SegmentRouting(Metric):
    """Segment routing best performance (SRP), rho and activation, with bootstrap intervals."""

    def __init__(
        self,
        space: Space,
        *,
        segments: Sequence[int] = (4, 16, 64, 256),
        bootstrap: int | ArrayLike | Sequence[ArrayLike] | None = None,
        intervals: Level = "layer",
        samples: Sequence[int] | None = None,
        seed: int = 0,
        confidence: float = 0.95,
    ) -> None:
        """Count for segments of any lengths.

        `bootstrap` is a number of replicates, drawn for `samples` (the number of samples of each
        domain) from `seed`; or weights [N, B] for every domain; or a list of one for each.
        `intervals` is the finest level with intervals: they cost memory and time.
        """
        super().__init__(space)
        self.segments = check_segments(segments)
        self.intervals = intervals
        self.confidence = confidence
        domains = len(space.domains)
        self.weights_D = as_weights(bootstrap, samples, domains=domains, seed=seed)
        self._columns = columns(self.segments)
        width = self._columns[-1].stop
        self.sums["counts"] = np.zeros(
            (domains, space.layers, space.num_experts, width), dtype=np.int64
        )
        if self.weights_D is not None:
            replicates = self.weights_D[0].shape[1]
            interval(0.0, np.zeros(replicates), confidence)  # too few are refused before the work
            groups = 1 if intervals == "model" else space.layers
            groups *= space.num_experts if intervals == "expert" else 1
            self.sums["drawn"] = np.zeros((domains, groups, width, replicates))

    def add(self, domain: int, rows_N: NDArray[np.int64], samples: Samples) -> None:
        """Add samples of one domain."""
        if self.weights_D is None:
            _, counts_LES = window_counts(samples, self.segments)
            self.sums["counts"][domain] += counts_LES
            return
        weights_NB = self.weights_D[domain]
        if len(rows_N) and rows_N.max() >= len(weights_NB):
            raise UserError(
                f"sample {rows_N.max()} of the domain '{self.space.domains[domain]}' arrived, but "
                f"there are bootstrap weights for {len(weights_NB)}. Give as many as samples."
            )
        weights_NB = weights_NB[rows_N]
        drawn_GSB = self.sums["drawn"][domain]
        if self.intervals == "expert":
            experts = self.space.num_experts
            for layer in range(samples.layers):
                one = _layer(samples, layer)
                by_sample_NES, counts_LES = window_counts(one, self.segments, each_expert=True)
                self.sums["counts"][domain, layer] += counts_LES[0]
                for expert in range(experts):
                    group = layer * experts + expert
                    drawn_GSB[group] += weigh(by_sample_NES[:, expert], weights_NB)
            return
        by_sample_NLS, counts_LES = window_counts(samples, self.segments)
        self.sums["counts"][domain] += counts_LES
        if self.intervals == "model":
            by_sample_NLS = by_sample_NLS.sum(axis=1, keepdims=True, dtype=np.int64)
        for group in range(by_sample_NLS.shape[1]):
            drawn_GSB[group] += weigh(by_sample_NLS[:, group], weights_NB)

    def result(self) -> SegmentRouting:
        """Return itself: read it with `at` or `tables`."""
        return self

    def at(
        self, segment: int, level: Level = "model", *, domain: str | None = None
    ) -> SegmentFigures:
        """Return the figures of one segment length and level, of one domain or all together."""
        if segment not in self.segments:
            counted = ", ".join(map(str, self.segments))
            raise UserError(f"segment={segment} was not counted. Use one of {counted}.")
        if level not in LEVELS:
            raise UserError(f"level='{level}' is unknown. Use one of {', '.join(LEVELS)}.")
        where = self._columns[self.segments.index(segment)]
        which = self._domains(domain)
        counts_LEC = self.sums["counts"][which, :, :, where].sum(axis=0)
        axes = {"model": (0, 1), "layer": (1,), "expert": ()}[level]
        figures = best_threshold(counts_LEC.sum(axis=axes))
        if self.weights_D is None or LEVELS.index(level) > LEVELS.index(self.intervals):
            return figures
        best_B = self._replicates(which, where, level).reshape(*figures.srp.shape, -1)
        low, high = interval(figures.srp, best_B, self.confidence)
        return SegmentFigures(
            figures.srp, figures.rho, figures.activation, figures.threshold, figures.windows,
            low, high,
        )  # fmt: skip

    def tables(self, level: Level = "model", *, by_domain: bool = False) -> dict[str, Any]:
        """Return columns of equal length: domain, layer, expert (where they apply), segment, ..."""
        rows: dict[str, list[Any]] = {}
        names = self.space.domains if by_domain else (None,)
        for segment, name in ((m, name) for name in names for m in self.segments):
            found = self.at(segment, level, domain=name)
            for index in np.ndindex(found.srp.shape):
                row: dict[str, Any] = {"domain": name} if by_domain else {}
                row |= dict(zip(("layer", "expert"), index, strict=False))
                row |= {"segment": segment, "activation": found.activation[index]}
                row |= {"srp": found.srp[index], "rho": found.rho[index]}
                if found.low is not None and found.high is not None:
                    row |= {"low": found.low[index], "high": found.high[index]}
                row["threshold"] = found.threshold[index]
                for key, value in row.items():
                    rows.setdefault(key, []).append(value)
        return {key: np.array(values) for key, values in rows.items()}

    def _domains(self, domain: str | None) -> list[int]:
        if domain is None:
            return list(range(len(self.space.domains)))
        if domain not in self.space.domains:
            raise UserError(
                f"There is no domain '{domain}'. Use one of {', '.join(self.space.domains)}."
            )
        return [self.space.domains.index(domain)]

    def _replicates(self, which: list[int], where: slice, level: Level) -> NDArray[np.float64]:
        """Best F1 of every replicate, [groups, B]."""
        drawn_DGSB = self.sums["drawn"]
        groups = drawn_DGSB.shape[1]
        layers = self.space.layers
        wanted = 1 if level == "model" else layers if level == "layer" else int(groups)
        best_GB = np.empty((wanted, drawn_DGSB.shape[3]))
        each = groups // wanted  # groups of the finest level in one wanted

        def work(start: int, stop: int) -> None:
            for group in range(start, stop):
                own = slice(group * each, (group + 1) * each)
                total_CB = np.zeros((where.stop - where.start, best_GB.shape[1]))
                for domain in which:
                    for part_CB in drawn_DGSB[domain, own, where]:
                        total_CB += part_CB
                _best_of_replicates(total_CB, best_GB[group])

        spread(work, wanted)
        return best_GB


def check_segments(segments: Sequence[int]) -> tuple[int, ...]:
    """Return the segment lengths. Raises UserError unless they are whole numbers from 1 on."""
    found = tuple(segments)
    if not found or any(
        isinstance(m, bool) or not isinstance(m, (int, np.integer)) or m < 1 for m in found
    ):
        raise UserError(f"segments={segments!r} was given. Give lengths in tokens, 1 or more.")
    return tuple(int(m) for m in found)


def best_threshold(counts_C: NDArray[np.int64]) -> SegmentFigures:
    """Return the figures of populations whose windows with c active tokens are counted.

    `counts_C` is int64 [..., m + 1].
    """
    counts = np.asarray(counts_C, dtype=np.int64)
    segment = counts.shape[-1] - 1
    windows_C = counts[..., ::-1].cumsum(axis=-1)[..., ::-1]
    matches_C = (counts * np.arange(segment + 1))[..., ::-1].cumsum(axis=-1)[..., ::-1]
    predicted_C = segment * windows_C
    active = matches_C[..., :1]
    f1_C = 2 * matches_C / np.maximum(predicted_C + active, 1)
    best = f1_C.argmax(axis=-1)
    chosen = np.take_along_axis(predicted_C, best[..., None], axis=-1)[..., 0]
    active, offered = active[..., 0], predicted_C[..., 0]
    return SegmentFigures(
        srp=f1_C.max(axis=-1),
        rho=chosen / np.maximum(active, 1) * (active > 0),
        activation=np.where(offered > 0, active / np.maximum(offered, 1), np.nan),
        threshold=best,
        windows=windows_C[..., 0],
    )


@compiled
def _best_of_replicates(counts_CB, best_B):  # type: ignore[no-untyped-def]
    segment = counts_CB.shape[0] - 1
    replicates = counts_CB.shape[1]
    active_B = np.zeros(replicates)
    for count in range(1, segment + 1):
        for b in range(replicates):
            active_B[b] += count * counts_CB[count, b]
    matches_B = np.zeros(replicates)
    predicted_B = np.zeros(replicates)
    best_B[:] = 0
    for count in range(segment, -1, -1):
        for b in range(replicates):
            matches_B[b] += count * counts_CB[count, b]
            predicted_B[b] += segment * counts_CB[count, b]
            f1 = 2 * matches_B[b] / max(predicted_B[b] + active_B[b], 1.0)
            best_B[b] = max(best_B[b], f1)


def _layer(samples: Samples, layer: int) -> Samples:
    ids_NTLK = np.ascontiguousarray(samples.experts_NTLK[:, :, layer : layer + 1])
    return Samples(ids_NTLK, samples.lengths_N, samples.num_experts)
