"""What expert offloading reaches, and what watching routing costs while training.

    python -m benchmarks.offload --out DIR [--part offload] [--part watch] [--part exact]

A model of the preset's shape with random weights (bf16 on a GPU), a prompt of random tokens, then
greedy decoding of one sequence. For caches and policies (`offload`): tokens/s measured, tokens/s
predicted from the misses, the bandwidth of one expert and the step in which nothing travels;
whether the tokens are those of the model itself, and hits those of `caches.hit_rates` on the
recorded routing. `exact`: the smallest cache against the model itself in float32.

`watch`: updates of that model (forward, backward, optimizer), plain and watched in turn: medians,
and the median over pairs of watched / plain - 1; a sample (SRP and hit rates) is waited for to its
end, which the loop does not do, and shared by 50 updates. Each figure is printed as it is found,
and all of them are written to DIR/offload.json.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import moesaic
from benchmarks.recording import build, keep, timed
from moesaic.routing import caches
from moesaic.routing.online import RoutingWatch
from moesaic.training.config import OptimizerConfig
from moesaic.training.optimizer import Optimizer
from moesaic.training.step import build_pass, run_update

CASES: tuple[dict[str, Any], ...] = (
    {"cache": 2.0, "policy": "lru"},
    {"cache": 2.0, "policy": "lru", "prefetch": False},
    {"cache": 1.0, "policy": "lru"},
    {"cache": 3.0, "policy": "lru"},
    {"cache": 4.0, "policy": "lru"},
    {"cache": 2.0, "policy": "lfu"},
    {"cache": 2.0, "policy": "fixed"},
    {"cache": 2.0, "policy": "lru", "scope": "model"},
)
PARTS = ("offload", "watch", "exact")
EVERY = 50  # updates that share a sample


def greedy(model: Any, prompt: torch.Tensor, count: int) -> tuple[list[int], torch.Tensor, float]:
    """Return the tokens, the logits of the prompt's last place, and tokens/s of decoding."""
    with torch.inference_mode():
        outputs = model(input_ids=prompt, use_cache=True)
        first = outputs.logits[:, -1].float()
        tokens = [first.argmax(-1, keepdim=True)]

        def steps() -> None:
            past = outputs.past_key_values
            for _ in range(count):
                found = model(input_ids=tokens[-1], past_key_values=past, use_cache=True)
                past = found.past_key_values
                tokens.append(found.logits[:, -1].argmax(-1, keepdim=True))

        seconds = timed(steps, prompt.device)
    return torch.cat(tokens, 1)[0].tolist(), first, count / seconds


def routing(rec: Any) -> np.ndarray:
    """Chosen experts as one sample [1, rows, layers, K]."""
    return np.stack([rec.experts[layer].numpy() for layer in sorted(rec.experts)], axis=1)[None]


def offloading(model: Any, prompt: torch.Tensor, count: int) -> Iterator[tuple[str, Any]]:
    """Every case beside the model itself: (name, figures)."""
    greedy(model, prompt, 3)  # warm up
    with moesaic.recording(model, logits=False) as rec:
        tokens, logits, _ = greedy(model, prompt, count)
    _, _, speed = greedy(model, prompt, count)
    yield "without offloading", {"tokens_per_second": speed}
    experts = model.config.num_local_experts
    ids = routing(rec)
    usage = np.stack([np.bincount(x.ravel(), minlength=experts) for x in ids[0].swapaxes(0, 1)])
    for case in CASES:
        clock = Clock(prompt.device)
        options = {**case, "usage": usage} if case["policy"] == "fixed" else case
        with moesaic.offload(model, **options) as off:
            clock.lap("entering_s")
            measured = off.measure(prompt, new_tokens=count)
            clock.lap("measuring_s")
            off.clear()
            with moesaic.recording(model, logits=False) as rec:
                given, first, _ = greedy(model, prompt, count)
            clock.lap("decoding_s")
            same = [a == b for a, b in zip(given, tokens, strict=True)]
            figures = {
                "tokens_per_second": measured.tokens_per_second,
                "predicted_serial": measured.predicted.serial,
                "predicted_overlapped": measured.predicted.overlapped,
                "hit_rate_decoding": measured.hit_rate,
                "misses_a_token": measured.misses,
                "step_without_transfers_ms": 1e3 * measured.compute,
                "bandwidth_GB_per_s": measured.bandwidth / 1e9,
                "expert_MB": measured.expert_bytes / 1e6,
                "device_MB": off.device_bytes / 1e6,
                "host_MB": off.host_bytes / 1e6,
                "guesses": off.guesses,
                "used_guesses": off.used_guesses,
                "loads": off.loads,
                "same_tokens": all(same),
                "first_other_token": None if all(same) else same.index(False),
                "prompt_logits_differ_by": float((first - logits).abs().max()),
                "hits_as_simulated": as_simulated(off, routing(rec), experts, case["policy"]),
            }
            clock.lap("comparing_s")
        clock.lap("leaving_s")
        yield ", ".join(f"{k}={v}" for k, v in case.items()), figures | clock.seconds
    yield "after leaving", {"same_tokens": greedy(model, prompt, count)[0] == tokens}


