"""moesaic export: a LLaMA-MoE becomes a dense LLaMA again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moesaic.cli.output import JsonOption, OutOption, emit

PANEL = "Make"


def command(
    model: Annotated[Path, typer.Argument(help="Directory of a LLaMA-MoE checkpoint.")],
    out: OutOption,
    scores: Annotated[
        str,
        typer.Option(
            help="off: experts added up, the inverse of convert. uniform: weighted by the score "
            "scale factor / experts, as a mixture weights them on average."
        ),
    ] = "off",
    overwrite: Annotated[bool, typer.Option(help="Replace the output directory.")] = False,
    json: JsonOption = False,
) -> None:
    """Turn a LLaMA-MoE back into the dense LLaMA that all its experts make together.

    Every layer is compared with its experts. Neurons come back in their dense order where the
    conversion's split is still beside the weights, else in the order of the experts.

    Example: `moesaic export runs/moe -o runs/dense`
    """
    from moesaic.construct.export import export
    from moesaic.core.lineage import read_lineage

    path = export(
        model,
        out=out,
        scores=scores,  # type: ignore[arg-type]  # checked by export
        overwrite=overwrite,
    )
    record = read_lineage(path) or {}
    keys = ("exact", "difference", "difference_of", "neuron_order", "parameters_total")
    result: dict[str, Any] = {"path": str(path), "scores": scores}
    result |= {key: record.get(key) for key in keys}

    def render() -> None:
        print(f"parameters   {result['parameters_total']:,}")
        order = "the dense model" if result["neuron_order"] == "dense" else "the experts"
        print(f"neurons      in the order of {order}")
        print(f"exact        layers differ by {result['difference']:.2g}")

    emit(result, json=json, render=render, path=path)
