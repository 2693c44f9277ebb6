"""What keeps expert load even in a run: a balance loss, a bias on the choice, both or neither.

Who computes the loss: our LlamaMoE, the model's class in transformers or here ("native"), or, for
classes that compute none (DeepSeek-V2 and V3, GLM-4-MoE, Dots, ...), `RouterObserver`.

Routers with a correction bias (`e_score_correction_bias`) choose by score + bias and weigh by score
alone. It gets no gradient; after each update it moves by a fixed rate towards even load (Wang et
al., arXiv 2408.15664; DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

    load_LE     choices per layer and expert of a whole update
    bias_E      the correction bias of one router, float32
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from moesaic.core.errors import UserError
from moesaic.routing.sites import Site, find_sites
from moesaic.training.config import BalanceConfig
from moesaic.training.observed import RouterObserver

BalanceKind = Literal["llama_moe", "native", "observed"]

_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")  # the second: JetMoE
_WISHES = ("aux_loss_alpha", *_COEFFICIENTS)
"""Where a config may say which coefficient its model was made with."""
_BIASES = ("e_score_correction_bias", "expert_bias")
BIAS_RATE = 1e-3
"""DeepSeek-V3's rate, up to its last tokens."""
_WITH_BIAS, _ALONE = 1e-4, 1e-3
"""DeepSeek-V3's coefficient, where the bias does the most; DeepSeek-V2's."""


@dataclass
class Balance:
    """How a model is balanced: decided once, by `choose_balance`."""

    kind: BalanceKind | None
    coefficient: float | None
    """Weight of the balance loss; None: there is none."""
    rate: float = 0.0
    biases: tuple[torch.Tensor | None, ...] = ()
    """By routed layer; None: a router without one."""
    observer: RouterObserver | None = None
    reason: str = ""
    """Why nothing balances the model."""

    def __str__(self) -> str:
        """One line for the user."""
        found = []
        if self.kind == "observed" and self.coefficient and self.observer is not None:
            routers = _routers(len(self.observer.sites))
            score = f"{self.observer.score} " if self.observer.score else ""
            found.append(
                f"loss on the {score}scores observed in {routers}, coefficient {self.coefficient:g}"
            )
        elif self.coefficient:
            found.append(f"the model's own loss, coefficient {self.coefficient:g}")
        if self.rate:
            moved = _routers(sum(bias is not None for bias in self.biases))
            found.append(f"bias of {moved} moves by {self.rate:g} an update")
        why = self.reason or "the coefficient of its loss is 0"
        return f"balance: {' and '.join(found)}" if found else f"balance: none, because {why}"

    @torch.no_grad()
    def move_biases(self, load_LE: torch.Tensor) -> None:
        """Move each bias up where an expert got less than the mean of its layer, else down.

        `load_LE` is of the whole update; in a process group it is added up over its ranks.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            load_LE = load_LE.clone()
            torch.distributed.all_reduce(load_LE)
        steps_LE = self.rate * (load_LE.mean(-1, keepdim=True) - load_LE).sign()
        for bias_E, step_E in zip(self.biases, steps_LE, strict=True):
            if bias_E is not None:
                bias_E.add_(step_E.to(bias_E.device).view_as(bias_E))


def balance_kind(model: nn.Module) -> BalanceKind | None:
    """Say who computes the balance loss: our LlamaMoE, the model's class, an observer or nobody."""
    if hasattr(model.config, "gate_balance_loss_weight"):
        return "llama_moe"
    if _field(model) is not None and _computes_loss(type(model)):
        return "native"
    return "observed" if any(site.stack == "decoder" for site in find_sites(model)) else None


def set_balance_coefficient(model: nn.Module, coefficient: float | None) -> float | None:
    """Set the weight of the model's own balance loss and return the one in force.

    None: it has no loss of its own. Raises UserError when a coefficient is asked for all the same.
    """
    kind = balance_kind(model)
    config: Any = model.config
    if kind == "llama_moe":
        if coefficient is not None:
            model.set_moe_gate_balance_loss_weight(coefficient)  # type: ignore[operator]
        return float(config.gate_balance_loss_weight)
    field = _field(model)
    if kind != "native" or field is None:
        if coefficient:
            raise UserError(
                f"balance.coefficient={coefficient} has no effect: {type(model).__name__} has no "
                "balance loss. Leave it out."
            )
        return None
    if coefficient is not None:
        setattr(config, field, coefficient)
    return float(getattr(config, field) or 0.0)


