"""moesaic export: a mixture in a layout that other programs load, or as a dense LLaMA again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moesaic.cli.output import JsonOption, OutOption, emit

PANEL = "Make"


def command(
    model: Annotated[Path, typer.Argument(help="Directory of a mixture made by moesaic.")],
    out: OutOption,
    layout: Annotated[
        str,
        typer.Option(
            help="dense: the dense LLaMA that all experts make together. Or a stock layout: "
            "mixtral, qwen2_moe, qwen3_moe, flex_olmo, olmoe, deepseek_v3."
        ),
    ] = "dense",
    scores: Annotated[
        str,
        typer.Option(
            help="Of layout dense. off: experts added up, the inverse of convert. uniform: "
            "weighted by the score scale factor / experts, as a mixture weights them on average."
        ),
    ] = "off",
    dtype: Annotated[
        str,
        typer.Option(
            help="Of a stock layout. keep: the number type of the model. float32: exact where a "
            "factor does not fit bf16."
        ),
    ] = "keep",
    tolerance: Annotated[
        float,
        typer.Option(help="Of a stock layout: largest difference, relative to the largest output."),
    ] = 1e-4,
    overwrite: Annotated[bool, typer.Option(help="Replace the output directory.")] = False,
    json: JsonOption = False,
) -> None:
    """Write a mixture in a layout that transformers, vLLM and llama.cpp load, or as a dense LLaMA.

    Both are run and compared. A stock layout that cannot carry the model says why; one whose
    outputs differ by more than the tolerance is not written.

    Example: `moesaic export runs/moe -o runs/mixtral --layout mixtral`
    """
    from moesaic.core.lineage import read_lineage

    if layout == "dense":
        from moesaic.construct.export import export

        path = export(
            model,
            out=out,
            scores=scores,  # type: ignore[arg-type]  # checked by export
            overwrite=overwrite,
        )
    else:
        from moesaic.construct.export_layout import export_layout

        path = export_layout(
            model,
            out=out,
            layout=layout,
            dtype=dtype,  # type: ignore[arg-type]  # checked by export_layout
            tolerance=tolerance,
            overwrite=overwrite,
        )
    record = read_lineage(path) or {}
    keys = ("exact", "difference", "difference_of", "neuron_order", "parameters_total")
    result: dict[str, Any] = {"path": str(path), "layout": layout}
    result |= {"scores": scores} if layout == "dense" else {"largest_value": None}
    result |= {key: record.get(key) for key in (*keys, *result) if key not in ("path", "scores")}
    result["layout"] = layout

    def render() -> None:
        print(f"layout       {layout}")
        print(f"parameters   {result['parameters_total']:,}")
        if layout == "dense":
            order = "the dense model" if result["neuron_order"] == "dense" else "the experts"
            print(f"neurons      in the order of {order}")
            print(f"exact        layers differ by {result['difference']:.2g}")
        else:
            exact = "exact" if result["exact"] else "inexact"
            print(
                f"{exact:<12} {result['difference_of']} differ by {result['difference']:.2g} "
                f"(largest {result['largest_value']:.3g})"
            )

    emit(result, json=json, render=render, path=path)
