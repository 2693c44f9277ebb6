"""What the sums of a study mean: figures of one domain as arrays, then tables over all of them.

A table is a dict of columns of equal length; each becomes a parquet file. The domain "all" means
all domains together: pooled for segment routing and load, the plain mean over the domains for hit
rates and loss, as in the routing study. Layers have their numbers in the decoder (or encoder).

Notation: D domains, L layers, E experts, C cache sizes. `ratio` (rho) is a cache's size over the
experts that a token activates: top_k in a layer, the sum of top_k over the layers in the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from moesaic.routing.hits import CacheHits
from moesaic.routing.metrics.coactivation import Coactivation
from moesaic.routing.metrics.importance import Importance
from moesaic.routing.metrics.load import Load
from moesaic.routing.metrics.position_routing import PositionRouting
from moesaic.routing.metrics.segment_routing import Level, SegmentFigures, SegmentRouting
from moesaic.routing.metrics.vocabulary import WORDS, Vocabulary
from moesaic.routing.relations import domain_correlations, domain_specialisation
from moesaic.routing.study import SCOPES, Arrays, Study, policies_of

__all__ = ["ALL", "Table", "domain_figures", "sample_losses", "tables_of"]

ALL = "all"
TOP_WORDS = 15
Table = dict[str, Any]
Words = Callable[[int], str]
LEVELS: tuple[Level, ...] = ("model", "layer", "expert")


def domain_figures(study: Study) -> Arrays:
    """Return the figures of the domain that was just read, as arrays by name."""
    found: Arrays = {"number": np.array(study.number)}
    rows = study.borders.of(study.number)
    found["tokens"] = np.array(study.borders.lengths[rows].sum())
    found["samples"] = np.array(len(rows))
    losses = sample_losses(study, rows)
    some = losses[np.isfinite(losses)]
    found["loss"] = np.array(some.mean() if len(some) else np.nan)
    found |= _shared_figures(study.current, study)
    for scope in SCOPES:
        hits = cast(CacheHits, study.current[f"hits {scope}"])
        for policy in policies_of(study.settings):
            figures = hits.at(policy, domain=hits.space.domains[0])
            for key in ("rate", "low", "high"):
                if (part := getattr(figures, key)) is not None:
                    found[f"hits/{scope}/{policy}/{key}"] = part
            found[f"hits/{scope}/samples"] = figures.samples
        # which experts are fixed depends on the domains still to come
        for key, part in hits.sums.items():
            if key.endswith(" fixed") or key in ("samples", "drawn samples"):
                found[f"fixed/{scope}/{key}"] = part
    return found


def sample_losses(study: Study, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the mean loss of some samples, NaN without any."""
    loss = study.trace.loss
    found = np.full(len(rows), np.nan)
    if loss is None:
        return found
    for place, row in enumerate(rows):
        own = np.asarray(loss[study.borders.starts[row] : study.borders.ends[row]], dtype=float)
        own = own[np.isfinite(own)]
        if len(own):
            found[place] = own.mean()
    return found


def _shared_figures(metrics: Mapping[str, Any], study: Study) -> Arrays:
    """Figures that a domain and all of them together have."""
    found: Arrays = {}
    segments = cast(SegmentRouting, metrics["segments"])
    for m in study.settings.segments:
        for level in LEVELS:
            found |= _segment_arrays(f"segments/{m}/{level}", segments.at(m, level))
        positions = cast(PositionRouting, metrics["positions"]).at(m)
        found |= _segment_arrays(f"positions/{m}", positions)
    load = cast(Load, metrics["load"]).result()[ALL]
    found |= {"counts": load.counts_LE, "share": load.share_LE, "dead": load.dead_L}
    found |= {f"balance/{key}": part for key, part in load.balance.items()}
    found |= {f"local/{key}": part for key, part in load.local.items()}
    importance = cast(Importance, metrics["importance"]).result()[ALL]
    found["importance"] = importance.share_LE
    found["weight entropy"], found["weight largest"] = importance.entropy_L, importance.largest_L
    return found


def _segment_arrays(prefix: str, figures: SegmentFigures) -> Arrays:
    """SRP and rho are unknown (NaN), not 0, where no window fits into a sample."""
    fits = figures.windows > 0
    found: Arrays = {
        "srp": np.where(fits, figures.srp, np.nan),
        "rho": np.where(fits, figures.rho, np.nan),
        "activation": figures.activation,
        "threshold": figures.threshold,
        "windows": figures.windows,
    }
    if figures.low is not None and figures.high is not None:
        found["low"] = np.where(fits, figures.low, np.nan)
        found["high"] = np.where(fits, figures.high, np.nan)
    return {f"{prefix}/{key}": np.asarray(part) for key, part in found.items()}


