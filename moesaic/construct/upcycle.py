"""Upcycling: a dense model becomes a larger one whose layers hold several experts.

Layers are streamed: the dense layer is mapped, its experts are made one at a time and written, so
no more than one layer and one expert are in memory whatever the size of the model. While a layer is
there the routed sum is compared with it.
Notation: as in upcycle_method; T tokens.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from moesaic.construct.dense import DenseModel, open_dense
from moesaic.construct.merged import merge
from moesaic.construct.stream import Comparison
from moesaic.construct.upcycle_layouts import Layout, LayoutName, make_layout
from moesaic.construct.upcycle_method import UpcycleInputs, UpcycleMethod
from moesaic.construct.upcycles import UPCYCLES
from moesaic.core.console import note, track
from moesaic.core.errors import MoesaicError, UserError, check_seed
from moesaic.core.files import check_step, output_directory, write_text
from moesaic.core.lineage import write_lineage
from moesaic.measure.exactness import FeedForward, feed_forward, fixed_tokens, running_difference
from moesaic.models.checkpoint import CheckpointWriter, copy_companions

__all__ = ["upcycle"]

Verify = Literal["auto", "full", "layers", "off"]

FULL_BELOW = 2_000_000_000
"""Up to this many parameters of the mixture whole models are compared, beyond it layers."""
_TOKENS = 64
"""Random tokens of the per-layer comparison."""


def upcycle(
    models: Path | str | Sequence[Path | str],
    *,
    out: Path | str,
    method: str | Mapping[str, Any] | UpcycleMethod = "copies",
    experts: int | None = None,
    top_k: int = 2,
    shared: int = 0,
    layout: LayoutName | None = None,
    data: Any = None,
    seed: int = 0,
    verify: Verify = "auto",
    overwrite: bool = False,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Turn one dense model, or several of one shape, into a mixture with more parameters.

    Args:
        models: directory of the dense checkpoint, or a list of them for the method join.
        out: the directory that appears when everything is written and compared.
        method: a name of `moesaic list upcycles`, or settings ``{"method": name, ...}``.
        experts: all experts of a layer, shared ones included; join takes the number of models.
        top_k: experts active for a token, shared ones included.
        shared: always-on copies of the (first) dense layer; every active expert weighs the same.
        layout: "llama_moe" (with shared experts: `llama_moe_residual`), "moesaic_moe", which holds
            every dense family, or "mixtral"; None: llama_moe where it computes the same attention.
        data: join: one source of text per model, in their order.
        seed: of routers, noise and neurons drawn anew.
        verify: "full" compares logits of the dense model with the mixture's as it routes, "layers"
            every layer on 64 fixed random tokens; "auto" is full below 2 B parameters.
        overwrite: replace `out` when it is there.
        max_shard_bytes: size at which a new weight file starts.

    Returns the output directory; its moesaic.json records ``exact`` and the measured difference.

    Raises:
        UserError: wrong numbers or models, damaged files, a layout that cannot hold the result.
        MoesaicError: no space left; or a result that should be exact and is not.
    """
    started = time.monotonic()
    check_seed(seed)
    paths = [Path(models)] if isinstance(models, (str, Path)) else [Path(path) for path in models]
    if not paths:
        raise UserError("No model was given. Give the directory of a dense LLaMA.")
    out = check_step(out, overwrite=overwrite, inputs=[*paths, data])
    if verify not in ("auto", "full", "layers", "off"):
        raise UserError(f"verify={verify!r} was given. Use one of: auto, full, layers, off.")
    chosen = UPCYCLES.resolve(method)
    assert isinstance(chosen, UpcycleMethod)
    inputs = _inputs(paths, chosen, experts, top_k, shared, data, seed)
    layout = layout or inputs.dense.mixture
    scale, must_equal = chosen.scale(inputs), chosen.exact(inputs)
    drawn = make_layout(
        layout,
        inputs.dense,
        chosen.neurons(inputs),
        selects=inputs.selects,
        shared=shared,
        scale=scale,
        # Noise would choose among the slices of one copy; alike copies it teaches to differ.
        noise=scale == 1,
    )
    sizes = _sizes(drawn, inputs)
    if verify == "auto":
        verify = "full" if sizes["parameters_total"] < FULL_BELOW else "layers"
    with output_directory(out, overwrite=overwrite) as partial:
        comparison = _write(chosen, inputs, drawn, partial, verify == "layers", max_shard_bytes)
        write_text(partial / "config.json", json.dumps(drawn.config, indent=2) + "\n")
        copy_companions(paths[0], partial)
        if verify == "full":
            comparison = Comparison("logits", *running_difference(paths[0], partial)[:2])
        facts = _judge(must_equal, drawn, inputs, comparison, len(paths))
        settings = {
            "models": [str(path) for path in paths],
            "method": {"method": _key(chosen), **chosen.model_dump(mode="json")},
            "experts": inputs.experts + shared,
            "shared": shared,
            "top_k": top_k,
            "layout": layout,
            "data": None if data is None else [str(source) for source in inputs.data or ()],
            "verify": verify,
        }
        report = {**sizes, **facts, **inputs.facts}
        report["seconds"] = round(time.monotonic() - started, 2)
        parent = str(paths[0])
        write_lineage(partial, step="upcycle", parent=parent, config=settings, seed=seed, **report)
    return out


