"""Where gates and calculators take random numbers from, so that a test or a study can decide them.

Every module that draws holds a `Randomness`; without a generator it draws from torch's global one,
whose state gradient checkpointing saves and restores. A subclass may return fixed tensors. Set one
for a whole model with `model.set_randomness(...)`.
"""

from __future__ import annotations

import torch


class Randomness:
    """Random tensors of a given tensor's shape and device, from `generator` or torch's global one.

    A generator of your own is not rewound when gradient checkpointing recomputes a layer: use the
    global one there.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.generator = generator

    def normal(self, like: torch.Tensor) -> torch.Tensor:
        """N(0, 1), float32, in the shape of `like`."""
        return torch.randn(like.shape, generator=self.generator, device=like.device)

    def uniform(self, like: torch.Tensor) -> torch.Tensor:
        """U[0, 1), float32, in the shape of `like`."""
        return torch.rand(like.shape, generator=self.generator, device=like.device)

    def gumbel(self, like: torch.Tensor) -> torch.Tensor:
        """Gumbel(0, 1), float32, in the shape of `like`."""
        waiting = torch.empty(like.shape, device=like.device).exponential_(generator=self.generator)
        return -waiting.log()

    def permutation(self, length: int, device: torch.device) -> torch.Tensor:
        """A random order of 0..length-1, int64."""
        return torch.randperm(length, generator=self.generator, device=device)
