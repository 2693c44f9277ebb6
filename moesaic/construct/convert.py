"""Dense LLaMA in, LLaMA-MoE or LLaMA-MoE-v2 out: layer by layer, from file to file.

The tensors of the dense model are mapped, rearranged one layer at a time into two buffers that
alternate, and written by a second thread; the layer is compared with the dense one while it is in
memory. Notation: L layers, E routed experts, R shared experts, D hidden size, F dense neurons,
I neurons of one expert, K routed experts chosen for a token.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moesaic.construct.agreement import check_router, check_split, check_top_k
from moesaic.construct.blueprint import Blueprint, draw
from moesaic.construct.blueprint_v2 import check_v2_source, draw_v2
from moesaic.construct.dense import DenseModel, open_dense
from moesaic.construct.legacy_v2 import open_split
from moesaic.construct.method import SplitMethod, resolve_method
from moesaic.construct.recipe import made_before
from moesaic.construct.router import FILE_NAME as ROUTER_FILE
from moesaic.construct.router import Gate, RouterInit, RouterMethod, init_router, resolve_router
from moesaic.construct.routers import ROUTERS
from moesaic.construct.split import FILE_NAME as SPLIT_FILE
from moesaic.construct.split import NeuronSplit, divide
from moesaic.construct.splits import SPLITS
from moesaic.construct.stream import Comparison, write_experts
from moesaic.core.console import note
from moesaic.core.errors import MoesaicError, UserError, check_seed
from moesaic.core.files import check_step, output_directory, write_text
from moesaic.core.lineage import write_lineage
from moesaic.models.checkpoint import copy_companions

__all__ = ["PRESETS", "convert"]

Verify = Literal["auto", "full", "layers", "off"]


@dataclass(frozen=True)
class Preset:
    """The model class of a conversion, and what is used where nothing was said."""

    split: str
    router: str
    gate: Gate


PRESETS = {
    "llama-moe-v1": Preset("random", "random", "mlp"),
    "llama-moe-v2": Preset("sequential", "kaiming", "linear"),
}
"""The released families: LLaMA-MoE (arXiv 2406.16554) and LLaMA-MoE-v2 (arXiv 2411.15708)."""

FULL_BELOW = 2_000_000_000
"""Up to this many parameters whole models are compared, beyond it layers."""


def convert(
    model: Path | str,
    *,
    out: Path | str,
    split: str | Path | Mapping[str, Any] | SplitMethod | NeuronSplit | None = None,
    experts: int | None = None,
    top_k: int,
    router: str | Path | Mapping[str, Any] | RouterMethod | RouterInit | None = None,
    data: Any = None,
    seed: int = 0,
    shared: int = 0,
    preset: Literal["llama-moe-v1", "llama-moe-v2"] = "llama-moe-v1",
    contract_layers: int = 0,
    gate: Gate | None = None,
    scale: Literal["auto", "layerwise"] | float | Sequence[float] = "auto",
    shared_scale: float | None = None,
    verify: Verify = "auto",
    overwrite: bool = False,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Turn a dense LLaMA (or Mistral without a sliding window) into a mixture of experts.

    Args:
        model: directory of the dense checkpoint; its number type is kept.
        out: the directory that appears when everything is written and compared.
        split: name of a split, settings ``{"method": name, ...}``, a file or directory that
            `moesaic split` wrote, the original's neuron_indices.pt, or a NeuronSplit. By default
            the preset's.
        experts: all experts of a layer, shared ones included; may be left out with a ready split.
        top_k: experts active for a token, shared ones included.
        router: name of a router init, settings, a file or directory of `moesaic router`, the
            original's gate_weights.pt, or a RouterInit. By default the gates that the split was
            made with, where it has any (`gradient-plus`), else the preset's.
        data: text for splits, router inits and layer-wise scales that look at activations.
        seed: of the split and the router init.
        shared: experts that are always on (a `llama_moe_residual` checkpoint; in LLaMA-MoE-v2 one
            residual MLP).
        preset: the class of model and the split, router and gate it has by default:
            "llama-moe-v1" random, random, mlp; "llama-moe-v2" sequential, kaiming, linear.
        contract_layers: so many of the first, and of the last, layers stay dense (LLaMA-MoE-v2).
        gate: the router network, ``W2 tanh(W1 x)`` or ``W x``; a ready router init decides itself.
        scale: factor on the chosen experts' sum. "auto" is E/K, as in the released models (1 for a
            LLaMA-MoE-v2 with shared experts); "layerwise" measures one per layer on `data` (see
            `construct.scale`; LLaMA-MoE only).
        shared_scale: factor on the shared experts' weighted mean; R by default, which makes it
            their sum (LLaMA-MoE only).
        verify: "full" compares logits of the whole models with all experts on and scores off,
            "layers" the feed-forward layers one at a time on 256 fixed random tokens; "auto" is
            full below 2 B parameters.
        overwrite: replace `out` when it is there.
        max_shard_bytes: size at which a new weight file starts.

    Returns the output directory: weights, config.json, the tokenizer, split.safetensors and
    moesaic.json, which records ``exact`` and the measured difference.

    Raises:
        UserError: wrong numbers, a model that is not a dense LLaMA, damaged files, NaN in weights.
        MoesaicError: no space left; or a conversion that should be exact and is not.
    """
    started = time.monotonic()
    check_seed(seed)
    model = Path(model)
    out = check_step(out, overwrite=overwrite, inputs=[model, split, router, data])
    dense = open_dense(model)
    _check_choice(verify, ("auto", "full", "layers", "off"), "verify")
    _check_choice(preset, tuple(PRESETS), "preset")
    chosen = PRESETS[preset]
    if gate is None:
        gate = "linear" if dense.mixture == "moesaic_moe" else chosen.gate
    split = chosen.split if split is None else split
    _check_choice(gate, ("mlp", "linear"), "gate")
    _check_scales(scale, shared_scale)
    _check_preset(preset, dense, gate, scale, shared_scale, contract_layers)
    division = _ready_split(split, dense)
    ready_router = _ready_router(router)
    if division is None:
        if experts is None:
            raise UserError("experts is missing. Say into how many experts to split, such as 8.")
        check_top_k(top_k, experts, shared)
        check_router(ready_router, dense, experts - shared)
        # A mapping or method object is checked before hours of reading; a name by its registry.
        method = resolve_method(split)  # type: ignore[arg-type]
        if ready_router is None:
            resolve_router(router or chosen.router)  # type: ignore[arg-type]
        division, arrays = divide(model, method, experts, shared, data, seed)
        if router is None and "gates" in arrays:
            ready_router = RouterInit.from_gates(arrays["gates"], {"method": method.key})
    else:
        check_split(division, dense, experts, shared)
        check_top_k(top_k, division.num_experts + division.num_shared, division.num_shared)
        if router is None:
            ready_router = _beside(split)
        check_router(ready_router, dense, division.num_experts)
    selects = top_k - division.num_shared
    if ready_router is None:
        ready_router = init_router(
            model,
            split=division,
            method=router or chosen.router,  # type: ignore[arg-type]
            gate=gate,
            top_k=selects,
            data=data,
            seed=seed,
            contract_layers=contract_layers,
        )
    factors = _scale(scale, preset, dense, division, ready_router, selects, data)
    if preset == "llama-moe-v2":
        assert isinstance(factors, float)
        blueprint: Blueprint = draw_v2(
            dense,
            division,
            ready_router,
            selects=selects,
            scale=factors,
            contract_layers=contract_layers,
        )
    else:
        blueprint = draw(
            dense,
            division,
            ready_router.with_shared(division.num_shared, dense, seed),
            selects=selects,
            scale=factors,
            shared_scale=float(division.num_shared or 1) if shared_scale is None else shared_scale,
        )
    if verify == "auto":
        verify = "full" if dense.checkpoint.parameters < FULL_BELOW else "layers"
    settings = {
        "split": division.meta,
        "router": {key: value for key, value in ready_router.meta.items() if key != "split"},
        "experts": division.num_experts + division.num_shared,
        "shared": division.num_shared,
        "top_k": top_k,
        "preset": preset,
        "contract_layers": contract_layers,
        "gate": ready_router.gate,
        "scale": factors,
        "shared_scale": blueprint.config.get("score_scale_factor_residual"),
        "data": None if data is None else str(data),
        "verify": verify,
    }
    with output_directory(out, overwrite=overwrite) as partial:
        comparison = write_experts(
            blueprint,
            partial,
            compare=verify == "layers",
            max_shard_bytes=max_shard_bytes,
        )
        write_text(partial / "config.json", json.dumps(blueprint.config, indent=2) + "\n")
        copy_companions(model, partial)
        division.save(partial / SPLIT_FILE)
        if verify == "full":
            from moesaic.measure.exactness import logit_difference

            comparison = Comparison("logits", *logit_difference(model, partial))
        inside = range(contract_layers, dense.layers - contract_layers)
        facts = _judge(division, inside, comparison)
        report = {**blueprint.sizes(), **facts, "seconds": round(time.monotonic() - started, 2)}
        write_lineage(
            partial, step="convert", parent=str(model), config=settings, seed=seed, **report
        )
    return out


