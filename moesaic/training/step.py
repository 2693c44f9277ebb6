"""One optimizer update: forward passes, the loss they add up to, and what is worth reporting.

    ids_ABT   token ids: A forward passes of B sequences of T tokens
    position_ABT, labels_ABT   of packed conversations: positions that begin anew in each, and what
              is learned (-100: not); without them a sequence is one text and all of it is learned
    counts_LE load or importance per layer L and expert E

The update's loss is  sum(cross-entropy) / tokens learned  +  mean over passes of the balance loss.
Cross-entropy is weighted by tokens over the whole update, and the balance loss is averaged, so
neither depends on how the sequences are divided into passes (beyond what the balance statistic
itself sees). With a teacher of weight w the first term is

    ((1 - w) x sum(cross-entropy)  +  w x sum of KL(teacher || student)) / tokens learned

and both of its parts are reported unweighted.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from moesaic.models.selects import selects_of
from moesaic.training.balance import Balance, choose_balance
from moesaic.training.optimizer import Optimizer

if TYPE_CHECKING:
    from moesaic.training.distill import Teacher


class PassOutput(NamedTuple):
    """What one forward pass gives: a summed loss, a weighted balance loss, counts per expert.

    With a teacher also the summed divergence from it, and the teacher's weight in the loss.
    """

    cross_entropy: torch.Tensor
    balance: torch.Tensor | None
    load_LE: torch.Tensor | None
    importance_LE: torch.Tensor | None
    divergence: torch.Tensor | None = None
    weight: float = 0.0


class UpdateResult(NamedTuple):
    """What one update reports, all on the device."""

    values: dict[str, torch.Tensor]
    routing: dict[str, torch.Tensor]


def build_pass(
    model: nn.Module, balance: Balance | None = None, teacher: Teacher | None = None
) -> Callable[..., PassOutput]:
    """Return the function from ids_BT, and position_BT and labels_BT if any, to one pass's outputs;
    torch.compile may take it.

    `balance` None: as the model wants to be balanced by default. `teacher` None: from data alone.
    """
    balance = balance or choose_balance(model)
    kind, observer = balance.kind, balance.observer
    config: Any = model.config
    coefficient = float(balance.coefficient or 0.0)
    # Asking for router logits costs memory and makes the model add its own loss: only where needed.
    extra = {"output_router_logits": True} if kind == "native" and coefficient > 0 else {}

    def run(
        ids_BT: torch.Tensor,
        position_BT: torch.Tensor | None = None,
        labels_BT: torch.Tensor | None = None,
    ) -> PassOutput:
        if observer is not None:
            observer.start()
        inputs: dict[str, Any] = {"input_ids": ids_BT, "use_cache": False}
        if position_BT is not None:
            # No mask: positions that begin anew are what keeps conversations apart.
            inputs["position_ids"] = position_BT
        outputs = model(**inputs, **extra)
        labels_BT = ids_BT if labels_BT is None else labels_BT
        # At weight 1 it is told and not learned: nothing is kept for its gradient.
        learned = teacher is None or teacher.weight < 1
        logits_BTV = outputs.logits if learned else outputs.logits.detach()
        cross_entropy = F.cross_entropy(
            logits_BTV[:, :-1].flatten(0, 1).float(), labels_BT[:, 1:].flatten(), reduction="sum"
        )
        loss, load, importance = None, None, None
        if kind == "llama_moe":
            loss = outputs.balance_loss
            load, importance = _stack(outputs.gate_load), _stack(outputs.gate_importance)
        elif extra:
            loss = outputs.aux_loss * coefficient
            if (attention := outputs.get("attn_aux_loss")) is not None:  # attention's own routers
                loss = loss + attention * coefficient
            load, importance = _native_counts(outputs.router_logits, config)
        if observer is not None:
            observed = observer.read(observer.stop(), len(ids_BT))
            load, importance = observed.load_LE, observed.importance_LE
            if kind == "observed" and coefficient > 0:
                loss = observed.loss * coefficient
        found = PassOutput(cross_entropy, loss, load, importance)
        if teacher is None:
            return found
        divergence = teacher.divergence(outputs.logits, labels_BT, **inputs)
        return found._replace(divergence=divergence, weight=teacher.weight)

    return run


def run_update(
    run_pass: Callable[..., PassOutput],
    optimizer: Optimizer,
    ids_ABT: torch.Tensor,
    *,
    position_ABT: torch.Tensor | None = None,
    labels_ABT: torch.Tensor | None = None,
    autocast: AbstractContextManager[Any] | None = None,
    balance: Balance | None = None,
) -> UpdateResult:
    """Compute gradients over all passes of `ids_ABT`, update the weights, return what to report.

    With `balance`, the biases that it moves are moved by the load of all passes.
    """
    result = accumulate(
        run_pass, ids_ABT, position_ABT=position_ABT, labels_ABT=labels_ABT, autocast=autocast
    )
    result.values["grad_norm"] = optimizer.step()
    if balance is not None and balance.rate:
        balance.move_biases(result.routing["load"])
    return result


def accumulate(
    run_pass: Callable[..., PassOutput],
    ids_ABT: torch.Tensor,
    *,
    position_ABT: torch.Tensor | None = None,
    labels_ABT: torch.Tensor | None = None,
    autocast: AbstractContextManager[Any] | None = None,
) -> UpdateResult:
    """Add the update's gradients to the parameters; no host synchronisation."""
    passes = len(ids_ABT)
    predicted: torch.Tensor | int = ids_ABT[..., 1:].numel()
    given: list[torch.Tensor] = [ids_ABT]
    if position_ABT is not None and labels_ABT is not None:
        given += [position_ABT, labels_ABT]
        predicted = (labels_ABT[..., 1:] >= 0).sum().clamp_min(1)
    values: dict[str, torch.Tensor] = {}
    routing: dict[str, torch.Tensor] = {}
    for tensors_BT in zip(*given, strict=True):
        with autocast or nullcontext():
            found = run_pass(*tensors_BT)
        loss = found.cross_entropy / predicted
        _add(values, "loss", loss)
        if found.divergence is not None:
            divergence = found.divergence / predicted
            _add(values, "distill_loss", divergence)
            loss = (1.0 - found.weight) * loss + found.weight * divergence
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
