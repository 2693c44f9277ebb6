"""The page of a construction: construct.json in, what every stage and every layer did out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moesaic.report.html import Fact, Page
from moesaic.report.tables import Column, Table

__all__ = ["layers_table", "page", "stages_table"]


def stages_table(figures: Mapping[str, Any]) -> Table:
    """One row a stage: loss, all-experts-on difference, captured energy, load, output error."""
    columns = [
        Column("stage", "Stage"),
        Column("loss", "Held-out loss", "fixed", note="nats a token, mean over the domains"),
        Column(
            "all_on_difference",
            "All experts on",
            "scientific",
            1,
            note="largest difference of a layer's output from the dense layer's, all experts on",
        ),
        Column("captured", "Captured energy", "percent", 1, note="by the router's choice"),
        Column("oracle", "Oracle", "percent", 1, note="by the best choice of as many experts"),
        Column("load_entropy", "Load entropy", "fixed", note="1 is even load"),
        Column(
            "output_error",
            "Output error",
            "percent",
            1,
            note="squares of the dense layer's output that are missed, held-back tokens, "
            "mean over the layers",
        ),
    ]
    return Table(columns, figures["stages"], caption="Before and after each stage.")


def layers_table(figures: Mapping[str, Any]) -> Table:
    """One row a layer."""
    stages = [row["stage"] for row in figures["stages"] if row["stage"] != "dense"]
    columns = [
        Column("layer", "Layer", "integer"),
        Column("captured", "Captured", "percent", 1),
        Column("oracle", "Oracle", "percent", 1),
        Column("load_entropy", "Load entropy", "fixed"),
        *(Column(stage, f"Error: {stage}", "percent", 1) for stage in stages),
        Column("strength", "Ridge", "scientific", 0, note="chosen on held-back tokens"),
        Column("stream_error", "Stream error", "percent", 1, note="of the residual stream after"),
    ]
    rows = [
        {
            **layer,
            **layer["output_error"],
            "strength": (layer.get("refit") or {}).get("strength"),
        }
        for layer in figures["layers"]
    ]
    return Table(columns, rows, caption="Every layer, on calibration tokens that were held back.")


def page(figures: Mapping[str, Any]) -> Page:
    """The report as a `Page`."""
    recipe = figures["recipe"]
    made = Page(
        "A mixture of experts without training",
        subtitle=f"{Path(figures['model']).name}: {recipe['experts']} experts a layer, of which a "
        f"token uses {recipe['top_k']}; calibrated on {recipe['tokens']:,} tokens.",
        footer=", ".join(f"{name} {value} s" for name, value in figures["seconds"].items()),
    )
    first, last = figures["stages"][0], figures["stages"][-1]
    short = made.section("In short")
    if last["loss"] is not None:
        short.facts(
            [
                Fact("dense", f"{first['loss']:.3f}", "held-out loss"),
                Fact("mixture", f"{last['loss']:.3f}", "held-out loss"),
                Fact("gap", f"{last['loss'] - first['loss']:+.3f}", "nats a token"),
            ]
        )
    made.section("Stages").table(stages_table(figures))
    made.section("Layers").table(layers_table(figures))
    if last["loss"] is not None:
        domains = [name for name in first["losses"] if name != "mean"]
        columns = [Column("stage", "Stage"), *(Column(name, name, "fixed") for name in domains)]
        rows = [{"stage": row["stage"], **row["losses"]} for row in figures["stages"]]
        made.section("Domains").table(Table(columns, rows, caption="Held-out loss, nats a token."))
    lines = [f"{key}: {value}" for key, value in recipe.items()]
    made.section("How it was made").code("\n".join(lines), title="The recipe")
    return made
