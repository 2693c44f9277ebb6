"""The sums of a routing analysis: all metrics, domain after domain, with a state to go on from.

Metrics with bootstrap replicates are kept for the domain being read only; when it is done, its
figures go into a file, its sums into the pooled ones. So memory does not grow with the tokens or
the domains. In bytes, for L layers of E experts, B replicates, S = sum of m + 1 over the segment
lengths, P policies, V words kept of each of three kinds:

    segment routing    16 L E S + 24 L S B    (S B where intervals are of the model only)
    hit rates          16 P L E (B + 1)
    co-activation      16 L E^2
    vocabulary         12 L E V, kept below `VOCABULARY_BYTES` by leaving out the rarest words;
                       at the end 8 L E V more
    a block            about 150 MB, and the temporary arrays of a metric

16 layers of 64 experts, 1000 replicates and 50,000 words: sums of 0.8 GB, see
benchmarks/routing.md for what the process takes. 48 layers of 128: sums of 2.2 GB.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moesaic.core.errors import UserError, check_seed
from moesaic.routing.compiled import all_of
from moesaic.routing.hits import CacheHits
from moesaic.routing.metric import Metric
from moesaic.routing.metrics.coactivation import Coactivation
from moesaic.routing.metrics.importance import Importance
from moesaic.routing.metrics.load import Load
from moesaic.routing.metrics.position_routing import PositionRouting
from moesaic.routing.metrics.segment_routing import SegmentRouting, check_segments
from moesaic.routing.metrics.vocabulary import WORDS, Vocabulary, Word
from moesaic.routing.reading import Borders
from moesaic.routing.samples import Samples, Space
from moesaic.routing.trace import Trace

__all__ = ["SCOPES", "VOCABULARY_BYTES", "Arrays", "Settings", "Study", "policies_of"]

VOCABULARY_BYTES = 1 << 30
"""What the counts of words may take."""
SCOPES: tuple[Literal["layer", "model"], ...] = ("layer", "model")
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Settings:
    """What decides the figures of an analysis. Raises UserError for what cannot be."""

    segments: tuple[int, ...] = (4, 16, 64, 256)
    """Segment lengths of SRP, and the windows of SCH, in tokens."""
    bootstrap: int = 1000
    """Replicates of every interval; 0: no intervals."""
    confidence: float = 0.95
    intervals: Literal["model", "layer"] = "layer"
    """Finest level of SRP that gets intervals."""
    cache_samples: int | None = None
    """Samples of each domain that cache simulations take, evenly spaced; None: all."""
    min_count: int = 20
    """Occurrences below which a word is left out of vocabulary specialisation."""
    case_tokens: int = 256
    """Tokens of the sample of each domain that is shown word by word."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_segments(self.segments)
        if len(set(self.segments)) < len(self.segments):
            raise UserError(f"segments={self.segments} has a length twice. Name each once.")
        for name, least in (("min_count", 1), ("case_tokens", 1), ("bootstrap", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} was given. Give {least} or more.")
        if self.cache_samples is not None and self.cache_samples < 1:
            raise UserError(f"cache_samples={self.cache_samples} was given. Give 1 or more.")
        if self.intervals not in ("model", "layer"):
            raise UserError(f"intervals='{self.intervals}' is unknown. Use model or layer.")
        check_seed(self.seed)

    @property
    def headline(self) -> int:
        """The segment length of figures that have only one: 16, as in the study, if counted."""
        return min(self.segments, key=lambda m: (abs(m - 16), m))

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "segments": list(self.segments)}


def policies_of(settings: Settings) -> dict[str, tuple[str, int | None]]:
    """Return the cache policies of an analysis but "fixed", by name."""
    windows = {f"sch-{m}": ("sch", m) for m in settings.segments}
    return {"lru": ("lru", None), "lfu": ("lfu", None), "belady": ("belady", None), **windows}


