"""moesaic upcycle: dense models become a larger mixture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moesaic.cli.output import JsonOption, OutOption, SeedOption, emit

PANEL = "Make"


def command(
    models: Annotated[
        list[Path],
        typer.Argument(help="Directory of a dense model; join takes several."),
    ],
    out: OutOption,
    method: Annotated[
        str,
        typer.Option(help="A name of `moesaic list upcycles`, or a YAML file of its settings."),
    ] = "copies",
    experts: Annotated[
        int | None,
        typer.Option(help="Experts of a layer, shared ones included; join counts the models."),
    ] = None,
    top_k: Annotated[
        int, typer.Option(help="Experts active for a token, shared ones included.")
    ] = 2,
    shared: Annotated[int, typer.Option(help="Always-on copies of the dense layer.")] = 0,
    layout: Annotated[
        str | None,
        typer.Option(
            help="llama_moe, moesaic_moe (every dense family), or mixtral: the layout that vLLM "
            "and llama.cpp load. By default llama_moe where it computes the same attention."
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="join: each model's own text, once per model and in their order."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of the method: ratio=0.3."),
    ] = None,
    verify: Annotated[
        str,
        typer.Option(
            help="Compare with the dense model: full (logits), layers, off, or auto (full below "
            "2 B parameters)."
        ),
    ] = "auto",
    seed: SeedOption = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace the output directory.")] = False,
    json: JsonOption = False,
) -> None:
    """Make a larger mixture out of dense models: copies, Drop-Upcycling, virtual groups, join.

    Plain copies and virtual groups equal the dense model exactly, and the command proves it; what
    is not exact states its difference.

    Example: `moesaic upcycle ckpt/dense -o runs/moe --method drop --set ratio=0.5 --experts 8`
    """
    from moesaic.cli.settings import settings_or_name
    from moesaic.construct.upcycle import upcycle
    from moesaic.core.config import override
    from moesaic.core.lineage import read_lineage

    settings = settings_or_name(method)
    if set_:
        settings = {"method": settings} if isinstance(settings, str) else settings
        settings = override(settings, set_)
    path = upcycle(
        models,
        out=out,
        method=settings,
        experts=experts,
        top_k=top_k,
        shared=shared,
        layout=layout,  # type: ignore[arg-type]  # checked by upcycle
        data=data or None,
        seed=seed,
        verify=verify,  # type: ignore[arg-type]  # checked by upcycle
        overwrite=overwrite,
    )
    record = read_lineage(path) or {}
    result: dict[str, Any] = {"path": str(path), "method": record["config"]["method"]["method"]}
    result |= {key: record[key] for key in _REPORTED if key in record}
    emit(result, json=json, render=lambda: _show(result), path=path)


_REPORTED = (
    "layers",
    "experts",
    "shared",
    "top_k",
    "expert_width",
    "parameters_dense",
    "parameters_total",
    "parameters_active",
    "bytes",
    "dtype",
    "exact",
    "difference",
    "difference_of",
    "largest_value",
    "own_text_first",
    "seconds",
)


def _show(result: dict[str, Any]) -> None:
    share = result["parameters_active"] / result["parameters_total"]
    shared = f", {result['shared']} of them shared" if result["shared"] else ""
    width = result["expert_width"]
    print(f"layers       {result['layers']}")
    print(f"experts      {result['experts']} of width {width}{shared}; {result['top_k']} active")
    print(f"parameters   {result['parameters_total']:,} (dense {result['parameters_dense']:,})")
    print(f"active       {result['parameters_active']:,} ({share:.1%})")
    print(f"size         {result['bytes'] / 1e6:,.1f} MB of {result['dtype']}")
    if result["difference"] is None:
        print("exact        not compared")
    else:
        measured = f"{result['difference_of']} differ by {result['difference']:.2g}"
        measured += f" (largest value {result['largest_value']:.3g})"
        print(f"exact        {'yes' if result['exact'] else 'no'}: {measured}")
    if own := result.get("own_text_first"):
        low, mean = min(own), sum(own) / len(own)
        print(f"routers      a text's own expert first for {mean:.1%} of tokens (worst {low:.1%})")
    print(f"seconds      {result['seconds']}")