def _inputs(
    paths: Sequence[Path],
    method: UpcycleMethod,
    experts: int | None,
    top_k: int,
    shared: int,
    data: Any,
    seed: int,
) -> UpcycleInputs:
    sources = [open_dense(path) for path in paths]
    if len(sources) > 1 and not method.several:
        raise UserError(
            f"{len(sources)} models were given, but {_key(method)} makes experts of one. "
            "Give one model, or use the method join."
        )
    if experts is None:
        if not method.several:
            raise UserError("experts is missing. Say how many experts to make, such as 8.")
        experts = len(sources) + shared
    if shared < 0 or experts - shared < 1:
        raise UserError(
            f"experts={experts} with shared={shared} was given. experts counts all experts, "
            "shared ones included; give more experts than shared ones."
        )
    if not shared < top_k <= experts:
        raise UserError(
            f"top_k={top_k} was given for {experts} experts, {shared} of them shared. "
            f"top_k counts all active experts: give {shared + 1} to {experts}."
        )
    others = getattr(method, "others", None)
    dense: DenseModel = merge(sources, others=others) if others else sources[0]
    if data is not None and (isinstance(data, (str, Path, Mapping))):
        data = [data]
    inputs = UpcycleInputs(
        dense, sources, experts - shared, top_k - shared, shared, data=data, seed=seed
    )
    method.check(inputs)
    return inputs


@torch.inference_mode()
def _write(
    method: UpcycleMethod,
    inputs: UpcycleInputs,
    layout: Layout,
    directory: Path,
    compare: bool,
    max_shard_bytes: int,
) -> Comparison | None:
    """Write every tensor; with `compare`, return the worst layer's difference."""
    dense, sources = inputs.dense, inputs.sources
    before, after = dense.outer()
    x_TD = fixed_tokens(dense.hidden, tokens=_TOKENS)
    found: list[tuple[float, float]] = []
    routers = method.routers(inputs)
    with CheckpointWriter(directory, layout.plan(), max_shard_bytes=max_shard_bytes) as writer:
        for name in before:
            writer.write(layout.renamed(name), dense.read(name))
        for layer in track(range(dense.layers), "upcycling layers"):
            tensors = layout.router_tensors(layer, router_ED := next(routers))
            for name, tensor in tensors.items():
                writer.write(name, tensor)
            for name in dense.others(layer):
                writer.write(layout.renamed(name), dense.read(name))
            read = [
                FeedForward(*(source.read(name) for name in source.ffn(layer)))
                for source in sources
            ]
            tally = (
                _Tally(inputs, read[0], x_TD, router_ED, method.scale(inputs)) if compare else None
            )
            names = layout.expert_names(layer)
            for number, places in enumerate(names[: inputs.experts]):
                expert = method.expert(inputs, layer, number, read).scaled(layout.fold)
                _write_expert(writer, places, expert)
                if tally is not None:
                    tally.add(number, expert, layout.fold)
            always = layout.always(read[0])
            for places, (expert, weight) in zip(names[inputs.experts :], always, strict=True):
                _write_expert(writer, places, expert)
                if tally is not None:
                    tally.add_always(expert, weight)
            if tally is not None:
                found.append(tally.difference())
            for source in sources:
                source.checkpoint.release([*source.ffn(layer), *source.others(layer)])
        for name in after:
            writer.write(layout.renamed(name), dense.read(name))
    next(routers, None)  # let it end: it leaves its figures then
    return Comparison("layers", *max(found)) if found else None


