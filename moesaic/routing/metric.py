"""What every metric and cache simulation is: sums over samples that can be added up.

A metric is made for a `Space`, fed blocks of samples with `update`, added to another that saw other
samples with `merge`, and read with `result`. Its memory does not grow with the samples.
`state` and `restore` carry the sums over an interruption. Subclasses keep everything that grows in
`sums`, arrays that add.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from moesaic.core.errors import UserError
from moesaic.routing.samples import Samples, Space

__all__ = ["Metric"]


class Metric(ABC):
    """Sums over samples; `seen_D` counts the samples of each domain."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.seen_D = np.zeros(len(space.domains), dtype=np.int64)
        self.sums: dict[str, NDArray[Any]] = {}

    def update(self, samples: Samples) -> None:
        """Add a block of samples. Raises UserError when it is not of this space."""
        for domain, rows, part in self._by_domain(samples):
            self.add(domain, rows, part)
            self.seen_D[domain] += len(part)

    @abstractmethod
    def add(self, domain: int, rows_N: NDArray[np.int64], samples: Samples) -> None:
        """Add samples of one domain; `rows_N` are their numbers inside it."""

    @abstractmethod
    def result(self) -> Any:
        """Return what the sums mean."""

    def merge(self, other: Self) -> None:
        """Add what `other` has seen. Raises UserError when it was made otherwise."""
        self._same({name: part.shape for name, part in other.sums.items()}, other.space)
        for name, part in other.sums.items():
            self.sums[name] += part
        self.seen_D += other.seen_D

    def state(self) -> dict[str, NDArray[Any]]:
        """Return the sums as arrays to be stored."""
        return {"seen": self.seen_D, **self.sums}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on from stored sums. Raises UserError when they are of another metric or space."""
        parts = {name: np.asarray(part) for name, part in state.items() if name != "seen"}
        self._same({name: part.shape for name, part in parts.items()}, self.space)
        self.sums = {name: part.astype(self.sums[name].dtype) for name, part in parts.items()}
        self.seen_D = np.asarray(state["seen"]).astype(np.int64)

    def pooled(self) -> Iterator[tuple[str, dict[str, NDArray[Any]]]]:
        """Yield (domain, its sums), and last ("all", the sums of all domains together).

        For metrics whose sums all have the domains as their first axis.
        """
        for place, name in enumerate(self.space.domains):
            yield name, {key: part[place] for key, part in self.sums.items()}
        yield "all", {key: part.sum(axis=0) for key, part in self.sums.items()}

    def _same(self, shapes: Mapping[str, tuple[int, ...]], space: Space) -> None:
        own = {name: part.shape for name, part in self.sums.items()}
        if own != dict(shapes) or space != self.space:
            raise UserError(
                f"{type(self).__name__} sums of another kind were given: {dict(shapes)} over "
                f"{space}, not {own} over {self.space}. Make both with the same settings."
            )

    def _by_domain(self, samples: Samples) -> Iterator[tuple[int, NDArray[np.int64], Samples]]:
        if (samples.num_experts, samples.layers) != (self.space.num_experts, self.space.layers):
            raise UserError(
                f"samples of {samples.layers} layers with {samples.num_experts} experts were given "
                f"to a metric over {self.space.layers} layers with {self.space.num_experts}."
            )
        domain_N = samples.domain_N
        if domain_N is None:
            domain_N = np.zeros(len(samples), dtype=np.int64)
        present = np.unique(domain_N)
        if len(present) and present[-1] >= len(self.space.domains):
            raise UserError(
                f"samples of domain {present[-1]} were given, but there are "
                f"{len(self.space.domains)}: {', '.join(self.space.domains)}. Number them from 0."
            )
        for domain in present.tolist():
            rows = np.flatnonzero(domain_N == domain)
            part = samples.take(rows)
            index_N = part.index_N
            if index_N is None:
                index_N = self.seen_D[domain] + np.arange(len(rows))
            yield domain, index_N, part
