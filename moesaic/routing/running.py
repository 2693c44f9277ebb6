"""Run the calls of offloaded experts: bring what is asked for, compute, guess what comes next.

Notation: R rows, K experts of a row, E experts, N = R * K, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moesaic.core.console import note
from moesaic.core.errors import MoesaicError
from moesaic.kernels.grouped import combine
from moesaic.routing.live import PassBooks
from moesaic.routing.placement import Layer
from moesaic.routing.sites import Heard
from moesaic.routing.slots import Bank, Shelf

__all__ = ["Runner"]

_FEW_ROWS = 64  # so few compute faster together than while others travel


@dataclass(eq=False)
class Runner:
    """What the calls of all layers share."""

    layers: list[Layer]
    shelves: list[Shelf]
    """One a layer, or one for all."""
    books: PassBooks | None
    """Counts for all layers together, where they share a shelf."""
    stride: int
    """E: the key of an expert is place x E + id."""
    prefetch: bool
    idle: bool = False
    """Nothing travels, results are wrong: for timing alone."""

    def shelf(self, layer: Layer) -> Shelf:
        """Return where a layer's experts are kept."""
        return self.shelves[0 if self.books is not None else layer.place]

    def run(self, layer: Layer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Compute what the experts module of `layer` would for these arguments."""
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
        self, layer: Layer, x_RD: torch.Tensor, ids_RK: torch.Tensor, weights_RK: torch.Tensor
    ) -> torch.Tensor:
        if ids_RK.numel() == 0:
            return torch.zeros_like(x_RD)
        shelf = self.shelf(layer)
        keys_RK, counted_RK, guess = self._fetch(layer, x_RD, ids_RK, weights_RK)
        if self.idle:
            bank = shelf.banks[0]
            slots_RK = keys_RK % bank.size
            return self._call(layer, bank, x_RD, _on(slots_RK, ids_RK), weights_RK)
        shelf.live.serve(counted_RK)
        if self.books is not None:
            self.books.report(layer.place, counted_RK)
        needed = list(dict.fromkeys(keys_RK.ravel().tolist()))
        rows, top_k = ids_RK.shape
        y_ND = None
        first = layer.place * self.stride
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
            following = self.layers[layer.place + 1]
            shelf = self.shelf(following)
            most = min(following.top_k, shelf.staging.bank.size) if shelf.staging else 0
            shelf.guess(guess, most=most)
        return out_RD

    def _fetch(
        self, layer: Layer, x_RD: torch.Tensor, ids_RK: torch.Tensor, weights_RK: torch.Tensor
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
        first = layer.place * self.stride
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
        return keys_RK, counted_RK, (found[order] + first + self.stride).tolist()

    def _guess(self, layer: Layer, x_RD: torch.Tensor) -> torch.Tensor | None:
        """What the next layer's router would choose for this layer's input, or None."""
        if not self.prefetch or self.idle or layer.place + 1 == len(self.layers):
            return None
        following = self.layers[layer.place + 1]
        router: Any = following.site.router
        shelf = self.shelf(following)
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
        layer: Layer,
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


def _on(array: NDArray[np.int64], like: torch.Tensor) -> torch.Tensor:
    """Send a small array of integers to where `like` is."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(like.device, non_blocking=True)
