"""Construction without training: split, route, weight, refit and refine a dense model in one run.

The four choices are registered methods that combine freely. Layers are made in order, each on the
output of the layers made before it; beside that stream the dense model's own runs along, as the
target. Notation: B rows, C tokens a row, T = B*C tokens, D hidden size, L layers, E experts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from pydantic import Field

from moesaic.construct.activations import LayerStream
from moesaic.construct.dense import DenseModel, open_dense
from moesaic.construct.free.distil import Distillation, ExpertWeights, distil
from moesaic.construct.free.layer import ConvertedLayer
from moesaic.construct.free.ridge import Moments, solve
from moesaic.construct.free.view import CalibratedRouter, CalibratedSplit, LayerView, held_back
from moesaic.construct.method import LayerSplit, resolve_method
from moesaic.construct.refit import Refit, RefitInputs
from moesaic.construct.refits import REFITS
from moesaic.construct.router import RouterInit, RouterInputs, resolve_router
from moesaic.construct.routers import ROUTERS
from moesaic.construct.split import NeuronSplit
from moesaic.construct.split import divide as make_split
from moesaic.construct.splits import SPLITS
from moesaic.construct.weighting import Weighting
from moesaic.construct.weightings import WEIGHTINGS
from moesaic.core.config import Config
from moesaic.core.console import note, track
from moesaic.core.errors import UserError, check_seed
from moesaic.core.files import check_step, output_directory, write_text
from moesaic.core.lineage import write_lineage
from moesaic.models.gates import TopKBalancedNoisyGate

__all__ = ["Construction", "Recipe", "construct", "run"]

Choice = str | dict[str, Any]


class Recipe(Config):
    """A construction: four choices, the sizes, the text."""

    model: str | None = None
    """Directory of the dense model; the command line may give it instead."""
    split: Choice = "energy"
    """Which neurons go together: a name, settings with `method`, or what `moesaic split` wrote."""
    router: Choice = "energy"
    """The router init: a name, settings, or what `moesaic router` wrote."""
    weighting: Choice = "one"
    """How chosen experts add up: a name or settings."""
    refit: Choice | None = "down"
    """How the dropped experts are made up for in closed form; null: not at all."""
    refine: Choice | None = None
    """`layerwise`: distil each layer from the dense one (gradients inside a layer only)."""
    attention: float | None = Field(default=1.0, ge=0, le=1)
    """Refit the attention's output projection too, so far towards the dense stream; null: no."""
    experts: int = Field(default=8, ge=1)
    """Experts of a layer, shared ones included."""
    top_k: int = Field(default=2, ge=1)
    """Experts active for a token, shared ones included."""
    shared: int = Field(default=0, ge=0)
    """Experts that are always on; they become one."""
    data: Any = None
    """Calibration text: file, folder, mapping of domains, or name of a dataset."""
    tokens: int = Field(default=131_072, ge=64)
    """Calibration tokens."""
    context: int = Field(default=512, ge=8)
    """Tokens of a row of calibration text."""
    seed: int = 0
    """Of the choice of text, the k-means and the distillation."""
    held_out: Any = None
    """Text to measure the loss on before and after each stage; null: not measured."""
    held_out_documents: int | None = Field(default=None, ge=1)
    """Documents of each domain that are read; all by default."""
    held_out_context: int = Field(default=512, ge=2)
    """Tokens of a held-out row."""
    device: str = "auto"
    """Where the layers are made and measured: a torch device; auto: CUDA where there is one."""

    def place(self) -> torch.device:
        """The device. Raises UserError for one that is not there."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            found = torch.device(self.device)
        except RuntimeError:
            raise UserError(
                f"device '{self.device}' is unknown. Use auto, cpu, cuda or cuda:N."
            ) from None
        if found.type == "cuda" and not torch.cuda.is_available():
            raise UserError(f"device is '{found}' but this machine has no CUDA GPU. Use auto.")
        return found


@dataclass
class Construction:
    """What a run made: the layers and the figures of every stage."""

    dense: DenseModel
    recipe: Recipe
    layers: list[ConvertedLayer]
    weighting: Weighting
    attention: list[torch.Tensor | None]
    refined: list[ExpertWeights | None]
    stages: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def split(self) -> NeuronSplit:
        """The division of the neurons."""
        return NeuronSplit(
            [layer.parts.experts for layer in self.layers],
            [layer.parts.shared for layer in self.layers],
            self.dense.width,
            {"method": _name(self.recipe.split), "recipe": self.recipe.model_dump(mode="json")},
        )

    def router(self) -> RouterInit:
        """The routers."""
        routers = []
        for layer, refined in zip(self.layers, self.refined, strict=True):
            weights = dict(layer.router)
            if refined is not None:
                weights = {"weight": refined.router_ED, "bias": refined.bias_E}
            routers.append(weights)
        # zeros: the softmax over the one shared expert is 1 whatever they are
        shared = [
            torch.zeros(1, self.dense.hidden) if layer.parts.shared else None
            for layer in self.layers
        ]
        return RouterInit(routers, shared, {"method": _name(self.recipe.router)})

    def config(self) -> dict[str, Any]:
        """config.json of the mixture."""
        from moesaic.construct.blueprint import draw

        routed, selects = len(self.layers[0].parts.experts), self.selects
        router = self.router()
        drawn = draw(
            self.dense, self.split(), router, selects=selects, scale=1.0, shared_scale=1.0
        ).config
        return {
            **drawn,
            "gate_network": router.gate,
            "gate_bias": router.bias,
            **self.weighting.fields(routed=routed, selects=selects),
        }

    @property
    def selects(self) -> int:
        """Routed experts of a token."""
        return self.recipe.top_k - self.recipe.shared


def construct(
    model: Path | str | None = None,
    *,
    out: Path | str,
    recipe: Recipe | Mapping[str, Any],
    overwrite: bool = False,
) -> Path:
    """Convert a dense LLaMA by a recipe and write the checkpoint, the figures and a report page.

    `out` holds an ordinary LLaMA-MoE directory with split.safetensors, router.safetensors,
    construct.json (what every stage changed) and moesaic.json; the report is drawn from
    construct.json by `moesaic construct`.

    Raises UserError for a model, sizes, methods or data that do not fit together.
    """
    settings = recipe if isinstance(recipe, Recipe) else Recipe.model_validate(dict(recipe))
    path = Path(model if model is not None else settings.model or "")
    if not str(model or settings.model or ""):
        raise UserError("No model was given. Name a dense model, or put model: in the recipe.")
    out = check_step(out, overwrite=overwrite, inputs=[path, settings.data])
    with output_directory(out, overwrite=overwrite) as partial:
        made = run(path, settings)
        made_model = assemble(made, "last")
        _save(made, made_model, partial)
        from moesaic.models.checkpoint import copy_companions

        copy_companions(path, partial)
        made.split().save(partial / "split.safetensors")
        made.router().save(partial / "router.safetensors")
        figures = results(made)
        write_text(partial / "construct.json", json.dumps(figures, indent=2) + "\n")
        write_lineage(
            partial,
            step="construct",
            parent=str(path),
            config=settings.model_dump(mode="json"),
            seed=settings.seed,
            exact=figures["exact"],
            stages=figures["stages"],
        )
    return out


def results(made: Construction) -> dict[str, Any]:
    """Everything measured, as plain JSON values."""
    return {
        "model": str(made.dense.checkpoint.path),
        "recipe": made.recipe.model_dump(mode="json"),
        "exact": made.split().exact and made.recipe.refit is None and made.recipe.refine is None,
        "stages": made.stages,
        "layers": [layer.facts for layer in made.layers],
        "seconds": {key: round(value, 1) for key, value in made.seconds.items()},
    }


def run(
    model: Path | str,
    recipe: Recipe,
    *,
    dense_loss: Mapping[str, float] | None = None,
    last_only: bool = False,
) -> Construction:
    """Make every layer in memory and measure the stages; writes nothing.

    `dense_loss` is the dense model's held-out loss by domain, where it is known already.
    `last_only` measures the loss of the dense model and of the last stage, not of those between.
    """
    started = time.monotonic()
    check_seed(recipe.seed)
    dense = open_dense(model)
    dense.need_llama("a mixture of `moesaic construct`")
    _check(recipe, dense)
    weighting: Weighting = WEIGHTINGS.resolve(recipe.weighting)
    refit: Refit | None = None if recipe.refit is None else REFITS.resolve(recipe.refit)
    refine = _refine(recipe)
    ids_BC = calibration_rows(Path(model), recipe)
    made = Construction(dense, recipe, [], weighting, [], [])
    maker = _Maker(made, ids_BC, refit=refit, refine=refine)
    for layer in track(range(dense.layers), "constructing layers"):
        maker.layer(layer)
    _warn(made)
    made.seconds |= maker.seconds
    made.seconds["construct"] = time.monotonic() - started
    _measure(made, dense_loss, last_only)
    made.seconds["all"] = time.monotonic() - started
    return made


def calibration_rows(model: Path, recipe: Recipe) -> torch.Tensor:
    """Token ids [B, C]: rows drawn by the seed among four times as many, domains in equal parts.

    Raises UserError when there is no data, or too little for the experts.
    """
    from moesaic.data import calibration_batches
    from moesaic.models.tokenizer import load_tokenizer

    if recipe.data is None:
        raise UserError(
            "No calibration text was given. Put data: in the recipe or give --data: a .jsonl or "
            ".txt file, a folder, or the name of a dataset."
        )
    rows_BC = torch.cat(
        list(
            calibration_batches(
                recipe.data,
                load_tokenizer(model),
                tokens=4 * recipe.tokens,
                context=recipe.context,
            )
        )
    )
    generator = torch.Generator().manual_seed(recipe.seed)
    chosen = torch.randperm(len(rows_BC), generator=generator)
    ids_BC = rows_BC[chosen[: max(1, recipe.tokens // recipe.context)]]
    least = 16 * recipe.experts
    if ids_BC.numel() < least:
        raise UserError(
            f"{ids_BC.numel()} calibration tokens for {recipe.experts} experts. Give text of at "
            f"least {least} tokens ({recipe.experts} experts x 16), better some thousands."
        )
    return ids_BC


class _Maker:
    """Both streams, and the methods that are asked layer by layer."""

    def __init__(
        self,
        made: Construction,
        ids_BC: torch.Tensor,
        *,
        refit: Refit | None,
        refine: Distillation | None,
    ) -> None:
        recipe, dense = made.recipe, made.dense
        self.made, self.refit, self.refine = made, refit, refine
        self.stream = LayerStream(dense, context=ids_BC.shape[1], device=recipe.place())
        self.dense_BCD = self.stream.embed(ids_BC)
        self.moe_BCD = self.dense_BCD.clone()
        self.held_T: torch.Tensor | None = None
        self.seconds: dict[str, float] = {}
        self.fields = made.weighting.fields(
            routed=recipe.experts - recipe.shared, selects=made.selects
        )
        model = dense.checkpoint.path
        self.division: list[LayerSplit] | None = None
        self.splitter: CalibratedSplit | None = None
        self.gates_LED: Any = None
        ready = _ready(recipe.split, SPLITS.names())
        method = None if ready else resolve_method(recipe.split)
        if isinstance(method, CalibratedSplit):
            self.splitter = method
        else:
            if ready:
                division = NeuronSplit.load(ready)
            else:
                assert method is not None
                data = recipe.data if method.needs_data else None
                division, arrays = make_split(
                    model, method, recipe.experts, recipe.shared, data, recipe.seed
                )
                self.gates_LED = arrays.get("gates")
            found = division.num_experts + division.num_shared
            if (division.layers, division.width, found, division.num_shared) != (
                dense.layers,
                dense.width,
                recipe.experts,
                recipe.shared,
            ):
                raise UserError(
                    f"The split is of {division.layers} layers, {division.width} neurons, {found} "
                    f"experts and {division.num_shared} shared; the recipe and the model ask for "
                    f"{dense.layers}, {dense.width}, {recipe.experts} and {recipe.shared}."
                )
            self.division = list(map(LayerSplit, division.experts, division.shared))
        self._open_router()

    def _open_router(self) -> None:
        recipe, dense = self.made.recipe, self.made.dense
        ready = _ready(recipe.router, ROUTERS.names())
        self.fitter: CalibratedRouter | None = None
        self.routers: Iterator[dict[str, torch.Tensor]] | None = None
        self.growing = SimpleNamespace(
            experts=[],
            shared=[],
            layers=dense.layers,
            width=dense.width,
            num_experts=recipe.experts - recipe.shared,
            num_shared=recipe.shared,
        )
        if ready:
            self.routers = iter(RouterInit.load(ready).layers)
            return
        router = resolve_router(recipe.router)
        if self.gates_LED is not None and router.key == "hidden-clusters":
            # the split made these gates, and its experts belong to them in this order
            self.routers = iter([{"weight": torch.from_numpy(gate)} for gate in self.gates_LED])
            return
        if isinstance(router, CalibratedRouter):
            self.fitter = router
            return
        # These look at the experts of the layer they make, so the split may grow as they go.
        inputs = RouterInputs(
            dense.checkpoint.path,
            self.growing,  # type: ignore[arg-type]  # a NeuronSplit whose layers are still coming
            router.networks[0],
            self.made.selects,
            recipe.data,
            recipe.seed,
        )
        router.check(inputs)
        self.routers = router.build(inputs)

    @torch.inference_mode()
    def layer(self, index: int) -> None:
        """Make one layer and move both streams past it."""
        module: Any = self.stream.load(index)
        mlp = module.mlp
        with self._timed("streams"):
            dense_TD, normed_TD = self.stream.attend(module, self.dense_BCD)
            moe_TD, x_TD, attention = self._attend(module, dense_TD)
            dense_TD = dense_TD + _in_parts(mlp, normed_TD)
            neurons_TF = _in_parts(
                lambda x: mlp.act_fn(mlp.gate_proj(x)).mul_(mlp.up_proj(x)), x_TD
            )
            own_TD = _in_parts(mlp.down_proj, neurons_TF)
        view = self._view(index, x_TD, neurons_TF, mlp)
        with self._timed("split and router"):
            converted = self._divide(view, mlp)
            weights_TE = converted.weights(x_TD)
        full_TD = dense_TD - moe_TD
        error = {"split": converted.error(view, weights_TE, own_TD, refitted=False)}
        target_TD = own_TD
        if self.refit is not None:
            with self._timed("refit"):
                bias_D = converted.down_bias_D
                offset = 0.0 if bias_D is None else bias_D
                inputs = RefitInputs(
                    index,
                    len(x_TD),
                    lambda part: converted.features(neurons_TF[part], weights_TE[part]),
                    own_TD - offset,
                    full_TD - offset,
                    view.held_T,
                    converted.down_PD,
                    converted.facts,
                )
                target_TD = self.refit.target(inputs)
                converted.refit_PD = self.refit.solve(inputs)
            error["refit"] = converted.error(view, weights_TE, own_TD, refitted=True)
        out_TD = converted.forward(neurons_TF, weights_TE, refitted=True)
        refined = None
        if self.refine is not None:
            with self._timed("refine"):
                refined, out_TD, missed = self._distil(view, converted, target_TD, self.refine)
                converted.facts["refine"] = missed
            held_T = view.held_T
            rest_TD = out_TD[held_T] - own_TD[held_T]
            error["refine"] = float(rest_TD.square().sum() / own_TD[held_T].square().sum())
        converted.judge(view, weights_TE, own_TD)
        converted.facts["output_error"] = error
        converted.facts["split"] = view.facts
        shape = self.moe_BCD.shape
        self.dense_BCD = dense_TD.view(shape)
        self.moe_BCD = (moe_TD + out_TD).view(shape)
        drift = (self.moe_BCD - self.dense_BCD).square().sum()
        spread = (dense_TD - dense_TD.mean(0)).square().sum()
        converted.facts["stream_error"] = float(drift / spread)
        self.made.layers.append(converted.to("cpu"))
        self.made.attention.append(None if attention is None else attention.cpu())
        self.made.refined.append(None if refined is None else refined.to("cpu"))

    def _view(
        self, index: int, x_TD: torch.Tensor, neurons_TF: torch.Tensor, mlp: Any
    ) -> LayerView:
        recipe = self.made.recipe
        return LayerView(
            index,
            x_TD,
            neurons_TF,
            mlp.gate_proj.weight,
            mlp.up_proj.weight,
            mlp.down_proj.weight,
            experts=recipe.experts,
            shared=recipe.shared,
            top_k=self.made.selects,
            context=self.moe_BCD.shape[1],
            seed=recipe.seed,
        )

    def _divide(self, view: LayerView, mlp: Any) -> ConvertedLayer:
        if self.splitter is not None:
            parts = self.splitter.divide_layer(view)
        else:
            assert self.division is not None
            parts = self.division[view.layer]
        if len(parts.shared) > 1:  # always on, all with weight 1: one wide expert is the same
            parts = LayerSplit(parts.experts, [np.concatenate(parts.shared)])
        self.growing.experts.append(parts.experts)
        self.growing.shared.append(parts.shared)
        if self.fitter is not None:
            router = self.fitter.fit_layer(view, parts.experts)
        else:
            assert self.routers is not None
            router = next(self.routers)
        router = {name: weight.to(view.x_TD.device).float() for name, weight in router.items()}
        order = torch.from_numpy(np.concatenate([*parts.experts, *parts.shared]))
        bias = getattr(mlp.down_proj, "bias", None)
        return ConvertedLayer(
            parts,
            router,
            self._gate(router, len(parts.experts)),
            float(self.fields.get("score_scale_factor", 1.0)),
            view.down_DF.T[order].contiguous(),
            bias,
        )

    def _gate(self, router: dict[str, torch.Tensor], experts: int) -> TopKBalancedNoisyGate:
        network = RouterInit([router], [None]).gate
        first = next(iter(router.values()))
        if first.shape != (experts, self.made.dense.hidden):
            raise UserError(
                f"The router init is for {first.shape[0]} experts and hidden size "
                f"{first.shape[1]}; needed are {experts} and {self.made.dense.hidden}. "
                "Make a router init for this model and split."
            )
        gate = TopKBalancedNoisyGate(
            self.made.dense.hidden,
            experts,
            self.made.selects,
            network=network,
            add_noise=False,
            bias="bias" in router,
            weighting=self.fields.get("gate_weighting", "scores"),
        ).eval()
        assert gate.gate_network is not None
        gate.gate_network.load_state_dict(router)
        return gate.to(self.stream.device)

    def _attend(
        self, module: Any, dense_TD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Attention on the converted stream, refitted towards `dense_TD`, the dense model's.

        Returns the residual stream, the feed-forward input and the new weight of o_proj, if any.
        """
        blend = self.made.recipe.attention
        if blend is None:
            return *self.stream.attend(module, self.moe_BCD), None
        projection = module.self_attn.o_proj
        seen: list[torch.Tensor] = []
        hook = projection.register_forward_pre_hook(
            lambda _, args: seen.append(args[0].flatten(0, -2))
        )
        moe_TD, _ = self.stream.attend(module, self.moe_BCD)
        hook.remove()
        mixed_TP, before_TD = torch.cat(seen), self.moe_BCD.flatten(0, 1)
        target_TD = torch.lerp(moe_TD, dense_TD, blend) - before_TD
        offset = 0.0 if projection.bias is None else projection.bias
        target_TD = target_TD - offset
        held_T = held_back(len(mixed_TP), self.moe_BCD.shape[1]).to(mixed_TP.device)
        sizes = (mixed_TP.shape[1], target_TD.shape[1])
        fitted, held = (Moments(*sizes, device=mixed_TP.device) for _ in range(2))
        fitted.add(mixed_TP[~held_T], target_TD[~held_T])
        held.add(mixed_TP[held_T], target_TD[held_T])
        found = solve(fitted, held, start_PQ=projection.weight.T.contiguous())
        moe_TD = before_TD + mixed_TP @ found.weights_PQ + offset
        weight = found.weights_PQ.T.contiguous()
        return moe_TD, module.post_attention_layernorm(moe_TD), weight

    def _distil(
        self,
        view: LayerView,
        converted: ConvertedLayer,
        target_TD: torch.Tensor,
        settings: Distillation,
    ) -> tuple[ExpertWeights, torch.Tensor, dict[str, float]]:
        down_PD = converted.down_PD if converted.refit_PD is None else converted.refit_PD
        sizes = [len(ids) for ids in converted.parts.experts]
        split = converted.order_P.view(len(sizes), sizes[0])
        with torch.inference_mode(False), torch.enable_grad():
            start = ExpertWeights(
                view.gate_FD[split].clone(),
                view.up_FD[split].clone(),
                down_PD.view(len(sizes), sizes[0], -1).clone(),
                converted.router["weight"].clone(),
                converted.router.get("bias", view.x_TD.new_zeros(len(sizes))).clone(),
            )
            refined, missed = distil(
                start,
                view.x_TD.clone(),
                target_TD.clone(),
                view.held_T.clone(),
                top_k=self.made.selects,
                settings=settings,
                seed=self.made.recipe.seed + view.layer,
            )
        out_TD = _in_parts(lambda x: refined.forward(x, self.made.selects), view.x_TD)
        return refined, out_TD, missed

    def _timed(self, name: str) -> Any:
        return _Timer(self.seconds, name)


