"""The static split: the control that nobody shows, pruning instead of routing."""

import torch

from moesaic.construct.free.view import CalibratedSplit, LayerView
from moesaic.construct.method import LayerSplit
from moesaic.construct.splits import SPLITS


@SPLITS.register
class Static(CalibratedSplit):
    """Neurons by mean output energy: expert 0 holds the highest. With the router `first`, pruning.

    A control: a mixture whose router is worth having beats it at the same active size.
    """

    def divide_layer(self, view: LayerView) -> LayerSplit:
        """Divide one layer."""
        view = view.first(self.tokens)
        order = torch.argsort(view.energy_TF.mean(0), descending=True, stable=True)
        parts = list(order.view(view.experts, -1).sort(dim=1).values.cpu().numpy())
        return LayerSplit(parts[view.shared :], parts[: view.shared])
