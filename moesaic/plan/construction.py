"""What turning a dense model into a mixture costs, stage by stage.

Counted in operations: matrix products, Cholesky factors in float64, bytes moved in memory and to
disk. What only the text decides, such as the rounds until a split rests, is counted at its limit.
Notation: T calibration tokens, C tokens of a row, D hidden size, F neurons of a layer, E experts,
A weights of a layer's attention, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from moesaic.construct.allot import TOKENS as PRICED_TOKENS
from moesaic.construct.free.fit import RouterFit
from moesaic.construct.free.ridge import STRENGTHS
from moesaic.construct.input_maps import MAP_STRENGTHS, looked_at
from moesaic.construct.layer_maker import KEPT
from moesaic.construct.splits.energy import FEWER
from moesaic.plan.machine import Machine

__all__ = ["Construction", "Look", "Stage"]

_ASSIGN_SECONDS = 1.3e-7
"""An assignment's time by neuron and expert, on one core (14336 x 8 and 11008 x 16 measured)."""
_ENERGIES = 8
"""Times that the neurons' energies are read or written before the first round."""
_RUNTIME = 2_500_000_000
"""Bytes of host memory of Python, torch and CUDA's libraries."""


@dataclass(frozen=True)
class Stage:
    """The work of one stage on the whole model."""

    name: str
    products: float = 0.0
    """Operations of matrix products in float32."""
    double: float = 0.0
    """Operations in float64: factors and what is solved with them."""
    moved: float = 0.0
    written: float = 0.0
    assigned: float = 0.0
    """Neurons times experts that are assigned to one another on the host."""

    def seconds(self, machine: Machine) -> float:
        """How long it takes."""
        return (
            self.products / machine.float32
            + self.double / machine.double
            + self.moved / machine.memory_rate
            + self.written / machine.disk_rate
            + self.assigned * _ASSIGN_SECONDS
        )


