"""The page of a comparison: models among the published ones, and against the first of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moesaic.report import routing_figures as figures
from moesaic.report.analysis import Analysis
from moesaic.report.html import Page
from moesaic.report.plots import dots
from moesaic.report.reference import SOURCE, reference
from moesaic.report.routing_page import CAPTIONS, save_all
from moesaic.report.tables import Column, Table

__all__ = ["draw_comparison", "published_table"]


def draw_comparison(
    analyses: Sequence[Analysis], comparison: Mapping[str, Any], folder: Path
) -> Path:
    """Write figures and report.html to `folder`; return the page."""
    drawn = {
        "srp-rho": figures.srp_against("rho", analyses),
        "srp-loss": figures.srp_against("loss", analyses),
        "srp-domains": _domains_figure(comparison),
        "srp-layers": figures.srp_by_layer(analyses),
        "srp-experts": figures.srp_by_expert(analyses),
        "srp-positions": figures.srp_by_position(analyses),
        "sch-models": figures.sch(analyses),
        "policies-models": figures.policies(analyses),
        "sch-layers": figures.sch_by_layer(analyses),
        "specialisation-models": figures.specialisation_models(analyses),
    }
    made = {name: figure for name, figure in drawn.items() if figure is not None}
    save_all(made, folder / "figures")
    others = ", ".join(a.name for a in analyses[1:])
    page = Page(
        f"{analyses[0].name} and {others}",
        subtitle=f"Routing of {len(analyses)} models, among those of the routing study.",
        footer=f"moesaic route compare. Published figures: {SOURCE}.",
    )
    m = analyses[0].headline
    captions = {**CAPTIONS, "srp-domains": f"SRP by domain, segments of {m} tokens."}

    section = page.section("Differences")
    if comparison["notes"]:
        section.text("\n\n".join(comparison["notes"]))
    section.table(differences_table(comparison))
    section.table(likeness_table(comparison))
    if (domains := domains_table(comparison)).rows:
        section.table(domains)
    for title, names in (
        ("Consistency", ["srp-rho", "srp-domains", "srp-layers", "srp-experts", "srp-positions"]),
        ("Expert caches", ["sch-models", "policies-models", "sch-layers"]),
        ("Loss and specialisation", ["srp-loss", "specialisation-models"]),
    ):
        section = page.section(title)
        for name in names:
            if name in made:
                section.figure(made[name], caption=captions[name].format(m=m))
    page.section("All models").sortable(published_table(comparison))
    return page.write(folder / "report.html")


def differences_table(comparison: Mapping[str, Any]) -> Table:
    """SRP and rho of every segment length and model, against the base."""
    changes = {row["name"]: row["srp"] for row in comparison["differences"]}
    rows = []
    for m in map(str, comparison["segments"]):
        for model in comparison["models"]:
            own = model["srp"][m]
            change = changes.get(model["name"], {}).get(m, {})
            row: dict[str, Any] = {"m": int(m), "name": model["name"], "rho": own["rho"]}
            row["srp"] = None if own["srp"] is None else 100 * own["srp"]
            if change.get("relative") is not None:
                row["change"] = 100 * change["relative"]
                row["rho change"] = change["rho"]
            if change.get("distinct") is not None:
                row["distinct"] = "apart" if change["distinct"] else "overlap"
            rows.append(row)
    columns = [
        Column("m", "segment", "integer"),
        Column("name", "model"),
        Column("srp", "SRP, %", "fixed", 2),
        Column("change", "change, %", "signed", 2),
        Column("distinct", "intervals"),
        Column("rho", "rho", "fixed", 2),
        Column("rho change", "change of rho", "signed", 2),
    ]
    return Table(columns, rows, f"Changes are those from {comparison['base']}, SRP relative to it.")


def likeness_table(comparison: Mapping[str, Any]) -> Table:
    """Loss, hit rates and load of every model, and how alike its experts are to the base's."""
    changes = {row["name"]: row for row in comparison["differences"]}
    rows = []
    for model in comparison["models"]:
        change = changes.get(model["name"], {})
        same = (change.get("same_choices") or {}).get("mean")
        lru = model["hit_rates"]["lru"].get("2")
        rows.append(
            {
                "name": model["name"],
                "loss": model["loss"],
                "lru": None if lru is None else 100 * lru,
                "cv": model["load"]["cv"],
                "local": model["load"]["local_cv"],
                "load": (change.get("experts") or {}).get("load"),
                "srp": (change.get("experts") or {}).get("srp"),
                "same": None if same is None else 100 * same,
            }
        )
    columns = [
        Column("name", "model"),
        Column("loss", "loss", "fixed", 3),
        Column("lru", "LRU, %", "fixed", 1, note="one cache of 2 x the active experts"),
        Column("cv", "load", "fixed", 3, note="deviation / mean over the experts"),
        Column("local", "load inside samples", "fixed", 3),
        Column("load", "load alike", "fixed", 3, note="correlation with the base's experts"),
        Column("srp", "SRP alike", "fixed", 3),
        Column("same", "same choices, %", "fixed", 1, note="of the same tokens"),
    ]
    kept = [column for column in columns if any(row[column.key] is not None for row in rows)]
    return Table(kept, rows, "Loss, caches and load.")


