"""Where the weights of an offloaded model lie: experts in host memory, the rest on the device.

Everything that moves is moved back by the exit stack that the functions are given. A parameter
stays the object it was; its data lies elsewhere.
"""

from __future__ import annotations

import contextlib
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moesaic.core.errors import UserError
from moesaic.models.anatomy import anatomy
from moesaic.routing.sites import Site, find_sites
from moesaic.routing.slots import page_lock

__all__ = ["Layer", "device_of", "experts_to_host", "find_layers", "rest_to"]


@dataclass(eq=False)
class Layer:
    """One MoE layer: its experts module, and what is asked of it."""

    place: int
    site: Site
    module: nn.Module
    top_k: int
    experts: int
    host: dict[str, nn.Parameter]
    """Weights by expert; while offloaded their data is in host memory."""
    device: torch.device
    names: list[str]
    """Of the first three arguments: rows, ids, weights."""
    inner: Any
    """The module's own forward."""
    heard: Any = None
    """What its router last returned (routers of this package)."""
    guessing: bool = True

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert."""
        return sum(p.data[0].nbytes for p in self.host.values())

    @property
    def layout(self) -> tuple[Any, ...]:
        """Layers with the same can share slots."""
        parts = [(name, p.dtype, p.shape[1:]) for name, p in self.host.items()]
        return self.device, tuple(parts)


def find_layers(model: nn.Module, device: torch.device | None) -> list[Layer]:
    """Find the layers to offload. Raises UserError where there is none, or one in another form."""
    sites = [site for site in find_sites(model) if site.kind == "mlp"]
    if not sites:
        raise UserError(
            f"{type(model).__name__} has no experts: it is a dense model. Offload a mixture of "
            "experts."
        )
    facts = {layer.experts: layer for layer in anatomy(model).layers}  # type: ignore[arg-type]
    found: list[Layer] = []
    for site in sites:
        module, fact = site.experts, facts.get(site.experts_path)
        host: dict[str, nn.Parameter] = {}
        if module is not None and fact is not None:
            host = {
                name: parameter
                for name, parameter in module._parameters.items()
                if parameter is not None
                and parameter.dim() >= 2
                and parameter.shape[0] == fact.num_experts
            }
        if module is None or fact is None or sum(p.dim() == 3 for p in host.values()) < 2:
            raise UserError(
                f"{type(model).__name__}: the experts of {site.path} are no 3-D weights "
                "[experts, ., .], the form that moesaic offloads. accelerate's device_map offloads "
                "whole layers of any model."
            )
        if getattr(module, "_is_expert_parallel", False):
            raise UserError("the model runs expert-parallel. Offload a model of one process.")
        first = next(iter(host.values()))
        if first.device.type == "meta":
            raise UserError(
                f"the weights of {site.experts_path} are not in memory: accelerate keeps them "
                "elsewhere. Load the model with device_map='cpu' and give device."
            )
        names = [
            name
            for name, parameter in inspect.signature(type(module).forward).parameters.items()
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        ][1:4]
        found.append(
            Layer(
                len(found),
                site,
                module,
                fact.top_k,
                fact.num_experts,
                host,
                device or first.device,
                names,
                module.forward,
            )
        )
    return found


def experts_to_host(stack: contextlib.ExitStack, layer: Layer) -> None:
    """Move a layer's experts to host memory, page-locked for a GPU; undone by `stack`."""
    for parameter in layer.host.values():
        before, given = parameter.data.device, parameter.data
        if layer.device.type != "cuda":
            data = given.cpu()
        elif before.type == "cpu":
            data = stack.enter_context(page_lock(given))
        else:  # locked first: a GPU writes into such memory ten times as fast
            empty = torch.empty_like(given, device="cpu")
            data = stack.enter_context(page_lock(empty)).copy_(given)
        if before.type == "cpu":
            stack.callback(setattr, parameter, "data", given)
        else:
            del given  # its memory is what slots need
            stack.callback(_bring_back, parameter, before)
        parameter.data = data


def _bring_back(parameter: nn.Parameter, device: torch.device) -> None:
    with torch.no_grad():
        parameter.data = parameter.data.to(device)


def rest_to(
    stack: contextlib.ExitStack, model: nn.Module, layers: list[Layer], device: torch.device
) -> None:
    """Move all but the experts to the device; undone by `stack`."""
    experts = {id(parameter) for layer in layers for parameter in layer.host.values()}
    for parameter in model.parameters():
        if id(parameter) not in experts and parameter.device != device:
            stack.callback(setattr, parameter, "data", parameter.data)
            parameter.data = parameter.data.to(device)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device:
                stack.callback(module._buffers.__setitem__, name, buffer)
                module._buffers[name] = buffer.to(device)


def device_of(name: torch.device | str) -> torch.device:
    """Return the device called `name`. Raises UserError for one that is not there."""
    try:
        found = torch.device(name)
    except RuntimeError:
        raise UserError(f"device '{name}' is unknown. Use cpu, cuda or cuda:N.") from None
    if found.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"device is '{name}' but this machine has no CUDA GPU. Use cpu.")
        if found.index is None:
            found = torch.device("cuda", torch.cuda.current_device())
    return found
