"""moesaic attention: turn a model's attention into experts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moesaic.cli.output import JsonOption, OutOption, SeedOption, emit

PANEL = "Make"


def command(
    model: Annotated[Path, typer.Argument(help="Directory of a dense LLaMA or LLaMA-MoE-v2.")],
    out: OutOption,
    top_k: Annotated[int, typer.Option(help="Attention experts of a token.")],
    experts: Annotated[
        int | None,
        typer.Option(
            help="Attention experts: a multiple of the key/value heads that divides the query "
            "heads; the key/value heads by default."
        ),
    ] = None,
    scale: Annotated[
        float | None,
        typer.Option(help="Factor on the experts' weighted sum; experts / top-k by default."),
    ] = None,
    verify: Annotated[bool, typer.Option(help="Compare with the model it is made from.")] = True,
    seed: SeedOption = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace the output directory.")] = False,
    json: JsonOption = False,
) -> None:
    """Turn attention into experts: LLaMA-MoE-v2's attention MoE, with dense MLPs or MLP experts.

    An expert is a key/value head with its query heads, or a part of them. With all experts on the
    result equals the model; the measured difference is printed and kept in moesaic.json.

    Example: `moesaic attention runs/v2 -o runs/v2-attention --top-k 3`
    """
    from moesaic.construct.attention import attention
    from moesaic.core.lineage import read_lineage

    path = attention(
        model,
        out=out,
        top_k=top_k,
        experts=experts,
        scale=scale,
        seed=seed,
        verify=verify,
        overwrite=overwrite,
    )
    record = read_lineage(path) or {}
    result: dict[str, Any] = {"path": str(path), **record["config"]}
    result |= {key: record[key] for key in ("exact", "difference")}

    def render() -> None:
        print(f"experts   {result['experts']}, {result['top_k']} a token")
        print(f"scale     {result['scale']:.4g}")
        if result["difference"] is None:
            print("exact     not compared")
        else:
            print(f"exact     yes: logits differ by {result['difference']:.2g}")

    emit(result, json=json, render=render, path=path)