def tables_of(study: Study, parts: Sequence[Arrays], decode: Words) -> dict[str, Table]:
    """Return every table, of the pooled sums of a finished study and the figures of its domains."""
    trace, settings = study.trace, study.settings
    names = [trace.domains[int(part["number"])] for part in parts]
    pooled = _shared_figures(study.pooled, study)
    groups = [(ALL, pooled), *zip(names, parts, strict=True)]
    layers = np.array(trace.layers)
    tables = {
        f"segments_{level}": _segment_table(groups, settings.segments, level, trace)
        for level in LEVELS
    }
    tables["positions"] = _positions_table(groups, settings.segments)
    for scope in SCOPES:
        tables[f"hits_{scope}"] = _hits_table(study, parts, names, scope)
    tables["load"] = _stack(
        {
            "domain": name,
            **_indices(layers, trace.shape.num_experts),
            "count": _real(part["counts"], trace.shape.num_experts),
            "load": _real(part["share"], trace.shape.num_experts),
            "importance": _real(part["importance"], trace.shape.num_experts),
        }
        for name, part in groups
    )
    tables["balance"] = _stack(
        {
            "domain": name,
            "layer": layers,
            **{key: part[f"balance/{key}"] for key in ("cv", "entropy", "violation")},
            **{f"local_{key}": part[f"local/{key}"] for key in ("cv", "entropy", "violation")},
            "dead": part["dead"] - (trace.num_experts - np.array(trace.shape.num_experts)),
            "weight_entropy": part["weight entropy"],
            "weight_largest": part["weight largest"],
        }
        for name, part in groups
    )
    tables["domains"] = _domains_table(groups, parts, settings.headline)
    coactivation = cast(Coactivation, study.pooled["coactivation"]).result()[ALL]
    tables["pairs"] = _pairs_table(coactivation, trace.layers, trace.shape.num_experts)
    tables["next_layer"] = _next_table(coactivation.next_LEE, trace.layers)
    tables["kept"] = {"layer": layers, "kept": coactivation.kept_L}
    tables["words"], special = _words_table(study, decode)
    tables["experts"] = _experts_table(study, parts, names, pooled, special, tables["words"])
    tables |= _correlation_tables(parts, names, settings.headline)
    return tables


def _real(values: NDArray[Any], experts_L: Sequence[int]) -> NDArray[Any]:
    """Flatten [L, E], leaving out experts that a layer does not have."""
    return np.concatenate([row[:count] for row, count in zip(values, experts_L, strict=True)])


def _indices(layers: NDArray[np.int64], experts_L: Sequence[int]) -> Table:
    return {
        "layer": np.repeat(layers, experts_L),
        "expert": np.concatenate([np.arange(count) for count in experts_L]),
    }


def _stack(parts: Iterator[Table]) -> Table:
    """Put tables below each other; what is one value is repeated."""
    columns: dict[str, list[NDArray[Any]]] = {}
    for part in parts:
        count = max(len(v) for v in part.values() if isinstance(v, np.ndarray))
        for key, value in part.items():
            whole = value if isinstance(value, np.ndarray) else np.array([value] * count)
            columns.setdefault(key, []).append(whole)
    return {key: np.concatenate(values) for key, values in columns.items()}


def _segment_table(
    groups: Sequence[tuple[str, Arrays]], segments: Sequence[int], level: Level, trace: Any
) -> Table:
    experts_L = trace.shape.num_experts

    def flat(values: NDArray[Any]) -> NDArray[Any]:
        return _real(values, experts_L) if level == "expert" else np.atleast_1d(values)

    def rows() -> Iterator[Table]:
        for name, part in groups:
            for m in segments:
                row: Table = {"domain": name}
                if level == "expert":
                    row |= _indices(np.array(trace.layers), experts_L)
                elif level == "layer":
                    row["layer"] = np.array(trace.layers)
                row["segment"] = m
                for key in ("srp", "low", "high", "rho", "activation", "threshold", "windows"):
                    if (found := part.get(f"segments/{m}/{level}/{key}")) is not None:
                        row[key] = flat(found)
                yield row

    return _stack(rows())


