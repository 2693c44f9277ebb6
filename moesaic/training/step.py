"""One optimizer update: forward passes, the loss they add up to, and what is worth reporting.

    ids_ABT   token ids: A forward passes of B sequences of T tokens
    counts_LE load or importance per layer L and expert E

The update's loss is  sum(cross-entropy) / tokens  +  mean over passes of the balance loss.
Cross-entropy is weighted by tokens over the whole update, and the balance loss is averaged, so
neither depends on how the sequences are divided into passes (beyond what the balance statistic
itself sees).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from moesaic.core.errors import UserError
from moesaic.models.selects import selects_of
from moesaic.training.optimizer import Optimizer

BalanceKind = Literal["llama_moe", "native"]


class PassOutput(NamedTuple):
    """What one forward pass gives: a summed loss, a weighted balance loss, counts per expert."""

    cross_entropy: torch.Tensor
    balance: torch.Tensor | None
    load_LE: torch.Tensor | None
    importance_LE: torch.Tensor | None


class UpdateResult(NamedTuple):
    """What one update reports, all on the device."""

    values: dict[str, torch.Tensor]
    routing: dict[str, torch.Tensor]


def balance_kind(model: nn.Module) -> BalanceKind | None:
    """Say who computes the model's balance loss: our LlamaMoE, transformers, or nobody."""
    config: Any = model.config
    if hasattr(config, "gate_balance_loss_weight"):
        return "llama_moe"
    if hasattr(config, "router_aux_loss_coef"):
        return "native"
    return None


def set_balance_coefficient(model: nn.Module, coefficient: float | None) -> float | None:
    """Set the weight of the balance loss and return the one in force (None: there is no such loss).

    Raises UserError when a coefficient is asked for and the model has no balance loss to weigh.
    """
    kind = balance_kind(model)
    config: Any = model.config
    if kind is None:
        if coefficient:
            raise UserError(
                f"balance.coefficient={coefficient} has no effect: {type(model).__name__} has no "
                "balance loss. Leave it out."
            )
        return None
    if kind == "llama_moe":
        if coefficient is not None:
            model.set_moe_gate_balance_loss_weight(coefficient)  # type: ignore[operator]
        return float(config.gate_balance_loss_weight)
    if coefficient is not None:
        config.router_aux_loss_coef = coefficient
    return float(config.router_aux_loss_coef)


def build_pass(model: nn.Module) -> Callable[[torch.Tensor], PassOutput]:
    """Return the function from ids_BT to one pass's outputs; torch.compile may take it."""
    kind = balance_kind(model)
    config: Any = model.config
    coefficient = float(config.router_aux_loss_coef) if kind == "native" else 1.0
    # Asking for router logits costs memory and makes the model add its own loss: only where needed.
    extra = {"output_router_logits": True} if kind == "native" and coefficient > 0 else {}

    def run(ids_BT: torch.Tensor) -> PassOutput:
        outputs = model(input_ids=ids_BT, use_cache=False, **extra)
        logits_NV = outputs.logits[:, :-1].flatten(0, 1).float()
        cross_entropy = F.cross_entropy(logits_NV, ids_BT[:, 1:].flatten(), reduction="sum")
        balance, load, importance = None, None, None
        if kind == "llama_moe":
            balance = outputs.balance_loss
            load, importance = _stack(outputs.gate_load), _stack(outputs.gate_importance)
        elif extra:
            balance = outputs.aux_loss * coefficient
            if (attention := outputs.get("attn_aux_loss")) is not None:  # attention's own routers
                balance = balance + attention * coefficient
            load, importance = _native_counts(outputs.router_logits, config)
        return PassOutput(cross_entropy, balance, load, importance)

    return run


def run_update(
    run_pass: Callable[[torch.Tensor], PassOutput],
    optimizer: Optimizer,
    ids_ABT: torch.Tensor,
    *,
    autocast: AbstractContextManager[Any] | None = None,
) -> UpdateResult:
    """Compute gradients over all passes of `ids_ABT`, update the weights, return what to report."""
    result = accumulate(run_pass, ids_ABT, autocast=autocast)
    result.values["grad_norm"] = optimizer.step()
    return result


def accumulate(
    run_pass: Callable[[torch.Tensor], PassOutput],
    ids_ABT: torch.Tensor,
    *,
    autocast: AbstractContextManager[Any] | None = None,
) -> UpdateResult:
    """Add the update's gradients to the parameters; no host synchronisation."""
    passes = len(ids_ABT)
    predicted = ids_ABT.shape[0] * ids_ABT.shape[1] * (ids_ABT.shape[2] - 1)
    values: dict[str, torch.Tensor] = {}
    routing: dict[str, torch.Tensor] = {}
    for ids_BT in ids_ABT:
        with autocast or nullcontext():
            found = run_pass(ids_BT)
        loss = found.cross_entropy / predicted
        _add(values, "loss", loss)
        if found.balance is not None:
            # Below zero means "off" in LLaMA-MoE: reported as 0, not trained on.
            share = found.balance.float() / passes
            _add(values, "balance_loss", share.clamp_min(0.0))
            if share.requires_grad:
                loss = loss + torch.where(share > 0, share, torch.zeros_like(share))
        if found.load_LE is not None:
            _add(routing, "load", found.load_LE)
        if found.importance_LE is not None:
            _add(routing, "importance", found.importance_LE)
        loss.backward()
    return UpdateResult(values, routing)


def _add(sums: dict[str, torch.Tensor], name: str, value: torch.Tensor) -> None:
    value = value.detach()
    sums[name] = sums[name] + value if name in sums else value


def _stack(per_layer: Any) -> torch.Tensor | None:
    """Stack the layers' counts; None where a gate reports none or layers differ in experts."""
    if not per_layer:
        return None
    rows = [row.detach().float() for row in per_layer if isinstance(row, torch.Tensor)]
    rows = [row for row in rows if row.ndim == 1]
    if not rows or len({len(row) for row in rows}) != 1:
        return None
    return torch.stack(rows)


def _native_counts(
    router_logits: Any, config: Any
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Count for softmax top-k routers, which is what transformers' balance loss assumes."""
    if not router_logits:
        return None, None
    loads, weights = [], []
    for layer, logits_NE in enumerate(router_logits):
        if logits_NE is None:  # a dense layer
            continue
        probs_NE = logits_NE.detach().float().softmax(-1)
        top_NK, ids_NK = probs_NE.topk(selects_of(config.num_experts_per_tok, layer), dim=-1)
        empty_E = probs_NE.new_zeros(probs_NE.shape[-1])
        loads.append(empty_E.index_add(0, ids_NK.flatten(), torch.ones_like(top_NK.flatten())))
        weights.append(empty_E.index_add(0, ids_NK.flatten(), top_NK.flatten()))
    return (torch.stack(loads), torch.stack(weights)) if loads else (None, None)
