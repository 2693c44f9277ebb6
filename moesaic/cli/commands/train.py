"""moesaic train: continual pre-training, or training from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moesaic.cli.output import JsonOption, OutOption, SetOption, emit

PANEL = "Train"


def command(
    file: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")],
    out: OutOption,
    model: Annotated[Path | None, typer.Option(help="The model to start from.")] = None,
    set_: SetOption = None,
    resume: Annotated[
        bool, typer.Option(help="Go on from the newest saved state in the output directory.")
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the resolved config, stop.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Train a dense or mixture-of-experts model on text, from one YAML file.

    The output directory becomes a Hugging Face model with `log.jsonl`, the resolved `train.yaml`
    and the saved states. After an interruption the same command goes on where it was.

    Example: `moesaic train cpt-tiny -o runs/cpt --model runs/moe --set steps=50`
    """
    from moesaic.recipes import find
    from moesaic.training.loop import plan, read_config, train

    settings = read_config(find(file, kind="train"), model=model, overrides=set_ or ())
    if dry_run:
        emit(planned := plan(settings), json=json, render=lambda: _show_plan(planned))
        return
    path = train(settings, out=out, resume=resume)
    result = _result(path)
    emit(result, json=json, render=lambda: _show(result), path=path)


def _result(path: Path) -> dict[str, Any]:
    from moesaic.core.lineage import read_lineage

    lineage = read_lineage(path) or {}
    keys = ("updates", "tokens", "seconds", "held_out_loss", "parameters", "active_parameters")
    return {"path": str(path), **{key: lineage.get(key) for key in keys}}


def _show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    print(f"{result['updates']:,} updates, {result['tokens']:,} tokens, {result['seconds']:.1f} s")
    if result["held_out_loss"]:
        table = Table("domain", "held-out loss (nats a token)")
        for domain, loss in result["held_out_loss"].items():
            table.add_row(domain, f"{loss:.4f}")
        Console().print(table)


def _show_plan(planned: dict[str, Any]) -> None:
    from moesaic.core.config import to_yaml

    print(to_yaml(planned), end="")
