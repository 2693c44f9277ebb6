"""The ExpertWeaver split: neurons that open on the same texts (arXiv 2602.15521).

Notation: T tokens, F neurons, S texts, E experts (shared ones included).
"""

from __future__ import annotations

import numpy as np
import torch
from pydantic import Field
from torch.nn.functional import linear

from moesaic.construct.balanced_kmeans import balanced_kmeans
from moesaic.construct.free.view import CalibratedSplit, LayerView
from moesaic.construct.method import LayerSplit, SplitInputs
from moesaic.construct.splits import SPLITS
from moesaic.core.errors import UserError


@SPLITS.register
class Expertweaver(CalibratedSplit):
    """ExpertWeaver (arXiv 2602.15521): balanced k-means of the gates' mean opening per text.

    A neuron's vector is the mean of act(gate x) over each row of text; shared are the neurons whose
    gate opens most on average. Their number is the same in every layer, as the paper has it for
    training on, or `layerwise` that of the layer, as it has it where nothing is trained.
    """

    layerwise: bool = False
    """Choose the number of shared experts for each layer: fewer where more neurons are specialised.
    With `shared: 0`; they count among `top_k`, and at least one expert of a token is routed."""
    specialised: float = Field(default=0.6, gt=0)
    """A neuron is where its opening varies by more than this from text to text: the standard
    deviation of its mean absolute opening, divided by its mean."""
    least: float = Field(default=0.2, ge=0, le=1)
    """Share of a layer's neurons that are shared where all are specialised."""
    most: float = Field(default=0.7, ge=0, le=1)
    """Share where none is."""

    def check(self, inputs: SplitInputs) -> None:
        """As every split; a split file has no place for numbers that differ by layer."""
        super().check(inputs)
        if self.layerwise:
            raise UserError(
                "expertweaver with layerwise: true needs its router, which is made with it. Use "
                "`moesaic construct`, or layerwise: false."
            )

    def divide_layer(self, view: LayerView) -> LayerSplit:
        """Divide one layer."""
        view = view.first(self.tokens)
        gate_TF = view.activation(linear(view.x_TD, view.gate_FD, view.gate_bias_F))
        rows = max(1, len(gate_TF) // view.context)
        if rows < 8:  # texts too few to tell neurons apart
            rows = min(8, len(gate_TF))
        mean_SF = torch.stack([part.mean(0) for part in gate_TF.chunk(rows)])
        size = gate_TF.shape[1] // view.experts
        shared = self._shared(view, gate_TF.abs_(), rows) if self.layerwise else view.shared
        order = torch.argsort(mean_SF.abs().mean(0), descending=True, stable=True)
        always, rest = order[: shared * size], order[shared * size :].sort().values
        routed = view.experts - shared
        points = np.ascontiguousarray(mean_SF[:, rest].T.cpu().numpy(), dtype=np.float32)
        labels = balanced_kmeans(points, routed, metric="l2", seed=view.seed + view.layer).labels
        experts = [rest.cpu().numpy()[labels == expert] for expert in range(routed)]
        parts = [np.sort(part) for part in always.cpu().numpy().reshape(max(1, shared), -1)]
        parts = parts if shared else []
        if self.layerwise:
            return LayerSplit([*parts, *experts], [], always=shared)
        return LayerSplit(experts, parts)

    def _shared(self, view: LayerView, opening_TF: torch.Tensor, rows: int) -> int:
        """Shared experts of this layer (equations 3 to 6), at most top_k - 1; kept in facts."""
        if view.shared:
            raise UserError(
                f"shared={view.shared} with expertweaver's layerwise: true, which chooses it. "
                "Set shared=0."
            )
        if self.least > self.most:
            raise UserError(
                f"least={self.least} is above most={self.most}. Give the smaller share as least."
            )
        mean_SF = torch.stack([part.mean(0) for part in opening_TF.chunk(rows)])
        variation_F = mean_SF.std(0, correction=0) / mean_SF.mean(0).clamp(min=1e-12)
        ratio = float((variation_F > self.specialised).float().mean())
        share = self.most - (self.most - self.least) * ratio
        width = len(variation_F)
        wanted = round(round(share * width) / (width // view.experts))
        found = min(wanted, view.top_k - 1)
        view.facts |= {"specialised": round(ratio, 4), "always_on": found, "wanted": wanted}
        return found
