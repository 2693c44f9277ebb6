"""moesaic align: give mixture layers the output distribution of their dense layers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moesaic.cli.output import JsonOption, OutOption, emit

PANEL = "Make"


def command(
    model: Annotated[Path, typer.Argument(help="Directory of a LLaMA-MoE-v2.")],
    out: OutOption,
    reference: Annotated[Path, typer.Option(help="The dense model that it was made of.")],
    data: Annotated[str, typer.Option(help="Text: file, folder or dataset.")],
    tokens: Annotated[int, typer.Option(help="Tokens read.")] = 65_536,
    context: Annotated[int, typer.Option(help="Tokens of a row.")] = 512,
    original: Annotated[
        bool,
        typer.Option(help="Leave the bias undivided by the scale factor, as the original does."),
    ] = False,
    distribution: Annotated[
        Path | None,
        typer.Option(help="The original's distribution.pt, instead of measuring the dense model."),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the output directory.")] = False,
    json: JsonOption = False,
) -> None:
    """Align every expert layer's output mean and variance with the dense layer's.

    Example: `moesaic align runs/v2 -o runs/v2-aligned --reference ckpt/dense --data text.jsonl`
    """
    from moesaic.construct.align import align

    path = align(
        model,
        out=out,
        reference=reference,
        data=data,
        tokens=tokens,
        context=context,
        original=original,
        distribution=distribution,
        overwrite=overwrite,
    )
    result: dict[str, Any] = {"path": str(path), "reference": str(reference)}
    emit(result, json=json, render=lambda: print("aligned   every layer with experts"), path=path)