def as_simulated(off: Any, ids: np.ndarray, experts: int, policy: str) -> bool:
    """Whether the hits are those of the simulation on the recorded routing."""
    rates = caches.hit_rates(ids, num_experts=experts, policy=policy, scope=off.scope)[0]
    rates = rates if off.scope == "layer" else rates[None]
    return all(
        rate[size - 1] == np.float32(hits / asked)
        for rate, size, hits, asked in zip(rates, off.slots, off.hits, off.requests, strict=True)
    )


class Clock:
    """Seconds between laps, each from an idle device to an idle device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, dict[str, float]()
        self.start = self._now()

    def lap(self, name: str) -> None:
        now = self._now()
        self.seconds[name], self.start = now - self.start, now

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def exact(model: Any, prompt: torch.Tensor, count: int) -> dict[str, Any]:
    """In float32: the smallest cache against the model itself."""
    model = model.float()
    tokens, logits, _ = greedy(model, prompt, count)
    with moesaic.offload(model, cache=1.0):
        given, first, _ = greedy(model, prompt, count)
    return {
        "same_tokens": given == tokens,
        "prompt_logits_differ_by": float((first - logits).abs().max()),
    }


def watching(model: Any, batch: int, length: int, pairs: int) -> dict[str, Any]:
    """Updates with and without a watch."""
    model.train()
    device = model.device
    optimizer = Optimizer(model, OptimizerConfig(lr=1e-5))
    run_pass = build_pass(model)
    ids_ABT = torch.randint(0, model.config.vocab_size, (1, batch, length), device=device)
    often, seldom = RoutingWatch(model, every=1), RoutingWatch(model, every=10**9)

    def update(watch: RoutingWatch | None) -> None:
        with nullcontext() if watch is None else watch.update(1, length=length):
            run_update(run_pass, optimizer, ids_ABT)

    def flushed(watch: RoutingWatch | None) -> None:
        update(watch)
        if watch is not None:
            watch.lines(wait=True)

    def paired(run: Callable[[Any], None], watch: RoutingWatch) -> tuple[float, float, float]:
        plain, watched = [], []
        for pair in range(pairs):
            turns = [(plain, None), (watched, watch)]
            for times, given in turns if pair % 2 == 0 else turns[::-1]:
                times.append(timed(partial(run, given), device))
        ratios = [b / a - 1 for a, b in zip(plain, watched, strict=True)]
        return statistics.median(plain), statistics.median(watched), statistics.median(ratios)

    for watch in (None, seldom, often, None, seldom, None):
        flushed(watch)
    plain, watched, cost = paired(update, seldom)
    started = time.perf_counter()
    lines = len(seldom.lines())
    flush = (time.perf_counter() - started) / lines
    nothing = paired(update, None)[2]  # type: ignore[arg-type]
    _, _, whole = paired(flushed, often)
    return {
        "tokens an update": batch * length,
        "plain_ms": 1e3 * plain,
        "watched_ms": 1e3 * watched,
        "load and entropy, percent": 100 * cost,
        "writing them at the log line, percent": 100 * flush / plain,
        "nothing (what the clock says), percent": 100 * nothing,
        "a sample waited for, percent of an update": 100 * (whole - cost),
        f"shared by {EVERY} updates, percent": 100 * (whole - cost) / EVERY,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", default="mixtral-1b")
    parser.add_argument("--set", action="append", default=[], help="config.x=y of the preset")
    parser.add_argument("--part", action="append", choices=PARTS, help="all by default")
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8, help="sequences of an update")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--pairs", type=int, default=10)
    options = parser.parse_args()
    # rounds have any number of rows: the launch of each would be measured at its first call
    os.environ.setdefault("MOESAIC_TUNE", "0")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = Clock(device)
    model = build(options.preset, options.set, device)
    prompt = torch.randint(0, model.config.vocab_size, (1, options.prompt), device=device)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "parameters": model.num_parameters(),
    }
    save = partial(keep, result, options.out / "offload.json")
    clock.lap("building")
    for part in options.part or PARTS:
        if part == "offload":
            for name, figures in offloading(model, prompt, options.tokens):
                save(name, figures)
        elif part == "watch":
            save("watching", watching(model, options.batch, options.length, options.pairs))
            model = None
            gc.collect()
            model = build(options.preset, options.set, device)
        else:
            save("float32", exact(model, prompt, 12))
        clock.lap(part)
        save("seconds", clock.seconds)


if __name__ == "__main__":
    main()
