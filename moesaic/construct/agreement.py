"""Do a split, a router init and the numbers asked for belong to one another and to the model?"""

from __future__ import annotations

from moesaic.construct.dense import DenseModel
from moesaic.construct.router import RouterInit
from moesaic.construct.split import NeuronSplit
from moesaic.core.errors import UserError

__all__ = ["check_router", "check_split", "check_top_k"]


def check_top_k(top_k: int, experts: int, shared: int) -> None:
    """Raise UserError unless `top_k` of `experts` experts can be active, the shared ones always."""
    if experts < 1:
        raise UserError(f"experts={experts} was given. Give at least 1 expert, such as 8.")
    if top_k > experts:
        raise UserError(
            f"top_k={top_k} but the model has {experts} experts. "
            "Lower top_k or split into more experts."
        )
    if top_k <= shared:
        what = f"{shared} are shared and always on" if shared else "none would be active"
        raise UserError(
            f"top_k={top_k} counts all active experts, and {what}. "
            f"Give top_k at least {shared + 1}."
        )


def check_split(division: NeuronSplit, dense: DenseModel, experts: int | None, shared: int) -> None:
    """Raise UserError for a split of another model or of other numbers than were asked for.

    `experts=None` and `shared=0` ask for nothing.
    """
    path = dense.checkpoint.path
    if (division.layers, division.width) != (dense.layers, dense.width):
        raise UserError(
            f"The split is for {division.layers} layers of {division.width} neurons, {path} has "
            f"{dense.layers} layers of {dense.width}. Make a split of this model."
        )
    for name, layers in (("routed", division.experts), ("shared", division.shared)):
        sums = {sum(len(ids) for ids in layer) for layer in layers}
        if len(sums) > 1:
            raise UserError(
                f"The {name} experts of the split hold {min(sums)} to {max(sums)} neurons a layer, "
                "but LLaMA-MoE has one intermediate_size. Make a split with equal sums."
            )
    total = division.num_experts + division.num_shared
    if experts not in (None, total):
        raise UserError(
            f"experts={experts} but the split has {total} experts, shared ones included. "
            "Leave experts out or make another split."
        )
    if shared not in (0, division.num_shared):
        raise UserError(
            f"shared={shared} but the split has {division.num_shared} shared experts. "
            "Leave shared out or make another split."
        )


def check_router(router: RouterInit | None, dense: DenseModel, routed: int) -> None:
    """Raise UserError for a router init of another model or of other than `routed` experts."""
    if router is None:
        return
    given = (len(router.layers), router.num_experts, router.hidden)
    if given != (dense.layers, routed, dense.hidden):
        raise UserError(
            f"The router init is for {given[0]} layers, {given[1]} experts and hidden size "
            f"{given[2]}; needed are {dense.layers}, {routed} and {dense.hidden}. "
            "Make a router init for this model and split."
        )
