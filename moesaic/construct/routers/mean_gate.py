"""ExpertWeaver's router init: the mean gate row of each expert."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch

from moesaic.construct.router import Gate, RouterInputs, RouterMethod
from moesaic.construct.routers import ROUTERS


@ROUTERS.register
class MeanGate(RouterMethod):
    """Row e is the mean of the gate rows of expert e's neurons (ExpertWeaver, arXiv 2602.15521)."""

    networks: ClassVar[tuple[Gate, ...]] = ("linear",)

    def build(self, inputs: RouterInputs) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the router weights of every layer."""
        for layer, experts in enumerate(inputs.split.experts):
            rows_FD = inputs.dense.read(inputs.dense.ffn(layer)[0]).float()
            means = [rows_FD[torch.from_numpy(ids)].mean(0) for ids in experts]
            yield {"weight": torch.stack(means)}
