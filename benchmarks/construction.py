"""Mixtures made without training, beside the published constructions: benchmarks/construction.md.

    python benchmarks/construction.py --only energy layerwise --top-k 2 4 -o runs/construction

One row a run is appended to OUT/rows.jsonl; rows that are there are not run again. `--table` prints
the table of what is there. `--documents` reads the first documents of each held-out domain only.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path("/work/shared")
DOMAINS = ["arxiv", "books", "c4", "commoncrawl", "github", "simple_english"]
DOMAINS += ["stackexchange", "wikipedia"]
OURS: dict[str, Any] = {"refit": {"method": "down", "blend": 0.75}, "attention": 1.0}
PLAIN: dict[str, Any] = {"refit": None, "attention": None}
GSP = {"method": "gradient-plus", "tokens": 32_768}
V2 = {"method": "softmax", "scale": "auto"}
DENSE: dict[str, Any] = {}
"""The dense model's losses, measured once a process."""
METHODS: dict[str, dict[str, Any]] = {
    "v1 random": {"split": "random", "router": "random", "weighting": "softmax", **PLAIN},
    "v1 cluster": {"split": "cluster", "router": "random", "weighting": "softmax", **PLAIN},
    "v2 GSP": {"split": GSP, "router": "hidden-clusters", "weighting": V2, **PLAIN},
    "v2 residual": {
        "split": GSP,
        "router": "hidden-clusters",
        "weighting": {"method": "softmax", "scale": 1.0},
        "shared": 1,
        **PLAIN,
    },
    "cmoe": {"split": "cmoe", "router": "representative", "shared": "half", **PLAIN},
    "expertweaver": {"split": "expertweaver", "router": "mean-gate", "shared": "half", **PLAIN},
    "pruned": {"split": "static", "router": "first", **PLAIN},
    "pruned + refit": {"split": "static", "router": "first", **OURS},
    "cmoe + refit": {"split": "cmoe", "router": "representative", "shared": "half", **OURS},
    "v1 random + our router, refit": {"split": "random", **OURS},
    "energy, no refit": PLAIN,
    "energy, down refit, own target": {
        "refit": {"method": "down", "blend": 0.0},
        "attention": None,
    },
    "energy, down refit": {"refit": {"method": "down", "blend": 0.5}, "attention": None},
    "energy, no loop": {"split": {"method": "energy", "rounds": 0}, **OURS},
    "energy": OURS,
    "layerwise": {"refine": "layerwise", **OURS},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/construction"))
    parser.add_argument("--model", type=Path, default=ROOT / "ckpt/dense-14m")
    parser.add_argument("--corpus", type=Path, default=ROOT / "data/corpus")
    parser.add_argument("--only", nargs="*", default=list(METHODS))
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, nargs="*", default=[2, 4, 6])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=262_144)
    parser.add_argument("--documents", type=int)
    parser.add_argument("--set", nargs="*", default=[], help="KEY=JSON of the recipe")
    parser.add_argument("--last-only", action="store_true", help="no losses between stages")
    parser.add_argument("--dense", type=Path, help="JSON of the dense model's losses by domain")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.table:
        print(table(options.out / "rows.jsonl"))
        return
    if options.dense is not None:
        DENSE[str(options.documents)] = json.loads(options.dense.read_text())
    for seed in options.seeds:
        for top_k in options.top_k:
            for name in options.only:
                once(options, name, top_k, seed)


def once(options: argparse.Namespace, name: str, top_k: int, seed: int) -> None:
    from moesaic.construct.pipeline import Recipe, results, run

    rows = options.out / "rows.jsonl"
    settings = dict(METHODS[name])
    if settings.get("shared") == "half":
        settings["shared"] = top_k // 2
    # Methods that see no activations need no more text than the measurements do.
    plain = settings.get("refit", "down") is None and name != "energy, no refit"
    settings["tokens"] = min(options.tokens, 16_384) if plain else options.tokens
    settings |= {key: json.loads(value) for key, value in (s.split("=", 1) for s in options.set)}
    key = {"method": name, "experts": options.experts, "top_k": top_k, "seed": seed}
    key |= {"tokens": settings["tokens"], "documents": options.documents, "set": options.set}
    done = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    if any(all(row.get(k) == v for k, v in key.items()) for row in done):
        return
    recipe = Recipe(
        experts=options.experts,
        top_k=top_k,
        seed=seed,
        data={d: str(options.corpus / d / "train.jsonl") for d in DOMAINS},
        held_out={d: str(options.corpus / d / "valid.jsonl") for d in DOMAINS},
        held_out_documents=options.documents,
        **settings,
    )
    started, used = time.monotonic(), time.process_time()
    known = str(options.documents)
    figures = results(
        run(options.model, recipe, dense_loss=DENSE.get(known), last_only=options.last_only)
    )
    DENSE[known] = figures["stages"][0]["losses"]
    stages = {row["stage"]: row["loss"] for row in figures["stages"]}
    last = figures["stages"][-1]["loss"]
    row = {
        **key,
        "dense": stages["dense"],
        "loss": last,
        "gap": last - stages["dense"],
        "stages": figures["stages"],
        "layers": figures["layers"],
        "construct_seconds": figures["seconds"]["construct"],
        "parts": figures["seconds"],
        "seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(time.process_time() - used, 1),
        "threads": torch.get_num_threads(),
    }
    with rows.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{name} {top_k}/{options.experts} seed {seed}: {last:.4f}", file=sys.stderr, flush=True)


def table(rows: Path) -> str:
    """Markdown: the mean over the seeds of every method's loss and gap, a row a method."""
    found: dict[tuple[str, int, int, int], list[dict[str, Any]]] = {}
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        key = (
            row["method"] + " " + " ".join(row["set"]),
            row["top_k"],
            row["experts"],
            row["tokens"],
        )
        found.setdefault(key, []).append(row)
    lines = ["| method | active | tokens | dense | loss | gap | seeds | construction s |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    columns = ("dense", "loss", "gap", "construct_seconds")
    for (method, top_k, experts, tokens), group in sorted(
        found.items(), key=lambda item: (item[0][1], item[1][0]["loss"])
    ):
        dense, loss, gap, spent = (sum(r[k] for r in group) / len(group) for k in columns)
        lines.append(
            f"| {method.strip()} | {top_k}/{experts} | {tokens:,} | {dense:.3f} | {loss:.3f} "
            f"| {gap:.3f} | {len(group)} | {spent:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
