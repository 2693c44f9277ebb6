"""Importance of every neuron to every cluster of hidden features (Gradient Split Plus).

Source: LLaMA-MoE-v2 (arXiv 2411.15708), split_gradient_get_grads_v2. A token belongs to the gate of
largest inner product with its MLP input. With h the input of down_proj and d the gradient of the
batch's mean loss with respect to it, neuron i's score for a cluster is the mean of |h_i * d_i| over
the cluster's tokens. One layer is in memory at a time: a forward pass keeps every layer's input, a
backward pass goes down through the layers and computes each again.

Notation: B rows, C tokens a row, L layers, E clusters, D hidden size, F neurons.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from moesaic.construct.activations import LayerStream
from moesaic.construct.dense import DenseModel
from moesaic.construct.free.head import head_of
from moesaic.core.console import track
from moesaic.core.errors import UserError

__all__ = ["TokenBatch", "cluster_importance", "text_batches"]


class TokenBatch(NamedTuple):
    """Rows that make one loss, padded on the right."""

    ids_BC: torch.Tensor
    labels_BC: torch.Tensor
    """Targets, not shifted; -100 where there is none."""
    real_BC: torch.Tensor
    """False at padding."""


def text_batches(ids_BC: torch.Tensor, *, batch: int) -> list[TokenBatch]:
    """Batches of full rows whose every token is a target."""
    return [
        TokenBatch(ids, ids, torch.ones_like(ids, dtype=torch.bool)) for ids in ids_BC.split(batch)
    ]


def cluster_importance(
    dense: DenseModel,
    gates_LED: torch.Tensor,
    batches: Iterable[TokenBatch],
    *,
    tokens_at_once: int = 16_384,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Score neurons: scores [L, E, F] and the tokens of every cluster [L, E].

    `tokens_at_once` bounds memory: L + 1 hidden states of so many tokens are held. Raises UserError
    when a cluster has no token in some layer, all of them named, when there is no text, or a score
    is not finite.
    """
    if dense.head != "ForCausalLM":
        raise UserError(
            f"{dense.checkpoint.path} has no language-model head, which importance needs. Give a "
            "model of the kind ForCausalLM."
        )
    layers, experts = gates_LED.shape[:2]
    sums_LEF = torch.zeros(layers, experts, dense.width, dtype=torch.float64)
    counts_LE = torch.zeros(layers, experts, dtype=torch.long)
    for group in track(list(_groups(batches, tokens_at_once)), "scoring neurons"):
        _score_group(dense, gates_LED, group, sums_LEF, counts_LE)
    if not int(counts_LE.sum()):
        raise UserError("There is no text to score neurons on. Give more data or more tokens.")
    empty = [f"layer {at[0]} expert {at[1]}" for at in (counts_LE == 0).nonzero().tolist()]
    if empty:
        raise UserError(
            f"Some experts win no token of this text, so no neuron has a score for them: "
            f"{', '.join(empty)}. Give more text or fewer experts, or make the gates again."
        )
    scores_LEF = sums_LEF / counts_LE[..., None]
    if not bool(torch.isfinite(scores_LEF).all()):
        raise UserError("Importance scores are not finite. Check the model's loss on this text.")
    return scores_LEF.float().numpy(), counts_LE.numpy()


def _groups(batches: Iterable[TokenBatch], tokens: int) -> Iterator[list[TokenBatch]]:
    group: list[TokenBatch] = []
    for batch in batches:
        if group and sum(b.ids_BC.numel() for b in group) + batch.ids_BC.numel() > tokens:
            yield group
            group = []
        group.append(batch)
    if group:
        yield group


def _score_group(
    dense: DenseModel,
    gates_LED: torch.Tensor,
    group: list[TokenBatch],
    sums_LEF: torch.Tensor,
    counts_LE: torch.Tensor,
) -> None:
    stream = LayerStream(dense, context=max(batch.ids_BC.shape[1] for batch in group))
    inputs = [[stream.embed(batch.ids_BC) for batch in group]]
    with torch.no_grad():
        for layer in range(dense.layers):
            module: Any = stream.load(layer)
            blocks = (stream.block(module, hidden) for hidden in inputs[-1])
            inputs.append([stream.finish(module, x, module.mlp(normed)) for x, normed in blocks])
    gradients = _top(stream, inputs.pop(), group)
    for layer in reversed(range(dense.layers)):
        module = stream.load(layer)
        for place, (hidden, batch) in enumerate(zip(inputs.pop(), group, strict=True)):
            hidden.requires_grad_()
            residual, normed = stream.block(module, hidden)
            mlp = module.mlp
            neurons_BCF = mlp.act_fn(mlp.gate_proj(normed)) * mlp.up_proj(normed)
            neurons_BCF.retain_grad()
            out = stream.finish(module, residual, mlp.down_proj(neurons_BCF))
            out.backward(gradients[place])
            assert hidden.grad is not None
            assert neurons_BCF.grad is not None
            gradients[place] = hidden.grad
            with torch.no_grad():
                change_TF = (neurons_BCF * neurons_BCF.grad).abs()[batch.real_BC.bool()]
                cluster_T = (normed[batch.real_BC.bool()] @ gates_LED[layer].float().T).argmax(1)
                sums_LEF[layer].index_add_(0, cluster_T, change_TF.double())
                counts_LE[layer] += cluster_T.bincount(minlength=len(counts_LE[layer]))


def _top(
    stream: LayerStream, hidden: list[torch.Tensor], group: list[TokenBatch]
) -> list[torch.Tensor]:
    """Gradients of every batch's mean loss with respect to the last hidden states."""
    final, head = stream.norm_after(stream.dense.layers - 1), head_of(stream)
    gradients = []
    for states, batch in zip(hidden, group, strict=True):
        states = states.detach().requires_grad_()
        logits = final(states)[:, :-1] @ head.weight_VD.T
        if head.cap is not None:
            logits = head.cap * torch.tanh(logits / head.cap)
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.labels_BC[:, 1:].flatten(), ignore_index=-100
        )
        gradients.append(torch.autograd.grad(loss, states)[0])
    return gradients
