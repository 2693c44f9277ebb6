"""The directions of the papers: loss of every split after conversion and after continual training.

A dense model is split into 8 experts in every way, converted with 2 and with 4 of 8 active, and
trained on for 1 M and for 4 M tokens, beside the dense model trained on as long and a MoE of the
same shape from random weights: same tokens in the same order, same schedule.

    python benchmarks/splits.py prepare --data CORPUS --work DIR      the splits, on a CPU
    python benchmarks/splits.py run --data CORPUS --work DIR --minutes 9
    python benchmarks/splits.py table --work DIR                      writes benchmarks/splits.md

CORPUS holds one folder a domain with train.jsonl and valid.jsonl. `run` appends one row a run to
DIR/results.jsonl and skips the runs that are there, so that it may be stopped and called again.
Loss is nats a token on valid.jsonl: one document a row, context 512, tokens weighted equally, mean
over the domains.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EXPERTS = 8
DOMAINS = (
    "commoncrawl",
    "c4",
    "github",
    "books",
    "arxiv",
    "wikipedia",
    "stackexchange",
    "simple_english",
)
# Name in the table: settings of the method, shared experts.
SPLITS: dict[str, tuple[dict[str, Any], int]] = {
    "random": ({"method": "random"}, 0),
    "cluster (l2)": ({"method": "cluster", "metric": "l2"}, 0),
    "cluster (cos)": ({"method": "cluster", "metric": "cos"}, 0),
    "coactivation": ({"method": "coactivation"}, 0),
    "gradient": ({"method": "gradient"}, 0),
    "sharing-inner": ({"method": "sharing-inner"}, 0),
    "sharing-inter": ({"method": "sharing-inter"}, 1),
}
DENSE, SCRATCH = "dense", "random weights"


@dataclass(frozen=True)
class Key:
    """One run: a start, how many experts are active, how long it is trained, and the seed."""

    start: str
    active: int
    tokens: int
    seed: int


def keys(active: list[int], tokens: list[int], seeds: list[int]) -> Iterator[Key]:
    """List the runs, short ones first, so that a table of one budget is whole early."""
    for seed in seeds:
        for budget in sorted(tokens):
            yield Key(DENSE, EXPERTS, budget, seed)
            for count in active:
                for name in [*SPLITS, SCRATCH]:
                    yield Key(name, count, budget, seed)


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name).strip("-").replace("--", "-")


def data(corpus: Path, part: str) -> dict[str, str]:
    return {name: str(corpus / name / f"{part}.jsonl") for name in DOMAINS}


def prepare(args: argparse.Namespace) -> None:
    """Compute the splits that are not there yet."""
    from moesaic.construct.split import make_split

    for name, (method, shared) in SPLITS.items():
        for seed in args.seeds:
            out = args.work / "splits" / f"{slug(name)}-{seed}"
            if out.is_dir():
                continue
            started = time.monotonic()
            scores = args.work / "splits" / f"gradient-{seed}" / "scores.safetensors"
            # Scoring neurons is most of the work and the same for the three splits that use it.
            reuse = name.startswith("sharing") and scores.is_file()
            make_split(
                args.model,
                out=out,
                method=method | ({"scores": str(scores)} if reuse else {}),
                experts=EXPERTS,
                shared=shared,
                data=data(args.data, "train"),
                seed=seed,
            )
            print(f"{name}, seed {seed}: {time.monotonic() - started:.1f} s", flush=True)


def start_model(key: Key, args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Write the model that a run starts from; return its lineage."""
    from moesaic.construct.convert import convert
    from moesaic.core.lineage import read_lineage

    if key.start == DENSE:
        shutil.copytree(args.model, out)
        return {}
    name = "random" if key.start == SCRATCH else key.start
    convert(
        args.model,
        out=out,
        split=args.work / "splits" / f"{slug(name)}-{key.seed}",
        top_k=key.active,
        router="random",
        seed=key.seed,
    )
    if key.start == SCRATCH:
        randomise(out, key.seed)
    return read_lineage(out) or {}


def randomise(folder: Path, seed: int) -> None:
    """Replace the weights of a model by those that its class starts from."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    torch.manual_seed(seed)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The training settings that every run shares; rows of other settings are not mixed."""
    return {"lr": args.lr, "sequences": args.sequences, "block_size": 512, "warmup_share": 0.05}