@dataclass
class Study:
    """All sums over the domains of one trace; `domain` counts the domains that are done."""

    trace: Trace
    borders: Borders
    settings: Settings
    domain: int = 0
    done: int = 0
    """Samples of the current domain that are in the sums."""
    pooled: dict[str, Metric] = field(init=False)
    current: dict[str, Metric] = field(init=False)
    words_left_out: int = 0
    largest: int = 0
    """Most bytes that all sums took."""

    def __post_init__(self) -> None:
        """Start with empty sums."""
        self.space = Space(self.trace.num_experts, len(self.trace.layers))
        self.domains = np.unique(self.borders.domain).tolist()
        """Numbers of the domains that have samples."""
        drawn = np.zeros((1, self.settings.bootstrap), dtype=np.uint8)  # never used for samples
        self.pooled = {
            "load": Load(self.space),
            "importance": Importance(self.space),
            "coactivation": Coactivation(self.space),
            "segments": self._segments(drawn if self.settings.bootstrap else None),
            "positions": self._positions(),
            "vocabulary": self._vocabulary(),
        }
        self.start_domain()

    @property
    def number(self) -> int:
        """Number, in the trace, of the domain being read."""
        return int(self.domains[self.domain])

    @property
    def bytes(self) -> int:
        """What all sums take."""
        metrics = [*self.pooled.values(), *self.current.values()]
        return sum(part.nbytes for metric in metrics for part in metric.state().values())

    def start_domain(self) -> None:
        """Make empty sums for the domain that is next; none after the last."""
        self.done = 0
        self.current = {}
        if self.domain >= len(self.domains):
            return
        count = len(self.borders.of(self.number))
        settings = self.settings
        self.current = {
            "load": Load(self.space),
            "importance": Importance(self.space),
            "segments": self._segments(settings.bootstrap or None, count),
            "positions": self._positions(),
        }
        taken = len(self.cache_rows(count))
        for scope in SCOPES:
            self.current[f"hits {scope}"] = CacheHits(
                self.space,
                policies={**policies_of(settings), "fixed": ("fixed", None)},
                scope=scope,
                bootstrap=settings.bootstrap or None,
                samples=[taken],
                seed=settings.seed + self.number,
                confidence=settings.confidence,
            )

    def cache_rows(self, count: int) -> NDArray[np.int64]:
        """Which of a domain's `count` samples the cache simulations take."""
        wanted = min(count, self.settings.cache_samples or count)
        return np.arange(wanted) * count // wanted

    def update(self, samples: Samples, done: int) -> None:
        """Add a block of the current domain; `done` of its samples are in the sums then."""
        updates = [
            partial(metric.update, samples)
            for metric in self.pooled.values()
            if isinstance(metric, (Coactivation, Vocabulary))
        ]
        for name in ("load", "importance", "segments", "positions"):
            updates.append(partial(self.current[name].update, samples))
        chosen = self.cache_rows(len(self.borders.of(self.number)))
        assert samples.index_N is not None
        taken, own = np.searchsorted(chosen, [samples.index_N[0], samples.index_N[-1] + 1])
        if own > taken:
            part = samples.take(chosen[taken:own] - samples.index_N[0])
            part = Samples(
                part.experts_NTLK,
                part.lengths_N,
                part.num_experts,
                index_N=np.arange(taken, own),
            )
            # the longest first
            updates[:0] = [partial(self.current[f"hits {s}"].update, part) for s in SCOPES[::-1]]
        all_of(updates)
        self.done = done

    def finish_domain(self) -> Arrays:
        """Pool the sums of the current domain, return its figures and go to the next."""
        from moesaic.routing.tabulate import domain_figures

        self.largest = max(self.largest, self.bytes)
        figures = domain_figures(self)
        for name, metric in self.current.items():
            if name in self.pooled:
                self.pooled[name].merge(metric)
        self.domain += 1
        self.start_domain()
        return figures

    def save(self, path: Path) -> None:
        """Write the state, whole or not at all."""
        state: Arrays = {"where": np.array([self.domain, self.done])}
        for group, metrics in (("pooled", self.pooled), ("current", self.current)):
            for name, metric in metrics.items():
                state |= {f"{group}/{name}/{key}": part for key, part in metric.state().items()}
        save_arrays(path, state)

    def restore(self, path: Path) -> None:
        """Go on from a state. Raises UserError when it cannot be read."""
        try:
            with np.load(path) as held:
                self.domain, done = (int(part) for part in held["where"])
                self.start_domain()
                self.done = done
                for group, metrics in (("pooled", self.pooled), ("current", self.current)):
                    for name, metric in metrics.items():
                        prefix = f"{group}/{name}/"
                        keys = [key for key in held.files if key.startswith(prefix)]
                        metric.restore({key.removeprefix(prefix): held[key] for key in keys})
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise UserError(
                f"{path} cannot be read ({error}). Remove the output directory and start again."
            ) from error

    def _segments(self, bootstrap: Any, count: int = 1) -> SegmentRouting:
        return SegmentRouting(
            self.space,
            segments=self.settings.segments,
            bootstrap=bootstrap,
            intervals=self.settings.intervals,
            samples=[count],
            seed=self.settings.seed + (self.number if self.domain < len(self.domains) else 0),
            confidence=self.settings.confidence,
        )

    def _positions(self) -> PositionRouting:
        longest = int(self.borders.lengths.max())
        return PositionRouting(self.space, tokens=longest, segments=self.settings.segments)

    def _vocabulary(self) -> Vocabulary:
        """Count only words that are frequent enough, and no more than memory allows."""
        counts = _occurrences(self.trace)
        each = 4 * self.space.layers * self.space.num_experts
        most = max(1, VOCABULARY_BYTES // (each * len(WORDS)))
        kept: dict[Word, NDArray[np.int64]] = {}
        for word in WORDS:
            ids = np.flatnonzero(counts[word] >= self.settings.min_count)
            if len(ids) > most:
                self.words_left_out = max(self.words_left_out, len(ids) - most)
                ids = np.sort(ids[np.argsort(-counts[word][ids], kind="stable")[:most]])
            kept[word] = ids
        return Vocabulary(
            self.space,
            vocabulary=len(counts["input"]),
            min_count=self.settings.min_count,
            words=kept,
        )


def _occurrences(trace: Trace) -> Mapping[Word, NDArray[np.int64]]:
    """Count how often each word occurs in a trace, of each kind."""
    sources = [trace.token_ids] if trace.predicted is None else [trace.token_ids, trace.predicted]
    largest = max(int(source.max()) for source in sources)
    size = max(int(trace.info.get("vocab_size") or 0), largest + 1)
    found = {word: np.zeros(size, dtype=np.int64) for word in WORDS}
    at_once = 1 << 20
    for start in range(0, trace.rows, at_once):
        part = slice(start, start + at_once)
        ids = trace.token_ids[part].astype(np.int64)
        found["input"] += np.bincount(ids, minlength=size)
        found["target"] += np.bincount(ids[trace.position[part] > 0], minlength=size)
        if trace.predicted is not None:
            found["predicted"] += np.bincount(
                trace.predicted[part].astype(np.int64), minlength=size
            )
    return found


def save_arrays(path: Path, arrays: Arrays) -> None:
    """Write arrays to an .npz file, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy's stub takes keywords for bools
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
