"""Write a mixture of ours in a stock transformers layout, which vLLM and llama.cpp load.

Tensor by tensor, nothing is collected; then both are run and the difference is stated.
Notation: E routed experts, D hidden size, T tokens.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import get_args

import torch

from moesaic.construct.layouts import FLATTEN, find_layout
from moesaic.construct.mixture_view import Rule, view_of
from moesaic.construct.relayout import Dtype, Relayout
from moesaic.core.console import note, track
from moesaic.core.errors import UserError
from moesaic.core.files import check_step, output_directory, write_text
from moesaic.core.lineage import write_lineage
from moesaic.measure.exactness import (
    TOLERANCE,
    Difference,
    FeedForward,
    feed_forward,
    fixed_tokens,
    running_difference,
)
from moesaic.models.checkpoint import Checkpoint, CheckpointWriter, copy_companions

__all__ = ["export_layout"]

FULL_BELOW = 2_000_000_000
"""Up to this many parameters whole models are compared, beyond it layers."""


def export_layout(
    model: Path | str,
    *,
    out: Path | str,
    layout: str,
    dtype: Dtype = "keep",
    tolerance: float = TOLERANCE,
    overwrite: bool = False,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Write a mixture in a stock layout and state how far its function is from the original's.

    Args:
        model: directory of a `llama_moe`, `llama_moe_residual`, `llama_moe_v2` or `moesaic_moe`.
        out: the directory that appears when everything is written and compared.
        layout: a key of `layouts.LAYOUTS`, such as "mixtral".
        dtype: number type of the tensors that change; "float32" writes every tensor so, for factors
            that bf16 cannot hold.
        tolerance: largest difference of the outputs, relative to the largest output (at least 1).
        overwrite: replace `out` when it is there.
        max_shard_bytes: size at which a new weight file starts.

    Both models run on the same fixed tokens in float32 (beyond 2 B parameters: layer by layer);
    moesaic.json records the difference.

    Raises:
        UserError: the layout cannot carry the model (every reason is told), the difference is above
            the tolerance (nothing is written), damaged files or NaN.
        MoesaicError: no space left.
    """
    model, out = Path(model), check_step(out, overwrite=overwrite, inputs=[model])
    if dtype not in get_args(Dtype):
        raise UserError(f"dtype={dtype!r} was given. Use one of: {', '.join(get_args(Dtype))}.")
    if not tolerance > 0:
        raise UserError(f"tolerance={tolerance} was given. Give a positive number, such as 1e-3.")
    target = find_layout(layout)
    checkpoint = Checkpoint(model)
    job = Relayout(checkpoint, view_of(checkpoint.config, name=str(model)), target, dtype)
    job.check()
    unlike = target.not_in_llama_cpp(job.rule, tied=bool(job.view.text.get("tie_word_embeddings")))
    whole = checkpoint.parameters < FULL_BELOW
    worst = Difference(0.0, 0.0, 0.0)
    with output_directory(out, overwrite=overwrite) as partial:
        with CheckpointWriter(partial, job.plan(), max_shard_bytes=max_shard_bytes) as writer:
            for name in job.kept():
                writer.write(name, job.cast(job.read(name)))
            for layer in track(range(job.view.layers), f"writing {layout}"):
                for name, tensor in job.layer(layer):
                    writer.write(name, tensor)
                if not whole:
                    worst = max(worst, _layer_difference(job, layer))
        write_text(partial / "config.json", json.dumps(job.config(), indent=2) + "\n")
        copy_companions(model, partial)
        if whole:
            worst = running_difference(model, partial)
        difference, largest, typical = worst
        relative = difference / max(1.0, largest)
        if not relative <= tolerance:
            raise UserError(
                f"As {layout}, the outputs differ by {difference:.3g} (largest value "
                f"{largest:.3g}), which is {relative:.2g} of it; the tolerance is {tolerance:g}. "
                f"Half of the tokens differ by less than {typical:.2g}. Nothing was written. "
                f"{_cure(job)}"
            )
        write_lineage(
            partial,
            step="export",
            parent=str(model),
            config={"layout": layout, "dtype": dtype, "tolerance": tolerance},
            exact=relative <= TOLERANCE,
            difference=difference,
            difference_of="logits" if whole else "layers",
            typical_difference=typical,
            largest_value=largest,
            flattened=job.flattened,
            llama_cpp=unlike is None,
            folded=[job.fold(layer) for layer in range(job.view.layers)],
            parameters_total=sum(math.prod(shape) for _, _, shape in job.plan()),
        )
    if job.flattened:
        note(
            f"{layout} has no weights of 1: the routers are scaled by {FLATTEN:g}, which makes "
            f"the weights of chosen experts nearly equal; outputs differ by {difference:.2g}, "
            f"for half of the tokens by less than {typical:.2g}"
        )
    if any(
        job.view.width * kind.itemsize % 16 for name, kind, _ in job.plan() if ".experts." in name
    ):
        note(
            "transformers' default experts implementation asks for widths that are a multiple of "
            '16 bytes: load it with experts_implementation="eager" or "moesaic"'
        )
    if unlike is not None:
        note(f"for transformers and vLLM: llama.cpp {unlike}")
    return out