def _judge(
    division: NeuronSplit, layers: Sequence[int], comparison: Comparison | None
) -> dict[str, Any]:
    # Contract layers stay dense, whatever the split says of them.
    copies = [division.copies(layer) for layer in layers]
    covered = [float((copies_F > 0).mean()) for copies_F in copies]
    once = all(bool((copies_F == 1).all()) for copies_F in copies)
    facts: dict[str, Any] = {
        "exact": once and comparison is not None,
        "neurons_covered": sum(covered) / len(covered),
        "difference": None,
    }
    if comparison is None:
        note("not compared with the dense model: --verify off; moesaic.json says exact: false")
        return facts
    facts["difference"] = comparison.difference
    facts["difference_of"] = comparison.kind
    facts["largest_value"] = comparison.largest
    if once and not comparison.exact:
        raise MoesaicError(
            f"All experts on differ from the dense model by {comparison.difference:.3g} "
            f"({comparison.kind}), though every neuron is held once. Nothing was written; "
            "please report this."
        )
    if not once:
        note(
            "neurons repeat or vanish in this split, so all experts on are not the dense model: "
            f"{facts['neurons_covered']:.1%} of the neurons are covered, the {comparison.kind} "
            f"differ by {comparison.difference:.3g} (largest value {comparison.largest:.3g})"
        )
    return facts


