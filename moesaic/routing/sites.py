"""Where a model routes: its routers and experts modules, and how to read what each one says.

A site is one routed layer. What counts is what the experts were really given, so both ends are
heard: the router's output (logits, gate weights) and the arguments of the experts module (chosen
ids and weights). Routers of this package return (logits, weights, ids[, kept]) and say
`is_moe_router = True`; those of transformers are read by the types and shapes of what they return,
and the few that return something else by class name.

Notation: rows = batch x sequence flattened, E experts, K chosen experts of a row.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

Stack = Literal["decoder", "encoder"]

_ROUTER = re.compile(r"^(gate|gating|router|moe_gate)$")
_ELSEWHERE = re.compile(r"(^|\.)(encoder|vision\w*|visual|audio\w*)(\.|$)")


class Choice(NamedTuple):
    """What one site decided in one call; a part that is nowhere to be read is None.

    `ids` [rows, K] int64, -1 where capacity dropped the choice; `weights` [rows, K] as the router
    gives them, before any factor outside of it (of a dropped choice: 0 or its probability);
    `logits` [rows, E], before softmax.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    logits: torch.Tensor | None


class Heard(NamedTuple):
    """Tensors kept by the hooks of one site, in the order in which they were heard."""

    router: tuple[Any, ...] | None
    experts: tuple[torch.Tensor, torch.Tensor] | None
    logits: torch.Tensor | None


Keep = Callable[[Any], tuple[Any, ...]]
Read = Callable[["Site", Heard], Choice]


@dataclass(eq=False)
class Site:
    """One routed layer of one stack: whom to listen to, and how to understand it."""

    layer: int
    kind: Literal["mlp", "attention"]
    stack: Stack
    path: str
    router_path: str
    experts_path: str
    owner: str
    """Path of the module that holds the list of layers: its calls are the forward passes."""
    router: nn.Module | None
    experts: nn.Module | None
    keep: Keep
    read: Read
    logits: nn.Module | None = None
    """A module whose output is the logits, where the router returns probabilities only."""
    calculator: nn.Module | None = None
    """LLaMA-MoE's calculator, which may leave scores out or drop tokens."""

    @property
    def own(self) -> bool:
        """Whether the router is of this package and gives (logits, weights, ids[, kept])."""
        return self.read is _read_own

    @property
    def experts_say_all(self) -> bool:
        """Whether the experts' arguments say everything but the logits."""
        return self.read is _read_any and self.experts is not None


def find_sites(model: nn.Module) -> list[Site]:
    """Return the routed layers of `model`, in the order of its modules."""
    modules = dict(model.named_modules())
    routers: dict[str, str | None] = {}  # router path -> experts path
    lonely: list[str] = []  # experts without a router module
    for path, module in modules.items():
        if getattr(module, "is_moe_router", False) or _special(module) is not None:
            routers.setdefault(path, None)
    for path, module in modules.items():
        if not _is_experts(path, module):
            continue
        router = _router_of(modules, path)
        if router is None:
            lonely.append(path)
        elif routers.get(router) is None:
            routers[router] = path
    sites = [_site(modules, router, experts) for router, experts in routers.items()]
    sites += [_site(modules, None, experts) for experts in lonely]
    order = {path: index for index, path in enumerate(modules)}
    return sorted(sites, key=lambda site: order[site.path])


def _is_experts(path: str, module: nn.Module) -> bool:
    """Whether `module` is called with (hidden states, ids, weights)."""
    if hasattr(module, "is_transposed") and hasattr(module, "has_bias"):
        return True  # transformers' experts interface
    own_forward = type(module).forward not in (nn.ModuleList.forward, nn.Module.forward)
    return path.rpartition(".")[2] == "experts" and own_forward


def _router_of(modules: dict[str, nn.Module], experts: str) -> str | None:
    """Return the router nearest to a module of experts: a child of one that holds both."""
    above = experts.rpartition(".")[0]
    while above and not above.rpartition(".")[2].isdigit():
        for name, child in modules[above].named_children():
            if getattr(child, "is_moe_router", False) or _ROUTER.match(name):
                return f"{above}.{name}"
        above = above.rpartition(".")[0]
    if above:  # the layer itself holds both (Gemma)
        for name, child in modules[above].named_children():
            if getattr(child, "is_moe_router", False) or _ROUTER.match(name):
                return f"{above}.{name}"
    return None


