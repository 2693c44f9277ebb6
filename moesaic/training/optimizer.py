"""AdamW with the groups a language model wants, and fp32 master copies for bf16 weights.

Decay leaves out biases and norm weights (LLaMA-MoE's rule: names with ``norm`` and one-dimensional
parameters). Routers may have a learning rate of their own; those that a construction fitted need
one, or the first updates undo them (benchmarks/construction.md).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from moesaic.training.config import OptimizerConfig

Named = list[tuple[str, nn.Parameter]]

_ROUTER_PARTS = ("gate_network", "weight_noise", "router", "mlp.gate.", "block_sparse_moe.gate.")
_WEIGHS = ("gate.correction", "gate.scale")
"""Parameters of a router that weigh the chosen experts only; it was fitted where it has them."""


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Say whether weight decay applies to a parameter."""
    return not (name.endswith("bias") or "norm" in name.lower() or parameter.ndim < 2)


def is_router(name: str) -> bool:
    """Say whether a parameter decides which experts are chosen, by its name."""
    return not name.endswith(_WEIGHS) and any(part in name for part in _ROUTER_PARTS)


def trainable(model: nn.Module) -> Named:
    """List the parameters that get gradients, tied ones once."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def router_lr(model: nn.Module, config: OptimizerConfig) -> float:
    """The factor on the learning rate of a model's routers."""
    if config.router_lr is not None:
        return config.router_lr
    return 0.1 if any(name.endswith(_WEIGHS) for name, _ in model.named_parameters()) else 1.0


class Optimizer:
    """AdamW over a model's parameters.

    Where the weights are bf16 or fp16 the update works on fp32 master copies, since a change
    smaller than 1/256 of a bf16 weight would be lost; the copies are then the truth and are saved
    with the state.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        self.config = config
        self.model_parameters = trainable(model)
        self.parameters: Named = [(name, _master(p)) for name, p in self.model_parameters]
        self.has_masters = any(
            master is not p
            for (_, master), (_, p) in zip(self.parameters, self.model_parameters, strict=True)
        )
        groups, factor = [], router_lr(model, config)
        for router in (False, True):
            for decay in (True, False):
                members = [
                    p
                    for name, p in self.parameters
                    if decays(name, p) is decay and is_router(name) is router
                ]
                if members:
                    groups.append(
                        {
                            "params": members,
                            "weight_decay": config.weight_decay if decay else 0.0,
                            "lr_scale": factor if router else 1.0,
                        }
                    )
        self.inner = torch.optim.AdamW(
            groups,
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            fused=all(p.device.type in ("cpu", "cuda") for _, p in self.parameters),
        )

    def step(self) -> torch.Tensor:
        """Clip, update, clear the gradients; return the norm before clipping, on the device."""
        if self.has_masters:
            self._move_gradients()
        parameters = [p for _, p in self.parameters]
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.config.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.clip, norm)
        self.inner.step()
        self.inner.zero_grad(set_to_none=True)
        if self.has_masters:
            self._write_back()
        return norm

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the whole state as named tensors: ``<parameter>::exp_avg`` and so on."""
        found: dict[str, torch.Tensor] = {}
        for (name, p), (_, model_p) in zip(self.parameters, self.model_parameters, strict=True):
            for key, value in self.inner.state.get(p, {}).items():
                found[f"{name}::{key}"] = torch.as_tensor(value)
            if p is not model_p:
                found[f"{name}::master"] = p.detach()
        return found

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restore what `tensors` returned."""
        by_parameter: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            name, _, kind = key.rpartition("::")
            by_parameter.setdefault(name, {})[kind] = value
        for (name, p), (_, model_p) in zip(self.parameters, self.model_parameters, strict=True):
            values = by_parameter.get(name, {})
            if p is not model_p:
                with torch.no_grad():
                    p.copy_(values.pop("master"))
            if values:
                # The fused update wants its step count on the parameters' device.
                self.inner.state[p] = {kind: value.to(p.device) for kind, value in values.items()}

    def _move_gradients(self) -> None:
        for (_, master), (_, p) in zip(self.parameters, self.model_parameters, strict=True):
            if master is not p:
                master.grad = None if p.grad is None else p.grad.to(master.dtype)
                p.grad = None

    @torch.no_grad()
    def _write_back(self) -> None:
        pairs = zip(self.model_parameters, self.parameters, strict=True)
        moved = [(p, master) for (_, p), (_, master) in pairs if master is not p]
        torch._foreach_copy_([p for p, _ in moved], [master for _, master in moved])


def count(parameters: Iterable[torch.Tensor]) -> int:
    """Count elements."""
    return sum(p.numel() for p in parameters)


def _master(p: nn.Parameter) -> nn.Parameter:
    if p.dtype in (torch.bfloat16, torch.float16):
        return nn.Parameter(p.detach().float())
    return p
