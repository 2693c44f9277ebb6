"""The ExpertWeaver split: neurons that open on the same texts (arXiv 2602.15521)."""

import numpy as np
import torch
from torch.nn.functional import linear

from moesaic.construct.balanced_kmeans import balanced_kmeans
from moesaic.construct.free.view import CalibratedSplit, LayerView
from moesaic.construct.method import LayerSplit
from moesaic.construct.splits import SPLITS


@SPLITS.register
class Expertweaver(CalibratedSplit):
    """ExpertWeaver (arXiv 2602.15521): balanced k-means of the gates' mean opening per text.

    A neuron's vector is the mean of act(gate x) over each row of text; shared are the neurons whose
    gate opens most on average. The same number of shared experts in every layer, as the paper uses
    for training on; its layer-wise number needs layers of unequal shape.
    """

    def divide_layer(self, view: LayerView) -> LayerSplit:
        """Divide one layer."""
        view = view.first(self.tokens)
        gate_TF = view.activation(linear(view.x_TD, view.gate_FD, view.gate_bias_F))
        rows = max(1, len(gate_TF) // view.context)
        if rows < 8:  # texts too few to tell neurons apart
            rows = min(8, len(gate_TF))
        mean_SF = torch.stack([part.mean(0) for part in gate_TF.chunk(rows)])
        size = gate_TF.shape[1] // view.experts
        order = torch.argsort(mean_SF.abs().mean(0), descending=True, stable=True)
        shared, rest = order[: view.shared * size], order[view.shared * size :].sort().values
        routed = view.experts - view.shared
        points = np.ascontiguousarray(mean_SF[:, rest].T.cpu().numpy(), dtype=np.float32)
        labels = balanced_kmeans(points, routed, metric="l2", seed=view.seed + view.layer).labels
        experts = [rest.cpu().numpy()[labels == expert] for expert in range(routed)]
        parts = [np.sort(part) for part in shared.cpu().numpy().reshape(max(1, view.shared), -1)]
        return LayerSplit(experts, parts if view.shared else [])