class _Timer:
    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        self.start = time.monotonic()

    def __exit__(self, *_: object) -> None:
        spent = time.monotonic() - self.start
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + spent


def assemble(made: Construction, stage: str) -> Any:
    """The mixture as a model in float32, as it was after a stage: "split", "refit" or "last"."""
    from moesaic.models.llama_moe import LlamaMoEConfig, LlamaMoEForCausalLM
    from moesaic.models.llama_moe_residual import (
        LlamaMoEResidualConfig,
        LlamaMoEResidualForCausalLM,
    )

    fields = {k: v for k, v in made.config().items() if k not in ("model_type", "dtype")}
    shared = bool(made.recipe.shared)
    config = (LlamaMoEResidualConfig if shared else LlamaMoEConfig)(**fields)
    model: Any = (LlamaMoEResidualForCausalLM if shared else LlamaMoEForCausalLM)(config).eval()
    dense = made.dense
    before, after = dense.outer()
    names = [*before, *(n for i in range(dense.layers) for n in dense.others(i)), *after]
    weights = {name: dense.read(name).float() for name in names}
    if stage != "split":
        for index, weight in enumerate(made.attention):
            if weight is not None:
                weights[f"{dense.prefix}layers.{index}.self_attn.o_proj.weight"] = weight
    unexpected = model.load_state_dict(weights, strict=False).unexpected_keys
    assert not unexpected, unexpected
    with torch.no_grad():
        for index, layer in enumerate(made.layers):
            _fill(model.model.layers[index].mlp, made, index, layer, stage)
    return model


