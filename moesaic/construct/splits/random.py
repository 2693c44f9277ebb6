"""The random split: neurons dealt by a seeded shuffle. Needs only the model's config."""

from collections.abc import Iterator
from random import Random as PythonRandom
from typing import ClassVar

import numpy as np

from moesaic.construct.method import LayerSplit, SplitInputs, SplitMethod
from moesaic.construct.splits import SPLITS


@SPLITS.register
class Random(SplitMethod):
    """Neurons shuffled and dealt to the experts; every neuron once.

    Layers draw from one stream in order, with Python's own generator, so that a seed gives the
    labels that LLaMA-MoE's Independent-Random gives after `random.seed(seed)` (arXiv 2406.16554,
    section 3.1). Neurons ascend inside an expert. With R shared experts, the first R parts are the
    shared ones.
    """

    makes_shared: ClassVar[bool] = True

    def divide(self, inputs: SplitInputs) -> Iterator[LayerSplit]:
        """Yield the split of every layer in order."""
        stream = PythonRandom(inputs.seed)
        for _ in range(inputs.layers):
            labels = list(range(inputs.experts)) * inputs.expert_width
            stream.shuffle(labels)
            parts = [np.flatnonzero(np.array(labels) == expert) for expert in range(inputs.experts)]
            yield LayerSplit(parts[inputs.shared :], parts[: inputs.shared])
