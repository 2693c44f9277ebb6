"""Losses on router logits that several families share, and which tokens they count.

logits_TE   router logits of one layer: T = batch x sequence tokens, E experts
valid_T     bool, which tokens count (not padding); None: all
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def balance_loss(
    router_logits: Sequence[torch.Tensor], valid_T: torch.Tensor | None, *, top_k: int
) -> torch.Tensor:
    """Mean over layers of E * sum_e load_e * mean probability_e (arXiv 2101.03961, equation 4).

    For routers that take the `top_k` highest of a softmax over all experts. Load counts choices,
    those that a capacity drops too, and sums to `top_k`, which is the loss at perfect balance. The
    gradient goes through the probabilities. Each layer is balanced by itself: with loads added up
    over layers, an expert of one layer could make up for its namesake in another.
    """
    losses = []
    for logits_TE in router_logits:
        probs_TE = logits_TE.float().softmax(dim=-1)
        chosen_TE = torch.zeros_like(probs_TE).scatter(1, probs_TE.topk(top_k).indices, 1.0)
        load_E, probability_E = _mean(chosen_TE, valid_T), _mean(probs_TE, valid_T)
        losses.append(probs_TE.shape[1] * (load_E * probability_E).sum())
    return _mean_over_layers(losses)


def router_z_loss(
    router_logits: Sequence[torch.Tensor], valid_T: torch.Tensor | None
) -> torch.Tensor:
    """Mean over layers and tokens of log(sum exp(logits))^2 (arXiv 2202.08906, equation 5)."""
    squares = (logits_TE.float().logsumexp(dim=-1).square() for logits_TE in router_logits)
    return _mean_over_layers([_mean(square_T, valid_T) for square_T in squares])


def valid_tokens(
    attention_mask: torch.Tensor | None, hidden_states: torch.Tensor
) -> torch.Tensor | None:
    """Which tokens of hidden_states [B, S, D] are not padding: bool [B*S], or None for all.

    `attention_mask` [B, past + S]; one of another form (prepared, 4-D) says nothing here.
    """
    if attention_mask is None or attention_mask.dim() != 2:
        return None
    return attention_mask[:, -hidden_states.shape[1] :].bool().flatten()


def share_of_step(labels: torch.Tensor, items: int | torch.Tensor | None) -> torch.Tensor | float:
    """Share of these labels in an optimizer step's `items` targets; 1 where it is not known.

    A routing loss weighted by it does not grow with the number of micro-batches.
    """
    if items is None:
        return 1.0
    if isinstance(items, torch.Tensor):
        items = items.to(labels.device)
    return (labels[..., 1:] != -100).sum() / items


def _mean(values: torch.Tensor, valid_T: torch.Tensor | None) -> torch.Tensor:
    """Mean over the tokens that count, without waiting for a GPU."""
    if valid_T is None:
        return values.mean(dim=0)
    weight_T = valid_T.to(values)
    summed: torch.Tensor = torch.tensordot(weight_T, values, dims=1)
    return summed / weight_T.sum().clamp_min(1)


def _mean_over_layers(losses: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()
