"""Losses on router logits that several families share.

logits_TE   router logits of one layer: T = batch x sequence tokens, E experts
probs_TE    what the router makes of them, of sum 1 in each row
ids_TK      the K experts really chosen for each
valid_T     bool, which tokens count (not padding); None: all
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moesaic.models.padding import share_of_step, valid_tokens

__all__ = [
    "balance_loss",
    "layer_balance",
    "pooled_balance",
    "router_z_loss",
    "share_balance",
    "share_of_step",
    "sum_losses",
    "valid_tokens",
]


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


def pooled_balance(
    logits: Sequence[torch.Tensor], ids: Sequence[torch.Tensor], valid_T: torch.Tensor | None
) -> torch.Tensor:
    """Return E * sum_e f_e p_e over the rows of all layers together (Switch, section 2.2).

    f_e: choices of expert e per row (K in all), p_e: mean probability; both without padding. K for
    perfect balance. As transformers' `load_balancing_loss_func`, but of the experts really chosen.
    """
    totals = [
        _totals(logits_TE.softmax(-1, dtype=torch.float32), ids_TK, valid_T, groups=1)
        for logits_TE, ids_TK in zip(logits, ids, strict=True)
    ]
    load_E, sums_E, rows = (
        torch.stack([total[0].to(logits[0].device) for total in kind]).sum(0)
        for kind in zip(*totals, strict=True)
    )
    return load_E.shape[0] * ((load_E / rows) * (sums_E / rows)).sum()


def layer_balance(
    logits_TE: torch.Tensor,
    ids_TK: torch.Tensor,
    valid_T: torch.Tensor | None,
    *,
    groups: int = 1,
) -> torch.Tensor:
    """Return `share_balance` of one layer with a softmax router.

    With one group a sequence it is DeepSeek's sequence-wise loss.
    """
    probs_TE = logits_TE.softmax(-1, dtype=torch.float32)
    return share_balance(probs_TE, ids_TK, valid_T, groups=groups)


def share_balance(
    probs_TE: torch.Tensor,
    ids_TK: torch.Tensor,
    valid_T: torch.Tensor | None = None,
    *,
    groups: int = 1,
) -> torch.Tensor:
    """Return E * sum_e f_e p_e of one layer, the mean over `groups` equal parts of the rows.

    f_e: share of the choices that went to expert e, p_e: mean of `probs_TE`; both without padding.
    1 for perfect balance. With one group a sequence and sigmoids brought to sum 1 it is
    DeepSeek-V3's loss (arXiv 2412.19437, equations 17 to 20) without its factor.
    """
    load_GE, sums_GE, count_G1 = _totals(probs_TE, ids_TK, valid_T, groups=groups)
    count_G1 = count_G1.clamp_min(1)  # a sequence of padding alone adds nothing
    share_GE = load_GE / (count_G1 * ids_TK.shape[-1])
    return load_GE.shape[1] * (share_GE * (sums_GE / count_G1)).sum(-1).mean()


def _totals(
    probs_TE: torch.Tensor, ids_TK: torch.Tensor, valid_T: torch.Tensor | None, *, groups: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choices and summed probabilities [G, E], and rows [G, 1], of G groups of rows."""
    chosen_TE = torch.zeros_like(probs_TE).scatter(1, ids_TK, 1.0)
    counted_T1 = probs_TE.new_ones(len(probs_TE), 1)
    if valid_T is not None:
        counted_T1 = valid_T.to(probs_TE)[:, None]
    load_GE, sums_GE, count_G1 = (
        (x * counted_T1).view(groups, -1, x.shape[1]).sum(1)
        for x in (chosen_TE, probs_TE, torch.ones_like(counted_T1))
    )
    return load_GE, sums_GE, count_G1


def sum_losses(losses: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum scalars that may lie on several devices."""
    return torch.stack([loss.to(losses[0].device) for loss in losses]).sum()


def _mean(values: torch.Tensor, valid_T: torch.Tensor | None) -> torch.Tensor:
    """Mean over the tokens that count, without waiting for a GPU."""
    if valid_T is None:
        return values.mean(dim=0)
    weight_T = valid_T.to(values)
    summed: torch.Tensor = torch.tensordot(weight_T, values, dims=1)
    return summed / weight_T.sum().clamp_min(1)


def _mean_over_layers(losses: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()
