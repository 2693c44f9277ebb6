"""Construction without training: split, route, weight, refit and refine a dense model in one run.

The choices are registered methods that combine freely (`recipe`). Layers are made in order, each on
the output of the layers made before it (`layer_maker`), and written as they are made
(`mixture_writer`), so that one layer is in memory, never a model.
Notation: D hidden size.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moesaic.construct.allot import Allotment, allot
from moesaic.construct.calibration import calibration_rows
from moesaic.construct.choices import SplitChoice, router_network
from moesaic.construct.dense import DenseModel, open_dense
from moesaic.construct.layer_maker import LayerMaker, MadeLayer
from moesaic.construct.mixture_writer import MixtureWriter
from moesaic.construct.recipe import Recipe, check_recipe, name_of, refinement, stage_names
from moesaic.construct.refit import Refit
from moesaic.construct.refits import REFITS
from moesaic.construct.router import RouterInit
from moesaic.construct.split import NeuronSplit
from moesaic.construct.stages import (
    held_out,
    name_the_idle,
    name_the_uncovered,
    name_the_unrefined,
    name_the_unweighted,
    stage_records,
)
from moesaic.construct.weighting import Weighting, layer_fields
from moesaic.construct.weightings import WEIGHTINGS
from moesaic.core.console import track
from moesaic.core.errors import UserError, check_seed
from moesaic.core.files import check_step, output_directory, write_text
from moesaic.core.lineage import write_lineage
from moesaic.measure.exactness import is_exact
from moesaic.models.selects import Selects, together

__all__ = ["Construction", "Recipe", "construct", "results", "run"]


@dataclass
class Construction:
    """What a run made: splits, routers and the figures; the weights are where they were written."""

    dense: DenseModel
    recipe: Recipe
    layers: list[MadeLayer] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    allotment: Allotment | None = None
    last_norm: float = 1.0
    """Factor of the last norm's weight in the stage `refit`."""

    @property
    def selects(self) -> Selects:
        """Routed experts of a token, of all layers or of each."""
        if self.allotment is not None:
            return together(self.allotment.selects)
        return self.recipe.top_k - self.recipe.shared

    def split(self) -> NeuronSplit:
        """The division of the neurons."""
        return NeuronSplit(
            [layer.parts.experts for layer in self.layers],
            [layer.parts.shared for layer in self.layers],
            self.dense.width,
            {
                "method": name_of(self.recipe.split),
                "recipe": self.recipe.model_dump(mode="json"),
            },
        )

    def router(self) -> RouterInit:
        """The routers."""
        shared = [
            torch.zeros(1, self.dense.hidden) if layer.parts.shared else None
            for layer in self.layers
        ]
        routers = [layer.router for layer in self.layers]
        return RouterInit(routers, shared, {"method": name_of(self.recipe.router)})


def construct(
    model: Path | str | None = None,
    *,
    out: Path | str,
    recipe: Recipe | Mapping[str, Any],
    overwrite: bool = False,
) -> Path:
    """Convert a dense model by a recipe; write the checkpoint, the figures and a report page.

    `out` holds an ordinary directory of a LLaMA-MoE (of other families a moesaic_moe) with
    split.safetensors, router.safetensors, construct.json (what every stage changed) and
    moesaic.json; the report is drawn from construct.json by `moesaic construct`.

    Raises UserError for a model, sizes, methods or data that do not fit together, MoesaicError
    when the disk is full.
    """
    settings = recipe if isinstance(recipe, Recipe) else Recipe.model_validate(dict(recipe))
    path = Path(model if model is not None else settings.model or "")
    if not str(model or settings.model or ""):
        raise UserError("No model was given. Name a dense model, or put model: in the recipe.")
    reads = [settings.split, settings.router, settings.data, settings.held_out]
    out = check_step(out, overwrite=overwrite, inputs=[path, *reads])
    with output_directory(out, overwrite=overwrite) as partial:
        *before, last = stage_names(settings)
        # Earlier stages are models too, where their loss is asked for; they do not stay.
        between = partial / ".stages"
        places = {stage: between / stage for stage in before if settings.held_out is not None}
        made = _make(path, settings, {**places, last: partial})
        shutil.rmtree(between, ignore_errors=True)
        made.split().save(partial / "split.safetensors")
        made.router().save(partial / "router.safetensors")
        figures = results(made)
        write_text(partial / "construct.json", json.dumps(figures, indent=2) + "\n")
        write_lineage(
            partial,
            step="construct",
            parent=str(path),
            config=settings.model_dump(mode="json"),
            seed=settings.seed,
            exact=figures["exact"],
            stages=figures["stages"],
        )
    return out


