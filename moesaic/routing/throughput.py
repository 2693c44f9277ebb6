"""Tokens per second under expert offloading: predicted from hit rates, and measured.

One token takes `compute` seconds when nothing has to be fetched, and every miss one expert's bytes
over the bandwidth. Nothing hidden, the two add up (`serial`); at best one hides behind the other
(`overlapped`). What is measured lies between, or below where a step costs more than its parts.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from moesaic.routing.offload import Offload

__all__ = ["Measured", "Predicted", "measure", "predict"]


@dataclass(frozen=True)
class Predicted:
    """Tokens/s of one sequence."""

    serial: float
    """Transfers and computing one after the other."""
    overlapped: float
    """Transfers and computing side by side, the longer one decides."""


@dataclass(frozen=True)
class Measured:
    """What a decoding run reached, and what the simulation's misses would let expect."""

    tokens_per_second: float
    predicted: Predicted
    hit_rate: float
    """Of the decoded tokens."""
    misses: float
    """A token, of all layers."""
    compute: float
    """Seconds a step when nothing travels."""
    bandwidth: float
    """Bytes a second to a slot."""
    expert_bytes: int
    tokens: int


def predict(*, compute: float, misses: float, expert_bytes: float, bandwidth: float) -> Predicted:
    """Predict tokens/s from the misses of a token, all layers together."""
    fetching = misses * expert_bytes / bandwidth
    return Predicted(_rate(compute + fetching), _rate(max(compute, fetching)))


def _rate(seconds: float) -> float:
    return 1.0 / seconds if seconds > 0 else float("inf")


def measure(off: Offload, input_ids: torch.Tensor, *, new_tokens: int) -> Measured:
    """See `Offload.measure`."""
    batch = len(input_ids)
    input_ids = input_ids.to(off.model.device)
    with torch.inference_mode():
        _decode(off, input_ids, 2)  # warm up
        off.clear()
        cache = _read(off, input_ids)
        requests, hits = int(off.requests.sum()), int(off.hits.sum())
        seconds = _steps(off, cache, new_tokens)
        requests, hits = int(off.requests.sum()) - requests, int(off.hits.sum()) - hits
        assert off._runner is not None
        off._runner.idle = True
        try:
            compute = _steps(off, _read(off, input_ids), new_tokens) / new_tokens
        finally:
            off._runner.idle = False
        bandwidth = _bandwidth(off)
    misses = (requests - hits) / new_tokens
    step = predict(
        compute=compute, misses=misses, expert_bytes=off.expert_bytes, bandwidth=bandwidth
    )
    return Measured(
        tokens_per_second=batch * new_tokens / seconds,
        predicted=Predicted(batch * step.serial, batch * step.overlapped),
        hit_rate=hits / requests,
        misses=misses / batch,
        compute=compute,
        bandwidth=bandwidth,
        expert_bytes=off.expert_bytes,
        tokens=batch * new_tokens,
    )


def _decode(off: Offload, input_ids: torch.Tensor, steps: int) -> None:
    _steps(off, _read(off, input_ids), steps)


def _read(off: Offload, input_ids: torch.Tensor) -> list[Any]:
    """Read the prompt; return the next ids [B, 1] and the cache of keys and values."""
    outputs = off.model(input_ids=input_ids, use_cache=True)
    return [outputs.logits[:, -1:].argmax(-1), outputs.past_key_values]


def _steps(off: Offload, state: list[Any], steps: int) -> float:
    """Decode greedily; return seconds."""
    for lane in off._lanes.values():
        lane.finish()
    start = time.perf_counter()
    for _ in range(steps):
        outputs = off.model(input_ids=state[0], past_key_values=state[1], use_cache=True)
        state[:] = outputs.logits[:, -1:].argmax(-1), outputs.past_key_values
    for lane in off._lanes.values():
        lane.finish()
    return time.perf_counter() - start


def _bandwidth(off: Offload, *, times: int = 20) -> float:
    """Bytes a second of experts on their way to a slot, one after the other.

    The slot's content is copied back from where it was, so that the caches stay as they are.
    """
    shelf = off._shelves[0]
    bank = shelf.banks[0]
    held = bank.keys[0]
    places = [off._expert(key) for key in range(2)]
    shelf.lane.finish()
    start = time.perf_counter()
    for number in range(times):
        shelf.lane.send(bank.slot(0), places[number % len(places)], after=None)
    shelf.lane.finish()
    seconds = time.perf_counter() - start
    if held is not None:
        shelf.lane.send(bank.slot(0), off._expert(held), after=None)
        shelf.lane.finish()
    return times * sum(tensor.nbytes for tensor in bank.slot(0)) / seconds
