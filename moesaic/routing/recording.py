"""Watch a model route: which experts every row of a forward pass really went to.

    with moesaic.recording(model) as rec:
        model(input_ids)
    rec.experts[3]          # layer 3: chosen experts, [rows, K]

Forward hooks only. They keep references to what the routers returned anyway: nothing is copied or
waited for while the model runs; tensors are put together and moved to the CPU when they are read.

Notation: rows = batch x sequence flattened, E experts, K chosen experts of a row.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from moesaic.core.console import note
from moesaic.core.errors import MoesaicError, UserError
from moesaic.routing.sites import Choice, Heard, Site, Stack, find_sites, hear_experts

_KEPT_BYTES = 2**30
"""What may wait on an accelerator before it is moved to the CPU, so that long recordings fit."""


class Routes:
    """What one group of routers chose: dicts keyed by layer, and which rows count.

    Row r of every tensor is the same token: batch x sequence flattened, forward pass after forward
    pass. Tensors are on the CPU; they are put together when an attribute is read.
    """

    def __init__(self, stream: _Stream, sites: list[Site]) -> None:
        self._stream = stream
        self._sites = {site.layer: site for site in sites}
        self._read: dict[str, tuple[int, Any]] = {}

    @property
    def experts(self) -> dict[int, torch.Tensor]:
        """Chosen experts [rows, K] int64 by layer; -1 where capacity dropped the choice.

        Highest score first where the family defines an order.
        """
        return self._gathered("ids")

    @property
    def weights(self) -> dict[int, torch.Tensor]:
        """Gate weights [rows, K] by layer, before any scale factor; 1 where scores are not used.

        A dropped choice has what its router gave it: 0, or its probability (Switch).
        """
        return self._gathered("weights")

    @property
    def logits(self) -> dict[int, torch.Tensor]:
        """Router logits [rows, E] by layer, before softmax; empty with `logits=False`."""
        return self._gathered("logits")

    @property
    def mask(self) -> torch.Tensor:
        """Rows that count, bool [rows]: False for padding."""
        return self._cached("mask", self._mask)

    @property
    def calls(self) -> list[int]:
        """Borders of the forward passes: pass i is the rows calls[i] to calls[i + 1]."""
        borders = [0]
        for call in self._stream.calls:
            borders.append(borders[-1] + call.rows)
        return borders

    def drain(self) -> dict[int, Choice]:
        """Return what was recorded since the last `drain`, by layer, and forget it.

        Nothing is moved: tensors stay on the devices where they were made. The routes of one stack
        (a decoder's feed-forward and attention routers) are forgotten together.
        """
        calls = self._stream.take()
        return {
            layer: choices[0] if len(choices) == 1 else _merged(choices)
            for layer, site in self._sites.items()
            if (choices := [choice for call in calls for choice in call.choices(site)])
        }

    def _gathered(self, what: str) -> dict[int, torch.Tensor]:
        return self._cached(what, lambda: self._gather(what))

    def _cached(self, what: str, make: Any) -> Any:
        known = self._read.get(what)
        if known is None or known[0] != self._stream.version:
            known = self._read[what] = (self._stream.version, make())
        return known[1]

    def _gather(self, what: str) -> dict[int, torch.Tensor]:
        found = {}
        for layer, site in self._sites.items():
            parts = [
                part
                for call in self._stream.calls
                for choice in call.choices(site)
                if (part := getattr(choice, what)) is not None
            ]
            if parts:
                found[layer] = _joined(parts)
        return found

    def _mask(self) -> torch.Tensor:
        parts = [call.mask() for call in self._stream.calls]
        return torch.cat(parts) if parts else torch.ones(0, dtype=torch.bool)

    def __repr__(self) -> str:
        return f"layers {sorted(self._sites)}, {self.calls[-1]} rows"


class Recording(Routes):
    """What the decoder's feed-forward routers chose; `encoder` and `attention` are of its form.

    `encoder` holds the layers of an encoder (of a sequence-to-sequence model, or the one for
    images), `attention` routers that choose attention experts; both are empty where there are none.
    """

    encoder: Routes
    attention: Routes

    def __init__(self, streams: dict[Stack, _Stream], sites: list[Site]) -> None:
        decoder = streams["decoder"]
        here = [site for site in sites if site.stack == "decoder"]
        super().__init__(decoder, [site for site in here if site.kind == "mlp"])
        self.attention = Routes(decoder, [site for site in here if site.kind == "attention"])
        there = [site for site in sites if site.stack == "encoder"]
        self.encoder = Routes(streams["encoder"], there)


@contextlib.contextmanager
def recording(model: nn.Module, *, logits: bool = True) -> Iterator[Recording]:
    """Record what the routers of `model` choose in the forward passes inside the block.

    Works for every model with experts that moesaic or transformers knows, in training too, during
    `generate`, and with layers spread by accelerate. Outputs do not change. `logits=False` lets go
    of the router logits, which are the most of what is kept.

    A model compiled with torch.compile runs uncompiled inside the block, and a note says so:
    compiled code calls no hooks.

    Raises:
        UserError: the model has no routers.
    """
    inner = getattr(model, "_orig_mod", None)  # what torch.compile(model) wraps
    model, wrapped = (model, False) if inner is None else (inner, True)
    plan = _plan(model)
    if not plan.sites:
        raise UserError(
            f"{type(model).__name__} has no routers: it is a dense model. Record a mixture of "
            "experts."
        )
    streams: dict[Stack, _Stream] = {"decoder": _Stream(), "encoder": _Stream()}
    recorded = Recording(streams, plan.sites)
    with contextlib.ExitStack() as stack:
        if wrapped or plan.compiled(model):
            note("torch.compile: the model runs uncompiled while it is recorded.")
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        elif _may_be_compiled(model):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        handles: list[Any] = []
        stack.callback(lambda: [handle.remove() for handle in handles])
        for handle in _listen(model, plan, streams, logits):
            handles.append(handle)
        yield recorded


@dataclass(eq=False)
class _Plan:
    """Whom to listen to in one model; walking its modules takes longer than the listening.

    Nothing here refers to the model itself (None stands for it), which would live forever.
    """

    sites: list[Site]
    owners: list[tuple[Stack, nn.Module | None, list[str]]]
    """Stack, the module whose calls are its passes, and the names of that module's arguments."""
    links: list[tuple[dict[str, nn.Module | None], str, nn.Module]]
    """Children of a module, a name, the child: what has to be as it was for the plan to hold."""

    @classmethod
    def of(cls, model: nn.Module) -> _Plan:
        sites = _one_a_layer(find_sites(model))
        owners: list[tuple[Stack, nn.Module | None, list[str]]] = []
        links: dict[tuple[int, str], tuple[dict[str, nn.Module | None], str, nn.Module]] = {}

        def watch(parent: nn.Module, name: str, child: nn.Module) -> None:
            links[id(parent), name] = (parent._modules, name, child)

        for stack, path in dict.fromkeys((site.stack, site.owner) for site in sites):
            owner = model.get_submodule(path)
            names = list(inspect.signature(type(owner).forward).parameters)[1:]
            owners.append((stack, None if owner is model else owner, names))
            for layers in owner.children():  # dense layers too: they may become mixtures
                for layer in layers if isinstance(layers, nn.ModuleList) else ():
                    for name, child in layer.named_children():
                        watch(layer, name, child)
        for site in sites:
            for end in (site.router_path, site.experts_path):
                parent = model
                for name in end.split(".") if end else ():
                    child = parent.get_submodule(name)
                    watch(parent, name, child)
                    parent = child
        return cls(sites, owners, list(links.values()))

    def holds(self) -> bool:
        """Whether no part of the model has been replaced since."""
        return all(children.get(name) is child for children, name, child in self.links)

    def compiled(self, model: nn.Module) -> bool:
        """Whether the model, a layer or a part of a layer was compiled in place."""
        name = "_compiled_call_impl"  # None in the class
        return name in vars(model) or any(name in vars(child) for _, _, child in self.links)


_PLANS: weakref.WeakKeyDictionary[nn.Module, _Plan] = weakref.WeakKeyDictionary()


def _plan(model: nn.Module) -> _Plan:
    plan = _PLANS.get(model)
    if plan is None or not plan.holds():
        plan = _PLANS[model] = _Plan.of(model)
    return plan


@dataclass(eq=False)
class _Call:
    """One forward pass of a stack of layers."""

    rows: int
    given_mask: torch.Tensor | None
    shape: tuple[int, int] | None
    """Batch and sequence, where they could be read."""
    keeps_logits: bool
    router: list[tuple[Site, Any]] = field(default_factory=list)
    experts: list[tuple[Site, Any]] = field(default_factory=list)
    logits: list[tuple[Site, Any]] = field(default_factory=list)
    read: dict[Site, list[Choice]] = field(default_factory=dict)
    sorted: dict[Site, tuple[list[Any], list[Any], list[Any]]] | None = None
    """What was heard by site: put in order when it is first read, not while the model runs."""

    @property
    def bytes(self) -> int:
        """Of what is kept on accelerators, if all layers are like the one heard last."""
        return sum(
            len(places) * _on_device(places[-1][1])
            for places in (self.router, self.experts)
            if places
        )

    def sites(self) -> set[Site]:
        """Sites that were heard."""
        return {site for places in (self.router, self.experts) for site, _ in places}

    def choices(self, site: Site) -> list[Choice]:
        """What the site decided, in the order of its calls."""
        if site not in self.read:
            choices = [site.read(site, heard) for heard in self._heard(site)]
            if not self.keeps_logits:
                choices = [choice._replace(logits=None) for choice in choices]
            self.read[site] = choices
        return self.read[site]

    def _heard(self, site: Site) -> Iterator[Heard]:
        if self.sorted is None:
            self.sorted = {}
            for index, places in enumerate((self.router, self.experts, self.logits)):
                for where, kept in places:
                    self.sorted.setdefault(where, ([], [], []))[index].append(kept)
        parts = self.sorted.get(site, ([], [], []))
        for index in range(max(map(len, parts))):
            yield Heard(*(part[index] if index < len(part) else None for part in parts))

    def mask(self) -> torch.Tensor:
        """Bool [rows]."""
        whole = torch.ones(self.rows, dtype=torch.bool)
        if self.given_mask is None or self.shape is None:
            return whole
        found = _rows_that_count(self.given_mask, *self.shape)
        return whole if found is None or found.numel() != self.rows else found.flatten().cpu()

    def spill(self) -> None:
        """Move what is kept to the CPU."""
        for site in self.sites():
            self.read[site] = [
                Choice(*(None if x is None else x.cpu() for x in choice))  # type: ignore[arg-type]
                for choice in self.choices(site)
            ]
        if self.given_mask is not None:
            self.given_mask = self.given_mask.cpu()
        self.sorted = {}
        for places in (self.router, self.experts, self.logits):
            places.clear()


@dataclass(eq=False)
class _Stream:
    """The forward passes of one stack; `open` is the one under way."""

    calls: list[_Call] = field(default_factory=list)
    open: _Call | None = None
    version: int = 0
    """Counts changes of `calls`."""
    waiting: int = 0
    """Calls at the end of `calls` that have not been moved to the CPU."""
    waiting_bytes: int = 0

    def begin(self, call: _Call) -> None:
        self.open = call

    def take(self) -> list[_Call]:
        """Return the calls so far and forget them."""
        calls, self.calls = self.calls, []
        self.version += 1
        self.waiting = self.waiting_bytes = 0
        return calls

    def end(self) -> None:
        """Take the open call in. One that failed half-way never gets here and is forgotten."""
        call, self.open = self.open, None
        if call is None or not (call.router or call.experts):
            return
        if call.rows < 0:
            site = next(site for site, _ in (*call.router, *call.experts))
            call.rows = sum(len(choice.ids) for choice in call.choices(site))
        self.calls.append(call)
        self.version += 1
        self.waiting += 1
        self.waiting_bytes += call.bytes
        if self.waiting_bytes > _KEPT_BYTES:
            for waiting in self.calls[-self.waiting :]:
                waiting.spill()
            self.waiting = self.waiting_bytes = 0


def _listen(
    model: nn.Module, plan: _Plan, streams: dict[Stack, _Stream], logits: bool
) -> Iterator[Any]:
    """Register every hook, yielding its handle."""
    for stack, owner, names in plan.owners:
        stream, module = streams[stack], model if owner is None else owner
        yield module.register_forward_pre_hook(_begin(stream, names, logits), with_kwargs=True)
        yield module.register_forward_hook(_end(stream))
    for site in plan.sites:
        stream = streams[site.stack]
        if site.router is not None and (logits or not site.experts_say_all):
            yield site.router.register_forward_hook(_hear_router(stream, site, logits))
        if site.experts is not None:
            yield site.experts.register_forward_pre_hook(
                _hear_experts(stream, site), with_kwargs=True
            )
        if site.logits is not None and logits:
            yield site.logits.register_forward_hook(_hear_logits(stream, site))


def _begin(stream: _Stream, names: list[str], logits: bool) -> Any:
    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            raise MoesaicError(
                "torch.compile met a model that is being recorded, and compiled code calls no "
                "hooks. Compile the model before `recording`, which then runs it uncompiled."
            )
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        shape = None
        for name in ("input_ids", "inputs_embeds", "hidden_states"):
            tensor = given.get(name)
            if isinstance(tensor, torch.Tensor) and tensor.dim() >= 2:
                shape = (tensor.shape[0], tensor.shape[1])
                break
        mask = given.get("attention_mask")
        rows = -1 if shape is None else shape[0] * shape[1]
        mask = mask if isinstance(mask, torch.Tensor) else None
        stream.begin(_Call(rows, mask, shape, logits))

    return begin


def _end(stream: _Stream) -> Any:
    def end(module: nn.Module, args: Any, output: Any) -> None:
        stream.end()

    return end


# A call is open only while its stack runs forward: gradient checkpointing runs layers again during
# the backward pass, and those are no choices of their own.
def _hear_router(stream: _Stream, site: Site, logits: bool) -> Any:
    keep, own_without = site.keep, site.own and not logits

    def hear(module: nn.Module, args: Any, output: Any) -> None:
        call = stream.open
        if call is not None:
            kept = keep(output)
            call.router.append((site, (None, *kept[1:]) if own_without else kept))

    return hear


def _hear_experts(stream: _Stream, site: Site) -> Any:
    def hear(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = stream.open
        if call is not None:
            heard = hear_experts(args, kwargs)
            if heard is not None:
                call.experts.append((site, heard))

    return hear


def _hear_logits(stream: _Stream, site: Site) -> Any:
    def hear(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if stream.open is not None:
            stream.open.logits.append((site, output.detach()))

    return hear


def _on_device(kept: tuple[Any, ...]) -> int:
    return sum(x.nbytes for x in kept if isinstance(x, torch.Tensor) and not x.is_cpu)


def _merged(choices: list[Choice]) -> Choice:
    logits = [choice.logits for choice in choices if choice.logits is not None]
    return Choice(
        torch.cat([choice.ids for choice in choices]),
        torch.cat([choice.weights for choice in choices]),
        torch.cat(logits) if logits else None,
    )


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    if len({part.device for part in parts}) > 1:
        parts = [part.cpu() for part in parts]
    return torch.cat(parts).cpu()  # a copy, so that nothing of the model's own is handed out


def _rows_that_count(mask: torch.Tensor, batch: int, length: int) -> torch.Tensor | None:
    """Read a mask [B, past + S], or one of queries and keys [B, 1, S, past + S]: bool [B, S]."""
    if mask.dim() == 2 and mask.shape[0] == batch and mask.shape[1] >= length:
        return mask[:, mask.shape[1] - length :] != 0
    if mask.dim() == 4 and mask.shape[-2] == length and mask.shape[-1] == length:
        # a row that counts may look at itself
        own = mask[:, 0].diagonal(dim1=-2, dim2=-1)
        own = own if mask.dtype == torch.bool else own == 0
        return own.expand(batch, length)
    return None


def _one_a_layer(sites: list[Site]) -> list[Site]:
    """Keep the largest stack where several would claim the same layers (speech beside text)."""
    chosen: dict[tuple[str, str, int], Site] = {}
    left_out: set[str] = set()
    weight = {s.owner: sum(t.owner == s.owner for t in sites) for s in sites}
    for site in sorted(sites, key=lambda site: -weight[site.owner]):
        key = (site.stack, site.kind, site.layer)
        if key in chosen:
            left_out.add(site.owner)
        else:
            chosen[key] = site
    if left_out:
        kept = ", ".join(sorted({site.owner for site in chosen.values()}))
        note(f"recording {kept}; not {', '.join(sorted(left_out))}, whose layers have their names.")
    return [site for site in sites if chosen.get((site.stack, site.kind, site.layer)) is site]


def _may_be_compiled(model: nn.Module) -> bool:
    """Whether someone may hold a compiled wrapper of this model: its hooks would not be called.

    Flex attention is compiled code of its own, and far too large without.
    """
    flex = getattr(getattr(model, "config", None), "_attn_implementation", "") == "flex_attention"
    return "torch._dynamo" in sys.modules and not flex
