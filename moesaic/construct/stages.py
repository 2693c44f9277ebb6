"""What each stage of a construction changed: held-out loss, captured energy, load, output error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from moesaic.construct.dense import DenseModel
from moesaic.construct.recipe import Recipe, stage_names
from moesaic.construct.split import NeuronSplit
from moesaic.core.console import note
from moesaic.models.selects import Selects

__all__ = [
    "held_out",
    "name_the_idle",
    "name_the_uncovered",
    "name_the_unrefined",
    "name_the_unweighted",
    "stage_records",
]

_FLOAT32_BELOW = 2_000_000_000
"""Parameters up to which losses are measured in float32; larger models in their own type."""


def stage_records(
    facts: Sequence[Mapping[str, Any]],
    recipe: Recipe,
    *,
    losses: Mapping[str, Mapping[str, float] | None],
) -> list[dict[str, Any]]:
    """One record for the dense model and one for every stage: losses, and means over the layers.

    `facts` are the layers'; `losses` those of "dense" and of the stages that were measured.
    """
    records: list[dict[str, Any]] = [{"stage": "dense", **_loss(losses.get("dense"))}]
    for stage in stage_names(recipe):
        record: dict[str, Any] = {"stage": stage, "all_on_difference": None}
        if stage != "refine":
            all_on = "all_on_refit" if stage == "refit" else "all_on"
            record["all_on_difference"] = max(float(f[all_on]) for f in facts)
        for key in ("captured", "oracle", "load_entropy"):
            record[key] = None if stage == "refine" else _mean([f[key] for f in facts])
        record["output_error"] = _mean([f["output_error"][stage] for f in facts])
        records.append(record | _loss(losses.get(stage)))
    return records


def held_out(directory: Path, dense: DenseModel, recipe: Recipe) -> dict[str, float]:
    """The held-out loss of a model in a directory, by domain and "mean"."""
    from moesaic.measure.loss import held_out_loss
    from moesaic.models.load import load
    from moesaic.models.tokenizer import load_tokenizer

    place = recipe.place()
    small = dense.checkpoint.parameters < _FLOAT32_BELOW
    model = load(
        directory,
        dtype=torch.float32 if small else "auto",
        # onto the GPU tensor by tensor: the host does not hold a large model
        device_map=None if small or place.type == "cpu" else {"": place},
    )
    return held_out_loss(
        model,
        load_tokenizer(dense.checkpoint.path),
        recipe.held_out,
        context=recipe.held_out_context,
        max_documents=recipe.held_out_documents,
        device=place,
    )


def name_the_idle(facts: Sequence[Mapping[str, Any]]) -> None:
    """Say which experts no calibration token chose, by layer and number."""
    never = [
        f"layer {f['layer']} expert{'s' if len(f['never_chosen']) > 1 else ''} "
        + ", ".join(map(str, f["never_chosen"]))
        for f in facts
        if f["never_chosen"]
    ]
    if never:
        note(f"no calibration token chose {'; '.join(never)}. More text or fewer experts may help.")


def name_the_uncovered(split: NeuronSplit) -> None:
    """Say that a split repeats or drops neurons, so that all experts on are not the dense model."""
    if not split.exact:
        covered = sum(split.coverage()) / split.layers
        note(
            "neurons repeat or vanish in this split, so all experts on are not the dense model: "
            f"{covered:.1%} of the neurons are covered"
        )


def name_the_unrefined(facts: Sequence[Mapping[str, Any]]) -> None:
    """Say which layers training did not bring nearer to the dense model: they stay as they were."""
    same = [
        str(f["layer"])
        for f in facts
        if "refine" in f and f["refine"]["loss_after"] >= f["refine"]["loss_before"]
    ]
    if same:
        note(
            f"refine: training did not help layer {', '.join(same)} on held-back text; "
            "there the refit's weights stay. More tokens or a lower learning_rate may help."
        )


def name_the_unweighted(dense: DenseModel, recipe: Recipe, selects: Selects) -> None:
    """Say that routers of one expert learn nothing from the loss where its length is normed."""
    fewest = selects if isinstance(selects, int) else min(selects)
    normed = any("post_feedforward_layernorm" in name for name in dense.others(0))
    if normed and fewest == 1 and not recipe.shared:
        note(
            f"{dense.family.name} has a norm behind the MLP, which undoes the weight of a lone "
            "expert: the loss gives its router no gradient, only a balance loss does. "
            "A higher top_k or a shared expert would."
        )


def _loss(losses: Mapping[str, float] | None) -> dict[str, Any]:
    return {"loss": None} if losses is None else {"loss": losses["mean"], "losses": dict(losses)}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