def _cure(job: Relayout) -> str:
    """What to do about a difference above the tolerance."""
    if job.flattened:
        return (
            "The weights of chosen experts are 1, which no stock router gives exactly, and a token "
            "whose next expert is as good may get that one; allow more with --tolerance. Once "
            "trained, tempered weights are exact in layouts that renormalise."
        )
    layers = range(job.view.layers)
    factors = [*map(job.fold, layers), *map(job.steepness, layers)]
    if job.dtype == "keep" and any(math.log2(factor) % 1 for factor in factors):
        return "Factors in weights were rounded: use --dtype float32, or --tolerance."
    return "Allow more with --tolerance."


@torch.inference_mode()
def _layer_difference(job: Relayout, layer: int) -> Difference:
    """Compare a layer before and after on fixed tokens."""
    from transformers.activations import ACT2FN

    made = dict(job.layer(layer))
    start, view, layout = f"model.layers.{layer}.", job.view, job.layout
    x_TD = fixed_tokens(int(view.text["hidden_size"]))
    act = ACT2FN[view.text.get("hidden_activation") or view.text["hidden_act"]]
    sums = []
    exponent, own, weigh = 1.0, view.rule, view.factors[layer]
    if job.exponents:  # K times a softmax over the chosen ones
        exponent, own, weigh = job.exponents[layer], "renormalised", weigh * view.top_k
    for rule, factor, steepness, router, names, read in (
        (own, weigh, exponent, view.router_name(), view.names, job.read),
        (
            job.rule,
            job.global_factor or 1.0,
            1.0,
            layout.router,
            lambda _, expert: layout.names(expert),
            made.__getitem__,
        ),
    ):
        logits_TE = steepness * (x_TD @ read(f"{start}{router}").float().T)
        weights_TE = _weights(logits_TE, rule, view.top_k)
        y_TD = torch.zeros_like(x_TD)
        for expert in range(view.experts):
            parts = FeedForward(*(read(f"{start}{name}") for name in names(layer, expert)))
            y_TD += feed_forward(x_TD, parts, act) * weights_TE[:, expert, None] * factor
        sums.append(y_TD)
    apart_TD = (sums[0] - sums[1]).abs()
    typical = float(apart_TD.amax(-1).median())
    return Difference(float(apart_TD.max()), float(sums[0].abs().max()), typical)


def _weights(logits_TE: torch.Tensor, rule: Rule, top_k: int) -> torch.Tensor:
    """Weights [T, E] of all experts, zero where they are not chosen."""
    scores_TE = logits_TE.sigmoid() if rule == "sigmoid" else logits_TE.softmax(-1)
    top_TK, ids_TK = scores_TE.topk(top_k, dim=-1)
    if rule == "renormalised":
        top_TK = top_TK / top_TK.sum(-1, keepdim=True)
    if rule == "one":
        top_TK = torch.ones_like(top_TK)
    return torch.zeros_like(scores_TE).scatter(1, ids_TK, top_TK)
