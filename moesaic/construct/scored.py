"""Splits made from importance scores: what they share, and the three ways to use the scores.

Notation: C score vectors (one per cluster of text), E experts, F neurons, I neurons of one expert,
R shared experts. `order_CF` holds every vector's neurons from best to worst.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from moesaic.construct.method import Projection, SplitInputs, SplitMethod
from moesaic.core.errors import UserError

__all__ = ["ScoredMethod", "assign_once", "best_neurons", "rank_neurons", "take_common"]

Ids = NDArray[np.int64]
Scores = NDArray[np.float32]
Criterion = Literal["max", "min"]


class ScoredMethod(SplitMethod):
    """A split by importance scores: one score vector per cluster of text."""

    needs_data: ClassVar[bool] = True

    criterion: Criterion = "max"
    """Whether an expert takes the neurons of highest or of lowest score."""
    hook: Projection = "up"
    """What is scored: `up`, the input of down_proj; `gate`, the output of gate_proj."""
    kind: Literal["feature_change", "feature_grad"] = "feature_change"
    """The gradient of the loss, or the value times it (first-order change of the loss)."""
    level: Literal["sample", "total"] = "sample"
    """Whether the kernel is applied to every token's score or to their sum."""
    kernel: Literal["plain", "l1", "l2"] = "l1"
    """What is added up: the score, its absolute value, or its square."""
    counting: Literal["token", "original"] = "token"
    """`token`: the same whatever the batch; `original`: LLaMA-MoE's, gradients of batch means."""
    clusters: Literal["text", "domains"] = "text"
    """Clusters of similar text, or the domains of the data in their order."""
    tokens: int = Field(default=131_072, ge=2)
    """Tokens read, all clusters together."""
    context: int = Field(default=512, ge=2)
    """Tokens of a row."""
    batch: int = Field(default=8, ge=1)
    """Rows of one forward and backward pass."""
    scores: Path | None = None
    """Scores made earlier, instead of data: scores.safetensors, or a folder of the original's."""

    def check(self, inputs: SplitInputs) -> None:
        """Raise UserError when the method cannot do what was asked; scores stand for data."""
        if self.scores is None:
            super().check(inputs)
        else:
            super().check(SplitInputs(**{**_fields(inputs), "data": self.scores}))

    def scores_for(self, inputs: SplitInputs, count: int) -> Scores:
        """The scores of `count` clusters of text: float32 [L, count, F]."""
        from moesaic.construct.importance import cluster_scores, load_scores

        if self.scores is not None:
            scores_LCF = load_scores(
                self.scores, layers=inputs.layers, width=inputs.width, hook=self.hook
            )
        else:
            scores_LCF = cluster_scores(inputs.model, inputs.data, self, count, seed=inputs.seed)
        if scores_LCF.shape[1] < count:
            raise UserError(
                f"The split {self.key} needs {count} score vectors, but there are "
                f"{scores_LCF.shape[1]}. Ask for fewer experts or score more clusters of text."
            )
        inputs.arrays["scores"] = scores_LCF
        return scores_LCF[:, :count]


def rank_neurons(scores_CF: Scores, criterion: Criterion) -> Ids:
    """Every vector's neurons from best to worst, the lower number first among equals: [C, F]."""
    keys_CF = -scores_CF if criterion == "max" else scores_CF
    return np.argsort(keys_CF, axis=1, kind="stable")


def best_neurons(order_CF: Ids, size: int, without: Ids) -> list[Ids]:
    """The first `size` neurons of every vector that are not among `without`."""
    keep_F = np.ones(order_CF.shape[1], bool)
    keep_F[without] = False
    return [row_F[keep_F[row_F]][:size] for row_F in order_CF]


def assign_once(scores_CF: Scores, criterion: Criterion, size: int, without: Ids) -> list[Ids]:
    """Deal neurons to experts, each neuron once, best score first, until every expert has `size`.

    Of all pairs of an expert with room and a free neuron, the one with the best score is next;
    among equal scores the highest expert, then the neuron it ranks first. Neurons come in the order
    dealt.
    """
    experts, width = scores_CF.shape
    order_CF = rank_neurons(scores_CF, criterion)
    ranked_CF = np.take_along_axis(scores_CF, order_CF, axis=1)
    # The highest expert comes first, and a stable sort leaves it first among equal scores.
    key_CF = (-ranked_CF if criterion == "max" else ranked_CF)[::-1]
    turn = np.argsort(key_CF.ravel(), kind="stable")
    picks, neurons = experts - 1 - turn // width, order_CF[::-1].ravel()[turn]
    dealt: list[list[int]] = [[] for _ in range(experts)]
    free = [True] * width
    for neuron in without.tolist():
        free[neuron] = False
    missing = experts * size
    for pick, neuron in zip(picks.tolist(), neurons.tolist(), strict=True):
        if free[neuron] and len(dealt[pick]) < size:
            dealt[pick].append(neuron)
            free[neuron] = False
            missing -= 1
            if not missing:
                break
    return [np.array(ids, np.int64) for ids in dealt]


def take_common(order_CF: Ids, size: int, total: int) -> Ids:
    """The `total` neurons that most vectors rank among their first `size`, in order.

    Neurons that the most vectors agree on come first, in ascending order; they leave every ranking,
    the next ones move up, and agreement is counted again.
    """
    taken = np.empty(0, np.int64)
    while len(taken) < total:
        votes_F = np.bincount(
            np.concatenate(best_neurons(order_CF, size, taken)), minlength=order_CF.shape[1]
        )
        agreed = np.flatnonzero(votes_F == votes_F.max())
        taken = np.concatenate([taken, agreed])
    return taken[:total]


def _fields(inputs: SplitInputs) -> dict[str, Any]:
    return {name: getattr(inputs, name) for name in inputs.__dataclass_fields__}
