"""The sharing-inter split: neurons that all texts need are shared experts, the rest is routed."""

from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from moesaic.construct.method import LayerSplit, SplitInputs
from moesaic.construct.scored import (
    ScoredMethod,
    assign_once,
    best_neurons,
    rank_neurons,
    take_common,
)
from moesaic.construct.splits import SPLITS
from moesaic.core.errors import UserError


@SPLITS.register
class SharingInter(ScoredMethod):
    """Neurons that most texts need become always-on experts, the rest is routed.

    Sharing-Inter of LLaMA-MoE (arXiv 2406.16554, section 3.1). Needs shared experts. With `share`,
    a routed expert takes its own text's best among the rest, and neurons may repeat or vanish;
    without, the rest is dealt out, every neuron once. Neurons come from best to worst.
    """

    makes_shared: ClassVar[bool] = True

    share: bool = True
    """Whether routed experts may have neurons in common."""

    def check(self, inputs: SplitInputs) -> None:
        """Raise UserError without shared experts, and as every scored split does."""
        if not inputs.shared:
            raise UserError(
                "The split sharing-inter needs shared experts, but shared=0. "
                "Give shared=1 or more, or use the split sharing-inner."
            )
        super().check(inputs)

    def divide(self, inputs: SplitInputs) -> Iterator[LayerSplit]:
        """Yield the split of every layer in order."""
        size = inputs.expert_width
        for scores_CF in self.scores_for(inputs, inputs.experts - inputs.shared):
            order_CF = rank_neurons(scores_CF, self.criterion)
            common = take_common(order_CF, size, inputs.shared * size)
            if self.share:
                routed = best_neurons(order_CF, size, common)
            else:
                routed = assign_once(scores_CF, self.criterion, size, common)
            yield LayerSplit(routed, np.split(common, inputs.shared))
