"""What turning a dense model into a mixture costs, stage by stage.

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
    attention_refit: bool
    refine: tuple[float, int] | None
    """Passes of a layer-wise distillation over the tokens, and tokens of a step."""
    active: float
    """Share of the routed neurons that a token uses."""
    tokens: int
    context: int

    def stages(self) -> Iterator[Stage]:
        """Yield the work of every stage, all layers together."""
        T, D, F, E, L = self.tokens, self.hidden, self.width, self.experts, self.layers
        layer = (self.attention + 3 * D * F) * self.itemsize
        attend = 2 * T * self.attention + 2 * T * self.context * D
        # Two streams, what the dense model says and what the converted layers make of it; the
        # second goes through the experts once more, and again when they were refitted.
        ffn = (12 + 2 + 2 * self.refit) * T * D * F
        yield Stage("run the text", L * (2 * attend + ffn), moved=L * (4 * layer + 6 * T * F * 4))
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
        if self.attention_refit:  # on what the streams met anyway
            fit = 2 * T * D * D * 2 + _STRENGTHS * 4 * D**3
            yield Stage("attention refit", L * fit, L * 9 * D**3)
        if self.refine is not None:
            passes, batch = self.refine
            trained = passes * T * 7 / 8
            trained_products = (
                3 * trained * 6 * D * F * self.active
            )  # forward and twice that backward
            # Adam reads and writes weights, gradients and two moments, and gradients are cleared
            steps = max(1, trained / min(batch, T))
            yield Stage("refine", L * trained_products, moved=L * steps * 3 * D * F * 4 * 8)
        moved = 3 * self.total * 4
        yield Stage("assemble and write", 0, 0, moved, self.total * self.itemsize)

    def convert(self) -> Stage:
        """The work of `moesaic convert` with the random split, which reads no text."""
        compare = 2 * 256 * 6 * self.hidden * self.width * self.layers
        written = self.total * self.itemsize
        return Stage("convert", compare, moved=4 * written, written=written)

    def memory(self) -> dict[str, dict[str, int]]:
        """Bytes of host memory by part, at each of the moments that could be the worst."""
        T, D, F = self.tokens, self.hidden, self.width
        layer = {
            "finished layers": self.layers * self._finished() * 4,
            "one layer in float32": (self.attention + 3 * D * F) * 4,
            "hidden states of two streams": 6 * T * D * 4,
            "neurons": T * F * 4,
        }
        at: dict[str, dict[str, int]] = {}
        if self.split_sees == "text":
            at["split"] = {**layer, "energies and inputs": 3 * T * F * 4 + 2 * T * D * 4}
        if self.router_sees == "text":
            inputs = T * F * 4 + 2 * T * D * 4 + 4 * D * D * 8
            at["router"] = {**layer, "energies, inputs, moments": inputs}
        if self.refit:
            at["refit"] = {**layer, "moments and eigenvectors": 3 * F * F * 4 + 4 * F * F * 8}
        if self.refine is not None:
            at["refine"] = {
                **layer,
                "weights, gradients, moments, targets": 15 * F * D * 4 + T * D * 4,
            }
        outside = self.layers * self.attention + 2 * self.vocabulary * D
        at["assemble and write"] = {
            "finished layers": layer["finished layers"],
            "the mixture in float32": self.total * 4,
            "what is taken over, in float32": outside * 4,
        }
        return at

    def _finished(self) -> int:
        """Numbers kept of a finished layer until the mixture is assembled."""
        down = self.hidden * self.width
        kept = (1 + self.refit) * down + self.attention_refit * self.hidden**2
        return kept + (3 * down if self.refine is not None else 0)

    def convert_memory(self) -> dict[str, int]:
        """Bytes of host memory of `moesaic convert` with the random split, by part."""
        ffn, attention = 3 * self.hidden * self.width, self.attention
        return {
            "two layers as read": 2 * (ffn + attention) * self.itemsize,
            "two layers as rearranged": 2 * ffn * self.itemsize,
        }

    def one_layer(self) -> Construction:
        """The same work on a model of one layer without embeddings, to be measured."""
        total = self.attention + 3 * self.hidden * self.width
        return replace(self, layers=1, total=total)
