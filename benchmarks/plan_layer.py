"""One layer at the real sizes of LLaMA-2-7B or LLaMA-3-8B, random weights: measured and foretold.

Steps: `moesaic convert` (random split, router random, layers compared); the closed-form layer of
`moesaic construct` (energy split of one round, and router)
on a few thousand random tokens; the moments of the
refit, and the eigenvectors it needs at a smaller size. Prints one JSON object.

    python benchmarks/plan_layer.py --shape llama-2-7b --tokens 4096
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moesaic.construct.convert import convert
from moesaic.construct.scratch import init, read_preset


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = work()
    seconds = round(time.perf_counter() - start, 2)
    print(f"{seconds} s", file=sys.stderr, flush=True)
    return seconds, found


def closed_form(path: Path, *, tokens: int, experts: int, top_k: int) -> dict[str, float]:
    """Split and route the one layer as `moesaic construct` does, on random token ids."""
    from moesaic.construct import pipeline
    from moesaic.construct.dense import open_dense
    from moesaic.construct.weightings import WEIGHTINGS

    split = {"method": "energy", "rounds": 1, "starts": 1}
    recipe = pipeline.Recipe(experts=experts, top_k=top_k, tokens=tokens, refit=None, split=split)
    dense = open_dense(path)
    made = pipeline.Construction(dense, recipe, [], WEIGHTINGS.resolve("one"), [], [])
    ids_BC = torch.randint(0, 1000, (tokens // 512, 512))
    maker = pipeline._Maker(made, ids_BC, refit=None, refine=None)
    seconds, _ = timed(lambda: maker.layer(0))
    return {
        "rounds": 1,
        "layer": seconds,
        **{name: round(s, 2) for name, s in maker.seconds.items()},
    }


def peak() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", default="llama-2-7b")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--skip", nargs="*", default=[])
    given = parser.parse_args()
    preset = read_preset(
        given.shape, overrides=["config.num_hidden_layers=1", "config.vocab_size=1000",
                                "config.bos_token_id=1", "config.eos_token_id=2"],
    )  # fmt: skip
    width = preset.config["intermediate_size"]
    results: dict[str, Any] = {"shape": given.shape, "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        dense = init(preset, out=Path(folder) / "dense")
        results["peak GB after init"] = peak()
        results["convert, s"], moe = timed(
            lambda: convert(
                dense,
                out=Path(folder) / "moe",
                experts=given.experts,
                top_k=given.top_k,
                verify="layers",
            )
        )
        results["convert, bytes"] = sum(f.stat().st_size for f in moe.glob("*.safetensors"))
        results["peak GB after convert"] = peak()
        if "closed" not in given.skip:
            results["construct, s"] = closed_form(
                dense, tokens=given.tokens, experts=given.experts, top_k=given.top_k
            )
            results["peak GB after construct"] = peak()
    h_TF = torch.randn(2048, width)
    results["refit moments of 2048 tokens, s"], _ = timed(lambda: h_TF.T @ h_TF)
    a_NN = torch.randn(2048, 2048, dtype=torch.float64)
    a_NN = a_NN @ a_NN.T
    results["eigenvectors of 2048, s"], _ = timed(lambda: torch.linalg.eigh(a_NN))
    results["peak GB"] = peak()
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
