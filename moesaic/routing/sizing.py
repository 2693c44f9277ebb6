"""Which expert cache a device needs: memory, hit rate and predicted tokens/s for every size.

    found = size_caches(trace, expert_bytes=352e6, bandwidth=25e9, compute=0.02)
    found.advice.cache, found.advice.policy

A size is `cache` = slots of a layer / top_k, as `moesaic.offload` takes it; with scope "model" as
many slots in all are shared by the layers. Hit rates are means over the samples of the trace, each
starting cold. "belady" and "sch" know the future: they bound what a policy could reach. "fixed" is
chosen on the trace itself, so other text hits less.

Notation: L layers, E experts of a layer, K experts a token, C slots, G caches (L, or 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moesaic.core.errors import UserError
from moesaic.routing.hits import CacheHits
from moesaic.routing.live import LIVE
from moesaic.routing.reading import blocks, borders_of
from moesaic.routing.samples import Space
from moesaic.routing.throughput import Predicted, predict
from moesaic.routing.trace import Trace

__all__ = ["POLICIES", "CacheSize", "Sizing", "size_caches"]

POLICIES = ("lru", "lfu", "fixed", "sch", "belady")
_ENOUGH = 0.9  # of the speed with every expert on the device


@dataclass(frozen=True)
class CacheSize:
    """One policy at one size."""

    policy: str
    runs: bool
    """Whether `moesaic.offload` can run it: others know the future."""
    cache: float
    """Slots over top_k."""
    slots: int
    """In all, those for experts that pass through included."""
    bytes: int
    hit_rate: float
    misses: float
    """A token, of all layers."""
    predicted: Predicted

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Sizing:
    """All sizes of all policies, the smallest first, and the one to take."""

    scope: str
    layers: int
    num_experts: int
    top_k: int
    full: float
    """Tokens/s with every expert on the device."""
    sizes: tuple[CacheSize, ...]
    advice: CacheSize | None
    reason: str

    def of(self, policy: str) -> list[CacheSize]:
        """Return the sizes of one policy."""
        return [size for size in self.sizes if size.policy == policy]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def size_caches(
    trace: Trace | Path | str,
    *,
    expert_bytes: float,
    bandwidth: float,
    compute: float,
    scope: Literal["layer", "model"] = "layer",
    policies: Sequence[str] = POLICIES,
    window: int = 16,
    memory: float | None = None,
    target: float | None = None,
) -> Sizing:
    """Predict tokens/s under expert offloading for caches of every size.

    Args:
        trace: recorded routing of the model, on text like that it will read.
        expert_bytes: of one expert.
        bandwidth: from the host to the device, bytes/s.
        compute: seconds that a token takes when nothing has to be fetched.
        scope: a cache for each layer, or one for all.
        policies: names of cache policies.
        window: tokens that "sch" sees, the current one included.
        memory: bytes on the device for experts; the advice is then the fastest that fits.
        target: tokens/s; the advice is then the smallest cache that reaches it.

    With neither, the advice is the smallest cache that reaches 90 % of the speed with every expert
    on the device. It goes by `predicted.serial` and by policies that can run. Raises UserError for
    a trace without tokens, numbers that are not above 0 and unknown policies.
    """
    given = {"expert_bytes": expert_bytes, "bandwidth": bandwidth, "compute": compute}
    for name, value in {**given, "memory": memory, "target": target}.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UserError(f"{name}={value} was given. Give a number above 0.")
    if scope not in ("layer", "model"):
        raise UserError(f"scope='{scope}' is unknown. Use layer or model.")
    if not policies:
        raise UserError("no policy was given. Give at least one.")
    opened = trace if isinstance(trace, Trace) else Trace(trace)
    rates, asked_L = _rates(opened, scope, policies, window)
    found = []
    for cache, slots_L in _sizes(opened):
        total, every = int(slots_L.sum()), sum(opened.shape.num_experts)
        spare = 0 if total == every else max(2, opened.top_k)
        for policy in policies:
            rate_GE = rates[policy]
            if scope == "layer":
                hit_L = rate_GE[np.arange(len(slots_L)), slots_L - 1]
            else:
                hit_L = np.full(len(slots_L), rate_GE[0, total - 1])
            misses = float((asked_L * (1 - hit_L)).sum())
            found.append(
                CacheSize(
                    policy,
                    policy in LIVE,
                    cache,
                    total + spare,
                    round((total + spare) * expert_bytes),
                    1 - misses / float(asked_L.sum()),
                    misses,
                    predict(misses=misses, **given),
                )
            )
    full = 1 / compute
    advice, reason = _advice(found, full, memory, target)
    return Sizing(
        scope,
        len(opened.layers),
        opened.num_experts,
        opened.top_k,
        full,
        tuple(found),
        advice,
        reason,
    )


def _rates(
    trace: Trace, scope: Literal["layer", "model"], policies: Sequence[str], window: int
) -> tuple[dict[str, NDArray[np.float64]], NDArray[np.float64]]:
    """Mean hit rates [G, E] of each policy, and the requests of a token in each layer [L]."""
    layers = len(trace.layers)
    metric = CacheHits(
        Space(trace.num_experts, layers),
        policies={name: (name, window) for name in policies},
        scope=scope,
    )
    asked_L, tokens = np.zeros(layers), 0
    borders = borders_of(trace)
    for domain in range(len(trace.domains)):
        for _, samples in blocks(trace, borders, domain):
            metric.add(0, np.arange(len(samples)), samples)
            asked_L += (samples.experts_NTLK >= 0).sum(axis=(0, 1, 3))
            tokens += int(samples.lengths_N.sum())
    rates = {name: np.nan_to_num(metric.at(name, domain="all").rate) for name in policies}
    return rates, asked_L / tokens


def _sizes(trace: Trace) -> list[tuple[float, NDArray[np.int64]]]:
    """Slots over top_k, and slots of each layer, for every size from top_k to all experts."""
    experts_L, top_L = np.array(trace.shape.num_experts), np.array(trace.shape.top_k)
    found = []
    for slots in range(trace.top_k, int(np.ceil(experts_L / top_L * trace.top_k).max()) + 1):
        cache = slots / trace.top_k
        wanted_L = np.floor(cache * top_L + 0.5).astype(np.int64)
        found.append((cache, np.clip(wanted_L, top_L, experts_L)))
    return found


def _advice(
    sizes: list[CacheSize], full: float, memory: float | None, target: float | None
) -> tuple[CacheSize | None, str]:
    able = [size for size in sizes if size.runs]
    if memory is not None:
        able = [size for size in able if size.bytes <= memory]
    if not able:
        return None, "no cache of top_k slots and more fits" if memory else "no policy that can run"

    def speed(size: CacheSize) -> float:
        return size.predicted.serial

    if memory is not None and target is None:
        best = max(able, key=lambda size: (speed(size), -size.bytes))
        return best, "the fastest that fits"
    wanted = _ENOUGH * full if target is None else target
    enough = [size for size in able if speed(size) >= wanted]
    if not enough:
        return max(able, key=speed), f"none reaches {wanted:.3g} tokens/s; the fastest"
    least = min(size.bytes for size in enough)
    best = max((size for size in enough if size.bytes == least), key=speed)
    what = f"{wanted:.3g} tokens/s" if target else f"{_ENOUGH:.0%} of full speed"
    return best, f"the smallest that reaches {what}"