def _fill(mlp: Any, made: Construction, index: int, layer: ConvertedLayer, stage: str) -> None:
    refined = made.refined[index] if stage == "last" else None
    block = mlp.routed
    router = layer.router
    if refined is not None:
        router = {"weight": refined.router_ED, "bias": refined.bias_E}
        if "bias" not in layer.router:
            router.pop("bias")
    block.gate.gate_network.load_state_dict(router)
    dense = made.dense
    gate_FD, up_FD = (dense.read(name).float() for name in dense.ffn(index)[:2])
    biases = [dense.read(name).float() for name in dense.biases(index) or ()]
    down_PD = layer.down_PD if stage == "split" or layer.refit_PD is None else layer.refit_PD
    targets = [(block.calculator, layer.parts.experts)]
    if layer.parts.shared:
        targets.append((mlp.residual_block.calculator, layer.parts.shared))
        mlp.residual_block.gate.gate_network.weight.zero_()
    start = 0
    for place, (calculator, experts) in enumerate(targets):
        weights = calculator.experts
        wide = weights.intermediate_dim
        for expert, numbers in enumerate(experts):
            ids, size = torch.from_numpy(numbers), len(numbers)
            weights.gate_up_proj[expert, :size] = gate_FD[ids]
            weights.gate_up_proj[expert, wide : wide + size] = up_FD[ids]
            weights.down_proj[expert, :, :size] = down_PD[start : start + size].T
            if biases:
                weights.gate_up_proj_bias[expert, :size] = biases[0][ids]
                weights.gate_up_proj_bias[expert, wide : wide + size] = biases[1][ids]
            start += size
        if biases:
            calculator.bias_down.copy_(biases[2] if place == 0 else 0 * biases[2])
        if refined is not None:
            weights.gate_up_proj.copy_(torch.cat([refined.gate_EID, refined.up_EID], dim=1))
            weights.down_proj.copy_(refined.down_EID.transpose(1, 2))


