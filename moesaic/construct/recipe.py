"""What a construction without training is told: four choices, the sizes, the text.

Each choice is the name of a registered method, its settings, or a file that was made before.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from moesaic.construct.agreement import check_top_k
from moesaic.construct.dense import DenseModel
from moesaic.construct.free.distil import Distillation
from moesaic.construct.legacy_v2 import SUFFIXES
from moesaic.construct.method import check_division
from moesaic.construct.weighting import StartingAtOne
from moesaic.construct.weightings import WEIGHTINGS
from moesaic.core.config import Config, parse
from moesaic.core.errors import UserError

__all__ = [
    "Choice",
    "Recipe",
    "check_recipe",
    "made_before",
    "name_of",
    "refinement",
    "stage_names",
]

Choice = str | dict[str, Any]


class Recipe(Config):
    """A construction: four choices, the sizes, the text."""

    model: str | None = None
    """Directory of the dense model; the command line may give it instead."""
    split: Choice = "energy"
    """Which neurons go together: a name, settings with `method`, what `moesaic split` wrote, or
    LLaMA-MoE-v2's neuron_indices.pt."""
    router: Choice = "energy"
    """The router init: a name, settings, what `moesaic router` wrote, or LLaMA-MoE-v2's
    gate_weights.pt."""
    weighting: Choice = "tempered"
    """How chosen experts add up: a name or settings."""
    refit: Choice | None = "down"
    """How the dropped experts are made up for in closed form; null: not at all."""
    refine: Choice | None = None
    """`layerwise`: train each layer towards the dense model's stream, one after the other."""
    attention: float | None = Field(default=1.0, ge=0, le=1)
    """Refit the attention's output projection too, so far towards the dense stream; null: no."""
    maps: bool = True
    """With the refits, fold ridge maps of what each weight reads, as the layers before have changed
    it, to what it read in the dense model into q, k and v and into every expert's gate and up, and
    scale the last norm."""
    experts: int = Field(default=8, ge=1)
    """Experts of a layer, shared ones included."""
    top_k: int = Field(default=2, ge=1)
    """Experts active for a token, shared ones included."""
    experts_per_layer: Literal["equal", "allotted"] = "equal"
    """`allotted`: layers use different numbers, `top_k` on average, chosen by what they cost."""
    shared: int = Field(default=0, ge=0)
    """Experts that are always on; they become one."""
    data: Any = None
    """Calibration text: file, folder, mapping of domains, or name of a dataset."""
    tokens: int = Field(default=65_536, ge=64)
    """Calibration tokens; on a GPU four times as many cost seconds and are worth some percent."""
    context: int = Field(default=512, ge=8)
    """Tokens of a row of calibration text."""
    seed: int = 0
    """Of the choice of text, the k-means and the distillation."""
    held_out: Any = None
    """Text to measure the loss on before and after each stage; null: not measured."""
    held_out_documents: int | None = Field(default=None, ge=1)
    """Documents of each domain that are read; all by default."""
    held_out_context: int = Field(default=512, ge=2)
    """Tokens of a held-out row."""
    device: str = "auto"
    """Where the layers are made and measured: a torch device; auto: CUDA where there is one."""

    def place(self) -> torch.device:
        """The device. Raises UserError for one that is not there."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            found = torch.device(self.device)
        except RuntimeError:
            raise UserError(
                f"device '{self.device}' is unknown. Use auto, cpu, cuda or cuda:N."
            ) from None
        if found.type == "cuda" and not torch.cuda.is_available():
            raise UserError(f"device is '{found}' but this machine has no CUDA GPU. Use auto.")
        return found


def check_recipe(recipe: Recipe, dense: DenseModel) -> None:
    """Raise UserError for sizes that do not go with one another or with the model."""
    if dense.head != "ForCausalLM":
        raise UserError(
            f"{dense.checkpoint.path} is no language model, so there is no text to refit its "
            "experts on. Use `moesaic convert`."
        )
    check_top_k(recipe.top_k, recipe.experts, recipe.shared)
    check_division(recipe.experts, dense.width)


def stage_names(recipe: Recipe) -> list[str]:
    """The stages that a construction goes through, in order."""
    asked = {"split": True, "refit": recipe.refit, "refine": recipe.refine}
    return [stage for stage, choice in asked.items() if choice is not None]


def refinement(recipe: Recipe) -> Distillation | None:
    """The settings of the distillation, where there is one. Raises UserError for other names."""
    if recipe.refine is None:
        return None
    chosen = recipe.refine if isinstance(recipe.refine, dict) else {"method": recipe.refine}
    settings = dict(chosen)
    if settings.pop("method", None) != "layerwise":
        raise UserError(f"refine={recipe.refine!r} was given. Use layerwise, or null.")
    if not isinstance(WEIGHTINGS.resolve(recipe.weighting), StartingAtOne):
        raise UserError(
            "refine: layerwise needs weights of 1 at conversion (weighting: tempered or one). "
            "Change it, or use refine: null."
        )
    return parse(Distillation, settings, source="refine layerwise")


def made_before(choice: Any, names: Sequence[str]) -> Path | None:
    """The file that a choice names, if it is no method; write ./random for a file of that name."""
    if isinstance(choice, str) and choice not in names:
        named = "/" in choice or choice.endswith((".safetensors", *SUFFIXES))
        return Path(choice) if named or Path(choice).exists() else None
    return choice if isinstance(choice, Path) else None


def name_of(choice: Choice) -> str:
    """The name of a chosen method, or the file."""
    return choice if isinstance(choice, str) else str(choice.get("method"))
