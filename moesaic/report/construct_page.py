"""The page of a construction: construct.json in, what every stage and every layer did out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moesaic.report import plots
from moesaic.report.html import Fact, Page
from moesaic.report.tables import Column, Table

__all__ = ["layers_table", "page", "spent", "stages_table"]


def stages_table(figures: Mapping[str, Any]) -> Table:
    """One row a stage: loss, all-experts-on difference, captured energy, load, output error.

    Without held-out text there is neither a loss nor anything to say of the dense model.
    """
    stages = figures["stages"]
    loss = Column("loss", "Held-out loss", "fixed", note="nats a token, mean over the domains")
    columns = [
        Column("stage", "Stage"),
        *([loss] if _measured(figures) else []),
        Column("output_error", "Output error", "percent", 1, note=_OUTPUT_ERROR),
        Column("captured", "Captured energy", "percent", 1, note="by the router's choice"),
        Column("oracle", "Oracle", "percent", 1, note="by the best choice of as many experts"),
        Column("load_entropy", "Load entropy", "fixed", note="1 is even load"),
        Column("all_on_difference", "All experts on", "scientific", 1, note=_ALL_ON),
    ]
    rows = [row for row in stages if row["stage"] != "dense" or _measured(figures)]
    return Table(columns, rows, caption="After each stage.")


def layers_table(figures: Mapping[str, Any]) -> Table:
    """One row a layer."""
    stages = [row["stage"] for row in figures["stages"] if row["stage"] != "dense"]
    columns = [
        Column("layer", "Layer", "integer"),
        *(Column(stage, f"Error: {stage}", "percent", 1) for stage in stages),
        Column("stream_error", "Stream error", "percent", 1, note=_STREAM_ERROR),
        Column("captured", "Captured", "percent", 1),
        Column("oracle", "Oracle", "percent", 1),
        Column("load_entropy", "Load entropy", "fixed"),
        Column("idle", "Idle", "integer", note="experts that no calibration token chose"),
        Column("strength", "Ridge", "scientific", 0, note="its strength, chosen on held-back text"),
    ]
    rows = [
        {
            **layer,
            **layer["output_error"],
            "idle": len(layer["never_chosen"]),
            "strength": (layer.get("refit") or {}).get("strength"),
        }
        for layer in figures["layers"]
    ]
    return Table(columns, rows, caption="Every layer, on calibration text that was held back.")


def spent(figures: Mapping[str, Any]) -> str:
    """Where the time went, in one line."""
    seconds = dict(figures["seconds"])
    whole, making = seconds.pop("all"), seconds.pop("construct")
    parts = {**seconds, "loss on held-out text": whole - making}
    named = ", ".join(f"{name} {value:.0f} s" for name, value in parts.items() if value >= 0.5)
    return f"{whole:.0f} s in all" + (f": {named}" if named else "")


def by_layer(figures: Mapping[str, Any]) -> str:
    """Experts of a token in every layer, where they were chosen layer by layer; else nothing."""
    found, shared = figures.get("experts_per_layer"), figures["recipe"]["shared"]
    if not found:
        return ""
    return "experts of a token by layer: " + " ".join(str(k + shared) for k in found["routed"])


def page(figures: Mapping[str, Any]) -> Page:
    """The report as a `Page`."""
    recipe = figures["recipe"]
    made = Page(
        "A mixture of experts without training",
        subtitle=f"{Path(figures['model']).name}: {recipe['experts']} experts a layer, of which a "
        f"token uses {recipe['top_k']}{' on average' * bool(by_layer(figures))}; calibrated on "
        f"{recipe['tokens']:,} tokens.",
        footer=spent(figures) + ".",
    )
    made.section("In short").facts(_facts(figures))
    stages = made.section("Stages").table(stages_table(figures))
    if figures["stages"][-1]["stage"] != "split":
        stages.text(
            "A refit makes up for the experts that are not chosen; all of them on then say more "
            "than the dense layer, which is as it should be."
        )
    if not _measured(figures):
        stages.text("No loss was measured, as no held-out text was given.")
    layers = made.section("Layers").table(layers_table(figures))
    if by_layer(figures):
        layers.text(by_layer(figures).capitalize() + ".")
    layers.figure(
        plots.load_map({"calibration text": [layer["load"] for layer in figures["layers"]]}),
        caption="How often every expert is chosen, against an even share.",
    )
    if _measured(figures):
        first = figures["stages"][0]
        domains = [name for name in first["losses"] if name != "mean"]
        columns = [Column("stage", "Stage"), *(Column(name, name, "fixed") for name in domains)]
        rows = [{"stage": row["stage"], **row["losses"]} for row in figures["stages"]]
        made.section("Domains").table(Table(columns, rows, caption="Held-out loss, nats a token."))
    lines = [f"{key}: {value}" for key, value in recipe.items()]
    made.section("How it was made").code("\n".join(lines), title="The recipe")
    return made


def _facts(figures: Mapping[str, Any]) -> list[Fact]:
    first, split, last = (figures["stages"][place] for place in (0, 1, -1))
    facts = []
    if _measured(figures):
        facts = [
            Fact("dense", f"{first['loss']:.3f}", "held-out loss"),
            Fact("mixture", f"{last['loss']:.3f}", "held-out loss"),
            Fact("gap", f"{last['loss'] - first['loss']:+.3f}", "nats a token"),
        ]
    before = f"{_percent(split['output_error'])} after the split alone"
    return [
        *facts,
        Fact("output error", _percent(last["output_error"]), before if last is not split else ""),
        Fact("captured energy", _percent(split["captured"]), f"oracle {_percent(split['oracle'])}"),
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _measured(figures: Mapping[str, Any]) -> bool:
    return figures["stages"][-1]["loss"] is not None


_OUTPUT_ERROR = (
    "squares of the dense layer's output that are missed, on held-back text, mean over the layers"
)
_ALL_ON = "largest difference of a layer's output from the dense layer's, all experts on"
_STREAM_ERROR = "squares by which the residual stream after the layer differs from the dense one"