def _measure(made: Construction, dense_loss: Mapping[str, float] | None, last_only: bool) -> None:
    """Add a record for the dense model and for every stage: losses and mean figures."""
    stages = ["split"]
    stages += ["refit"] if made.recipe.refit is not None else []
    stages += ["refine"] if made.recipe.refine is not None else []
    known = None if dense_loss is None else {"loss": dense_loss["mean"], "losses": dense_loss}
    made.stages.append({"stage": "dense", **(known or _loss(made, None))})
    facts = [layer.facts for layer in made.layers]
    for stage in stages:
        record: dict[str, Any] = {"stage": stage}
        all_on = "all_on_refit" if stage == "refit" else "all_on"
        record["all_on_difference"] = None
        if stage != "refine":
            record["all_on_difference"] = max(float(f[all_on]) for f in facts)
        for key in ("captured", "oracle", "load_entropy"):
            record[key] = None if stage == "refine" else _mean([f[key] for f in facts])
        record["output_error"] = _mean([f["output_error"][stage] for f in facts])
        last = stage == stages[-1]
        skipped = last_only and not last
        loss = {"loss": None} if skipped else _loss(made, "last" if last else stage)
        made.stages.append(record | loss)


def _loss(made: Construction, stage: str | None) -> dict[str, Any]:
    recipe = made.recipe
    if recipe.held_out is None:
        return {"loss": None}
    from moesaic.measure.loss import held_out_loss
    from moesaic.models.load import load
    from moesaic.models.tokenizer import load_tokenizer

    path = made.dense.checkpoint.path
    model = load(path, dtype=torch.float32) if stage is None else assemble(made, stage)
    losses = held_out_loss(
        model,
        load_tokenizer(path),
        recipe.held_out,
        context=recipe.held_out_context,
        max_documents=recipe.held_out_documents,
        device=recipe.place(),
    )
    return {"loss": losses["mean"], "losses": losses}


