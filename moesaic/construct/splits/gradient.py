"""The gradient split: every neuron to the expert whose text it matters most for."""

from collections.abc import Iterator

import numpy as np

from moesaic.construct.method import LayerSplit, SplitInputs
from moesaic.construct.scored import ScoredMethod, assign_once
from moesaic.construct.splits import SPLITS


@SPLITS.register
class Gradient(ScoredMethod):
    """Each neuron to the expert whose text it matters most for; every neuron once.

    LLaMA-MoE's gradient split, independent: experts stand for clusters of text, and the best pair
    of expert and free neuron is taken until all are dealt. Neurons ascend inside an expert.
    """

    def divide(self, inputs: SplitInputs) -> Iterator[LayerSplit]:
        """Yield the split of every layer in order."""
        none = np.empty(0, np.int64)
        for scores_CF in self.scores_for(inputs, inputs.experts):
            dealt = assign_once(scores_CF, self.criterion, inputs.expert_width, none)
            yield LayerSplit([np.sort(ids) for ids in dealt], [])