def run_one(key: Key, args: argparse.Namespace) -> dict[str, Any]:
    from moesaic.core.lineage import read_lineage, versions
    from moesaic.training.loop import train
    from moesaic.training.telemetry import read_log_lines

    started = time.monotonic()
    folder = args.work / "run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    lineage = start_model(key, args, folder / "start")
    shared = settings(args)
    updates = key.tokens // (shared["sequences"] * shared["block_size"])
    out = train(
        {
            "model": str(folder / "start"),
            "data": {
                "train": data(args.data, "train"),
                "valid": data(args.data, "valid"),
                "block_size": shared["block_size"],
                "cache": str(args.work / "tokens"),
            },
            "tokens": key.tokens,
            "batch": {"sequences": shared["sequences"]},
            "optimizer": {"lr": shared["lr"]},
            "schedule": {"warmup": round(shared["warmup_share"] * updates), "floor": 0.1},
            "checkpoint": {"keep_last": 0},
            "log": {"every": max(1, updates // 10)},
            "seed": key.seed,
        },
        out=folder / "out",
    )
    lines = read_log_lines(out / "log.jsonl")
    before, after = (line["loss"] for line in lines if line["event"] == "evaluate")
    last = [line for line in lines if line["event"] == "train"][-1]
    trained = read_lineage(out) or {}
    row = {
        **asdict(key),
        "settings": shared,
        "before": before,
        "after": after,
        "exact": lineage.get("exact"),
        "parameters": trained.get("parameters"),
        "active_parameters": trained.get("active_parameters"),
        "load_cv": last.get("load_cv"),
        "tokens_per_second": last["tokens_per_second"],
        "seconds": round(time.monotonic() - started, 1),
        "device": device_name(),
        "versions": versions(),
    }
    shutil.rmtree(folder)
    return row


def device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def read_rows(work: Path) -> list[dict[str, Any]]:
    path = work / "results.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def run(args: argparse.Namespace) -> None:
    """Run what is missing until the time is up."""
    started = time.monotonic()
    prepare(args)
    done = {
        Key(row["start"], row["active"], row["tokens"], row["seed"])
        for row in read_rows(args.work)
        if row["settings"] == settings(args)
    }
    missing = [key for key in keys(args.active, args.tokens, args.seeds) if key not in done]
    longest = 0.0
    for number, key in enumerate(missing):
        spent = time.monotonic() - started
        if spent + longest > 60 * args.minutes:
            print(f"{len(missing) - number} runs left; call again", flush=True)
            return
        row = run_one(key, args)
        longest = max(longest, row["seconds"])
        with (args.work / "results.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"{key.start:16} {key.active}/{EXPERTS} {key.tokens:>9,} seed {key.seed}: "
            f"{row['before']['mean']:.4f} -> {row['after']['mean']:.4f} "
            f"({row['seconds']:.0f} s, {row['tokens_per_second']:,.0f} tokens/s)",
            flush=True,
        )
    print("all runs are done", flush=True)


def coverage(key: dict[str, Any], work: Path) -> float | None:
    """Mean share of a layer's neurons that a split keeps, read from its file."""
    from moesaic.construct.split import NeuronSplit

    path = work / "splits" / f"{slug(key['start'])}-{key['seed']}" / "split.safetensors"
    return statistics.mean(NeuronSplit.load(path).coverage()) if path.is_file() else None


def table(args: argparse.Namespace) -> None:
    rows = [row for row in read_rows(args.work) if row["settings"] == settings(args)]
    rows = [{**row, "coverage": coverage(row, args.work)} for row in rows]
    if not rows:
        raise SystemExit(
            f"{args.work}/results.jsonl has no rows of these settings. Call run first."
        )
    args.out.write_text(render(rows, settings(args)))
    print(args.out)


def render(rows: list[dict[str, Any]], shared: dict[str, Any]) -> str:
    """Write the rows as a Markdown page: a table for each number of active experts."""
    budgets = sorted({row["tokens"] for row in rows})
    seeds = sorted({row["seed"] for row in rows})
    devices = sorted({row["device"] for row in rows})
    text = [
        "# Splits: loss after conversion and after continual pre-training",
        "",
        f"dense-14m (8 layers, FFN 1024) into {EXPERTS} experts; held-out loss in nats a token, "
        f"mean of {len(DOMAINS)} domains, one document a row, context 512. "
        f"Training: AdamW, peak rate {shared['lr']:g}, {shared['warmup_share']:.0%} warm-up, "
        f"cosine to 10 %, {shared['sequences']} x {shared['block_size']} tokens an update, domains "
        "in equal parts; every row sees the same tokens in the same order. "
        f"Seeds: {', '.join(map(str, seeds))}"
        + (" (mean ± half the range)." if len(seeds) > 1 else "."),
        "",
        f"Machine: {', '.join(devices)}. Made with `python benchmarks/splits.py run` and `table`.",
    ]
    for active in sorted({row["active"] for row in rows if row["start"] != DENSE}):
        chosen = [row for row in rows if row["active"] == active or row["start"] == DENSE]
        text += ["", f"## {active} of {EXPERTS} experts active", ""]
        heads = ["start", "covered", "converted", *(f"after {b / 1e6:g} M tokens" for b in budgets)]
        text += ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
        names = [
            name for name in (DENSE, *SPLITS, SCRATCH) if any(r["start"] == name for r in chosen)
        ]
        for name in names:
            mine = [row for row in chosen if row["start"] == name]
            cells = [name, covered(mine), figure([row["before"]["mean"] for row in mine])]
            for budget in budgets:
                cells.append(figure([r["after"]["mean"] for r in mine if r["tokens"] == budget]))
            text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"


def covered(rows: list[dict[str, Any]]) -> str:
    shares = [row["coverage"] for row in rows if row["coverage"] is not None]
    if not shares:
        return "–"
    return f"{statistics.mean(shares):.0%}"


def figure(losses: list[float]) -> str:
    if not losses:
        return ""
    half = (max(losses) - min(losses)) / 2
    return f"{statistics.mean(losses):.4f}" + (f" ± {half:.4f}" if half > 5e-5 else "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=["prepare", "run", "table"])
    parser.add_argument("--model", type=Path, default=ROOT / "../shared/ckpt/dense-14m")
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data/corpus")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/splits")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/splits.md")
    parser.add_argument("--active", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1_000_000, 4_000_000])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=9.0)
    args = parser.parse_args()
    {"prepare": prepare, "run": run, "table": table}[args.what](args)


if __name__ == "__main__":
    main()
