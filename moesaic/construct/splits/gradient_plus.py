"""The gradient-plus split: every neuron to the cluster of hidden features it matters most for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from moesaic.construct.method import LayerSplit, SplitInputs, SplitMethod
from moesaic.construct.scored import assign_once, best_neurons, rank_neurons, take_common
from moesaic.construct.splits import SPLITS
from moesaic.core.errors import UserError

if TYPE_CHECKING:
    import torch


@SPLITS.register
class GradientPlus(SplitMethod):
    """Each neuron to the cluster of hidden features it matters most for; makes the router too.

    Gradient Split Plus of LLaMA-MoE-v2 (arXiv 2411.15708). Gates cluster what a layer sees of text
    (`hidden-clusters`), neurons are scored by |h * dLoss/dh| over each cluster's tokens, and the
    best pair of expert and free neuron is taken until all are dealt. With shared experts, the
    neurons that most clusters rank highest are always on. With `share`, an expert takes its own
    best, and neurons may repeat or vanish.
    """

    makes_shared: ClassVar[bool] = True
    needs_data: ClassVar[bool] = True

    criterion: Literal["max", "min"] = "max"
    """Whether an expert takes the neurons of highest or of lowest score."""
    share: bool = False
    """Whether routed experts may have neurons in common."""
    gates: Path | None = None
    """Gates made earlier: router.safetensors, its directory, or the original's gate_weights.pt."""
    scores: Path | None = None
    """Scores made earlier: scores.safetensors or the original's importance_scores.pt."""
    jitter: float = Field(default=0.4, ge=0, lt=1)
    """Clusters of features hold an equal share of tokens, less or more by this part of it."""
    metric: Literal["l2", "cos"] = "l2"
    """Distance between features."""
    tokens: int = Field(default=131_072, ge=2)
    """Tokens read."""
    context: int = Field(default=512, ge=2)
    """Tokens of a row."""
    batch: int = Field(default=1, ge=1)
    """Rows of one loss."""

    def check(self, inputs: SplitInputs) -> None:
        """Raise UserError when the method cannot do what was asked; scores stand for data."""
        if self.scores is not None and inputs.data is None:
            fields = {name: getattr(inputs, name) for name in inputs.__dataclass_fields__}
            inputs = SplitInputs(**{**fields, "data": self.scores})
        super().check(inputs)

    def divide(self, inputs: SplitInputs) -> Iterator[LayerSplit]:
        """Yield the split of every layer in order."""
        routed = inputs.experts - inputs.shared
        size = inputs.expert_width
        none = np.empty(0, np.int64)
        for scores_CF in self._scores(inputs, routed):
            order_CF = rank_neurons(scores_CF, self.criterion)
            common = take_common(order_CF, size, inputs.shared * size) if inputs.shared else none
            if self.share:
                parts = best_neurons(order_CF, size, common)
            else:
                parts = assign_once(scores_CF, self.criterion, size, common)
                if not inputs.shared:
                    parts = [np.sort(ids) for ids in parts]
            yield LayerSplit(parts, np.split(common, inputs.shared) if inputs.shared else [])

    def _scores(self, inputs: SplitInputs, routed: int) -> NDArray[np.float32]:
        if self.gates is not None:
            inputs.arrays["gates"] = self._ready_gates(inputs, routed).numpy()
        if self.scores is not None:
            from moesaic.construct.importance import load_scores

            found = load_scores(self.scores, layers=inputs.layers, width=inputs.width, hook="up")
            if found.shape[1] != routed:
                raise UserError(
                    f"{self.scores} holds scores of {found.shape[1]} clusters, but there are "
                    f"{routed} routed experts. Ask for as many, or score again."
                )
        else:
            found = self._measure(inputs, routed)
        inputs.arrays["scores"] = found
        return found

    def _measure(self, inputs: SplitInputs, routed: int) -> NDArray[np.float32]:
        import torch

        from moesaic.construct.activations import text_sample
        from moesaic.construct.calibration import check_enough
        from moesaic.construct.cluster_importance import cluster_importance, text_batches
        from moesaic.construct.hidden import TOKENS_PER_EXPERT, HiddenSettings, hidden_gates

        ids_BC = text_sample(inputs.model, inputs.data, tokens=self.tokens, context=self.context)
        check_enough(ids_BC.numel(), routed, each=TOKENS_PER_EXPERT)
        inputs.facts["tokens"] = ids_BC.numel()
        if "gates" in inputs.arrays:
            gates_LED = torch.from_numpy(inputs.arrays["gates"])
        else:
            settings = HiddenSettings(jitter=self.jitter, metric=self.metric)
            gates_LED, _ = hidden_gates(
                inputs.dense, ids_BC, routed, settings=settings, seed=inputs.seed
            )
            inputs.arrays["gates"] = gates_LED.numpy()
        scores_LEF, counts_LE = cluster_importance(
            inputs.dense, gates_LED, text_batches(ids_BC, batch=self.batch)
        )
        inputs.facts["tokens_of_cluster"] = counts_LE.tolist()
        return scores_LEF

    def _ready_gates(self, inputs: SplitInputs, routed: int) -> torch.Tensor:
        import torch

        from moesaic.construct.router import RouterInit

        assert self.gates is not None
        ready = RouterInit.load(self.gates)
        gates = [layer["weight"] for layer in ready.layers] if ready.gate == "linear" else []
        wanted = (routed, int(inputs.config["hidden_size"]))
        if len(gates) != inputs.layers or any(tuple(gate.shape) != wanted for gate in gates):
            held = f"{len(gates)} of {list(gates[0].shape)}" if gates else "routers of network mlp"
            raise UserError(
                f"{self.gates} does not fit: needed are {inputs.layers} gates of {list(wanted)} "
                f"(routed experts, hidden size), it holds {held}. Make gates for this model."
            )
        return torch.stack(gates)