def _ready_split(split: Any, dense: DenseModel) -> NeuronSplit | None:
    path = made_before(split, SPLITS.names())
    if path is not None:
        return open_split(path, width=dense.width)
    return split if isinstance(split, NeuronSplit) else None


def _ready_router(router: Any) -> RouterInit | None:
    path = made_before(router, ROUTERS.names())
    if path is not None:
        return RouterInit.load(path)
    return router if isinstance(router, RouterInit) else None


def _beside(split: Any) -> RouterInit | None:
    """The router init that `moesaic split` left beside a split, if it did."""
    if isinstance(split, NeuronSplit):
        return None
    folder = Path(split) if Path(split).is_dir() else Path(split).parent
    made = (folder / SPLIT_FILE).is_file() and (folder / ROUTER_FILE).is_file()
    return RouterInit.load(folder) if made else None


def _check_choice(given: str, allowed: Sequence[str], name: str) -> None:
    if given not in allowed:
        raise UserError(f"{name}={given!r} was given. Use one of: {', '.join(allowed)}.")


def _check_scales(scale: Any, shared_scale: float | None) -> None:
    given = {"scale": scale, "shared_scale": shared_scale}
    for name, value in given.items():
        factors = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        for factor in factors:
            if isinstance(factor, int | float) and not 0 < factor < float("inf"):
                raise UserError(f"{name}={value} was given. Use a positive number.")


def _check_preset(
    preset: str,
    dense: DenseModel,
    gate: str,
    scale: Any,
    shared_scale: float | None,
    contract_layers: int,
) -> None:
    if preset == "llama-moe-v1":
        if contract_layers:
            raise UserError(
                f"contract_layers={contract_layers}: every layer of a LLaMA-MoE has experts. Leave "
                "it out, or use the preset llama-moe-v2."
            )
        return
    check_v2_source(dense)
    for name, given, allowed in (
        ("gate", gate == "mlp", "linear"),
        ("scale", scale == "layerwise" or isinstance(scale, list | tuple), "auto or one number"),
        ("shared_scale", shared_scale is not None, "none: the residual MLP is not scaled"),
    ):
        if given:
            raise UserError(
                f"{name} was given as the preset llama-moe-v2 cannot have it. Use {allowed}."
            )


def _scale(
    scale: Any,
    preset: str,
    dense: DenseModel,
    division: NeuronSplit,
    router: RouterInit,
    selects: int,
    data: Any,
) -> float | list[float]:
    if scale == "auto":
        if preset == "llama-moe-v2" and division.num_shared:
            return 1.0  # the original's: beside a residual MLP, experts act as in the dense model
        return division.num_experts / selects
    if scale == "layerwise":
        from moesaic.construct.scale import layer_scales

        return layer_scales(dense, division, router, top_k=selects, data=data)
    if isinstance(scale, str):
        raise UserError(f"scale={scale!r} was given. Use auto, layerwise, or a number.")
    if isinstance(scale, Sequence):
        if len(scale) != dense.layers:
            raise UserError(
                f"{len(scale)} scale factors were given for {dense.layers} layers. "
                "Give one number, or one per layer."
            )
        return [float(factor) for factor in scale]
    return float(scale)
