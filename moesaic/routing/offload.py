"""Run a mixture of experts with most of its experts in host memory: `moesaic.offload`.

    with moesaic.offload(model, cache=2.0, policy="lru") as off:
        model.generate(input_ids)
    off.hit_rate                    # as `caches.hit_rates` finds it on the same routing

Every MoE layer keeps cache x top_k experts on the device (arXiv 2505.16056, section 3.3), or all
layers share as many (`scope="model"`); the others wait in page-locked memory and travel when they
are asked for. A call that needs more experts than there are slots runs in rounds, each expert once,
and adds up every token's experts at the end, so that results do not depend on the rounds. While a
layer computes, the router of the next one is shown the same input, and the experts that it would
choose set out (Eliseev and Mazur, arXiv 2312.17238): a wrong guess costs transfers, nothing else,
and where most are wrong, guessing stops.

Hits are counted by the rules of `moesaic.routing.policy`: a guess may hide a miss, never turn it
into a hit. Every row counts that the experts compute, padding too.

Notation: rows = batch x sequence flattened, R rows, K experts of a row, E experts, L layers.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import sys
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from moesaic.core.console import note
from moesaic.core.errors import MoesaicError, UserError
from moesaic.kernels.grouped import combine
from moesaic.models.anatomy import anatomy
from moesaic.routing.live import LiveCache, PassBooks, live_cache
from moesaic.routing.policy import PriorityPolicy
from moesaic.routing.sites import Heard, Site, find_sites
from moesaic.routing.slots import MOST_SLOTS, Bank, Lane, Shelf, Staging, page_lock
from moesaic.routing.trace import Trace

if TYPE_CHECKING:
    from moesaic.routing.throughput import Measured

__all__ = ["Offload", "offload"]

LivePolicy = Literal["lru", "lfu", "fixed"]
_FEW_ROWS = 64  # so few compute faster together than while others travel
_RUNNING: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@contextlib.contextmanager
def offload(
    model: nn.Module | Path | str,
    *,
    cache: float = 2.0,
    policy: LivePolicy | PriorityPolicy = "lru",
    scope: Literal["layer", "model"] = "layer",
    device: torch.device | str | None = None,
    prefetch: bool = True,
    usage: Trace | Path | str | ArrayLike | None = None,
    **loading: Any,
) -> Iterator[Offload]:
    """Keep `cache` x top_k experts of every MoE layer on the device while the block runs.

    Outputs are those of the model itself, up to rounding. For inference: gradients do not pass the
    experts. On leaving, with or without an exception, everything is where it was.

    Args:
        model: a model, or a path, hub id or alias: then it is loaded into host memory and only what
            stays goes to the device; see `Offload.model`.
        cache: slots over top_k, rounded; at least top_k slots, at most all experts.
        policy: who leaves when another expert comes: "lru"; "lfu"; "fixed", where the experts used
            most stay (needs `usage`); or a `PriorityPolicy` of your own that does not look ahead.
        scope: slots of each layer for itself, or cache x top_k x layers shared by all.
        device: where to compute. None: where the experts are; for a path, the GPU if there is one.
            On a CPU, slots are tensors in the same memory.
        prefetch: guess what the next layer will ask for.
        usage: for "fixed": a trace, or how often each expert was asked for, [layers, experts].
        loading: keywords of `moesaic.load`, where `model` is to be loaded.

    Raises:
        UserError: a model without experts, or whose experts are no 3-D weights; a cache of 0 or
            less; a policy that looks ahead; a model that is offloaded already.
    """
    if isinstance(model, nn.Module):
        if loading:
            raise UserError(
                f"{', '.join(loading)} was given with a model that is loaded already. Give it to "
                "moesaic.load."
            )
    else:
        from moesaic.models.load import load

        loading.setdefault("device_map", "cpu")
        model = load(model, **loading)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    inner = getattr(model, "_orig_mod", model)  # what torch.compile(model) wraps
    with contextlib.ExitStack() as stack:
        if inner is not model or "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        off = Offload(inner, model)
        off._enter(stack, cache, policy, scope, device, prefetch, usage)
        yield off


@dataclass(eq=False)
class _Layer:
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
        return sum(p.data[0].nbytes for p in self.host.values())

    @property
    def layout(self) -> tuple[Any, ...]:
        """Layers with the same can share slots."""
        parts = [(name, p.dtype, p.shape[1:]) for name, p in self.host.items()]
        return self.device, tuple(parts)


@dataclass(eq=False)
class Offload:
    """A model while its experts are offloaded, and the counts of what was asked and fetched."""

    _inner: nn.Module
    model: Any
    """The model, as it was given or loaded."""
    cache: float = 0.0
    policy: str = ""
    scope: str = "layer"
    prefetch: bool = True
    slots: tuple[int, ...] = ()
    """Slots of each cache: a number a layer, or one."""
    layers: tuple[int, ...] = ()
    """Decoder layer index of each MoE layer."""
    _layers: list[_Layer] = field(default_factory=list)
    _shelves: list[Shelf] = field(default_factory=list)
    _books: PassBooks | None = None
    _lanes: dict[torch.device, Lane] = field(default_factory=dict)
    _staging: dict[Any, Staging] = field(default_factory=dict)
    _stride: int = 0
    """E: the key of an expert is place x E + id."""
    _idle: bool = False
    """Nothing travels, results are wrong: for timing alone."""

    @property
    def requests(self) -> NDArray[np.int64]:
        """Requests so far, of each cache: [L], or [1] for the whole model."""
        return np.array([cache.requests for cache in self._counted()])

    @property
    def hits(self) -> NDArray[np.int64]:
        """Requests that hit by the simulation's rule, of each cache: [L], or [1]."""
        return np.array([cache.hits for cache in self._counted()])

    @property
    def hit_rate(self) -> float:
        """Share of all requests that hit; NaN before the first."""
        asked = int(self.requests.sum())
        return float(self.hits.sum()) / asked if asked else math.nan

    @property
    def loads(self) -> int:
        """Experts that travelled because they were asked for, fillings of empty slots included."""
        return sum(shelf.loads for shelf in self._shelves)

    @property
    def guesses(self) -> int:
        """Experts that set out because the router before said so."""
        return sum(shelf.guesses for shelf in self._shelves)

    @property
    def used_guesses(self) -> int:
        """Experts asked for that had set out before, because they were guessed."""
        return sum(shelf.used_guesses for shelf in self._shelves)

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert (of the largest)."""
        return max(layer.expert_bytes for layer in self._layers)

    @property
    def device_bytes(self) -> int:
        """Bytes of all slots on devices, those for guesses included."""
        banks = [bank for shelf in self._shelves for bank in shelf.banks]
        banks += [staging.bank for staging in self._staging.values()]
        return sum(bank.nbytes for bank in banks)

    @property
    def host_bytes(self) -> int:
        """Bytes of all experts in host memory."""
        return sum(p.nbytes for layer in self._layers for p in layer.host.values())

    @property
    def num_experts(self) -> tuple[int, ...]:
        """Experts of each layer."""
        return tuple(layer.experts for layer in self._layers)

    def clear(self) -> None:
        """Empty the caches and the counts, as a sample of a simulation starts."""
        for shelf in self._shelves:
            shelf.live.clear()
            if self.policy != "fixed":
                shelf.clear()
            shelf.forget()
        if self._books is not None:
            self._books.clear()

    def measure(self, input_ids: torch.Tensor, *, new_tokens: int = 32) -> Measured:
        """Read a prompt [B, T], decode greedily, and return tokens/s measured and predicted.

        Empties the caches first. Bandwidth is that of one expert on its way to a slot; the time
        without transfers is measured on a second run in which nothing travels.
        """
        from moesaic.routing.throughput import measure

        return measure(self, input_ids, new_tokens=new_tokens)

    def _counted(self) -> list[LiveCache]:
        if self._books is not None:
            return [self._books.cache]
        return [shelf.live for shelf in self._shelves]

    # Entering

    def _enter(
        self,
        stack: contextlib.ExitStack,
        cache: float,
        policy: str | PriorityPolicy,
        scope: str,
        device: torch.device | str | None,
        prefetch: bool,
        usage: Any,
    ) -> None:
        if isinstance(cache, bool) or not isinstance(cache, (int, float)) or not cache > 0:
            raise UserError(f"cache={cache!r} was given. Give slots over top_k, such as 2.0.")
        if scope not in ("layer", "model"):
            raise UserError(f"scope='{scope}' is unknown. Use layer or model.")
        if self._inner in _RUNNING:
            raise UserError("the model is offloaded already. Leave that block first.")
        self.cache, self.scope, self.prefetch = float(cache), scope, prefetch
        self.policy = policy if isinstance(policy, str) else type(policy).__name__
        wanted = None if device is None else _device(device)
        self._layers = layers = _layers(self._inner, wanted)
        self.layers = tuple(layer.site.layer for layer in layers)
        self._stride = max(layer.experts for layer in layers)
        counts = None if usage is None else self._usage(usage)
        if scope == "model" and len({layer.layout for layer in layers}) > 1:
            raise UserError(
                "scope='model' shares slots among layers, but their experts differ in shape or "
                "device. Use scope='layer'."
            )
        sizes = self._sizes(cache)
        lives = self._lives(policy, sizes, counts)
        _RUNNING.add(self._inner)
        stack.callback(_RUNNING.discard, self._inner)
        for layer in layers:
            self._lanes.setdefault(layer.device, Lane(layer.device))
        with torch.no_grad():
            for layer in layers:
                _to_host(stack, layer)
            if wanted is not None:
                _rest_to(stack, self._inner, layers, wanted)
            stack.callback(self._finish)  # before the experts want their place on the GPU back
            self._shelve(sizes, lives)
        for layer in layers:
            self._put_in(stack, layer)
        for lane in self._lanes.values():
            lane.finish()

    def _sizes(self, cache: float) -> tuple[int, ...]:
        """Slots of each cache: rounded, half up."""
        layers = self._layers
        if self.scope == "model":
            base, most = sum(x.top_k for x in layers), sum(x.experts for x in layers)
            least = max(x.top_k for x in layers)
            sizes = [min(most, max(least, math.floor(cache * base + 0.5)))]
        else:
            sizes = [
                min(x.experts, max(x.top_k, math.floor(cache * x.top_k + 0.5))) for x in layers
            ]
        self.slots = tuple(sizes)
        return self.slots

    def _lives(
        self, policy: str | PriorityPolicy, sizes: tuple[int, ...], counts: NDArray[Any] | None
    ) -> list[LiveCache]:
        experts = len(self._layers) * self._stride
        if self.scope == "model":
            flat = None if counts is None else counts.ravel()
            self._books = PassBooks(live_cache(policy, sizes[0], experts, flat), len(self._layers))
            return [live_cache(policy, sizes[0], experts, flat)]
        found = []
        for layer, size in zip(self._layers, sizes, strict=True):
            own = None
            if counts is not None:  # experts of other layers never come
                own = np.full(experts, -1.0)
                own[layer.place * self._stride :][: layer.experts] = counts[layer.place][
                    : layer.experts
                ]
            found.append(live_cache(policy, size, experts, own))
        return found

    def _usage(self, usage: Any) -> NDArray[np.float64]:
        """Requests of each expert, [L, E]."""
        wanted = (len(self._layers), self._stride)
        if isinstance(usage, (Trace, Path, str)):
            trace = usage if isinstance(usage, Trace) else Trace(usage)
            missing = [layer for layer in self.layers if layer not in trace.layers]
            if missing or trace.num_experts > self._stride:
                raise UserError(
                    f"{trace.directory} is a trace of another model: it has layers "
                    f"{list(trace.layers)} of {trace.num_experts} experts, the model "
                    f"{list(self.layers)} of {self._stride}. Record this model."
                )
            found = np.zeros(wanted)
            for start in range(0, len(trace), 1 << 16):
                ids_RLK = trace.chosen(start, start + (1 << 16))
                for row, layer in zip(found, self.layers, strict=True):
                    ids = ids_RLK[:, trace.layers.index(layer)].ravel()
                    row += np.bincount(ids[ids >= 0], minlength=self._stride)
            return found
        given: NDArray[np.float64] = np.asarray(usage, dtype=np.float64)
        if given.shape != wanted:
            raise UserError(f"usage has the shape {given.shape}. Give counts {wanted}, or a trace.")
        return given

    def _shelve(self, sizes: tuple[int, ...], lives: list[LiveCache]) -> None:
        whole = self.scope == "model"
        for place, (size, live) in enumerate(zip(sizes, lives, strict=True)):
            layer = self._layers[place]
            lane = self._lanes[layer.device]
            parts = [min(MOST_SLOTS, size - start) for start in range(0, size, MOST_SLOTS)]
            like = {name: p.data for name, p in layer.host.items()}
            banks = [Bank(like, part, layer.device) for part in parts]
            every = sum(x.experts for x in self._layers) if whole else layer.experts
            staging = None
            if size < every:
                staging = self._staging.get(layer.layout)
                if staging is None:
                    spare = max(2, *(x.top_k for x in self._layers if x.layout == layer.layout))
                    staging = Staging(Bank(like, spare, layer.device))
                    self._staging[layer.layout] = staging
            shelf = Shelf(live, banks, staging, lane, self._expert)
            self._shelves.append(shelf)
            if live.resident_E.any():
                shelf.preload()

    def _put_in(self, stack: contextlib.ExitStack, layer: _Layer) -> None:
        """Let the layer's experts be run by `_run`."""
        module: Any = layer.module
        before = module.__dict__.get("forward")

        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            return self._run(layer, args, kwargs)

        def restore() -> None:
            if before is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = before

        stack.callback(restore)
        module.forward = forward
        if layer.site.own and layer.site.router is not None:

            def hear(router: nn.Module, args: Any, output: Any) -> None:
                layer.heard = layer.site.keep(output)

            stack.callback(layer.site.router.register_forward_hook(hear).remove)

    def _finish(self) -> None:
        """Let go of the slots; counts stay."""
        for lane in self._lanes.values():
            lane.finish()
        for shelf in self._shelves:
            shelf.clear()
            shelf.banks.clear()
        self._staging.clear()

    def _expert(self, key: int) -> list[torch.Tensor]:
        """The tensors of one expert in host memory."""
        place, expert = divmod(key, self._stride)
        return [p.data[expert] for p in self._layers[place].host.values()]

    # Running

    def _run(self, layer: _Layer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        given = {**dict(zip(layer.names, args, strict=False)), **kwargs}
        x, ids, weights = (given[name] for name in layer.names)
        with torch.no_grad():
            x_RD = x.reshape(-1, x.shape[-1])
            ids_RK = ids.reshape(len(x_RD), -1)
            weights_RK = weights.reshape(ids_RK.shape)
            out = self._compute(layer, x_RD, ids_RK, weights_RK).view_as(x)
        if torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad):
            out = _NoGradient.apply(out, x, weights)
        return out

    def _compute(
        self, layer: _Layer, x_RD: torch.Tensor, ids_RK: torch.Tensor, weights_RK: torch.Tensor
    ) -> torch.Tensor:
        shelf = self._shelves[0 if self.scope == "model" else layer.place]
        keys_RK, counted_RK, guess = self._fetch(layer, x_RD, ids_RK, weights_RK)
        if self._idle:
            bank = shelf.banks[0]
            slots_RK = keys_RK % bank.size
            return self._call(layer, bank, x_RD, _on(slots_RK, ids_RK), weights_RK)
        shelf.live.serve(counted_RK)
        if self._books is not None:
            self._books.report(layer.place, counted_RK)
        needed = list(dict.fromkeys(keys_RK.ravel().tolist()))
        rows, top_k = ids_RK.shape
        y_ND = None
        first = layer.place * self._stride
        for steps in shelf.rounds(needed, at_once=rows <= _FEW_ROWS):
            for bank, slots in steps:
                slot_E = np.full(layer.experts, -1, dtype=np.int64)
                for key, slot in slots.items():
                    slot_E[key - first] = slot
                slots_RK = slot_E[keys_RK - first]
                if len(slots) == len(needed):
                    out_RD = self._call(layer, bank, x_RD, _on(slots_RK, ids_RK), weights_RK)
                    continue
                # as many tokens with one expert each: every product is that of the whole call
                at = np.flatnonzero(slots_RK.ravel() >= 0)
                at_N = _on(at, ids_RK)
                y = self._call(
                    layer,
                    bank,
                    x_RD.index_select(0, at_N // top_k),
                    _on(slots_RK.ravel()[at], ids_RK)[:, None],
                    weights_RK.reshape(-1, 1).index_select(0, at_N),
                )
                if y_ND is None:
                    y_ND = y.new_empty(rows * top_k, y.shape[1])
                y_ND.index_copy_(0, at_N, y)
        if y_ND is not None:
            out_RD = combine(y_ND, torch.arange(len(y_ND), device=y_ND.device), top_k)
        if guess is not None:
            following = self._layers[layer.place + 1]
            shelf = self._shelves[0 if self.scope == "model" else following.place]
            most = min(following.top_k, shelf.staging.bank.size) if shelf.staging else 0
            shelf.guess(guess, most=most)
        return out_RD

    def _fetch(
        self, layer: _Layer, x_RD: torch.Tensor, ids_RK: torch.Tensor, weights_RK: torch.Tensor
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], list[int] | None]:
        """Bring the ids to the host, in one piece: keys, keys that count, guesses (most first)."""
        counted = ids_RK
        if layer.heard is not None:
            heard, layer.heard = Heard(layer.heard, (ids_RK, weights_RK), None), None
            counted = layer.site.read(layer.site, heard).ids
        parts = [ids_RK.long()] if counted is ids_RK else [ids_RK.long(), counted.long()]
        guessed = self._guess(layer, x_RD)
        if guessed is not None:
            parts.append(guessed)
        flat = torch.cat([part.reshape(-1) for part in parts]).cpu().numpy()
        size = ids_RK.numel()
        first = layer.place * self._stride
        keys_RK = flat[:size].reshape(ids_RK.shape) + first
        counted_RK = keys_RK
        if counted is not ids_RK:
            raw_RK = flat[size : 2 * size].reshape(ids_RK.shape)
            counted_RK = np.where(raw_RK >= 0, raw_RK + first, -1)
        if guessed is None:
            return keys_RK, counted_RK, None
        found, at, times = np.unique(
            flat[-guessed.numel() :], return_index=True, return_counts=True
        )
        order = np.lexsort((at, -times))  # the most wanted; of one row, the highest score
        return keys_RK, counted_RK, (found[order] + first + self._stride).tolist()

    def _guess(self, layer: _Layer, x_RD: torch.Tensor) -> torch.Tensor | None:
        """What the next layer's router would choose for this layer's input, or None."""
        if not self.prefetch or self._idle or layer.place + 1 == len(self._layers):
            return None
        following = self._layers[layer.place + 1]
        router: Any = following.site.router
        shelf = self._shelves[0 if self.scope == "model" else following.place]
        if (
            not following.guessing
            or router is None
            or router.training
            or shelf.staging is None
            or not shelf.guesses_pay
            or following.device != layer.device
        ):
            return None
        try:
            # not through hooks; a gate of ours may draw noise when it is called
            logits = getattr(router, "logits", None)
            found = logits(x_RD) if callable(logits) else router.forward(x_RD)
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            following.guessing = False
            note(f"offload: layer {following.site.layer} is not guessed ahead ({error}).")
            return None
        parts = found if isinstance(found, (tuple, list)) else (found,)
        tensors = [part for part in parts if isinstance(part, torch.Tensor)]
        ids = next((x for x in tensors if not x.is_floating_point() and x.dim() == 2), None)
        if ids is None and tensors and tensors[0].shape[-1] == following.experts:
            ids = tensors[0].reshape(-1, following.experts).topk(following.top_k).indices
        if ids is None or ids.shape[-1] > following.experts:
            following.guessing = False
            return None
        return ids.long().clamp(0, following.experts - 1)

    def _call(
        self,
        layer: _Layer,
        bank: Bank,
        x_RD: torch.Tensor,
        slots_RK: torch.Tensor,
        weights_RK: torch.Tensor,
    ) -> torch.Tensor:
        """Run the module's own code on slots in place of experts."""
        module: Any = layer.module
        experts = module.__dict__.get("num_experts")
        try:
            module._parameters.update(bank.tensors)
            if experts is not None:
                module.num_experts = bank.size
            out: torch.Tensor = layer.inner(x_RD, slots_RK, weights_RK)
            return out
        finally:
            module._parameters.update(layer.host)
            if experts is not None:
                module.num_experts = experts