def _site(modules: dict[str, nn.Module], router: str | None, experts: str | None) -> Site:
    path = router or experts or ""
    owner, layer = _place(modules, path)
    module = None if router is None else modules[router]
    block = modules[path.rpartition(".")[0]]
    calculator = getattr(block, "calculator", None)
    attention = getattr(module, "routes", None) == "attention" or (
        _special(module) is not None and bool(re.search(r"self_att", path))
    )
    logits = None
    keep: Keep
    read: Read
    if getattr(module, "is_moe_router", False):
        keep, read = _keep_tensors, _read_own
    elif (special := _special(module)) is not None:
        keep, read = special
        experts = None
    else:
        keep, read = _keep_tensors, _read_any
        if _is_a(module, *_PROBABILITIES):
            logits = getattr(module, "proj", None)
    return Site(
        layer=layer,
        kind="attention" if attention else "mlp",
        stack="encoder" if _ELSEWHERE.search(owner) else "decoder",
        path=path,
        router_path=router or "",
        experts_path=experts or "",
        owner=owner,
        router=module,
        experts=None if experts is None else modules[experts],
        keep=keep,
        read=read,
        logits=logits,
        calculator=calculator if isinstance(calculator, nn.Module) else None,
    )


def _place(modules: dict[str, nn.Module], path: str) -> tuple[str, int]:
    """Return the module that holds the list of layers, and the number of the layer in it."""
    parts = path.split(".")
    for index, part in enumerate(parts):
        if part.isdigit() and isinstance(modules[".".join(parts[:index])], nn.ModuleList):
            return ".".join(parts[: index - 1]), int(part)
    return "", 0


