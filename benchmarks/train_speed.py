"""Where the time of an update goes: host or device, eager or compiled, with or without data.

    python benchmarks/train_speed.py llama-4m --sequences 128 --block 512
    python benchmarks/train_speed.py mixtral-1b --sequences 4 --block 4096 --precision bf16 \
        --experts grouped_mm --experts moesaic

Prints, for each way, milliseconds an update (wall), milliseconds that kernels ran (profiler; when
this is much less than wall, the host is the limit), tokens/s, MFU from active parameters and the
peak of memory. The row `+ data thread` adds blocks drawn by the thread that `moesaic train` uses,
from random ids.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from moesaic.construct.scratch import model_config, read_preset
from moesaic.data import MixtureStream, TokenDomain
from moesaic.models.anatomy import anatomy
from moesaic.models.load import load
from moesaic.training.batches import prefetch
from moesaic.training.config import OptimizerConfig
from moesaic.training.optimizer import Optimizer
from moesaic.training.step import build_pass, run_update
from moesaic.training.telemetry import peak_flops


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_updates(update: Callable[[], Any], device: torch.device, count: int) -> float:
    """Return wall milliseconds an update, after warming up."""
    for _ in range(3):
        update()
    sync(device)
    started = time.perf_counter()
    for _ in range(count):
        update()
    sync(device)
    return 1e3 * (time.perf_counter() - started) / count


def busy(update: Callable[[], Any], device: torch.device, count: int) -> float | None:
    """Return milliseconds an update in which a kernel ran, or None on a CPU."""
    if device.type != "cuda":
        return None
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(count):
            update()
        sync(device)
    total = sum(event.self_device_time_total for event in profile.key_averages())
    return float(total) / 1e3 / count


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", help="a preset of moesaic init, or a model directory")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--block", type=int, default=512)
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--precision", choices=["fp32", "mixed", "bf16"], default="mixed")
    parser.add_argument("--only", choices=["eager", "compiled"], help="default: both")
    parser.add_argument(
        "--experts",
        action="append",
        help="an experts implementation; again for more, all in one run",
    )
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    model: Any
    if Path(args.model).is_dir():
        model = load(Path(args.model), dtype=dtype).to(device)
    else:
        with torch.device(device):
            config = model_config(read_preset(args.model))
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.train()
    counts = anatomy(model)
    tokens = args.sequences * args.block
    peak = peak_flops(device, None)
    print(
        f"{args.model}: {counts.params_total:,} parameters, {counts.params_active:,} active; "
        f"{tokens:,} tokens an update; {args.precision} on {device}"
    )
    optimizer = Optimizer(model, OptimizerConfig(lr=1e-4))
    mixed = args.precision == "mixed"
    autocast = torch.autocast(device.type, torch.bfloat16) if mixed else None
    vocabulary = model.config.vocab_size
    ids_ABT = torch.randint(0, vocabulary, (1, args.sequences, args.block), device=device)
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, vocabulary, 4000) for _ in range(400)]
    domain = TokenDomain.from_documents("random", documents, bos=1, eos=0)

    ways = [args.only] if args.only else ["eager", "compiled"]
    for way, experts in itertools.product(ways, args.experts or [None]):
        if experts is not None:
            model.set_experts_implementation(experts)
        torch.compiler.reset()
        run_pass = build_pass(model)
        if way == "compiled":
            run_pass = torch.compile(run_pass)

        def fixed(run_pass: Any = run_pass) -> None:
            run_update(run_pass, optimizer, ids_ABT, autocast=autocast)

        stream = MixtureStream({"random": domain}, block=args.block)
        source = prefetch(
            stream,
            updates=10**9,
            accumulation=1,
            size=args.sequences,
            length=args.block,
            pin=device.type == "cuda",
        )

        def drawn(run_pass: Any = run_pass, source: Any = source) -> None:
            ids = next(source).ids_ABT.to(device, non_blocking=True)
            run_update(run_pass, optimizer, ids, autocast=autocast)

        name = way if experts is None else f"{experts} {way}"
        rows = [(name, fixed)] if experts else [(name, fixed), (f"{name} + data thread", drawn)]
        for label, update in rows:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            wall = time_updates(update, device, args.updates)
            memory = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0
            kernels = busy(update, device, min(3, args.updates))
            speed = 1e3 * tokens / wall
            mfu = "n/a" if peak is None else f"{6 * counts.params_active * speed / peak:.2%}"
            ran = "n/a" if kernels is None else f"{kernels:.2f}"
            print(
                f"{label:34} {wall:9.2f} ms wall {ran:>8} ms kernels {speed:12,.0f} tokens/s "
                f"MFU {mfu} peak {memory:.1f} GB",
                flush=True,
            )
        source.close()


if __name__ == "__main__":
    main()
