"""The sequential split: neurons in blocks as they stand. Needs only the model's config."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from moesaic.construct.method import LayerSplit, SplitInputs, SplitMethod
from moesaic.construct.splits import SPLITS


@SPLITS.register
class Sequential(SplitMethod):
    """Neighbouring neurons together, in their order; every neuron once.

    What LLaMA-MoE-v2's converter does without an index file (arXiv 2411.15708). With R shared
    experts, the first R blocks are the shared ones.
    """

    makes_shared: ClassVar[bool] = True

    def divide(self, inputs: SplitInputs) -> Iterator[LayerSplit]:
        """Yield the split of every layer in order."""
        blocks = np.split(np.arange(inputs.width), inputs.experts)
        for _ in range(inputs.layers):
            yield LayerSplit(blocks[inputs.shared :], blocks[: inputs.shared])
