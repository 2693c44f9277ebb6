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
import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from moesaic.core.errors import UserError
from moesaic.routing.live import LiveCache, PassBooks, live_cache
from moesaic.routing.placement import Layer, device_of, experts_to_host, find_layers, rest_to
from moesaic.routing.policy import PriorityPolicy
from moesaic.routing.recording import _may_be_compiled
from moesaic.routing.running import Runner
from moesaic.routing.slots import MOST_SLOTS, Bank, Lane, Shelf, Staging
from moesaic.routing.trace import Trace

if TYPE_CHECKING:
    from moesaic.routing.throughput import Measured

__all__ = ["Offload", "offload"]

LivePolicy = Literal["lru", "lfu", "fixed"]
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
        if inner is not model or _may_be_compiled(inner):  # compiled code calls no forward of ours
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        off = Offload(inner, model)
        off._enter(stack, cache, policy, scope, device, prefetch, usage)
        yield off


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
    _layers: list[Layer] = field(default_factory=list)
    _shelves: list[Shelf] = field(default_factory=list)
    _books: PassBooks | None = None
    """Counts for the scope "model"."""
    _lanes: dict[torch.device, Lane] = field(default_factory=dict)
    _staging: dict[Any, Staging] = field(default_factory=dict)
    _stride: int = 0
    """E: the key of an expert is place x E + id."""
    _runner: Runner | None = None

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
        wanted = None if device is None else device_of(device)
        self._layers = layers = find_layers(self._inner, wanted)
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
                experts_to_host(stack, layer)
            if wanted is not None:
                rest_to(stack, self._inner, layers, wanted)
            stack.callback(self._finish)  # before the experts want their place on the GPU back
            self._shelve(sizes, lives)
        self._runner = Runner(layers, self._shelves, self._books, self._stride, prefetch)
        for layer in layers:
            _put_in(stack, layer, self._runner)
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
        for lane in self._lanes.values():
            lane.finish()  # slots are zeroed by the computing stream: nothing travels before
        for shelf in self._shelves:
            if shelf.live.resident_E.any():
                shelf.preload()

    def _finish(self) -> None:
        """Let go of the slots; counts stay."""
        for lane in self._lanes.values():
            lane.finish()
        for shelf in self._shelves:
            shelf.clear()
            shelf.banks.clear()
            shelf.staging = None
        self._staging.clear()

    def _expert(self, key: int) -> list[torch.Tensor]:
        """The tensors of one expert in host memory."""
        place, expert = divmod(key, self._stride)
        return [p.data[expert] for p in self._layers[place].host.values()]


def _put_in(stack: contextlib.ExitStack, layer: Layer, runner: Runner) -> None:
    """Let the layer's experts be run by `runner`."""
    module: Any = layer.module
    before = module.__dict__.get("forward")

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        return runner.run(layer, args, kwargs)

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
