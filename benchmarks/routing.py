"""Routing analysis against the CPU seconds of the programs of the routing study.

Input as in their measurement: router scores that follow an AR(1) process over the tokens (0.97,
unit variance, seed 0) in bfloat16; 256 samples of 512 tokens, 16 layers of 64 experts, 8 chosen,
one domain. Every stage is a process of its own; CPU seconds are user + system of all its threads,
from the array of chosen experts to the figures, after one call on a few tokens (compiled code is
kept on disk). Peak memory is that of the whole process, libraries and input included. The stages
run on one thread, then on all cores, and the results must be identical.

The original's seconds (spec section 15) are of its programs on one thread, without the bootstrap of
its hit rates; ours include 1000 replicates where `intervals` are named.

    python -m benchmarks.routing --out benchmarks/routing.md
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SAMPLES, TOKENS, LAYERS, EXPERTS, TOP_K, STICKINESS = 256, 512, 16, 64, 8, 0.97
SEGMENTS = (4, 16, 64, 256)
# stage -> (what it is, CPU seconds of the original, factor asked for)
STAGES: dict[str, tuple[str, float | None, int | None]] = {
    "srp": ("SRP, 4 segment lengths, 1000 replicates, intervals of model and layers", 48.0, 100),
    "chr-layer": ("LRU + LFU + Belady, 16 layer caches", 241.5, None),
    "chr-model": ("LRU + LFU + Belady, one cache of 1024 experts", 258.3, None),
    "chr": ("LRU + LFU + Belady, both scopes", 499.8, 50),
    "sch-layer": ("SCH(4, 16, 64, 256), 16 layer caches", 297.5, None),
    "sch-model": ("SCH(4, 16, 64, 256), one cache of 1024 experts", 506.4, None),
    "sch": ("SCH(4, 16, 64, 256), both scopes", 803.8, 50),
    "intervals": ("hit rates of all seven, 1000 replicates, layer scope", None, None),
}


def routed(seed: int = 0) -> np.ndarray:
    """Chosen experts int16 [samples, tokens, layers, k] of sticky router scores."""
    from moesaic.routing.samples import choose

    generator = np.random.default_rng(seed)
    ids = np.empty((SAMPLES, TOKENS, LAYERS, TOP_K), dtype=np.int16)
    for layer in range(LAYERS):
        noise = generator.standard_normal((TOKENS, SAMPLES, EXPERTS), dtype=np.float32)
        noise[1:] *= np.sqrt(1 - STICKINESS**2)
        for token in range(1, TOKENS):
            noise[token] += STICKINESS * noise[token - 1]
        bits = noise.view(np.uint32)
        bits += 0x7FFF + ((bits >> 16) & 1)  # to the nearest bfloat16, ties to even
        bits &= 0xFFFF0000
        for sample in range(SAMPLES):
            ids[sample, :, layer] = choose(noise[:, sample], TOP_K)
    return ids


def work(stage: str) -> Callable[[np.ndarray], list[np.ndarray]]:
    """The function that a stage measures: its results as arrays."""
    from moesaic.routing import caches
    from moesaic.routing.hits import CacheHits
    from moesaic.routing.metrics.segment_routing import SegmentRouting
    from moesaic.routing.samples import Space, read_samples

    kind, _, scope = stage.partition("-")
    windows: list[tuple[str, int | None]] = [("sch", window) for window in SEGMENTS]
    policies: list[tuple[str, int | None]] = [("lru", None), ("lfu", None), ("belady", None)]
    if kind == "sch":
        policies = windows

    def srp(ids: np.ndarray) -> list[np.ndarray]:
        metric = SegmentRouting(
            Space(EXPERTS, ids.shape[2]), segments=SEGMENTS, bootstrap=1000, samples=[len(ids)]
        )
        metric.update(read_samples(ids, num_experts=EXPERTS))
        found = [metric.at(m, level) for m in SEGMENTS for level in ("model", "layer", "expert")]
        limits = [part for figures in found for part in (figures.low, figures.high)]
        return [figures.srp for figures in found] + [part for part in limits if part is not None]

    def hits(ids: np.ndarray) -> list[np.ndarray]:
        return [
            caches.hit_rates(ids, num_experts=EXPERTS, policy=policy, window=window, scope=own)
            for own in ([scope] if scope else ["layer", "model"])
            for policy, window in policies
        ]

    def intervals(ids: np.ndarray) -> list[np.ndarray]:
        metric = CacheHits(
            Space(EXPERTS, ids.shape[2]),
            policies={
                f"{policy}-{window}": (policy, window) for policy, window in policies + windows
            },
            bootstrap=1000,
            samples=[len(ids)],
        )
        for start in range(0, len(ids), 64):
            metric.update(read_samples(ids[start : start + 64], num_experts=EXPERTS))
        found = metric.result().values()
        return [part for f in found for part in (f.rate, f.low, f.high) if part is not None]

    return {"srp": srp, "intervals": intervals}.get(kind, hits)


def measure(stage: str, file: str) -> None:
    """One stage, in this process; a line of JSON."""
    run = work(stage)
    ids = np.load(file)
    run(ids[:2, :300])
    started, began = time.process_time(), time.perf_counter()
    results = run(ids)
    seconds, wall = time.process_time() - started, time.perf_counter() - began
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in results))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    first = [float(part) for part in results[:12:3]] if stage == "srp" else []
    print(
        json.dumps(
            {"cpu": seconds, "wall": wall, "mb": peak, "sha": digest.hexdigest(), "first": first}
        )
    )


def child(stage: str, file: str, threads: int) -> dict[str, Any]:
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(names, str(threads))}
    command = [sys.executable, "-m", "benchmarks.routing", "--measure", stage, "--input", file]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def machine() -> str:
    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    import numba

    return (
        f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, load "
        f"{os.getloadavg()[0]:.1f} before; Python {platform.python_version()}, numpy "
        f"{np.__version__}, numba {numba.__version__}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--measure", choices=STAGES)
    parser.add_argument("--input")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, options.input)
        return
    where = machine()
    cores = len(os.sched_getaffinity(0))
    lines = [
        f"| stage | original, CPU s | moesaic, CPU s, one thread | factor | asked | peak MB | "
        f"wall s, one thread | wall s, {cores} threads | identical |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "experts.npy")
        np.save(file, routed())
        figures: list[float] = []
        for stage in options.stages:
            name, original, asked = STAGES[stage]
            one, all_cores = child(stage, file, 1), child(stage, file, cores)
            figures = one["first"] or figures
            factor = f"{original / one['cpu']:.0f}" if original else "-"
            lines.append(
                f"| {name} | {original or '-'} | {one['cpu']:.2f} | "
                f"{factor} | {asked or '-'} | "
                f"{one['mb']:.0f} | {one['wall']:.2f} | {all_cores['wall']:.2f} | "
                f"{'yes' if one['sha'] == all_cores['sha'] else 'NO'} |"
            )
            print(lines[-1], file=sys.stderr, flush=True)
    notes = [
        "# Routing analysis: speed and memory",
        "",
        *(__doc__ or "").partition("\n\n")[2].partition("\n\n    python")[0].splitlines(),
        "",
        *lines,
        "",
        "SRP of the model for segments of 4, 16, 64 and 256 tokens: "
        f"{', '.join(f'{value:.6f}' for value in figures)} (the original on its own draw of the "
        "same process: 0.878423, 0.754002, 0.573817, 0.388502).",
        "",
        f"{where}.",
        "",
        "    python -m benchmarks.routing --out benchmarks/routing.md",
    ]
    text = "\n".join(notes) + "\n"
    print(text)
    if options.out:
        held = options.out.read_text() if options.out.is_file() else ""
        mark = "## A complete analysis"  # measured by benchmarks.routing_scale: kept
        kept = f"\n{mark}{held.split(mark, 1)[1]}" if mark in held else ""
        options.out.write_text(text + kept)


if __name__ == "__main__":
    main()
