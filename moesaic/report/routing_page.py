"""The report of a routing analysis: figures as files, and one page with everything on it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moesaic.report.analysis import ALL, Analysis
from moesaic.report.html import Fact, Page, Section
from moesaic.report.plots import fixed, save
from moesaic.report.reference import SOURCE, reference
from moesaic.report.routing_figures import SPECIAL, figures_of, policy_name
from moesaic.report.tables import Column, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw", "save_all"]

CAPTIONS = {
    "srp-rho": "SRP of the whole model and rho, the experts that the best segment router keeps "
    "over those active. Right: consistent. Low: with few experts. Grey: the models of the study.",
    "srp-loss": "SRP and loss. Losses of models with different tokenizers cannot be compared.",
    "srp-layers": "SRP (solid) and rho (dotted) of every layer, with the interval of SRP.",
    "srp-experts": "Every expert: how often it is active and how well one decision for {m} tokens "
    "serves it. Dotted: what always choosing it would give. Dashed: even load.",
    "srp-positions": "SRP by where the segment lies in its sample.",
    "srp-domains": "How much more or less consistent each domain is than all text together.",
    "domain-likeness": "How alike domains are: correlation over all experts.",
    "specialisation-models": "Whether specialised experts are consistent ones: correlation over "
    "the experts of a model, among the models of the study.",
    "specialisation-experts": "Every expert: specialisation and SRP.",
    "specialisation-layers": "Specialisation by layer, mean over the experts.",
    "load": "Load of every expert, relative to an even share.",
    "balance": "Balance of the load overall and inside samples; sharpness of the weights; how many "
    "experts a token shares with the one before it.",
    "coactivation": "Experts that tokens choose together more (orange) or less (blue) often than "
    "independent choices would.",
    "hits-policies": "Hit rate of expert caches by their size over the active experts. Belady and "
    "SCH know the future: what a policy could reach.",
    "hits-domains": "Hit rates by domain.",
    "sch-models": "Segment cache best hit rate of one cache for the whole model.",
    "sch-layers": "Segment cache best hit rate of a cache for each layer.",
    "policies-models": "Hit rates of one cache for the whole model, among the models of the study.",
    "cases": "The experts that each token of a text chose, in the layer that routes it most "
    "consistently.",
}


def draw(analysis: Analysis) -> Path:
    """Write figures/*.png, figures/*.svg and report.html beside the tables; return the page."""
    figures = figures_of(analysis)
    save_all(figures, analysis.directory / "figures")
    path = analysis.directory / "report.html"
    return _page(analysis, figures).write(path)


def save_all(figures: dict[str, Figure], folder: Path) -> None:
    """Write figures as PNG and SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        fixed(figure)
        save(figure, folder / f"{name}.png", dpi=120)
        save(figure, folder / f"{name}.svg")


def _page(analysis: Analysis, figures: dict[str, Figure]) -> Page:
    metrics = analysis.metrics
    model, trace = metrics["model"], metrics["trace"]
    top_k, experts = _span(model["top_k"]), _span(model["num_experts"])
    page = Page(
        f"How {analysis.name} routes",
        subtitle=f"{trace['rows']:,} tokens of {len(trace['domains'])} domains through "
        f"{len(model['layers'])} layers of {experts} experts, {top_k} for every token.",
        footer=f"moesaic route analyze; trace {trace['path']}. Definitions and published figures: "
        f"{SOURCE}. Every figure is in metrics.json and the folder tables.",
    )

    def show(section: Section, *names: str) -> None:
        for name in names:
            if name in figures:
                section.figure(figures[name], caption=CAPTIONS[name].format(m=analysis.headline))

    section = page.section("Overview")
    section.facts(_facts(analysis))
    if metrics["notes"]:
        section.text("\n\n".join(metrics["notes"]))
    section.table(_segments_table(analysis))
    if (analysis.directory / "encoder" / "report.html").is_file():
        section.text("The encoder has a report of its own: encoder/report.html.")
    section = page.section("Consistency")
    show(section, "srp-rho", "srp-layers", "srp-experts", "srp-positions", "srp-loss")
    section.sortable(_layers_table(analysis))
    section = page.section("Expert caches")
    show(section, "hits-policies", "policies-models", "sch-models", "sch-layers", "hits-domains")
    section.table(_hits_table(analysis))
    section.table(_relations_table(analysis))
    section = page.section("Load")
    show(section, "load", "balance", "coactivation")
    if len(analysis.domains) > 1:
        section = page.section("Domains")
        show(section, "srp-domains", "domain-likeness")
        section.sortable(_domains_table(analysis))
    section = page.section("Specialisation")
    show(section, "specialisation-layers", "specialisation-experts", "specialisation-models")
    section = page.section("Texts")
    section.text(
        "The first sample of each domain, its words coloured by expert. Choose the text, the layer "
        "and which of a token's choices is shown; press an expert to see only its words."
    )
    keys = ("domain", "words", "best", "consistency", "experts")
    cases = [{**{key: case[key] for key in keys}, "size": case["bytes"]} for case in analysis.cases]
    section.routed(
        model["layers"], cases,
        caption="Consistency of a layer: mean SRP of its experts in segments of 16 tokens, "
        "weighted by how much the segment router uses them.",
    )  # fmt: skip
    show(section, "cases")
    page.section("Experts").sortable(_experts_table(analysis))
    return page


def _facts(analysis: Analysis) -> list[Fact]:
    metrics = analysis.metrics
    m = str(analysis.headline)
    srp = metrics["srp"][m]
    facts = []
    if srp["srp"] is not None:
        known = [row["srp"].get(int(m)) for row in reference()]
        better = sum(value is not None and value > srp["srp"] for value in known)
        total = sum(value is not None for value in known)
        among = f"{better} of {total} published models route more consistently" if total else ""
        facts.append(Fact(f"SRP, {m} tokens", f"{100 * srp['srp']:.1f} %", among))
        facts.append(Fact("rho", f"{srp['rho']:.2f}", "experts kept for a segment / active ones"))
    rates = metrics["hit_rates"]["layer"]
    for policy, words in (("lru", "a cache for each layer, twice the active experts"),):
        if (rate := rates.get(policy, {}).get("2")) is not None:
            best = rates["belady"]["2"]
            facts.append(
                Fact(
                    f"{policy_name(policy)} hit rate",
                    f"{100 * rate:.1f} %",
                    f"{words}; at best {100 * best:.1f} %",
                )
            )
    load = metrics["load"]
    facts.append(
        Fact(
            "Load", f"{load['cv']:.2f}",
            f"deviation / mean; {load['local_cv']:.2f} inside samples; {load['dead']} dead experts",
        )
    )  # fmt: skip
    special = metrics["specialisation"]
    if special["domain"] is not None:
        facts.append(
            Fact(
                "Domain specialisation", f"{special['domain']:.2f}", "deviation / mean over domains"
            )
        )
    if special["input"] is not None:
        facts.append(
            Fact(
                "Vocabulary", f"{100 * special['input']:.0f} %",
                "share of a word's tokens that its expert gets, mean",
            )
        )  # fmt: skip
    if metrics["loss"] is not None:
        facts.append(Fact("Loss", f"{metrics['loss']:.3f}", "nats a token, mean over domains"))
    return facts


def _percent(value: Any) -> float | None:
    return None if value is None or not np.isfinite(value) else 100 * float(value)


def _segments_table(analysis: Analysis) -> Table:
    rows = []
    for m, found in analysis.metrics["srp"].items():
        row = {"m": int(m), "srp": _percent(found["srp"]), "rho": found["rho"]}
        row["activation"] = _percent(found["activation"])
        if found.get("low") is not None:
            row["interval"] = f"{100 * found['low']:.2f} to {100 * found['high']:.2f}"
        rows.append(row)
    return Table(
        [
            Column("m", "tokens of a segment", "integer"),
            Column("srp", "SRP, %", "fixed", 2),
            Column("interval", "interval"),
            Column("rho", "rho", "fixed", 2),
            Column("activation", "activation, %", "fixed", 2),
        ],
        rows,
        "Segment routing best performance of the whole model.",
    )


def _layers_table(analysis: Analysis) -> Table:
    m = analysis.headline
    segments = analysis.table("segments_layer", domain=ALL, segment=m)
    balance = analysis.table("balance", domain=ALL)
    kept = analysis.table("kept")
    hits = analysis.table("hits_layer", domain=ALL)

    def rate(policy: str, layer: int) -> float | None:
        own = (hits["layer"] == layer) & (hits["policy"] == policy) & np.isclose(hits["ratio"], 2)
        return _percent(hits["rate"][own][0]) if own.any() else None

    rows = [
        {
            "layer": int(layer),
            "srp": _percent(segments["srp"][i]),
            "rho": float(segments["rho"][i]),
            "lru": rate("lru", layer),
            "belady": rate("belady", layer),
            "cv": float(balance["cv"][i]),
            "local_cv": float(balance["local_cv"][i]),
            "dead": int(balance["dead"][i]),
            "entropy": float(balance["weight_entropy"][i]),
            "kept": _percent(kept["kept"][i]),
        }
        for i, layer in enumerate(segments["layer"].tolist())
    ]
    return Table(
        [
            Column("layer", "layer", "integer"),
            Column("srp", f"SRP, % (m = {m})", "fixed", 2),
            Column("rho", "rho", "fixed", 2),
            Column(
                "lru", "LRU, %", "fixed", 1, note="hit rate of a cache of 2 x the active experts"
            ),
            Column("belady", "Belady, %", "fixed", 1),
            Column("cv", "load", "fixed", 3, note="deviation / mean of the load over the experts"),
            Column("local_cv", "load inside samples", "fixed", 3),
            Column("dead", "dead", "integer", note="experts that no token chose"),
            Column("entropy", "weights", "fixed", 3, note="entropy of a token's weights, 1: even"),
            Column("kept", "kept, %", "fixed", 1, note="experts that the token before chose too"),
        ],
        rows,
        "Every layer. Press a heading to sort.",
    )


def _hits_table(analysis: Analysis) -> Table:
    rows = []
    for scope, by_policy in analysis.metrics["hit_rates"].items():
        for policy, by_ratio in by_policy.items():
            rates = {ratio: _percent(rate) for ratio, rate in by_ratio.items()}
            place = "a cache for each layer" if scope == "layer" else "one for the model"
            rows.append({"scope": place, "policy": policy_name(policy), **rates})
    ratios = sorted({key for row in rows for key in row} - {"scope", "policy"}, key=float)
    return Table(
        [
            Column("scope", "cache"),
            Column("policy", "policy"),
            *(Column(ratio, f"{ratio} x", "fixed", 1) for ratio in ratios),
        ],
        rows,
        "Hit rates in % by cache size over the active experts, mean over layers and domains.",
    )


def _relations_table(analysis: Analysis) -> Table:
    """How SRP, SCH and real policies go together over domains and layers."""
    known = analysis.metrics["correlations"]
    rows = []
    for m in map(str, analysis.segments):
        row: dict[str, Any] = {"m": int(m)}
        row |= {f"srp {ratio}": value for ratio, value in known["srp_with_sch"][m].items()}
        row |= known["sch_with_policy"][m]
        share = analysis.metrics["share_of_belady"].get(f"sch-{m}", {})
        row["share"] = _percent(share.get("2"))
        rows.append(row)
    ratios = [key.removeprefix("srp ") for key in rows[0] if key.startswith("srp ")]
    return Table(
        [
            Column("m", "tokens", "integer"),
            *(Column(f"srp {ratio}", f"SRP, {ratio} x", "fixed", 2) for ratio in ratios),
            *(Column(p, policy_name(p), "fixed", 2) for p in ("lru", "lfu", "belady", "fixed")),
            Column("share", "of Belady, %", "fixed", 1, note="SCH in one cache for the model, 2 x"),
        ],
        rows,
        "Correlation of SCH with SRP by cache size, and with other policies at twice the active "
        "experts, over the layers of all domains.",
    )


def _domains_table(analysis: Analysis) -> Table:
    table = analysis.table("domains")
    rows = [
        {
            "domain": str(name),
            "tokens": int(table["tokens"][i]),
            "samples": int(table["samples"][i]),
            "loss": float(table["loss"][i]),
            "srp": _percent(table["srp"][i]),
            "difference": _percent(table["difference"][i]),
        }
        for i, name in enumerate(table["domain"])
    ]
    return Table(
        [
            Column("domain", "domain"),
            Column("tokens", "tokens", "integer"),
            Column("samples", "samples", "integer"),
            Column("loss", "loss", "fixed", 3),
            Column("srp", f"SRP, % (m = {analysis.headline})", "fixed", 2),
            Column("difference", "against all text, %", "fixed", 2),
        ],
        rows,
        "Every domain.",
    )


def _experts_table(analysis: Analysis) -> Table:
    table = analysis.table("experts")
    even = 1 / max(analysis.metrics["model"]["num_experts"])
    names = list(table)
    rows = []
    for values in zip(*(table[name].tolist() for name in names), strict=True):
        row = dict(zip(names, values, strict=True))
        row["load"] = row["load"] / even
        for key in ("srp", "activation", "importance"):
            row[key] = _percent(row[key])
        rows.append(row)
    return Table(
        [
            Column("layer", "layer", "integer"),
            Column("expert", "expert", "integer"),
            Column("load", "load", "fixed", 2, note="against an even share"),
            Column("importance", "weight, %", "fixed", 2, note="share of the gate weights"),
            Column("activation", "active, %", "fixed", 2),
            Column("srp", "SRP, %", "fixed", 1, note=f"segments of {analysis.headline} tokens"),
            Column("rho", "rho", "fixed", 2),
            Column("domain_specialisation", "domains", "fixed", 2, note=SPECIAL["domain"]),
            Column("top_domain", "most active in"),
            Column("input_specialisation", "read", "fixed", 2, note="in words read"),
            Column("predicted_specialisation", "predicted", "fixed", 2, note="in words predicted"),
            Column("target_specialisation", "next", "fixed", 2, note="in words that follow"),
            Column("top_words", "its words", note="read, the most its own first"),
        ],
        rows,
        "Every expert. Press a heading to sort; filter with words or conditions: layer=3 load>1.5.",
    )


def _span(values: list[int]) -> str:
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low} to {high}"