def choose_balance(model: nn.Module, config: BalanceConfig | None = None) -> Balance:
    """Decide how `model` is balanced, and begin to observe its routers where that takes it.

    On the meta device routers are not probed. Raises UserError for a setting without effect.
    """
    config = config or BalanceConfig()
    kind = balance_kind(model)
    name = type(model).__name__
    if kind is None:
        if config.bias_rate:
            raise UserError(
                f"balance.bias_rate={config.bias_rate} has no effect: {name} has no experts. "
                "Leave it out."
            )
        coefficient = set_balance_coefficient(model, config.coefficient)
        return Balance(None, coefficient, reason=f"{name} has no experts")
    biases, rate = _biases_to_move(model, config.bias_rate)
    if kind != "observed":
        coefficient = set_balance_coefficient(model, config.coefficient)
    elif config.coefficient is not None:
        coefficient = config.coefficient
    else:
        coefficient = _wish(model, _WITH_BIAS if rate else _ALONE)
    chosen = Balance(kind, coefficient, rate=rate, biases=biases)
    if kind == "llama_moe" and not getattr(model.config, "gate_use_balance", True):
        return replace(chosen, coefficient=0.0, reason="gate_use_balance is off")
    if (kind != "observed" or not coefficient) and not rate:
        return chosen
    chosen.observer = RouterObserver(model)
    if next(model.parameters()).is_meta:
        return chosen
    reason = chosen.observer.probe(model)
    if reason is None and rate and len({*chosen.observer.widths, *_sizes(biases)}) > 1:
        reason = "its layers differ in experts"
    if reason is None:
        return chosen
    if config.bias_rate or (kind == "observed" and config.coefficient):
        raise UserError(
            f"{name} cannot be balanced: {reason}. Leave out balance.coefficient and "
            "balance.bias_rate."
        )
    own = kind != "observed"
    return replace(
        chosen,
        coefficient=coefficient if own else 0.0,
        rate=0.0,
        biases=(),
        observer=None,
        reason=reason,
    )


def correction_biases(model: nn.Module) -> list[torch.Tensor]:
    """Return the biases that only the choice of experts sees; they want float32."""
    return [bias for site in find_sites(model) if (bias := _bias(model, site)) is not None]


def _biases_to_move(
    model: nn.Module, rate: float | None
) -> tuple[tuple[torch.Tensor | None, ...], float]:
    sites = [site for site in find_sites(model) if site.stack == "decoder"]
    biases = tuple(_bias(model, site) for site in sites)
    if not _sizes(biases):
        if rate:
            raise UserError(
                f"balance.bias_rate={rate} has no effect: the routers of {type(model).__name__} "
                "have no correction bias. Leave it out."
            )
        return (), 0.0
    if rate == 0:
        return biases, 0.0
    for bias in biases:
        if bias is not None:  # a step of 0.001 is lost in bfloat16 from 0.25 on
            bias.data = bias.data.float()
    return biases, BIAS_RATE if rate is None else rate


def _routers(count: int) -> str:
    return f"{count} router" + ("s" if count != 1 else "")


def _sizes(biases: tuple[torch.Tensor | None, ...]) -> set[int]:
    return {bias.numel() for bias in biases if bias is not None}


def _bias(model: nn.Module, site: Site) -> torch.Tensor | None:
    """Return the correction bias of a site, in its router or in the block that holds both."""
    path = site.router_path or site.experts_path
    for place in (path, path.rpartition(".")[0]):
        if not place:  # would be the whole model
            continue
        module = model.get_submodule(place)
        named = [*module.named_buffers(), *module.named_parameters()]
        for name, tensor in named:
            if name.rpartition(".")[2] in _BIASES:
                return tensor
    return None


def _field(model: nn.Module) -> str | None:
    return next((name for name in _COEFFICIENTS if hasattr(model.config, name)), None)


def _wish(model: nn.Module, default: float) -> float:
    """Return the coefficient that the config names, though the class does nothing with it."""
    given = (getattr(model.config, name, None) for name in _WISHES)
    return next((float(value) for value in given if value is not None), default)


def _computes_loss(cls: type) -> bool:
    """Whether a class's forward makes an `aux_loss`; many configs have the field all the same."""
    if any(base.__module__.partition(".")[0] == "moesaic" for base in cls.__mro__):
        return True
    code = inspect.unwrap(cls.forward).__code__  # type: ignore[attr-defined]
    return "aux_loss" in code.co_varnames