def _save(made: Construction, model: Any, directory: Path) -> None:
    from moesaic.models.save import save

    save(model.to(made.dense.checkpoint.dtype(made.dense.ffn(0)[0])), directory)


def _warn(made: Construction) -> None:
    never = [
        f"layer {layer.facts['layer']} expert {expert}"
        for layer in made.layers
        for expert in layer.facts["never_chosen"]
    ]
    if never:
        note(f"no calibration token chose {', '.join(never[:8])} ({len(never)} in all)")


def _check(recipe: Recipe, dense: DenseModel) -> None:
    if getattr(dense, "mixture", "llama_moe") != "llama_moe" or dense.head != "ForCausalLM":
        raise UserError(
            f"{dense.checkpoint.path} is no LLaMA language model; its experts cannot be refitted "
            "yet. Use `moesaic convert`."
        )
    if recipe.top_k > recipe.experts:
        raise UserError(
            f"top_k={recipe.top_k} but the model has {recipe.experts} experts. "
            "Lower top_k or split into more experts."
        )
    if recipe.top_k <= recipe.shared:
        raise UserError(
            f"top_k={recipe.top_k} counts all active experts, and {recipe.shared} are shared. "
            f"Give top_k at least {recipe.shared + 1}."
        )
    if dense.width % recipe.experts:
        raise UserError(
            f"experts={recipe.experts} does not divide the {dense.width} neurons of a layer. "
            "Use a divisor."
        )


def _refine(recipe: Recipe) -> Distillation | None:
    if recipe.refine is None:
        return None
    chosen = recipe.refine if isinstance(recipe.refine, dict) else {"method": recipe.refine}
    settings = dict(chosen)
    if settings.pop("method", None) != "layerwise":
        raise UserError(f"refine={recipe.refine!r} was given. Use layerwise, or null.")
    if recipe.shared or _name(recipe.weighting) != "one":
        raise UserError("refine: layerwise needs shared: 0 and weighting: one. Change these.")
    from moesaic.core.config import parse

    return parse(Distillation, settings, source="refine layerwise")


def _ready(choice: Choice, names: list[str]) -> Path | None:
    """The file that a choice names, if it is no method."""
    if isinstance(choice, str) and choice not in names and ("/" in choice or Path(choice).exists()):
        return Path(choice)
    return None


def _name(choice: Choice) -> str:
    return choice if isinstance(choice, str) else str(choice.get("method"))


def _in_parts(function: Callable[[torch.Tensor], torch.Tensor], x_TD: torch.Tensor) -> torch.Tensor:
    return torch.cat([function(part) for part in x_TD.split(8192)])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