def _positions_table(groups: Sequence[tuple[str, Arrays]], segments: Sequence[int]) -> Table:
    def rows() -> Iterator[Table]:
        for name, part in groups:
            for m in segments:
                srp = part[f"positions/{m}/srp"]
                yield {
                    "domain": name,
                    "segment": m,
                    "start": np.arange(len(srp)),
                    "middle": np.arange(len(srp)) + m // 2,
                    **{
                        key: part[f"positions/{m}/{key}"]
                        for key in ("srp", "rho", "activation", "windows")
                    },
                }

    return _stack(rows())


def _hits_table(study: Study, parts: Sequence[Arrays], names: Sequence[str], scope: str) -> Table:
    """A row per domain (and their mean), cache, policy and size."""
    trace = study.trace
    policies = [*policies_of(study.settings), "fixed"]
    fixed = _fixed_rates(study, parts, scope)
    bases = trace.shape.top_k if scope == "layer" else [sum(trace.shape.top_k)]
    sizes = list(trace.shape.num_experts)
    if scope == "model":  # ids are numbered as if every layer had the most experts of any
        sizes = [trace.num_experts * len(trace.layers)]

    def rates(part: int, policy: str, key: str) -> NDArray[np.float64] | None:
        if policy == "fixed":
            return fixed[part].get(key)
        return parts[part].get(f"hits/{scope}/{policy}/{key}")

    def rows() -> Iterator[Table]:
        for place, name in enumerate([ALL, *names]):
            for policy in policies:
                row: Table = {"domain": name, "policy": policy}
                if scope == "layer":
                    row["layer"] = np.repeat(np.array(trace.layers), sizes)
                counts = np.concatenate([np.arange(1, size + 1) for size in sizes])
                row |= {"size": counts, "ratio": counts / np.repeat(bases, sizes)}
                for key in ("rate", "low", "high"):
                    which = range(len(parts)) if name == ALL else [place - 1]
                    own = [found for p in which if (found := rates(p, policy, key)) is not None]
                    if not own or (name == ALL and key != "rate"):
                        # an interval of a mean over domains is not the mean of the intervals
                        row[key] = np.full(len(counts), np.nan)
                    else:
                        row[key] = _real(_mean(np.stack(own)), sizes)
                yield row

    return _stack(rows())


