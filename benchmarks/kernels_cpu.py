"""Our experts on a CPU beside transformers' grouped_mm: forward and backward, in alternating pairs.

    python benchmarks/kernels_cpu.py [--pairs 9] [--threads 2]

Every pair runs both on the same numbers, one after the other, in changing order; each member is
repeated until it takes about 50 ms. The ratio of a row is the median over the pairs of ours by
theirs, in wall time and in processor time (which other programs on the machine disturb less).
Gradients are taken for the input, both weights and the routing weights, as in training.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

import moesaic.kernels

SHAPES = (  # T, D, I, E, K
    (512, 256, 512, 8, 2),
    (512, 256, 128, 32, 4),
    (1, 256, 512, 8, 2),
    (8, 256, 128, 32, 4),
    (2048, 512, 256, 16, 4),
)
_LEAST = 0.05  # seconds in one measurement


class Experts(nn.Module):
    """An experts module as transformers' decorator leaves it."""

    has_gate = is_concatenated = True
    has_bias = is_transposed = has_post_expert_norm = _is_expert_parallel = False
    _apply_gate = _default_apply_gate

    def __init__(self, D: int, I: int, E: int, dtype: torch.dtype) -> None:  # noqa: E741
        super().__init__()
        self.num_experts, self.act_fn = E, nn.SiLU()
        self.gate_up_proj = nn.Parameter((torch.randn(E, 2 * I, D) * D**-0.5).to(dtype))
        self.down_proj = nn.Parameter((torch.randn(E, D, I) * I**-0.5).to(dtype))


def step(function: Callable[..., torch.Tensor], module: Experts, given: list[torch.Tensor]) -> None:
    """One forward and backward pass as in training: gradients are set, not accumulated."""
    x, ids, weights, grad = given
    x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
    module.zero_grad(set_to_none=True)
    function(module, x, ids, weights).backward(grad)


def clock(run: Callable[[], None], repeats: int) -> tuple[float, float]:
    """Wall and processor seconds of one call."""
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - wall) / repeats, (time.process_time() - processor) / repeats


def row(shape: tuple[int, ...], dtype: torch.dtype, pairs: int) -> dict[str, Any]:
    """Measure one row of the table."""
    T, D, I, E, K = shape  # noqa: E741
    torch.manual_seed(0)
    module = Experts(D, I, E, dtype)
    ids = torch.rand(T, E).argsort(dim=1)[:, :K]
    given = [torch.randn(T, D).to(dtype), ids, torch.rand(T, K).to(dtype), torch.randn(T, D)]
    given[3] = given[3].to(dtype)
    runs = {
        name: lambda function=ALL_EXPERTS_FUNCTIONS[name]: step(function, module, given)
        for name in ("moesaic", "grouped_mm")
    }
    for run in runs.values():
        clock(run, 2)
    repeats = max(1, math.ceil(_LEAST / clock(runs["grouped_mm"], 3)[0]))
    walls, processors, ours, theirs = [], [], [], []
    for pair in range(pairs):
        order = ["moesaic", "grouped_mm"] if pair % 2 else ["grouped_mm", "moesaic"]
        times = {name: clock(runs[name], repeats) for name in order}
        (wall, processor), (their_wall, their_processor) = times["moesaic"], times["grouped_mm"]
        walls.append(wall / their_wall)
        processors.append(processor / their_processor)
        ours.append(wall)
        theirs.append(their_wall)
    return {
        "ours": median(ours),
        "theirs": median(theirs),
        "ratio": median(walls),
        "processor": median(processors),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    moesaic.kernels.register()
    print(f"torch {torch.__version__}, {options.threads} threads, {options.pairs} pairs")
    print("| dtype | T, D, I, E, K | ours ms | grouped_mm ms | ratio | ratio of processor time |")
    print("|---|---|---|---|---|---|")
    ratios: dict[str, list[float]] = {"ratio": [], "processor": []}
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            found = row(shape, dtype, options.pairs)
            for kind, values in ratios.items():
                values.append(found[kind])
            print(
                f"| {str(dtype).removeprefix('torch.')} | {', '.join(map(str, shape))} "
                f"| {1e3 * found['ours']:.2f} | {1e3 * found['theirs']:.2f} "
                f"| {found['ratio']:.3f} | {found['processor']:.3f} |",
                flush=True,
            )
    means = {kind: math.exp(sum(map(math.log, v)) / len(v)) for kind, v in ratios.items()}
    print(
        f"geometric mean {means['ratio']:.3f} (processor time {means['processor']:.3f}); "
        f"highest row {max(ratios['ratio']):.3f} ({max(ratios['processor']):.3f})"
    )


if __name__ == "__main__":
    main()
