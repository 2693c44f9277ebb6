"""moesaic convert: a dense LLaMA becomes a mixture of experts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moesaic.cli.output import JsonOption, OutOption, SeedOption, emit

PANEL = "Make"


def command(
    model: Annotated[Path, typer.Argument(help="Directory of a dense LLaMA or Mistral.")],
    out: OutOption,
    top_k: Annotated[int, typer.Option(help="Experts active for a token, shared ones included.")],
    experts: Annotated[
        int | None,
        typer.Option(help="Experts of a layer, shared ones included; a ready split knows it."),
    ] = None,
    preset: Annotated[
        str,
        typer.Option(
            help="The class of model and its default split, router and gate: llama-moe-v1 (random, "
            "random, mlp) or llama-moe-v2 (sequential, kaiming, linear)."
        ),
    ] = "llama-moe-v1",
    split: Annotated[
        str | None,
        typer.Option(
            help="A name of `moesaic list splits`, a YAML file of its settings (`method: cluster`, "
            "`metric: cos`), what `moesaic split` wrote, or LLaMA-MoE-v2's neuron_indices.pt."
        ),
    ] = None,
    router: Annotated[
        str | None,
        typer.Option(
            help="A name of `moesaic list routers`, a YAML file of its settings, what "
            "`moesaic router` wrote, or LLaMA-MoE-v2's gate_weights.pt. By default the gates that "
            "the split was made with, else the preset's."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Text for methods that look at activations: file, folder or dataset."),
    ] = None,
    shared: Annotated[int, typer.Option(help="Experts that are always on.")] = 0,
    contract_layers: Annotated[
        int,
        typer.Option(help="So many of the first, and of the last, layers stay dense (v2)."),
    ] = 0,
    gate: Annotated[
        str | None, typer.Option(help="Router network: mlp or linear; by default the preset's.")
    ] = None,
    scale: Annotated[
        str,
        typer.Option(
            help="Factor on the chosen experts' weighted sum: auto (experts / top-k; 1 in a v2 "
            "with shared experts), layerwise (measured on --data), a number, or one per layer with "
            "commas."
        ),
    ] = "auto",
    shared_scale: Annotated[
        float | None,
        typer.Option(help="Factor on the shared experts' weighted mean; their number by default."),
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
    """Turn a dense LLaMA into a mixture of experts, and prove that nothing was lost.

    The feed-forward neurons are divided among experts, routers are added, everything else stays.
    With all experts on and scores off the result equals the dense model, unless the split repeats
    or drops neurons; the measured difference is printed and kept in moesaic.json.

    Example: `moesaic convert ckpt/dense -o runs/moe --split random --experts 8 --top-k 2`

    Example: `moesaic convert ckpt/dense -o runs/v2 --preset llama-moe-v2 --split gradient-plus
    --shared 1 --experts 8 --top-k 2 --data text.jsonl`
    """
    from moesaic.cli.settings import number_or_name, settings_or_name
    from moesaic.construct.convert import convert
    from moesaic.core.lineage import read_lineage

    path = convert(
        model,
        out=out,
        split=None if split is None else settings_or_name(split),
        experts=experts,
        top_k=top_k,
        router=None if router is None else settings_or_name(router),
        data=data,
        seed=seed,
        shared=shared,
        preset=preset,  # type: ignore[arg-type]  # checked by convert
        contract_layers=contract_layers,
        gate=gate,  # type: ignore[arg-type]  # checked by convert
        scale=number_or_name(scale),
        shared_scale=shared_scale,
        verify=verify,  # type: ignore[arg-type]  # checked by convert
        overwrite=overwrite,
    )
    record = read_lineage(path) or {}
    result: dict[str, Any] = {"path": str(path), "scale": record["config"]["scale"]}
    result |= {key: record.get(key) for key in _REPORTED}
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
    "neurons_covered",
    "difference",
    "difference_of",
    "largest_value",
    "seconds",
)


def _show(result: dict[str, Any]) -> None:
    low, high = result["expert_width"]
    width = f"{low}" if low == high else f"{low} to {high}"
    share = result["parameters_active"] / result["parameters_total"]
    shared = f", {result['shared']} of them shared" if result["shared"] else ""
    print(f"layers       {result['layers']}")
    print(f"experts      {result['experts']} of width {width}{shared}; {result['top_k']} active")
    print(f"parameters   {result['parameters_total']:,} (dense {result['parameters_dense']:,})")
    print(f"active       {result['parameters_active']:,} ({share:.1%})")
    print(f"scale        {_brief(result['scale'])}")
    print(f"size         {result['bytes'] / 1e6:,.1f} MB of {result['dtype']}")
    if result["difference"] is None:
        print("exact        not compared")
    else:
        measured = f"{result['difference_of']} differ by {result['difference']:.2g}"
        covered = f", {result['neurons_covered']:.1%} of the neurons covered"
        print(f"exact        {'yes' if result['exact'] else 'no'}: {measured}{covered}")
    print(f"seconds      {result['seconds']}")


def _brief(scale: float | list[float]) -> str:
    values = scale if isinstance(scale, list) else [scale]
    return ", ".join(f"{value:.4g}" for value in values)