@dataclass(frozen=True)
class Look:
    """What a split or a router looks at, and how often."""

    sees: Literal["nothing", "weights", "text"] = "nothing"
    tokens: int = 0
    rounds: int = 0
    """Times that every neuron is given to an expert, at most."""
    k_means: int = 0
    """The same on a part of the tokens, before."""
    fits: bool = False
    """Whether a router is fitted in every round."""
    whole: bool = True
    """Whether this is all that it does."""


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
    split: Look
    router: Look
    refit: bool
    attention_refit: bool
    maps: bool
    """What weights read is mapped, from the second layer on."""
    refine: tuple[float, int, int | None, bool] | None
    """Passes of a layer-wise distillation over the tokens, tokens of a step, layers ahead (None:
    all), and whether predictions count.
    """
    active: float
    """Share of the neurons that a token uses."""
    tokens: int
    context: int
    distilled: float = 1.0
    """Share of the neurons that refining computes for a token: all of them on a GPU."""
    priced: int = 0
    """Numbers of active experts that are tried in each layer; 0: all layers have the same."""

    def stages(self) -> Iterator[Stage]:
        """Yield the work of every stage, all layers together."""
        T, D, F, E, L = self.tokens, self.hidden, self.width, self.experts, self.layers
        layer = (self.attention + 3 * D * F) * self.itemsize
        attend = 2 * T * self.attention + 2 * T * self.context * D
        # Two streams, what the dense model says and what the converted layers make of it; the
        # second goes through the experts once more, and again when they were refitted.
        ffn = (12 + 2 + 2 * self.refit) * T * D * F
        if self.priced:
            yield self._pricing()
        yield Stage("run the text", L * (2 * attend + ffn), moved=L * (4 * layer + 6 * T * F * 4))
        if self.split.sees == "weights":
            rows = L * self.split.rounds * F * 2 * D
            yield Stage("split", 2 * E * rows, moved=4 * rows)
        if self.split.sees == "text":
            yield self._split_on_text(self.split)
        if self.router.sees == "text":
            fit, few = _Ridge(D + 1, E, len(RouterFit.strengths)), min(T, self.router.tokens)
            moved = (_ENERGIES + 1) * few * F * 4 + fit.passes
            yield Stage("router", L * 2 * few * D * D, L * fit.double, L * moved)
        if self.refit:
            ridge = _Ridge(F, D, len(STRENGTHS))
            moments = 2 * T * F * F + 2 * T * F * D + ridge.trials
            yield Stage("refit", L * moments, L * ridge.double, L * 2 * T * F * 4)
        if self.attention_refit:  # on what the streams met anyway
            ridge = _Ridge(D, D, len(STRENGTHS))
            yield Stage("attention refit", L * (6 * T * D * D + ridge.trials), L * ridge.double)
        if self.maps:
            # one map for gate and up before the split, one for attention, one of every expert on
            # its tokens; then the neurons once more
            ridge, shared = _Ridge(D, D, len(MAP_STRENGTHS)), 1 + self.attention_refit
            seen = min(T, looked_at(D))
            fits = 4 * D * D * (seen * shared + min(T * self.active * E, E * seen))
            folded = 2 * (4 * D * F + self.attention) * D + (shared + E) * ridge.trials
            operations = fits + folded + 2 * T * D * D + 4 * T * D * F * self.active
            double, moved = (shared + E) * ridge.double, 3 * T * F * 4
            yield Stage("maps", (L - 1) * operations, (L - 1) * double, (L - 1) * moved)
        if self.refine is not None:
            passes, batch, ahead, predicts = self.refine
            frozen = [later if ahead is None else min(ahead, later) for later in range(L)]
            heads = predicts * sum(found == later for later, found in enumerate(frozen))
            trained = passes * T * 7 / 8
            through = 2 * self.attention + 6 * D * F
            block = 2 * self.attention + 6 * D * F * self.distilled
            # forward and twice that backward; in the dense layers ahead and the head once
            trained_products = trained * (L * 3 * block + 2 * sum(frozen) * through)
            trained_products += trained * heads * 3 * 2 * D * self.vocabulary
            # Adam reads and writes weights, gradients and two moments, and gradients are cleared
            steps = max(1, trained / min(batch, T))
            yield Stage("refine", trained_products, moved=L * steps * 3 * D * F * 4 * 8)
        written = self.total * self.itemsize
        yield Stage("write", 0, 0, 3 * written, written)

    def _split_on_text(self, look: Look) -> Stage:
        """Energies of experts, a router for them, gains of neurons, an assignment, in every round;
        before that k-means on some of the tokens.
        """
        D, F, E, L = self.hidden, self.width, self.experts, self.layers
        few = min(self.tokens, look.tokens)
        reads = look.rounds + look.k_means / FEWER  # of the energies, twice in a round
        products, moved = reads * few * 4 * F * E, (2 * reads + _ENERGIES) * few * F * 4
        fit, times = _Ridge(D + 1, E, len(RouterFit.strengths)), look.rounds * look.fits
        return Stage(
            "split",
            L * (products + 2 * few * D * D * look.fits),
            L * (fit.factors * look.fits + fit.solutions * times),
            L * (moved + fit.passes * times),
            assigned=L * (look.rounds + look.k_means) * F * E,
        )

    def _pricing(self) -> Stage:
        """The work of choosing experts per layer: every layer converted by itself, then the rest of
        the dense model behind it, once for every number.
        """
        tokens = min(self.tokens, PRICED_TOKENS)
        few = replace(
            self,
            tokens=tokens,
            refit=False,
            attention_refit=False,
            maps=False,
            refine=None,
            priced=0,
        )
        parts = [stage for stage in few.stages() if stage.name != "write"]
        measured = self.layers * self.priced * tokens / 8
        behind = 2 * (self.attention + 3 * self.hidden * self.width) * (self.layers + 1) / 2
        products = measured * (behind + 2 * self.hidden * self.vocabulary)
        return Stage(
            "experts per layer",
            products + sum(part.products for part in parts),
            sum(part.double for part in parts),
            measured * self.vocabulary * 4 * 6 + sum(part.moved for part in parts),
            assigned=sum(part.assigned for part in parts),
        )

    def convert(self) -> Stage:
        """The work of `moesaic convert` with the random split, which reads no text."""
        compare = 2 * 256 * 6 * self.hidden * self.width * self.layers
        written = self.total * self.itemsize
        return Stage("convert", compare, moved=4 * written, written=written)

    def memory(self, *, gpu: bool) -> dict[str, dict[str, int]]:
        """Bytes by part, at each of the moments that could be the worst; `gpu` computes on one.

        One layer is held at a time, whatever their number; choosing experts per layer holds streams
        of a model for every layer.
        """
        T, D, F = self.tokens, self.hidden, self.width
        one = self.attention + 3 * D * F
        where = "GPU, " if gpu else ""
        layer = {
            "two residual streams": 2 * T * D * 4,
            "one layer in float32": one * 4,
            "the layer's inputs and outputs": 5 * T * D * 4,
            "neurons": T * F * 4,
        }
        waiting = 2 * one * self.itemsize
        if not gpu:
            layer["layers that are written"] = waiting
        at: dict[str, dict[str, int]] = {}
        if self.priced:
            streams = self.layers * self.priced * min(T, PRICED_TOKENS) // 8 * D * 4
            seen = min(T, PRICED_TOKENS) * (4 * F + 6 * D) * 4
            at["experts per layer"] = {
                "one layer in float32": one * 4,
                "streams of changed models": streams,
                "neurons, energies, inputs": seen,
            }
        if self.split.sees == "text":
            few = min(T, self.split.tokens)
            at["split"] = {**layer, "energies and inputs": 3 * few * F * 4 + 3 * few * D * 4}
        if self.router.sees == "text":
            few = min(T, self.router.tokens)
            inputs = few * F * 4 + 3 * few * D * 4 + 10 * D * D * 8
            at["router"] = {**layer, "energies, inputs, factors": inputs}
        if self.refit:
            gram = 3 * F * F * 4 + 3 * F * F * 8 + 3 * F * D * 8
            again = {"mapped neurons": T * F * 4} if self.maps else {}
            at["refit"] = {**layer, **again, "moments and a factor": gram}
        if self.refine is not None:
            _, batch, ahead, predicts = self.refine
            frozen = self.layers - 1 if ahead is None else min(ahead, self.layers - 1)
            kept = min((1 + frozen) * T * D * 4, KEPT)
            # what a step keeps for the way back: inputs of products and of norms
            step = min(batch, T) * (1 + frozen) * (10 * D + 4 * F) * 4
            at["refine"] = {
                **layer,
                "weights, gradients, moments": 15 * F * D * 4,
                "frozen layers and head": (frozen * one + predicts * self.vocabulary * D) * 4,
                "streams of the dense model": kept,
                "a step": step,
            }
        found = {f"{where}{stage}": parts for stage, parts in at.items()}
        if gpu:
            found["host"] = {
                "Python, torch, CUDA": _RUNTIME,
                "layers that are written": waiting,
                "a layer or the embeddings as read": max(one, self.vocabulary * D) * self.itemsize,
            }
        return found

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


@dataclass(frozen=True)
class _Ridge:
    """The operations of a ridge regression of P inputs and Q outputs, of which some strengths are
    tried and one is solved again.
    """

    inputs: int
    outputs: int
    strengths: int

    @property
    def factors(self) -> float:
        return (self.strengths + 1) * self.inputs**3 / 3

    @property
    def solutions(self) -> float:
        # what the start leaves, and two triangles for every strength
        return 2 * (self.strengths + 2) * self.inputs**2 * self.outputs

    @property
    def double(self) -> float:
        """In float64."""
        return self.factors + self.solutions

    @property
    def passes(self) -> float:
        """Bytes read and written beside a fit whose factors are there: inputs looked at for numbers
        that are not finite, two triangles of a factor and one error for every strength.
        """
        return self.inputs**2 * (5.0 + (self.strengths + 1) * (2 * 8 + 4))

    @property
    def trials(self) -> float:
        """In float32: the error on the tokens held back."""
        return 2 * (self.strengths + 1) * self.inputs**2 * self.outputs
