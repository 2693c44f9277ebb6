"""The headline figures of an analysis: metrics.json, from a study and its tables.

Everything that is unknown is null: SRP where no sample is as long as the segment, loss of a trace
without predictions, domain specialisation of one domain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.routing.relations import correlation, spread_of_load
from moesaic.routing.study import SCOPES, Study, policies_of
from moesaic.routing.tabulate import ALL, Table, number

__all__ = ["RATIOS", "summarise"]

RATIOS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
"""Cache sizes, over the active experts, of which figures are given."""


def summarise(study: Study, tables: dict[str, Table]) -> dict[str, Any]:
    """Return the headline figures as plain data."""
    trace, settings = study.trace, study.settings
    m = settings.headline
    experts = tables["experts"]
    domains = tables["domains"]
    rates = {scope: _rates(study, tables[f"hits_{scope}"]) for scope in SCOPES}
    pooled_L = tables["balance"]["domain"] == ALL
    balance = {
        key: number(np.nanmean(tables["balance"][key][pooled_L]))
        for key in ("cv", "entropy", "violation", "local_cv", "local_entropy", "local_violation")
    }
    special = {
        "domain": experts["domain_specialisation"],
        **{kind: experts[f"{kind}_specialisation"] for kind in ("input", "predicted", "target")},
    }
    return {
        "model": {
            "name": trace.info.get("model"),
            "architecture": trace.info.get("architecture"),
            "model_type": trace.info.get("model_type"),
            "layers": list(trace.layers),
            "num_experts": list(trace.shape.num_experts),
            "top_k": list(trace.shape.top_k),
            "parameters": (trace.info.get("settings") or {}).get("parameters"),
        },
        "trace": {
            "path": str(trace.directory.absolute()),
            "complete": trace.complete,
            "rows": trace.rows,
            "samples": len(study.borders.starts),
            "longest_sample": int(study.borders.lengths.max()),
            "domains": domains["domain"][1:].tolist(),
            "data": (trace.info.get("settings") or {}).get("data"),
        },
        "segment": m,
        "srp": _srp(tables["segments_model"], ALL, settings.segments),
        "srp_by_domain": {
            name: _srp(tables["segments_model"], name, settings.segments)
            for name in domains["domain"][1:].tolist()
        },
        "loss": number(domains["loss"][0]),
        "loss_by_domain": {
            name: number(loss)
            for name, loss in zip(domains["domain"][1:].tolist(), domains["loss"][1:], strict=True)
        },
        "hit_rates": rates,
        "load": {
            "deviation": number(spread_of_load(experts["activation"])),
            "dead": int(tables["balance"]["dead"][pooled_L].sum()),
            **balance,
        },
        "specialisation": {key: number(_mean(values)) for key, values in special.items()},
        "correlations": {
            "srp_with_specialisation": {
                key: number(correlation(experts["srp"], values)) for key, values in special.items()
            },
            "srp_with_sch": _srp_with_sch(study, tables),
            "sch_with_policy": _sch_with_policy(study, tables),
        },
        "share_of_belady": _share_of_belady(rates["model"]),
        "notes": _notes(study, tables),
        "memory_bytes": study.largest,
    }


def _srp(table: Table, domain: str, segments: Sequence[int]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for m in segments:
        (row,) = np.flatnonzero((table["domain"] == domain) & (table["segment"] == m))
        keys = [key for key in ("srp", "low", "high", "rho", "activation") if key in table]
        found[str(m)] = {key: number(table[key][row]) for key in keys}
        found[str(m)]["threshold"] = int(table["threshold"][row])
    return found


def _at(table: Table, domain: str | None, policy: str, ratio: float) -> NDArray[np.bool_]:
    chosen = (table["policy"] == policy) & np.isclose(table["ratio"], ratio)
    own = table["domain"] != ALL if domain is None else table["domain"] == domain
    found: NDArray[np.bool_] = chosen & own
    return found


def _rates(study: Study, table: Table) -> dict[str, dict[str, float | None]]:
    """Mean over domains (and layers) by policy and ratio; ratios that are no whole size: absent."""
    found: dict[str, dict[str, float | None]] = {}
    for policy in [*policies_of(study.settings), "fixed"]:
        found[policy] = {}
        for ratio in RATIOS:
            own = table["rate"][_at(table, ALL, policy, ratio)]
            if len(own):
                found[policy][f"{ratio:g}"] = number(_mean(own))
    return found


def _mean(values: NDArray[np.float64]) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def _srp_with_sch(study: Study, tables: dict[str, Table]) -> dict[str, dict[str, float | None]]:
    """Correlation over (domain, layer) of SRP and SCH hit rate with the same m, by ratio."""
    segments, hits = tables["segments_layer"], tables["hits_layer"]
    found: dict[str, dict[str, float | None]] = {}
    for m in study.settings.segments:
        srp = segments["srp"][(segments["segment"] == m) & (segments["domain"] != ALL)]
        found[str(m)] = {}
        for ratio in RATIOS:
            own = hits["rate"][_at(hits, None, f"sch-{m}", ratio)]
            if len(own) == len(srp):  # both are in the order of domains and layers
                found[str(m)][f"{ratio:g}"] = number(correlation(srp, own))
    return found


def _sch_with_policy(study: Study, tables: dict[str, Table]) -> dict[str, dict[str, float | None]]:
    """Correlation over (domain, layer) of SCH and other policies' hit rates, at ratio 2."""
    hits = tables["hits_layer"]
    found: dict[str, dict[str, float | None]] = {}
    for m in study.settings.segments:
        sch = hits["rate"][_at(hits, None, f"sch-{m}", 2.0)]
        found[str(m)] = {
            policy: number(correlation(sch, hits["rate"][_at(hits, None, policy, 2.0)]))
            for policy in ("lru", "lfu", "belady", "fixed")
        }
    return found