def domains_table(comparison: Mapping[str, Any]) -> Table:
    """SRP of every domain that the base and another model have, and its relative change."""
    m = _headline(comparison)
    base = comparison["models"][0]
    rows = []
    columns = [Column("domain", "domain"), Column("base", f"{base['name']}, %", "fixed", 2)]
    for change in comparison["differences"]:
        columns.append(Column(change["name"], f"{change['name']}, change in %", "signed", 2))
    for name, srp in base["srp_by_domain"].items():
        row: dict[str, Any] = {"domain": name}
        row["base"] = None if srp[m] is None else 100 * srp[m]
        for change in comparison["differences"]:
            relative = change["by_domain"].get(name, {}).get(m, {}).get("relative")
            row[change["name"]] = None if relative is None else 100 * relative
        if any(row[change["name"]] is not None for change in comparison["differences"]):
            rows.append(row)
    return Table(columns, rows, f"SRP by domain, segments of {m} tokens.")


def published_table(comparison: Mapping[str, Any]) -> Table:
    """One's own models and those of the study, one row each."""
    rows = []
    for model in comparison["models"]:
        rates = model["hit_rates"]
        row = {
            "name": model["name"],
            "source": "here",
            "loss": model["loss"],
            "deviation": model["load"]["deviation"],
            **{f"srp{m}": found["srp"] for m, found in model["srp"].items()},
            **{f"rho{m}": found["rho"] for m, found in model["srp"].items()},
            **{f"sch{r}": rates.get("sch-16", {}).get(str(r)) for r in (1, 2, 3)},
            **{p: rates[p].get("2") for p in ("lru", "lfu", "belady")},
            **{f"corr {key}": value for key, value in model["correlations"].items()},
        }
        rows.append(row)
    for kind in ("models", "toys"):
        for found in reference(kind):
            row = {"name": found["name"], "source": "study" if kind == "models" else "study, toy"}
            row |= {f"srp{m}": value for m, value in found["srp"].items()}
            row |= {f"rho{m}": value for m, value in found.get("rho", {}).items()}
            row |= {f"sch{r}": value for r, value in found["sch16"].items()}
            row |= found.get("rate2", {})
            row |= {"loss": found["log_ppl"], "deviation": found["load_deviation"]}
            row |= {f"corr {k}": v for k, v in found.get("correlations", {}).items()}
            rows.append(row)
    shares = [key for key in _keys(rows) if key.startswith(("srp", "sch"))]
    for row in rows:
        for key in [*shares, "lru", "lfu", "belady", "deviation"]:
            if row.get(key) is not None:
                row[key] = 100 * row[key]
    lengths = sorted(
        {int(key[3:]) for key in _keys(rows) if key.startswith("srp")} & {4, 16, 64, 256}
        | set(comparison["segments"])
    )
    columns = [
        Column("name", "model"),
        Column("source", "source"),
        *(Column(f"srp{m}", f"SRP {m}", "fixed", 2) for m in lengths),
        *(Column(f"rho{m}", f"rho {m}", "fixed", 2) for m in lengths),
        *(Column(f"sch{r}", f"SCH {r}x", "fixed", 1) for r in (1, 2, 3)),
        Column("lru", "LRU 2x", "fixed", 1),
        Column("lfu", "LFU 2x", "fixed", 1),
        Column("belady", "Belady 2x", "fixed", 1),
        Column("loss", "loss", "fixed", 3),
        Column("deviation", "load", "fixed", 2, note="standard deviation of the activation, %"),
        Column("corr domain", "domain", "fixed", 2, note="correlation of SRP and specialisation"),
        Column("corr input", "read", "fixed", 2),
        Column("corr predicted", "predicted", "fixed", 2),
        Column("corr target", "next", "fixed", 2),
    ]
    return Table(columns, rows, "Rates in %. SCH: window of 16, one cache for the model.")


def _headline(comparison: Mapping[str, Any]) -> str:
    return str(min(comparison["segments"], key=lambda m: (abs(m - 16), m)))


def _domains_figure(comparison: Mapping[str, Any]) -> Any:
    m = _headline(comparison)
    names = list(comparison["models"][0]["srp_by_domain"])
    values = {
        domain: {
            model["name"]: None if srp is None else 100 * srp
            for model in comparison["models"]
            for srp in [model["srp_by_domain"].get(domain, {}).get(m)]
        }
        for domain in names
    }
    if not any(value is not None for row in values.values() for value in row.values()):
        return None
    return dots(values, x_label=f"SRP, % (m = {m})")


def _keys(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))