def _mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the first axis of what is known."""
    known = np.isfinite(values)
    total = np.where(known, values, 0).sum(axis=0)
    return np.where(known.any(axis=0), total / np.maximum(known.sum(axis=0), 1), np.nan)


def _fixed_rates(study: Study, parts: Sequence[Arrays], scope: Any) -> list[Arrays]:
    """Hit rates of the experts that all domains together ask for most often."""
    prefix = f"fixed/{scope}/"
    name = f"{prefix}asked fixed"
    asked = sum((part[name] for part in parts[1:]), start=parts[0][name])
    found = []
    for part in parts:
        own = {key.removeprefix(prefix): part[key] for key in part if key.startswith(prefix)}
        drawn = own.get("drawn samples")
        hits = CacheHits(
            study.space,
            policies={"fixed": ("fixed", None)},
            scope=scope,
            bootstrap=None if drawn is None else np.zeros((1, drawn.shape[-1]), dtype=np.uint8),
            confidence=study.settings.confidence,
        )
        hits.restore({**own, "asked fixed": asked, "seen": np.zeros(1)})
        figures = hits.at("fixed", domain=study.space.domains[0])
        arrays = {"rate": figures.rate}
        if figures.low is not None and figures.high is not None:
            arrays |= {"low": figures.low, "high": figures.high}
        found.append(arrays)
    return found


def _domains_table(
    groups: Sequence[tuple[str, Arrays]], parts: Sequence[Arrays], headline: int
) -> Table:
    losses = np.array([float(part["loss"]) for part in parts])
    overall = float(groups[0][1][f"segments/{headline}/model/srp"])
    srp = np.array([float(part[f"segments/{headline}/model/srp"]) for _, part in groups])
    tokens, samples = ([int(part[key]) for part in parts] for key in ("tokens", "samples"))
    return {
        "domain": np.array([name for name, _ in groups]),
        "tokens": np.array([sum(tokens), *tokens]),
        "samples": np.array([sum(samples), *samples]),
        "loss": np.append(_mean(losses), losses),
        "srp": srp,
        "difference": srp / overall - 1 if overall > 0 else np.full(len(srp), np.nan),
    }


def _pairs_table(figures: Any, layers: Sequence[int], experts_L: Sequence[int]) -> Table:
    def rows() -> Iterator[Table]:
        for place, (layer, experts) in enumerate(zip(layers, experts_L, strict=True)):
            one, two = np.triu_indices(experts, 1)
            yield {
                "layer": np.full(len(one), layer),
                "expert": one,
                "other": two,
                "together": figures.together_LEE[place, one, two],
                "overlap": figures.overlap_LEE[place, one, two],
                "lift": figures.lift_LEE[place, one, two],
            }

    return _stack(rows())


def _next_table(next_LEE: NDArray[np.int64], layers: Sequence[int]) -> Table:
    """Only pairs that occur: a layer's expert and the next layer's."""
    place, one, two = np.nonzero(next_LEE)
    numbers = np.array(layers)
    return {
        "layer": numbers[place],
        "expert": one,
        "next_layer": numbers[place + 1] if len(numbers) > 1 else numbers[place],
        "next_expert": two,
        "tokens": next_LEE[place, one, two],
    }


def _words_table(study: Study, decode: Words) -> tuple[Table, Arrays]:
    """Words that experts own, and the specialisation [L, E] in each kind of word."""
    trace = study.trace
    columns: Table = {
        key: [] for key in ("kind", "layer", "expert", "rank", "id", "word", "frequency", "count")
    }
    special: Arrays = {}
    for kind in WORDS:  # one at a time: their counts are large
        figures = cast(Vocabulary, study.pooled["vocabulary"]).at(kind)
        special[kind] = figures.specialisation_LE
        for place, layer in enumerate(trace.layers):
            for expert in range(trace.shape.num_experts[place]):
                owned = figures.owned(place, expert, TOP_WORDS)
                for rank, (word, frequency, count) in enumerate(owned):
                    row = (kind, layer, expert, rank, word, decode(word), frequency, count)
                    for column, value in zip(columns.values(), row, strict=True):
                        column.append(value)
    return {key: np.array(values) for key, values in columns.items()}, special


def _experts_table(
    study: Study,
    parts: Sequence[Arrays],
    names: Sequence[str],
    pooled: Arrays,
    special: Mapping[str, NDArray[np.float64]],
    word_table: Table,
) -> Table:
    """One row an expert: everything that is known about it."""
    experts_L = study.trace.shape.num_experts
    m = study.settings.headline
    activation_DLE = np.stack([part[f"segments/{m}/expert/activation"] for part in parts])
    domains = domain_specialisation(activation_DLE)
    favourite_LE = np.nan_to_num(activation_DLE).argmax(axis=0)
    table = _indices(np.array(study.trace.layers), experts_L)
    table["load"] = _real(pooled["share"], experts_L)
    table["importance"] = _real(pooled["importance"], experts_L)
    for key in ("activation", "srp", "rho"):
        table[key] = _real(pooled[f"segments/{m}/expert/{key}"], experts_L)
    table["domain_specialisation"] = _real(domains.specialisation_LE, experts_L)
    table["top_domain"] = np.array(names)[_real(favourite_LE, experts_L)]
    for kind in WORDS:
        table[f"{kind}_specialisation"] = _real(special[kind], experts_L)
    tops: dict[tuple[int, int], list[str]] = {}
    read = [word_table[key].tolist() for key in ("kind", "layer", "expert", "rank", "word")]
    for kind, layer, expert, rank, word in zip(*read, strict=True):
        if kind == "input" and rank < 6:
            tops.setdefault((layer, expert), []).append(word)
    table["top_words"] = np.array(
        [
            " ".join(tops.get(key, []))
            for key in zip(table["layer"].tolist(), table["expert"].tolist(), strict=True)
        ]
    )
    return table


def _correlation_tables(
    parts: Sequence[Arrays], names: Sequence[str], headline: int
) -> dict[str, Table]:
    """How alike domains are: over all experts, of activation and of SRP."""
    tables = {}
    for key in ("activation", "srp"):
        values_DLE = np.stack([part[f"segments/{headline}/expert/{key}"] for part in parts])
        found = domain_correlations(values_DLE)
        tables[f"domain_{key}"] = {
            "domain": np.repeat(names, len(names)),
            "other": np.tile(names, len(names)),
            "correlation": found.ravel(),
        }
    return tables


def number(value: Any) -> float | None:
    """Return a number for JSON; None for what is unknown."""
    found = float(value)
    return found if math.isfinite(found) else None