def _share_of_belady(rates: dict[str, dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    found: dict[str, dict[str, float | None]] = {}
    for policy, by_ratio in rates.items():
        if policy == "belady":
            continue
        found[policy] = {}
        for ratio, rate in by_ratio.items():
            best = rates["belady"].get(ratio)
            found[policy][ratio] = rate / best if rate is not None and best else None
    return found


def _notes(study: Study, tables: dict[str, Table]) -> list[str]:
    """Say what a reader of the figures has to know about them."""
    trace, settings = study.trace, study.settings
    longest = int(study.borders.lengths.max())
    notes = []
    if not trace.complete:
        notes.append(
            f"The trace is not complete: its recording stopped after {trace.rows:,} tokens."
        )
    long = [m for m in settings.segments if m > longest]
    if long:
        notes.append(
            f"No sample has more than {longest} tokens: there are no figures for segments of "
            f"{', '.join(map(str, long))} tokens."
        )
    if len(study.domains) < 2:
        notes.append("One domain only: domain specialisation is unknown.")
    few = [int((study.borders.domain == d).sum()) for d in study.domains]
    if min(few) < 30 and settings.bootstrap:
        notes.append(
            f"A domain has {min(few)} samples only: intervals of so few are too narrow to rely on."
        )
    if trace.predicted is None:
        notes.append("The trace has no predictions: loss and predicted words are unknown.")
    if not len(tables["words"]["kind"]):
        notes.append(
            f"No word occurs {settings.min_count} times: vocabulary specialisation is unknown."
        )
    if study.words_left_out:
        notes.append(
            f"The {study.words_left_out:,} rarest words of those that occur {settings.min_count} "
            "times were left out to bound memory."
        )
    if len(set(trace.shape.num_experts)) > 1:
        notes.append(
            "Layers have different numbers of experts: figures of a layer or the model count as if "
            f"each had {trace.num_experts}, of which some are never chosen."
        )
    most = max(len(study.cache_rows(count)) for count in few)
    if settings.cache_samples is not None and most < max(few):
        notes.append(f"Cache simulations took {most} samples of each domain, evenly spaced.")
    return notes
