"""A construction at the real sizes of LLaMA-2-7B or LLaMA-3-8B, random weights: measured, foretold.

A model of a few layers is made of random bf16 weights; `convert` (random split, layers compared)
runs on the CPU, then the closed form of `moesaic construct` (energy split and router, both refits)
on random token ids, on the GPU where there is one. Both hold one layer at a time, so that the whole
model takes its layers times the last one, and the memory that was measured. Prints a JSON object.

    python benchmarks/plan_layer.py --shape llama-2-7b --tokens 176128
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from moesaic.construct.choices import SplitChoice
from moesaic.construct.convert import convert
from moesaic.construct.dense import open_dense
from moesaic.construct.layer_maker import LayerMaker
from moesaic.construct.mixture_writer import MixtureWriter
from moesaic.construct.recipe import Recipe
from moesaic.construct.refits import REFITS
from moesaic.construct.scratch import init, read_preset
from moesaic.construct.weightings import WEIGHTINGS
from moesaic.plan.machine import measure
from moesaic.plan.predict import plan

VOCABULARY = 1000


def make_dense(shape: str, layers: int, out: Path) -> None:
    """Write the model; in a process of its own, so that its memory is not counted."""
    sizes = {"num_hidden_layers": layers, "vocab_size": VOCABULARY}
    sizes |= {"bos_token_id": 1, "eos_token_id": 2}
    init(read_preset(shape, overrides=[f"config.{k}={v}" for k, v in sizes.items()]), out=out)


def say(what: str, since: float) -> float:
    seconds = time.perf_counter() - since
    print(f"{what}: {seconds:.2f} s", file=sys.stderr, flush=True)
    return round(seconds, 2)


def host_peak() -> float:
    """GB of host memory that this process has had at most, libraries and mapped files included."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2)


def closed_form(path: Path, out: Path, recipe: Recipe) -> dict[str, Any]:
    """Make and write every layer as `moesaic construct` does, on random token ids."""
    dense = open_dense(path)
    rows = recipe.tokens // recipe.context
    ids_BC = torch.randint(0, VOCABULARY, (rows, recipe.context))
    selects = recipe.top_k - recipe.shared
    fields = WEIGHTINGS.resolve("tempered").fields(
        routed=recipe.experts - recipe.shared, selects=selects
    )
    split = SplitChoice(dense, recipe)
    start = time.perf_counter()
    maker = LayerMaker(
        dense,
        recipe,
        ids_BC,
        split=split,
        fields=fields,
        refit=REFITS.resolve("down"),
        refine=None,
    )
    found: dict[str, Any] = {"tokens": ids_BC.numel(), "device": str(maker.stream.device)}
    found["embeddings, s"] = say("embeddings", start)
    layers = []
    with MixtureWriter(dense, out, selects=selects, fields=fields, ready=None) as writer:
        for index in range(dense.layers):
            before, start = dict(maker.seconds), time.perf_counter()
            made, weights = maker.layer(index)
            writer.layer(index, weights["refit"])
            seconds = say(f"layer {index}", start)
            parts = {k: round(v - before.get(k, 0.0), 2) for k, v in maker.seconds.items()}
            layers.append({"all": seconds, **parts, "host GB": host_peak()})
            if maker.stream.device.type == "cuda":
                layers[-1]["GPU GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
            layers[-1]["rounds of the split"] = len(made.facts["split"].get("captured", []))
            print(json.dumps(layers[-1]), file=sys.stderr, flush=True)
        start = time.perf_counter()
        writer.end(maker.last_norm()[1])
    found["last tensors written, s"] = say("writing", start)
    found["layers"] = layers
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", default="llama-2-7b")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=176_128)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", type=Path, help="where the models are written")
    parser.add_argument("--skip", nargs="*", default=[], help="convert, construct")
    given = parser.parse_args()
    recipe = Recipe(
        experts=given.experts, top_k=given.top_k, tokens=given.tokens, device=given.device
    )
    machine = measure(given.folder)
    results: dict[str, Any] = {"shape": given.shape, "threads": torch.get_num_threads()}
    whole = read_preset(given.shape).config["num_hidden_layers"]
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        dense = Path(folder) / "dense"
        child = multiprocessing.get_context("spawn").Process(
            target=make_dense, args=(given.shape, given.layers, dense)
        )
        start = time.perf_counter()
        child.start()
        child.join()
        say("random weights", start)
        if "convert" not in given.skip:
            start = time.perf_counter()
            sizes = {"experts": given.experts, "top_k": given.top_k}
            convert(dense, out=Path(folder) / "converted", verify="layers", **sizes)
            results["convert, s"] = say("convert", start)
            results["host GB after convert"] = host_peak()
        if "construct" not in given.skip:
            made = closed_form(dense, Path(folder) / "moe", recipe)
            results["construct"] = made
            last = made["layers"][-1]
            seconds = whole * last["all"] + made["embeddings, s"] + made["last tensors written, s"]
            results["whole model"] = {
                "layers": whole,
                "minutes": round(seconds / 60, 2),
                "host GB": last["host GB"],
                "GPU GB": last.get("GPU GB"),
            }
    overrides = [f"tokens={given.tokens}", f"experts={given.experts}", f"top_k={given.top_k}"]
    foretold = plan("energy", machine=machine, model=given.shape, overrides=overrides)
    results["foretold"] = {
        "machine": machine.to_dict(),
        "one layer, s": foretold.seconds["construct, one layer"],
        "minutes": round(sum(foretold.seconds["construct"].values()) / 60, 2),
        "GB": {use: round(peak / 1e9, 2) for use, peak in foretold.peak.items()},
    }
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
