"""moesaic split: divide the neurons of a dense model among experts, as a step of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moesaic.cli.output import JsonOption, OutOption, SeedOption, SetOption, emit

PANEL = "Make"


def command(
    model: Annotated[Path, typer.Argument(help="Directory of a dense LLaMA or Mistral.")],
    out: OutOption,
    experts: Annotated[int, typer.Option(help="Experts of a layer, shared ones included.")],
    method: Annotated[
        str,
        typer.Option(help="A name of `moesaic list splits`, or a YAML file: method and settings."),
    ] = "random",
    shared: Annotated[int, typer.Option(help="Experts that are always on.")] = 0,
    data: Annotated[
        str | None,
        typer.Option(help="Text for methods that look at it: file, folder or dataset."),
    ] = None,
    seed: SeedOption = 0,
    set_: SetOption = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the output directory.")] = False,
    json: JsonOption = False,
) -> None:
    """Divide the neurons of a dense LLaMA among experts.

    The directory holds split.safetensors; give it to `moesaic router --split` and `moesaic convert
    --split`. `random` reads the model's config only. `--set` changes a method's settings.

    Example: `moesaic split ckpt/dense -o runs/split --method cluster --experts 8 --set metric=cos`
    """
    from moesaic.cli.settings import settings_or_name
    from moesaic.construct.split import NeuronSplit, make_split
    from moesaic.core.config import override

    chosen = settings_or_name(method)
    if set_:
        chosen = override({"method": chosen} if isinstance(chosen, str) else chosen, set_)
    path = make_split(
        model,
        out=out,
        method=chosen,
        experts=experts,
        shared=shared,
        data=data,
        seed=seed,
        overwrite=overwrite,
    )
    made = NeuronSplit.load(path)
    coverage = made.coverage()
    widths = [size for layer in made.sizes() for size in layer]
    result: dict[str, Any] = {
        "path": str(path),
        "method": made.meta["method"],
        "layers": made.layers,
        "experts": made.num_experts + made.num_shared,
        "shared": made.num_shared,
        "expert_width": [min(widths), max(widths)],
        "exact": made.exact,
        "coverage": coverage,
    }

    def render() -> None:
        low, high = result["expert_width"]
        width = f"{low}" if low == high else f"{low} to {high}"
        always = f", {made.num_shared} of them shared" if made.num_shared else ""
        print(f"method     {result['method']}")
        print(f"layers     {made.layers} of {made.width} neurons")
        print(f"experts    {result['experts']} of width {width}{always}")
        held = "every neuron once" if made.exact else "neurons repeat or vanish"
        print(f"coverage   {min(coverage):.1%} to {max(coverage):.1%}: {held}")

    emit(result, json=json, render=render, path=path)
