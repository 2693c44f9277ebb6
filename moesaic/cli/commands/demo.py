"""`moesaic demo`: the whole way from a dense LLaMA to a trained mixture, with a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesaic.cli.output import JsonOption, OutOption, SeedOption, emit

PANEL = "Help"


def command(
    out: OutOption,
    tokens: Annotated[
        int | None, typer.Option(help="Train on so many tokens; by default about a minute's worth.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Train for about so many seconds instead.")
    ] = None,
    experts: Annotated[int, typer.Option(help="Experts per layer.")] = 8,
    top_k: Annotated[int, typer.Option(help="Experts that each token uses.")] = 2,
    seed: SeedOption = 0,
    model: Annotated[
        Path | None, typer.Option(hidden=True, help="Another dense LLaMA than the one shipped.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier demo in the output directory.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Go the whole way from a dense LLaMA to a trained mixture of experts, in under three minutes.

    Takes the small dense LLaMA inside the package, splits it into experts three ways, checks each
    against the dense model, measures the loss on held-out text, trains the best one on, lets both
    write, and puts everything on one page, report.html. Needs no data, no network and no GPU.

    Example: `moesaic demo -o runs/demo`
    """
    from moesaic.demo.page import loss_table
    from moesaic.demo.run import DENSE, demo

    results = demo(
        out,
        model=model or DENSE,
        experts=experts,
        top_k=top_k,
        tokens=tokens,
        seconds=seconds,
        seed=seed,
        overwrite=overwrite,
    )
    kept = ("dense", "methods", "trained_tokens", "seconds", "report", "checkpoint")
    emit(
        {name: results[name] for name in kept},
        json=json,
        render=lambda: print(f"\n{loss_table(results).text()}\n"),
        path=results["report"],
    )
