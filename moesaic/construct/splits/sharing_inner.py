"""The sharing-inner split: every expert takes the neurons its text needs most, shared or not."""

from collections.abc import Iterator

import numpy as np

from moesaic.construct.method import LayerSplit, SplitInputs
from moesaic.construct.scored import ScoredMethod, best_neurons, rank_neurons
from moesaic.construct.splits import SPLITS
from moesaic.core.errors import UserError


@SPLITS.register
class SharingInner(ScoredMethod):
    """Each expert its own text's best neurons; neurons may repeat or vanish.

    Sharing-Inner of LLaMA-MoE (arXiv 2406.16554, section 3.1). Neurons come from best to worst.
    """

    expert_size: int = 0
    """Neurons of an expert; 0 means the width divided by the number of experts."""

    def divide(self, inputs: SplitInputs) -> Iterator[LayerSplit]:
        """Yield the split of every layer in order."""
        size = self.expert_size or inputs.expert_width
        if not 0 < size <= inputs.width:
            raise UserError(
                f"expert_size={self.expert_size} was given for layers of {inputs.width} neurons. "
                f"Give a number from 1 to {inputs.width}, or 0 for width / experts."
            )
        none = np.empty(0, np.int64)
        for scores_CF in self.scores_for(inputs, inputs.experts):
            order_CF = rank_neurons(scores_CF, self.criterion)
            yield LayerSplit(best_neurons(order_CF, size, none), [])