def results(made: Construction) -> dict[str, Any]:
    """Everything measured, as plain JSON values."""
    recipe = made.recipe
    changed = (recipe.refit, recipe.refine, recipe.attention)
    return {
        "model": str(made.dense.checkpoint.path),
        "recipe": recipe.model_dump(mode="json"),
        "exact": made.split().exact
        and all(stage is None for stage in changed)
        and all(is_exact(layer.facts["all_on"], layer.facts["largest"]) for layer in made.layers),
        "experts_per_layer": None if made.allotment is None else made.allotment.facts(),
        "last_norm": made.last_norm,
        "stages": made.stages,
        "layers": [layer.facts for layer in made.layers],
        "seconds": {key: round(value, 1) for key, value in made.seconds.items()},
    }


def run(
    model: Path | str,
    recipe: Recipe,
    *,
    folder: Path | None = None,
    dense_loss: Mapping[str, float] | None = None,
    last_only: bool = False,
) -> Construction:
    """Make every layer and measure the stages.

    `folder` gets the model of every stage, in a directory each; without it they are written only
    for their loss to be measured, and vanish. `dense_loss` is the dense model's held-out loss by
    domain, where it is known already. `last_only` measures the loss of the dense model and of the
    last stage, not of those between.
    """
    stages = stage_names(recipe)
    if folder is None and recipe.held_out is None:
        stages = []
    elif last_only:
        stages = stages[-1:]
    with ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moesaic-")))
        places = {stage: folder / stage for stage in stages}
        return _make(Path(model), recipe, places, dense_loss)


def _make(
    model: Path,
    recipe: Recipe,
    places: Mapping[str, Path],
    dense_loss: Mapping[str, float] | None = None,
) -> Construction:
    """Make every layer; write the stages that have a place there and measure them."""
    asked = started = time.monotonic()
    check_seed(recipe.seed)
    dense = open_dense(model)
    check_recipe(recipe, dense)
    weighting: Weighting = WEIGHTINGS.resolve(recipe.weighting)
    refit: Refit | None = None if recipe.refit is None else REFITS.resolve(recipe.refit)
    refine = refinement(recipe)
    router_network(dense, recipe)  # refused before text is read
    ids_BC = calibration_rows(
        model,
        recipe.data,
        tokens=recipe.tokens,
        context=recipe.context,
        experts=recipe.experts,
        seed=recipe.seed,
    )
    losses: dict[str, Mapping[str, float] | None] = {"dense": dense_loss}
    if recipe.held_out is not None and dense_loss is None:
        # First, so that text which cannot be read is said before the work, not after it.
        losses["dense"] = held_out(model, dense, recipe)
        started = time.monotonic()
    made = Construction(dense, recipe)
    split = SplitChoice(dense, recipe)
    routed, selects = recipe.experts - recipe.shared, made.selects
    fields = layer_fields(weighting, routed=routed, selects=selects)
    if recipe.experts_per_layer == "allotted":
        first = LayerMaker(
            dense, recipe, ids_BC[:1], split=split, fields=fields, refit=None, refine=None
        )
        made.allotment = allot(first, ids_BC, weighting)
        made.seconds["experts per layer"] = time.monotonic() - started
        selects = made.selects
        fields = layer_fields(weighting, routed=routed, selects=selects)
    maker = LayerMaker(
        dense,
        recipe,
        ids_BC,
        split=split,
        fields=fields,
        refit=refit,
        refine=refine,
        selects=selects,
    )
    with ExitStack() as stack:
        writers = {
            stage: stack.enter_context(
                MixtureWriter(dense, place, selects=selects, fields=fields, ready=split.ready)
            )
            for stage, place in places.items()
        }
        for index in track(range(dense.layers), "constructing layers"):
            try:
                layer, weights = maker.layer(index)
            except UserError as error:
                raise UserError(f"Layer {index}: {error}") from error
            made.layers.append(layer)
            for stage, writer in writers.items():
                writer.layer(index, weights[stage])
        made.last_norm, changed = maker.last_norm()
        for stage, writer in writers.items():
            writer.end(changed if stage == "refit" else {})
    facts = [layer.facts for layer in made.layers]
    name_the_idle(facts)
    name_the_uncovered(made.split())
    name_the_unrefined(facts)
    name_the_unweighted(dense, recipe, selects)
    made.seconds |= {**maker.seconds, "construct": time.monotonic() - started}
    if recipe.held_out is not None:
        losses |= {stage: held_out(place, dense, recipe) for stage, place in places.items()}
    made.stages = stage_records(facts, recipe, losses=losses)
    made.seconds["all"] = time.monotonic() - asked
    return made
