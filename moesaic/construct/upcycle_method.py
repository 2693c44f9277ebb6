"""UpcycleMethod: what a way of upcycling decides, one layer and one expert at a time.

Notation: L layers, E routed experts, K of them chosen for a token, R shared experts, D hidden size,
F neurons of a dense layer, I neurons of one routed expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from moesaic.construct.dense import DenseModel
from moesaic.core.config import Config
from moesaic.core.errors import UserError
from moesaic.measure.exactness import FeedForward

__all__ = ["UpcycleInputs", "UpcycleMethod"]


@dataclass(frozen=True)
class UpcycleInputs:
    """What a method has to work with."""

    dense: DenseModel
    """What is taken over besides experts; for several models, the first or their mean."""
    sources: Sequence[DenseModel]
    """The dense models in the order they were given."""
    experts: int
    """E."""
    selects: int
    """K."""
    shared: int = 0
    """R: copies of the first model's layer that are always on."""
    data: Sequence[Any] | None = None
    """One source of text per model."""
    seed: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    """Figures that the method measured on the way; they end up in moesaic.json."""

    @property
    def routed_share(self) -> float:
        """The weight of the routed experts' sum, where every active expert weighs the same."""
        return self.selects / (self.selects + self.shared)

    def generator(self, *place: int) -> torch.Generator:
        """A stream of random numbers for a place, such as (layer, expert); no two are alike."""
        state = np.random.SeedSequence([self.seed, *place]).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(state >> np.uint64(1)))


class UpcycleMethod(Config):
    """A way to make experts out of dense layers; its typed fields are its settings."""

    several: ClassVar[bool] = False
    """Whether the method joins several dense models."""

    def check(self, inputs: UpcycleInputs) -> None:
        """Raise UserError, with the cure, when the method cannot do what was asked."""
        if inputs.data is not None:
            raise UserError(
                f"data was given, but {type(self).__name__} reads no text. Leave it out."
            )

    def neurons(self, inputs: UpcycleInputs) -> list[NDArray[np.int64]]:
        """Which dense neurons each routed expert starts from, the same in every layer."""
        every = np.arange(inputs.dense.width)
        return [every] * inputs.experts

    def scale(self, inputs: UpcycleInputs) -> float:
        """Factor on the routed sum, whose weights add up to 1, that makes it the dense output."""
        return 1.0

    def exact(self, inputs: UpcycleInputs) -> bool:
        """Whether the mixture must equal the dense model."""
        return True

    def routers(self, inputs: UpcycleInputs) -> Iterator[torch.Tensor]:
        """Yield the router of every layer in order, [E, D] float32."""
        std = float(inputs.dense.config.get("initializer_range", 0.02))
        for layer in range(inputs.dense.layers):
            shape = (inputs.experts, inputs.dense.hidden)
            yield torch.randn(shape, generator=inputs.generator(layer, inputs.experts)) * std

    def expert(
        self, inputs: UpcycleInputs, layer: int, expert: int, dense: Sequence[FeedForward]
    ) -> FeedForward:
        """One routed expert, from the layer of every source; may be views of it."""
        return dense[0]