def hear_experts(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return (ids, weights) from the arguments of a module of experts, or None."""
    if len(args) == 3 and not kwargs:  # the usual way, in a microsecond
        x, ids, weights = args
        if (
            isinstance(x, torch.Tensor)
            and isinstance(ids, torch.Tensor)
            and isinstance(weights, torch.Tensor)
            and x.dim() == 2 == ids.dim()
            and not ids.is_floating_point()
            and weights.is_floating_point()
            and weights.shape == ids.shape
        ):
            return ids, weights.detach()
    given = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.dim() == 2]
    ids = next((x for x in given[1:] if not x.is_floating_point()), None)
    if ids is None:
        return None
    weights = next((x for x in given[1:] if x.is_floating_point() and x.shape == ids.shape), None)
    return None if weights is None else (ids, weights.detach())


def _keep_tensors(output: Any) -> tuple[Any, ...]:
    """Keep the first four tensors of what a router returned, without their graph."""
    if isinstance(output, torch.Tensor):
        return (output.detach(),)
    if not isinstance(output, (tuple, list)):
        return ()
    return tuple([x.detach() for x in output[:4] if isinstance(x, torch.Tensor)])


def _read_own(site: Site, heard: Heard) -> Choice:
    """Read a router of this package: (logits, weights, ids[, kept])."""
    if heard.router is None:
        raise ValueError(f"{site.path} was not heard")
    logits, weights, ids = heard.router[:3]  # logits: None when nobody wants them
    kept = next((x for x in heard.router[3:] if x.dtype == torch.bool), None)
    if heard.experts is not None:
        given_ids, given_weights = heard.experts
        if given_ids.shape == ids.shape:
            ids = given_ids
            if kept is None and _is_a(site.calculator, "SwitchDropTokenCalculator"):
                # capacity is applied after the gate: what was dropped arrives with weight 0
                kept = (given_weights != 0) | (weights == 0)
    if not getattr(site.calculator, "multiply_gate_scores", True):
        weights = torch.ones_like(weights)
    if kept is not None:
        ids = ids.masked_fill(~kept, -1)
    return Choice(ids.long(), weights, logits)


def _read_any(site: Site, heard: Heard) -> Choice:
    """Read a router of unknown kind, the experts' arguments first."""
    logits, weights, ids = _triple(heard.router or ())
    if heard.logits is not None:
        logits = heard.logits
    if heard.experts is not None:
        ids, weights = heard.experts
    if ids is None or weights is None:
        raise ValueError(f"{site.path} says neither ids nor weights")
    return Choice(ids.long(), weights, None if logits is None else logits.flatten(0, -2))


def _triple(
    output: tuple[Any, ...],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Tell logits, weights and ids apart: ids are integers, logits the wider floats.

    Where K = E the shapes say nothing; the two orders in use are (logits, weights, ids) and
    (ids, weights, logits).
    """
    ids = next((x for x in output if not x.is_floating_point()), None)
    floats = [x for x in output if x.is_floating_point() and x.dim() >= 2]
    if ids is None:
        return (floats[0] if floats else None), None, None
    if output[0] is ids:
        floats = floats[::-1]
    chosen = next((x for x in floats[1:] if x.shape == ids.shape), None)
    return (floats[0] if floats else None), chosen, ids


def _keep_jetmoe(output: Any) -> tuple[Any, ...]:
    index_sorted, _, gates, sizes, logits = output
    return index_sorted, gates.detach(), sizes, logits.detach()


def _read_jetmoe(site: Site, heard: Heard) -> Choice:
    """JetMoE gives the choices sorted by expert: put them back where they came from."""
    if heard.router is None:
        raise ValueError(f"{site.path} was not heard")
    place_N, gates_N, sizes, logits = heard.router
    device = logits.device
    sizes_E = torch.as_tensor(sizes, device=device)
    expert_N = torch.repeat_interleave(torch.arange(len(sizes_E), device=device), sizes_E)
    ids_N = torch.empty_like(expert_N).scatter_(0, place_N, expert_N)
    weights_N = torch.empty_like(gates_N).scatter_(0, place_N, gates_N)
    rows = logits.shape[0]
    return Choice(ids_N.view(rows, -1), weights_N.view(rows, -1), logits)


def _keep_masks(output: Any) -> tuple[Any, ...]:
    return tuple(x.detach() for x in output)


def _read_switch(site: Site, heard: Heard) -> Choice:
    """Switch gives a one-hot choice, all zero where the expert was full."""
    if heard.router is None:
        raise ValueError(f"{site.path} was not heard")
    logits = heard.router[-1].flatten(0, -2)
    chosen, probs = heard.router[:2]
    if chosen.is_floating_point():  # transformers before 5.23: (probs, chosen, logits)
        chosen, probs = probs, chosen
    chosen, probs = chosen.reshape(logits.shape), probs.reshape(logits.shape[0], -1)
    ids = chosen.argmax(-1, keepdim=True)
    kept = chosen.any(-1, keepdim=True)
    weights = probs if probs.shape[1] == 1 else probs.gather(1, ids)
    return Choice(ids.masked_fill(~kept, -1), weights, logits)


def _read_nllb(site: Site, heard: Heard) -> Choice:
    """NLLB gives the first choice one-hot and the weights of both, [rows, E], zero if dropped."""
    if heard.router is None:
        raise ValueError(f"{site.path} was not heard")
    first, combined, logits = heard.router
    ids_1 = first.argmax(-1, keepdim=True)
    kept_1 = first.any(-1, keepdim=True)
    weight_1 = combined.gather(1, ids_1)
    others = combined.masked_fill(first.bool(), 0)
    weight_2, ids_2 = others.max(-1, keepdim=True)
    ids = torch.cat([ids_1.masked_fill(~kept_1, -1), ids_2.masked_fill(weight_2 <= 0, -1)], 1)
    weights = torch.cat([weight_1.masked_fill(~kept_1, 0), weight_2], 1)
    return Choice(ids, weights, logits)


_BY_CLASS: dict[str, tuple[Keep, Read]] = {
    "JetMoeTopKGating": (_keep_jetmoe, _read_jetmoe),
    "SwitchTransformersTop1Router": (_keep_masks, _read_switch),
    "NllbMoeTop2Router": (_keep_masks, _read_nllb),
}
"""Routers of transformers that return something else than logits, weights and ids."""
_PROBABILITIES = ("Gemma4TextRouter", "DiffusionGemmaTextRouter")
"""Routers of transformers that return probabilities; their `proj` gives the logits."""


def _is_a(module: object, *names: str) -> bool:
    """Whether the module's class, or one it derives from, has one of these names."""
    return any(cls.__name__ in names for cls in type(module).__mro__)


def _special(module: object) -> tuple[Keep, Read] | None:
    return next((how for name, how in _BY_CLASS.items() if _is_a(module, name)), None)