class _NoGradient(torch.autograd.Function):
    """Passes values on; says why there is no gradient where one is asked for."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise MoesaicError(
            "offloaded experts are for inference: gradients do not pass them. Train the model "
            "outside of moesaic.offload."
        )


def _layers(model: nn.Module, device: torch.device | None) -> list[_Layer]:
    """Find the layers to offload. Raises UserError where there is none, or one in another form."""
    sites = [site for site in find_sites(model) if site.kind == "mlp"]
    if not sites:
        raise UserError(
            f"{type(model).__name__} has no experts: it is a dense model. Offload a mixture of "
            "experts."
        )
    facts = {layer.experts: layer for layer in anatomy(model).layers}  # type: ignore[arg-type]
    found: list[_Layer] = []
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
            _Layer(
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


def _to_host(stack: contextlib.ExitStack, layer: _Layer) -> None:
    """Move a layer's experts to host memory, page-locked for a GPU; undone by `stack`."""
    for parameter in layer.host.values():
        before, given = parameter.data.device, parameter.data
        data = given.cpu()
        if layer.device.type == "cuda":
            data = stack.enter_context(page_lock(data))
        if before.type == "cpu":
            stack.callback(setattr, parameter, "data", given)
        else:
            del given  # its memory is what slots need
            stack.callback(_bring_back, parameter, before)
        parameter.data = data


def _bring_back(parameter: nn.Parameter, device: torch.device) -> None:
    with torch.no_grad():
        parameter.data = parameter.data.to(device)


def _rest_to(
    stack: contextlib.ExitStack, model: nn.Module, layers: list[_Layer], device: torch.device
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


def _device(name: torch.device | str) -> torch.device:
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


def _on(array: NDArray[np.int64], like: torch.Tensor) -> torch.Tensor:
    """Send a small array of integers to where `like` is."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(like.device, non_blocking=True)