def _write_expert(writer: CheckpointWriter, names: Sequence[str], expert: FeedForward) -> None:
    for name, tensor in zip(names, expert[:3], strict=True):
        writer.write(name, tensor)


@dataclass
class _Tally:
    """The output of a mixture layer on fixed tokens, added up expert by expert."""

    inputs: UpcycleInputs
    dense: FeedForward
    x_TD: torch.Tensor
    router_ED: torch.Tensor
    scale: float

    def __post_init__(self) -> None:
        top_TK, self.ids_TK = (self.x_TD @ self.router_ED.T).topk(self.inputs.selects, dim=1)
        self.weights_TK = top_TK.softmax(1) * self.scale * self.inputs.routed_share
        self.out_TD = torch.zeros_like(self.x_TD)

    def add(self, number: int, expert: FeedForward, fold: float) -> None:
        activation = self.inputs.dense.activation
        token_N, choice_N = torch.where(self.ids_TK == number)
        if len(token_N):
            part_ND = feed_forward(self.x_TD[token_N], expert, activation) / fold
            part_ND *= self.weights_TK[token_N, choice_N, None]
            self.out_TD.index_add_(0, token_N, part_ND)

    def add_always(self, expert: FeedForward, weight: float) -> None:
        self.out_TD += weight * feed_forward(self.x_TD, expert, self.inputs.dense.activation)

    def difference(self) -> tuple[float, float]:
        wanted_TD = feed_forward(self.x_TD, self.dense, self.inputs.dense.activation)
        return float((wanted_TD - self.out_TD).abs().max()), float(wanted_TD.abs().max())


def _judge(
    must_equal: bool,
    layout: Layout,
    inputs: UpcycleInputs,
    comparison: Comparison | None,
    models: int,
) -> dict[str, Any]:
    if comparison is None:
        note("not compared with the dense model: --verify off; moesaic.json says exact: false")
        return {"exact": False, "difference": None}
    # Folding a factor that is no power of two into half-precision weights rounds them.
    first = inputs.dense.checkpoint.dtype(inputs.dense.ffn(0)[0])
    odd = any(math.log2(factor) % 1 for factor in (layout.fold, layout.shared_fold))
    rounded = odd and first.itemsize < 4
    if must_equal and not rounded and not comparison.exact:
        raise MoesaicError(
            f"The mixture differs from the dense model by {comparison.difference:.3g} "
            f"({comparison.kind}), though its experts should make it up. Nothing was written; "
            "please report this."
        )
    exact = must_equal and comparison.exact
    if not exact:
        whom = "the first model" if models > 1 else "the dense model"
        note(
            f"this mixture is not {whom}: the {comparison.kind} differ by "
            f"{comparison.difference:.3g} (largest value {comparison.largest:.3g})"
        )
    return {
        "exact": exact,
        "difference": comparison.difference,
        "difference_of": comparison.kind,
        "largest_value": comparison.largest,
    }


def _sizes(layout: Layout, inputs: UpcycleInputs) -> dict[str, Any]:
    plan = layout.plan()
    counts = {name: math.prod(shape) for name, _, shape in plan}
    total = sum(counts.values())
    routed = sum(
        counts[name]
        for layer in range(inputs.dense.layers)
        for names in layout.expert_names(layer)[: inputs.experts]
        for name in names
    )
    noise = sum(count for name, count in counts.items() if ".weight_noise." in name)
    idle = routed * (1 - inputs.selects / inputs.experts) + noise
    dtype = inputs.dense.checkpoint.dtype(inputs.dense.ffn(0)[0])
    width = routed // (3 * inputs.dense.hidden * inputs.experts * inputs.dense.layers)
    return {
        "layers": inputs.dense.layers,
        "experts": inputs.experts + inputs.shared,
        "shared": inputs.shared,
        "top_k": inputs.selects + inputs.shared,
        "expert_width": width,
        "parameters_dense": inputs.dense.checkpoint.parameters,
        "parameters_total": total,
        "parameters_active": round(total - idle),
        "bytes": sum(math.prod(shape) * kind.itemsize for _, kind, shape in plan),
        "dtype": str(dtype).removeprefix("torch."),
    }


def _key(method: UpcycleMethod) -> str:
    return type(method).__module__.rpartition(".")[2].replace("_", "-")
