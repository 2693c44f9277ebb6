"""moesaic router: the first weights of the routers, as a step of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moesaic.cli.output import JsonOption, OutOption, SeedOption, emit

PANEL = "Make"


def command(
    model: Annotated[Path, typer.Argument(help="Directory of the dense model.")],
    out: OutOption,
    split: Annotated[
        Path | None, typer.Option(help="What `moesaic split` wrote, or neuron_indices.pt.")
    ] = None,
    experts: Annotated[
        int | None,
        typer.Option(help="Routed experts, instead of a split, for methods that need none."),
    ] = None,
    method: Annotated[
        str,
        typer.Option(help="A name of `moesaic list routers`, or a YAML file of its settings."),
    ] = "random",
    gate: Annotated[str, typer.Option(help="Router network: mlp or linear.")] = "mlp",
    top_k: Annotated[
        int, typer.Option(help="Routed experts a token will use; `select` learns these.")
    ] = 1,
    data: Annotated[
        str | None,
        typer.Option(help="Text for methods that look at it: file, folder or dataset."),
    ] = None,
    seed: SeedOption = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace the output directory.")] = False,
    json: JsonOption = False,
) -> None:
    """Make router weights for a dense model and its split.

    The directory holds router.safetensors; give it to `moesaic convert --router`.

    Example: `moesaic router ckpt/dense -o runs/router --split runs/split --method centroids`

    Example: `moesaic router ckpt/dense -o runs/gates --experts 8 --method hidden-clusters
    --gate linear --data text.jsonl`
    """
    from moesaic.cli.settings import settings_or_name
    from moesaic.construct.router import RouterInit, make_router

    path = make_router(
        model,
        out=out,
        split=split,
        experts=experts,
        method=settings_or_name(method),
        gate=gate,  # type: ignore[arg-type]  # checked by make_router
        top_k=top_k,
        data=data,
        seed=seed,
        overwrite=overwrite,
    )
    made = RouterInit.load(path)
    result: dict[str, Any] = {
        "path": str(path),
        "method": made.meta["method"],
        "gate": made.gate,
        "layers": len(made.layers),
        "experts": made.num_experts,
        "held_out_top_k_found": made.meta.get("held_out_top_k_found"),
    }

    def render() -> None:
        print(f"{result['method']}: {result['layers']} routers of {result['experts']} experts")
        if found := result["held_out_top_k_found"]:
            print(
                f"most active experts found, held-out tokens: {min(found):.1%} to {max(found):.1%}"
            )

    emit(result, json=json, render=render, path=path)
