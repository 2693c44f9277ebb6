"""Balanced k-means against the package k-means-constrained, on the same matrices in the same run.

Matrices: `gaussian`, seeded normal numbers, no structure; `planted`, 64 random directions, each row
one of them times 0.65 plus noise of length 1. Rows are scaled to length 1. The package runs as
LLaMA-MoE runs it (n_init 10, max_iter 500, random_state 0, n_jobs 1). Every measurement is a
process of its own with one BLAS thread; times are user + system CPU seconds of all its threads,
from the matrix in memory to the labels. Sums of squares are computed here from the labels.

With `--stop S`, a run of the package for 8 clusters is stopped after S CPU seconds. Its ten starts
then run one by one, so that the best of those that came to an end is known.

    pip install k-means-constrained
    python benchmarks/balanced_kmeans.py --out benchmarks/balanced_kmeans.md
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def matrix(kind: str, rows: int, columns: int, seed: int) -> Any:
    import numpy as np

    rng = np.random.default_rng(seed)
    points = rng.standard_normal((rows, columns), dtype=np.float32)
    if kind == "planted":
        points /= np.sqrt(columns)
        directions = rng.standard_normal((64, columns), dtype=np.float32)
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        points += 0.65 * directions[rng.integers(64, size=rows)]
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    return points


def figures(points: Any, labels: Any, clusters: int) -> dict[str, Any]:
    """Sum of squares within clusters, share explained and sizes, in float64."""
    import numpy as np

    rows = len(points)
    sums = np.stack([points[labels == c].sum(0, dtype=np.float64) for c in range(clusters)])
    sizes = np.bincount(labels, minlength=clusters)
    squares = float(
        sum((points[i : i + 512].astype(np.float64) ** 2).sum() for i in range(0, rows, 512))
    )
    within = squares - float(((sums**2).sum(1) / sizes).sum())
    total = squares - float((sums.sum(0) ** 2).sum()) / rows
    exact = bool((sizes == rows // clusters).all())
    return {"ss": within, "explained": 1 - within / total, "exact": exact}


def cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def measure(who: str, kind: str, clusters: int, rows: int, columns: int, seed: int) -> None:
    """One measurement, in this process; a line of JSON per result."""
    points = matrix(kind, rows, columns, seed)
    size = rows // clusters
    if who == "ours":
        from moesaic.construct.balanced_kmeans import balanced_kmeans

        started = cpu()
        labels = balanced_kmeans(points, clusters, seed=seed).labels
        print(json.dumps({"cpu": cpu() - started, **figures(points, labels, clusters)}), flush=True)
        return
    from k_means_constrained import KMeansConstrained

    settings = {"size_min": size, "size_max": size, "max_iter": 500, "n_jobs": 1}
    together = who == "package"
    started = cpu()
    for start in range(1 if together else 10):
        found = KMeansConstrained(
            clusters, n_init=10 if together else 1, random_state=start, **settings
        ).fit(points)
        seconds = cpu() - started
        result = figures(points, found.labels_, clusters)
        print(json.dumps({"cpu": seconds, "starts": start + 1, **result}), flush=True)


def run(who: str, arguments: list[str], stop: float | None = None) -> list[dict[str, Any]]:
    """Start a measurement in a process of its own; stopped after `stop` CPU seconds."""
    command = [sys.executable, __file__, "--measure", who, *arguments]
    limits = None
    if stop is not None:

        def limits() -> None:
            resource.setrlimit(resource.RLIMIT_CPU, (int(stop), int(stop) + 5))

    environment = {**os.environ, **dict.fromkeys(THREADS, "1")}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, preexec_fn=limits
    )
    if done.returncode and stop is None:
        raise SystemExit(done.stderr)
    return [json.loads(line) for line in done.stdout.splitlines()]


def compare(kind: str, clusters: int, options: argparse.Namespace) -> dict[str, Any]:
    sizes = [str(value) for value in (kind, clusters, options.rows, options.columns, options.seed)]
    ours = run("ours", sizes)[0]
    stopped = clusters == 8 and options.stop > 0
    if stopped:
        ended = run("starts", sizes, stop=options.stop)
        package = {**min(ended, key=lambda row: row["ss"])} if ended else {"ss": None}
        finished = len(ended) == 10
        package["cpu"] = ended[-1]["cpu"] if finished else options.stop
        package["note"] = (
            "all 10 starts" if finished else f"stopped; {len(ended)} of 10 starts ended"
        )
    else:
        package = {**run("package", sizes)[0], "note": "all 10 starts"}
    return {"matrix": kind, "clusters": clusters, "ours": ours, "package": package}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| matrix | clusters | SS, package | SS, moesaic | explained, package "
        "| explained, moesaic | CPU s, package | CPU s, moesaic | ratio | equal sizes | package |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours, package = row["ours"], row["package"]
        known = package["ss"] is not None
        lines.append(
            f"| {row['matrix']} | {row['clusters']} | {package['ss']:.2f} | " if known
            else f"| {row['matrix']} | {row['clusters']} | none yet | "
        )  # fmt: skip
        share = f"{package['explained']:.5f}" if known else "-"
        lines[-1] += (
            f"{ours['ss']:.2f} | {share} | {ours['explained']:.5f} | {package['cpu']:.1f} | "
            f"{ours['cpu']:.2f} | {package['cpu'] / ours['cpu']:.0f} | "
            f"{'yes' if ours['exact'] else 'NO'} | {package['note']} |"
        )
    return "\n".join(lines)


def page(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
         if line.startswith("model name")), platform.processor(),
    )  # fmt: skip
    packages = ("numpy", "k-means-constrained", "ortools")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"""# Balanced k-means

{options.rows} rows of {options.columns} numbers into clusters of exactly equal size (a layer of
LLaMA-2-7B has 11008 of 4096), against k-means-constrained with n_init 10 and max_iter 500, one
thread each, on the same matrices in the same run. SS: sum of squares within clusters, lower is
better. Explained: share of the variance between clusters. CPU s: user + system seconds of all
threads, from the matrix in memory to the labels; moesaic uses numpy and torch, so nothing is
compiled beforehand.

{table(rows)}

Seed {options.seed}. {model}, Python {platform.python_version()}, {versions}.

    python {" ".join(sys.argv)}
"""


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        who, kind, *numbers = sys.argv[2:]
        measure(who, kind, *map(int, numbers))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=11008)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--clusters", type=int, nargs="+", default=[16, 8])
    parser.add_argument("--matrices", nargs="+", default=["gaussian", "planted"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--stop", type=float, default=280, help="CPU seconds for 8 clusters; 0: none"
    )
    parser.add_argument("--out", type=Path, help="write the page there")
    options = parser.parse_args()
    rows = []
    for clusters in options.clusters:
        for kind in options.matrices:
            rows.append(compare(kind, clusters, options))
            print(table(rows[-1:]), flush=True)
    if options.out:
        options.out.write_text(page(rows, options))


if __name__ == "__main__":
    main()
