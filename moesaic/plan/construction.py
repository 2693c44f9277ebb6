"""What turning a dense model into a mixture costs, stage by stage, one layer in memory at a time.

Counted in operations: matrix products, eigenvectors, bytes moved in memory and to disk. What only
the text decides, such as the rounds until a split rests, is counted at its limit.
Notation: T calibration tokens, C tokens of a row, D hidden size, F neurons of a layer, E experts,
A weights of a layer's attention, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from moesaic.plan.machine import Machine

__all__ = ["Construction", "Stage"]

_PART = 8192
"""Tokens whose neurons are multiplied at a time."""
_ROUNDS = 10
"""Rounds of a split that alternates."""
_STRENGTHS = 12
"""Ridge strengths that are tried."""


@dataclass(frozen=True)
class Stage:
    """The work of one stage on the whole model."""

    name: str
    products: float = 0.0
    """Operations of matrix products in float32."""
    eigen: float = 0.0
    """Operations of eigenvectors in float64."""
    moved: float = 0.0
    written: float = 0.0

    def seconds(self, machine: Machine) -> float:
        """How long it takes."""
        return (
            self.products / machine.float32
            + self.eigen / machine.eigen
            + self.moved / machine.memory_rate
            + self.written / machine.disk_rate
        )


@dataclass(frozen=True)
class Construction:
    """A dense LLaMA shape and what is to be done with it."""

    hidden: int
    width: int
    layers: int
    attention: int
    """Attention weights of a layer."""
    vocabulary: int
    experts: int
    itemsize: int
    total: int
    """Parameters of the mixture."""
    split_sees: Literal["nothing", "weights", "text"]
    router_sees: Literal["nothing", "weights", "text"]
    refit: bool
    tokens: int
    context: int

    @property
    def reads_text(self) -> bool:
        """Whether calibration tokens run through the model."""
        return "text" in (self.split_sees, self.router_sees) or self.refit

    def stages(self) -> Iterator[Stage]:
        """Yield the work of every stage, all layers together."""
        T, D, F, E, L = self.tokens, self.hidden, self.width, self.experts, self.layers
        layer = (self.attention + 3 * D * F) * self.itemsize
        if self.reads_text:
            attend = 2 * T * self.attention + 2 * T * self.context * D
            # two streams: what the dense model says, and what the converted layers make of it
            yield Stage("run the text", 2 * L * (attend + 6 * T * D * F), moved=L * 4 * layer)
        if self.split_sees == "weights":
            yield Stage("split", L * _ROUNDS * 2 * F * E * 2 * D, moved=L * _ROUNDS * F * 2 * D * 4)
        if self.split_sees == "text":
            # a round: energies of experts, a router for them, gains of neurons. Before it two
            # k-means on an eighth of the tokens, 20 rounds at most.
            products = _ROUNDS * 4 * T * F * E + 2 * 20 * 4 * (T // 8) * F * E + 2 * T * D * D
            moved = (_ROUNDS * 2 + 6) * T * F * 4
            yield Stage("split", L * products, L * (_ROUNDS + 1) * 9 * D**3, L * moved)
        if self.router_sees == "text":
            yield Stage("router", L * 2 * T * D * D, L * 9 * D**3, L * 2 * T * F * 4)
        if self.refit:
            moments = 2 * T * F * F + 2 * T * F * D
            trials = _STRENGTHS * 4 * F * F * D + 2 * F**3 / 3
            yield Stage("refit", L * (moments + trials), L * 9 * F**3, L * 2 * T * F * 4)
        moved = 4 * L * 3 * D * F * self.itemsize
        compare = 2 * L * 256 * 6 * D * F
        written = self.total * self.itemsize
        yield Stage("rearrange, compare, write", compare, 0, moved, written)

    def memory(self) -> dict[str, int]:
        """Bytes of host memory by part; of the last three, the largest is there at a time."""
        T, D, F = self.tokens, self.hidden, self.width
        ffn = 3 * D * F * self.itemsize
        attention = self.attention * self.itemsize
        parts = {"two layers, as read and as rearranged": 2 * (2 * ffn + attention)}
        if not self.reads_text:
            return parts
        parts["one layer in float32"] = (self.attention + 3 * D * F) * 4
        parts["hidden states of two streams"] = 2 * 2 * T * D * 4
        parts["neurons"] = T * F * 4
        parts["embeddings"] = self.vocabulary * D * self.itemsize
        if self.split_sees == "text":
            parts["split: energies, inputs"] = 3 * T * F * 4 + 2 * T * D * 4
        if self.router_sees == "text":
            parts["router: energies, inputs, moments"] = T * F * 4 + 2 * T * D * 4 + 4 * D * D * 8
        if self.refit:
            parts["refit: moments, eigenvectors"] = 3 * F * F * 4 + 4 * F * F * 8
        return parts

    def peak(self) -> int:
        """Bytes at the worst moment: stages follow one another."""
        parts = self.memory()
        stages = [size for name, size in parts.items() if ":" in name]
        return sum(parts.values()) - sum(stages) + max(stages, default=0)

    def one_layer(self) -> Construction:
        """The same work on a model of one layer without embeddings, to be measured."""
        total = self.attention + 3 * self.hidden * self.width
        return replace(self, layers=1, total=total)
