"""moesaic plan: what something will take, before it is made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from moesaic.cli.output import JsonOption, SetOption, emit

if TYPE_CHECKING:
    from moesaic.plan.predict import Plan

PANEL = "Make"


def command(
    what: Annotated[
        str, typer.Argument(help="A YAML file, a shipped recipe or preset, or a model.")
    ],
    model: Annotated[
        str | None, typer.Option(help="The model of a recipe, in place of the one it names.")
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="Plan for h200, h100, a100 or rtx-4090, by its data sheet."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Texts at a time, where a model runs.")] = 1,
    context: Annotated[int, typer.Option(min=1, help="Tokens of a text there.")] = 4096,
    set_: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Foretell parameters, memory by part and time of a model, a construction or a training run.

    Only shapes are read, no weights. Times follow from counted operations and a measurement of
    this machine that takes a few seconds.

    Example: `moesaic plan llama-2-7b-4of16`
    """
    from moesaic.plan.machine import data_sheet, measure
    from moesaic.plan.predict import plan

    machine = measure()
    if gpu is not None:
        machine = data_sheet(gpu, disk_rate=machine.disk_rate)
    found = plan(
        what, machine=machine, model=model, batch=batch, context=context, overrides=set_ or ()
    )
    emit(found.to_dict(), json=json, render=lambda: _show(found))


def _show(found: Plan) -> None:
    share = found.active / found.parameters
    print(f"{found.what}: {found.architecture}")
    print(f"parameters   {found.parameters:,}")
    print(f"active       {found.active:,} ({share:.1%})")
    for part, count in found.parts.items():
        print(f"  {part:<38} {count:>16,}")
    for use, parts in found.memory.items():
        print(f"memory       {use}: {found.peak[use] / 1e9:.2f} GB at most")
        for part, size in parts.items():
            print(f"  {part:<38} {size / 1e9:>13.2f} GB")
    print(f"machine      {found.machine.name}; {found.machine.source}")
    for use, stages in found.seconds.items():
        print(f"time         {use}" + (f": {_time(sum(stages.values()))}" * (len(stages) > 1)))
        for stage, seconds in stages.items():
            print(f"  {stage:<38} {_time(seconds):>16}")
    for line in found.notes:
        print(f"note         {line}")


def _time(seconds: float) -> str:
    for size, unit in ((86400 * 365, "years"), (86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.3g} s" if seconds >= 0.1 else f"{seconds * 1000:.3g} ms"
