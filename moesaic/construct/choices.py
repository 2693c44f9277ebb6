"""The split and the router that a recipe chose, asked layer by layer.

Both may be methods that look at a layer's activations, methods that make every layer on their own,
or files that were made before. Notation: D hidden size, E routed experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from moesaic.construct.agreement import check_router, check_split
from moesaic.construct.dense import DenseModel
from moesaic.construct.free.view import CalibratedRouter, CalibratedSplit, LayerView
from moesaic.construct.legacy_v2 import open_split
from moesaic.construct.method import LayerSplit, resolve_method
from moesaic.construct.recipe import Recipe, made_before
from moesaic.construct.router import Gate, RouterInit, RouterInputs, resolve_router
from moesaic.construct.routers import ROUTERS
from moesaic.construct.split import NeuronSplit, divide
from moesaic.construct.splits import SPLITS
from moesaic.core.errors import UserError

__all__ = ["RouterChoice", "SplitChoice", "router_network"]


class SplitChoice:
    """The division of the neurons, a layer at a time; shared experts are one.

    Raises UserError for a split of another model or of other numbers than the recipe's.
    """

    def __init__(self, dense: DenseModel, recipe: Recipe) -> None:
        self.ready: NeuronSplit | None = None
        """The split of all layers, where it was known before the first."""
        self.gates_LED: Any = None
        """Router gates that the split was made with."""
        self._method: CalibratedSplit | None = None
        path = made_before(recipe.split, SPLITS.names())
        if path:
            self.ready = open_split(path, width=dense.width)
        else:
            method = resolve_method(recipe.split)
            if isinstance(method, CalibratedSplit):
                self._method = method
                return
            data = recipe.data if method.needs_data else None
            self.ready, arrays = divide(
                dense.checkpoint.path, method, recipe.experts, recipe.shared, data, recipe.seed
            )
            self.gates_LED = arrays.get("gates")
        check_split(self.ready, dense, recipe.experts, recipe.shared)
        if self.ready.num_shared != recipe.shared:
            raise UserError(
                f"shared={recipe.shared} but the split has {self.ready.num_shared} shared "
                f"experts. Set shared={self.ready.num_shared}, or make another split."
            )
        self.ready = _together(self.ready)

    def layer(self, view: LayerView) -> LayerSplit:
        """The experts of one layer."""
        if self._method is None:
            assert self.ready is not None
            return LayerSplit(self.ready.experts[view.layer], self.ready.shared[view.layer])
        parts = self._method.divide_layer(view)
        return parts._replace(shared=_joined(parts.shared))


class RouterChoice:
    """The routers, a layer at a time; those that look at experts see the split as it grows.

    Raises UserError for a network that the mixture cannot have and for a file of another model.
    """

    def __init__(
        self, dense: DenseModel, recipe: Recipe, split: SplitChoice, *, selects: int
    ) -> None:
        network = router_network(dense, recipe)
        self._fitter: CalibratedRouter | None = None
        self._layers: Iterator[dict[str, torch.Tensor]] | None = None
        self._growing = SimpleNamespace(
            experts=[],
            shared=[],
            layers=dense.layers,
            width=dense.width,
            num_experts=recipe.experts - recipe.shared,
            num_shared=recipe.shared,
        )
        path = made_before(recipe.router, ROUTERS.names())
        if path:
            self._layers = iter(RouterInit.load(path).layers)
            return
        router = resolve_router(recipe.router)
        if split.gates_LED is not None and router.key == "hidden-clusters":
            # the split made these gates, and its experts belong to them in this order
            self._layers = iter([{"weight": torch.from_numpy(gate)} for gate in split.gates_LED])
            return
        if isinstance(router, CalibratedRouter):
            self._fitter = router
            return
        inputs = RouterInputs(
            dense.checkpoint.path,
            self._growing,  # type: ignore[arg-type]  # a NeuronSplit whose layers are still coming
            network,
            selects,
            recipe.data,
            recipe.seed,
        )
        router.check(inputs)
        self._layers = router.build(inputs)

    def layer(self, view: LayerView, parts: LayerSplit) -> dict[str, torch.Tensor]:
        """The router weights of one layer, float32 on its device, as in `RouterInit.layers`."""
        self._growing.experts.append(parts.experts)
        self._growing.shared.append(parts.shared)
        if self._fitter is not None:
            router = self._fitter.fit_layer(view, parts.experts)
        else:
            assert self._layers is not None
            router = next(self._layers)
        return {name: weight.to(view.x_TD.device).float() for name, weight in router.items()}


def router_network(dense: DenseModel, recipe: Recipe) -> Gate:
    """The network of a recipe's routers, one matrix where it has to be and can.

    Raises UserError for a network that the mixture or the refining cannot have, and for a file of
    another model.
    """
    path = made_before(recipe.router, ROUTERS.names())
    if path:
        found = RouterInit.load(path)
        check_router(found, dense, recipe.experts - recipe.shared)
        networks: tuple[Gate, ...] = (found.gate,)
    else:
        networks = resolve_router(recipe.router).networks
    if dense.mixture == "moesaic_moe":
        reason = (
            f"{dense.checkpoint.path} is a {dense.family.name} and becomes a moesaic_moe, which "
            "routes by one matrix"
        )
        cure = "Choose another router"
    elif recipe.refine is not None:
        reason = "refine: layerwise distils a router of one matrix"
        cure = "Use refine: null, or another router"
    else:
        return networks[0]
    if "linear" not in networks:
        raise UserError(
            f"{reason}; the router is of network {networks[0]}. {cure}, such as energy."
        )
    return "linear"


def _together(division: NeuronSplit) -> NeuronSplit:
    shared = [_joined(layer) for layer in division.shared]
    return NeuronSplit(division.experts, shared, division.width, division.meta)


def _joined(shared: list[Any]) -> list[Any]:
    # always on, all with weight 1: one wide expert is the same
    return [np.concatenate(shared)] if shared else []
