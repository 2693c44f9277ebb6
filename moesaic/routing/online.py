"""Watch routing while a model trains: load and its entropy every update, segments now and then.

    watch = RoutingWatch(model, every=50)
    with watch.update(step, length=512):
        ...                              # forward and backward passes of one update
    for event, step, fields in watch.lines():
        ...

What counts is what the experts were given in the forward passes. Counts stay on the device until
`lines` asks for them; a sample travels on its own and is worked on in a thread, so that nothing
waits for the device inside an update. Recomputed layers (activation checkpointing) are not counted
again. Definitions: `moesaic.routing.metrics`.

Notation: R rows of an update, T tokens of a sequence, S sequences, L layers, E experts, K chosen.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from moesaic.core.errors import UserError
from moesaic.measure.load import dead_experts, entropy, load_share, variation
from moesaic.models.anatomy import anatomy
from moesaic.routing import metrics
from moesaic.routing.caches import make_policy
from moesaic.routing.hits import rates_of
from moesaic.routing.recording import recording
from moesaic.routing.samples import read_samples

__all__ = ["EVENT", "SAMPLE_EVENT", "RoutingWatch"]

EVENT = "routing"
SAMPLE_EVENT = "routing_sample"
Line = tuple[str, int, dict[str, Any]]


class RoutingWatch:
    """Routing of the updates since the last `lines`.

    Args:
        model: a mixture of experts.
        every: updates between two samples.
        sequences: of an update, that a sample holds.
        segments: lengths m of segments for SRP; those longer than a sequence are left out.
        caches: sizes over top_k for hit rates.
        policies: cache policies that need not know the future.

    Raises UserError for a model without experts.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 50,
        sequences: int = 2,
        segments: Sequence[int] = (16,),
        caches: Sequence[float] = (1.0, 2.0),
        policies: Sequence[str] = ("lru",),
    ) -> None:
        found = [layer for layer in anatomy(model).layers if layer.kind == "mlp"]  # type: ignore[arg-type]
        if not found:
            raise UserError(
                f"{type(model).__name__} has no experts: it is a dense model, whose routing cannot "
                "be watched. Leave the section routing out."
            )
        self.model = model
        self.every = every
        self.sequences = sequences
        self.segments = tuple(segments)
        self.caches = tuple(caches)
        self.policies = tuple(policies)
        self.experts = max(layer.num_experts for layer in found)
        self.top_k = max(layer.top_k for layer in found)
        self._steps: list[int] = []
        self._counts: list[torch.Tensor] = []
        self._samples: list[tuple[int, Future[dict[str, Any]]]] = []
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="routing")

    @contextlib.contextmanager
    def update(self, step: int, *, length: int) -> Iterator[None]:
        """Listen to the forward passes of update `step`, over sequences of `length` tokens."""
        with recording(self.model, logits=False) as rec:
            yield
            choices = rec.drain()
        ids_LRK = self._stacked([choices[layer].ids for layer in sorted(choices)])
        layers, width = len(ids_LRK), self.experts + 1  # column 0: no choice
        first_L = torch.arange(1, layers * width, width, device=ids_LRK.device)
        flat_N = (ids_LRK + first_L[:, None, None]).flatten()
        counts = torch.zeros(layers * width, dtype=torch.int32, device=ids_LRK.device)
        counts.scatter_add_(0, flat_N, torch.ones_like(flat_N, dtype=torch.int32))
        self._steps.append(step)
        self._counts.append(counts.view(layers, width))
        if step % self.every == 0:
            self._sample(step, ids_LRK, length)

    def lines(self, *, wait: bool = False) -> list[Line]:
        """Return (event, step, fields) of what is known by now; with `wait`, of all updates."""
        found: list[Line] = []
        if self._counts:
            counts_ULE = torch.stack(self._counts).cpu().numpy()[..., 1:].astype(np.int64)
            found += [
                (EVENT, step, _load(counts_LE))
                for step, counts_LE in zip(self._steps, counts_ULE, strict=True)
            ]
            self._steps, self._counts = [], []
        while self._samples and (wait or self._samples[0][1].done()):
            step, future = self._samples.pop(0)
            found.append((SAMPLE_EVENT, step, future.result()))
        return found

    def close(self) -> None:
        """Stop working on samples."""
        self._pool.shutdown(cancel_futures=True)

    def _stacked(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """[L, R, K], -1 where a layer chooses fewer."""
        device = parts[0].device
        wide = [
            torch.nn.functional.pad(part.to(device), (0, self.top_k - part.shape[1]), value=-1)
            if part.shape[1] < self.top_k
            else part.to(device)
            for part in parts
        ]
        return torch.stack(wide)

    def _sample(self, step: int, ids_LRK: torch.Tensor, length: int) -> None:
        rows = min(self.sequences * length, ids_LRK.shape[1])
        taken = ids_LRK[:, :rows].to(torch.int16)
        arrived = None
        if taken.device.type == "cuda":
            host = torch.empty(taken.shape, dtype=taken.dtype, pin_memory=True)
            host.copy_(taken, non_blocking=True)
            arrived = torch.cuda.current_stream(taken.device).record_event()
            taken = host
        self._samples.append((step, self._pool.submit(self._study, taken, arrived, length)))

    def _study(self, ids_LRK: torch.Tensor, arrived: Any, length: int) -> dict[str, Any]:
        if arrived is not None:
            arrived.synchronize()
        layers, rows, top_k = ids_LRK.shape
        ids_RLK = ids_LRK.numpy().swapaxes(0, 1)
        ids_STLK = np.ascontiguousarray(ids_RLK).reshape(rows // length, length, layers, top_k)
        found: dict[str, Any] = {"srp": {}, "rho": {}, "hit_rate": {}}
        for segment in self.segments:
            if segment <= length:
                figures = metrics.srp(ids_STLK, num_experts=self.experts, segment=segment)
                found["srp"][str(segment)] = _round(float(figures.srp))
                found["rho"][str(segment)] = _round(float(figures.rho))
        samples = read_samples(ids_STLK, num_experts=self.experts)
        for policy in self.policies:
            rates_E = np.nanmean(rates_of(samples, make_policy(policy), "layer"), axis=(0, 1))
            found["hit_rate"][policy] = {
                f"{cache:g}": _round(float(rates_E[self._slots(cache) - 1]))
                for cache in self.caches
            }
        return found

    def _slots(self, cache: float) -> int:
        return min(self.experts, max(1, math.floor(cache * self.top_k + 0.5)))


def _load(counts_LE: NDArray[np.int64]) -> dict[str, Any]:
    """Means over the layers (of `load_max` and `dead` the most), and each layer's figures."""
    figures = {
        "entropy": entropy(counts_LE),
        "load_cv": variation(counts_LE),
        "load_max": load_share(counts_LE).max(axis=-1) * counts_LE.shape[-1],
        "dead": dead_experts(counts_LE).astype(np.float64),
    }
    whole = {
        name: _round(float(values.max() if name in ("load_max", "dead") else values.mean()))
        for name, values in figures.items()
    }
    return {**whole, "layers": {name: _round(values) for name, values in figures.items()}}


def _round(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else [round(float(x), 6) for x in value]
