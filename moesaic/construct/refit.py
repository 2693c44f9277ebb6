"""What a refit is: new down projections that make up for the neurons a token does not use.

Notation: T tokens, D hidden size, P neurons held by a layer's experts (a neuron that two experts
hold counts twice), h_TP the neurons times the weight of their expert: 0 where it was not chosen.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from moesaic.core.config import Config

__all__ = ["Refit", "RefitInputs"]


@dataclass
class RefitInputs:
    """One converted layer on calibration tokens; all float32."""

    layer: int
    tokens: int
    features: Callable[[slice], torch.Tensor]
    """h_TP of some tokens."""
    own_TD: torch.Tensor
    """What the dense layer gives on the converted model's inputs."""
    full_TD: torch.Tensor
    """What would bring the residual stream back to the dense model's."""
    held_T: torch.Tensor
    """Tokens held back: bool [T]."""
    down_PD: torch.Tensor
    """The down projection as it is."""
    facts: dict[str, Any]


class Refit(Config):
    """A way to refit; its typed fields are its settings."""

    @property
    def key(self) -> str:
        """The name the refit is registered under."""
        return type(self).__module__.rpartition(".")[2].replace("_", "-")

    @abstractmethod
    def solve(self, inputs: RefitInputs) -> torch.Tensor:
        """The new down projection, [P, D]."""
