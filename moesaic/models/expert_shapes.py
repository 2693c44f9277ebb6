"""The sizes of a model's routed experts as the kernels see them, read off its config.json."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moesaic.kernels.reference import Activation
from moesaic.kernels.select import activation_of, why_unusual
from moesaic.models.anatomy import anatomy, build
from moesaic.models.catalog import find


@dataclass(frozen=True)
class ExpertShape:
    """One kind of expert layer: `name` is its class, `width` that of the widest expert.

    `unusual` says why our kernels leave it to transformers (then sizes are 0), or is None.
    """

    name: str
    num_experts: int
    top_k: int
    hidden: int = 0
    width: int = 0
    activation: Activation | None = None
    unusual: str | None = None


def expert_shapes(model: str | Path) -> list[ExpertShape]:
    """List the different expert layers of a model, in order; none for a dense one.

    Raises UserError when the model is not found or not supported.
    """
    built = build(find(model, local_files_only=True))
    shapes = []
    for layer in anatomy(built).layers:
        experts = built.get_submodule(layer.experts)
        name, unusual = type(experts).__name__, why_unusual(experts)
        if unusual is not None:
            shapes.append(ExpertShape(name, layer.num_experts, layer.top_k, unusual=unusual))
            continue
        _, hidden, width = experts.get_parameter("down_proj").shape
        if getattr(experts, "is_transposed", False):
            hidden, width = width, hidden
        shapes.append(
            ExpertShape(name, layer.num_experts, layer.top_k, hidden, width, activation_of(experts))
        )
    return list(dict.fromkeys(shapes))
