"""One layer after another: split, route, weigh, refit and refine, each on the layers before it.

Two residual streams run along: the converted model's, which every layer is made on, and the dense
model's, which is the target. Only these and one layer are in memory; what a layer's weights became
is handed on to whoever writes them.
Notation: B rows, C tokens a row, T = B*C tokens, D hidden size, F neurons, E experts, P neurons
held by the layer's experts, I neurons of one expert.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from moesaic.construct.activations import LayerStream
from moesaic.construct.attention_refit import Attended, attend_both
from moesaic.construct.choices import RouterChoice, SplitChoice
from moesaic.construct.dense import DenseModel
from moesaic.construct.free.block import Fixed, RoutedBlock, dense_block
from moesaic.construct.free.distil import Distillation, Target, distil
from moesaic.construct.free.head import Head, head_of
from moesaic.construct.free.layer import ConvertedLayer
from moesaic.construct.free.view import LayerView, held_back
from moesaic.construct.input_maps import fit_map, fold, fold_experts, scaled_norm
from moesaic.construct.method import LayerSplit
from moesaic.construct.pinned import pin
from moesaic.construct.recipe import Recipe
from moesaic.construct.refit import Refit, RefitInputs
from moesaic.construct.router import RouterInit
from moesaic.core.errors import UserError
from moesaic.models.gates import TopKBalancedNoisyGate
from moesaic.models.selects import Selects, selects_of

__all__ = ["KEPT", "LayerMaker", "LayerWeights", "MadeLayer"]


@dataclass
class LayerWeights:
    """The weights of a layer as they are after a stage; float32 on the maker's device."""

    parts: LayerSplit
    router: dict[str, torch.Tensor]
    gate_PD: torch.Tensor
    up_PD: torch.Tensor
    down_PD: torch.Tensor
    others: dict[str, torch.Tensor]
    """Weights of attention and norms that are not the dense model's, by name in the layer."""


@dataclass
class MadeLayer:
    """What is kept of a finished layer."""

    parts: LayerSplit
    router: dict[str, torch.Tensor]
    """Of the last stage, on the CPU."""
    facts: dict[str, Any]


@dataclass
class _Met:
    """What a layer meets before its feed-forward part is divided; [T, D] but for the neurons."""

    module: Any
    seen: Attended
    neurons_TF: torch.Tensor
    own_TD: torch.Tensor
    """What the dense layer gives on the converted stream."""
    full_TD: torch.Tensor
    """What would bring that stream back to the dense model's."""
    gate_FD: torch.Tensor
    """As the dense model has it; `module` holds it mapped, where `mapped`."""
    up_FD: torch.Tensor
    mapped: bool


class LayerMaker:
    """Both streams, and the methods that are asked layer by layer.

    `fields` are the weighting's. Weights are rounded to the type of the checkpoint before the
    streams go through them, so that later layers are made on what will be in the file. `selects`
    are the routed experts of a token, of all layers or of each; the recipe's by default.
    """

    def __init__(
        self,
        dense: DenseModel,
        recipe: Recipe,
        ids_BC: torch.Tensor,
        *,
        split: SplitChoice,
        fields: Mapping[str, Any],
        refit: Refit | None,
        refine: Distillation | None,
        selects: Selects | None = None,
    ) -> None:
        self.dense, self.recipe, self.fields = dense, recipe, fields
        self.split, self.refit, self.refine = split, refit, refine
        each = recipe.top_k - recipe.shared
        self.selects = each if selects is None else selects
        self.maps = recipe.maps and refit is not None
        self.router = RouterChoice(dense, recipe, split, selects=each)
        self.stream = LayerStream(dense, context=ids_BC.shape[1], device=recipe.place())
        self.dense_BCD = self.stream.embed(ids_BC)
        self.moe_BCD = self.dense_BCD  # until a layer has been changed
        self.dtype = dense.checkpoint.dtype(dense.ffn(0)[2])
        self.seconds: dict[str, float] = {}
        self._later: dict[int, Target] = {}
        self._predicts: Head | None = None

    @torch.inference_mode()
    def layer(self, index: int) -> tuple[MadeLayer, dict[str, LayerWeights]]:
        """Make one layer and move both streams past it; its weights after every stage."""
        with self._timed("streams"):
            met = self._meet(index)
        seen, mlp, own_TD, neurons_TF = met.seen, met.module.mlp, met.own_TD, met.neurons_TF
        view = LayerView.of(
            index,
            mlp,
            seen.normed_TD,
            neurons_TF,
            experts=self.recipe.experts,
            shared=self.recipe.shared,
            top_k=selects_of(self.selects, index),
            context=self.moe_BCD.shape[1],
            seed=self.recipe.seed,
        )
        with self._timed("split and router"):
            made = self.divide(view, mlp.down_proj.bias)
            weights_TE = made.weights(seen.normed_TD)
        gate_PD, up_PD = met.gate_FD[made.order_P], met.up_FD[made.order_P]
        last = LayerWeights(made.parts, made.router, gate_PD, up_PD, made.down_PD, {})
        stages = {"split": last}
        errors = {"split": made.error(neurons_TF, weights_TE, own_TD, view.held_T)}
        made.judge(view, weights_TE, own_TD)
        if self.refit is not None:
            with self._timed("refit"):
                if met.mapped:
                    gate_PD, up_PD = fold_experts(
                        gate_PD,
                        up_PD,
                        seen.normed_TD,
                        seen.dense_normed_TD,
                        weights_TE,
                        sizes=made.sizes,
                        held_T=view.held_T,
                        dtype=self.dtype,
                    )
                    neurons_TF = made.fold(view, gate_PD, up_PD, weights_TE)
                down_PD = self._refit(
                    self.refit, view, made, neurons_TF, weights_TE, own_TD, met.full_TD
                )
            last = stages["refit"] = replace(last, gate_PD=gate_PD, up_PD=up_PD, down_PD=down_PD)
            errors["refit"] = made.error(neurons_TF, weights_TE, own_TD, view.held_T)
            made.judge_refit(view, own_TD)
        del met.full_TD
        last.others = seen.weights
        if self.refine is None:
            out_TD = made.forward(neurons_TF, weights_TE)
            moe_TD = self.stream.finish(met.module, seen.residual_TD, out_TD)
        else:
            with self._timed("refine"):
                last, moe_TD = self._distil(view, made, last, self.refine)
            stages["refine"] = last
            held_T = view.held_T
            whole_TD = self.stream.finish(met.module, seen.residual_TD[held_T], own_TD[held_T])
            rest_TD, added_TD = whole_TD - moe_TD[held_T], whole_TD - seen.residual_TD[held_T]
            errors["refine"] = float(rest_TD.square().sum() / added_TD.square().sum())
        self.moe_BCD = moe_TD.view_as(self.dense_BCD)
        dense_TD = self.dense_BCD.flatten(0, 1)
        drift = (moe_TD - dense_TD).square_().sum()
        spread = (dense_TD - dense_TD.mean(0)).square_().sum()
        made.facts |= {
            "output_error": errors,
            "split": view.facts,
            "stream_error": float(drift / spread),
        }
        router = {name: weight.cpu() for name, weight in last.router.items()}
        return MadeLayer(made.parts, router, made.facts), stages

    def _meet(self, index: int) -> _Met:
        """Move the dense stream past a layer, and the other one to its feed-forward part."""
        module: Any = self.stream.load(index)
        mlp = module.mlp
        seen = attend_both(
            self.stream,
            module,
            self.dense_BCD,
            self.moe_BCD,
            blend=self.recipe.attention,
            maps=self.maps,
            dtype=self.dtype,
        )
        dense_out_TD = _in_parts(mlp, seen.dense_normed_TD)
        dense_TD = self.stream.finish(module, seen.dense_residual_TD, dense_out_TD)
        self.dense_BCD = dense_TD.view_as(self.dense_BCD)
        gate_FD, up_FD = mlp.gate_proj.weight, mlp.up_proj.weight
        mapped = self.maps and index > 0
        if mapped:  # what split and router look at; experts get maps of their own
            held_T = held_back(len(dense_TD), self.dense_BCD.shape[1]).to(dense_TD.device)
            map_DD = fit_map(seen.normed_TD, seen.dense_normed_TD, held_T)
            for part in (mlp.gate_proj, mlp.up_proj):
                folded = fold(part.weight, map_DD, self.dtype)
                part.weight = torch.nn.Parameter(folded, requires_grad=False)
        neurons_TF = _in_parts(
            lambda x: mlp.act_fn(mlp.gate_proj(x)).mul_(mlp.up_proj(x)), seen.normed_TD
        )
        own_TD = _in_parts(mlp.down_proj, neurons_TF)
        # Behind a norm it cannot be said what brings the stream back to the dense model's; there
        # the target is what the dense model's layer gives.
        after_norm = self.stream.output_norms(module)
        full_TD = dense_out_TD if after_norm else dense_TD - seen.residual_TD
        return _Met(module, seen, neurons_TF, own_TD, full_TD, gate_FD, up_FD, mapped)

    @torch.inference_mode()
    def last_norm(self) -> tuple[float, dict[str, torch.Tensor]]:
        """The factor of the last norm (`scaled_norm`) and its weight by name, where it changes.

        Where maps are left out, or layers were refined towards the predictions, it is 1.
        """
        if not self.maps or self.refine is not None:
            return 1.0, {}
        norm = self.stream.norm_after(self.dense.layers - 1)
        factor, weight_D = scaled_norm(norm, self.moe_BCD, self.dense_BCD)
        return factor, {} if weight_D is None else {self.dense.outer()[1][0]: weight_D}

    def divide(self, view: LayerView, bias_D: torch.Tensor | None) -> ConvertedLayer:
        """The experts and the router of the next layer; `bias_D` is of its down projection."""
        parts = self.split.layer(view)
        router = self.router.layer(view, parts)
        if parts.always is not None:
            weighting = self.fields.get("gate_weighting", "scores")
            router = pin(router, view.x_TD, parts.always, weighting=weighting)
        router = self._rounded(router)
        order_P = torch.from_numpy(np.concatenate([*parts.experts, *parts.shared]))
        scale = self.fields.get("score_scale_factor", 1.0)
        return ConvertedLayer(
            parts,
            router,
            self._gate(view.layer, router, len(parts.experts)),
            float(scale[view.layer] if isinstance(scale, list) else scale),
            view.down_DF.T[order_P.to(view.down_DF.device)].contiguous(),
            bias_D,
        )

    def _gate(
        self, layer: int, router: dict[str, torch.Tensor], experts: int
    ) -> TopKBalancedNoisyGate:
        gate = TopKBalancedNoisyGate(
            self.dense.hidden,
            experts,
            selects_of(self.selects, layer),
            network=RouterInit([router], [None]).gate,
            add_noise=False,
            bias="bias" in router,
            weighting=self.fields.get("gate_weighting", "scores"),
        ).eval()
        assert gate.gate_network is not None
        gate.gate_network.load_state_dict(router)
        return gate.to(self.stream.device)

    def _refit(
        self,
        refit: Refit,
        view: LayerView,
        made: ConvertedLayer,
        neurons_TF: torch.Tensor,
        weights_TE: torch.Tensor,
        own_TD: torch.Tensor,
        full_TD: torch.Tensor,
    ) -> torch.Tensor:
        """Put the new down projection, [P, D], into `made`, and return it."""
        bias_D = made.down_bias_D
        inputs = RefitInputs(
            view.layer,
            len(own_TD),
            lambda part: made.features(neurons_TF[part], weights_TE[part]),
            own_TD if bias_D is None else own_TD - bias_D,
            full_TD if bias_D is None else full_TD - bias_D,
            view.held_T,
            made.down_PD,
            made.facts,
        )
        made.refit_PD = refit.solve(inputs).to(self.dtype).float()
        return made.refit_PD

    def _distil(
        self, view: LayerView, made: ConvertedLayer, start: LayerWeights, settings: Distillation
    ) -> tuple[LayerWeights, torch.Tensor]:
        """The refined layer, and the residual stream after it, [T, D].

        The feed-forward input is read again from the converted stream, as attention changes too.
        """
        sizes = {len(ids) for ids in made.parts.experts}
        if len(sizes) > 1:
            raise UserError(
                f"The experts hold {min(sizes)} to {max(sizes)} neurons; "
                "refine: layerwise needs experts of one width. Use refine: null, or another split."
            )
        settings = settings.on(self.stream.device)
        with torch.inference_mode(False), torch.enable_grad():
            block = self._block(view, made, start)
            made.facts["refine"] = distil(
                block,
                self.moe_BCD,
                self._targets(view.layer, settings.ahead),
                head=self._head(view.layer, settings),
                settings=settings,
                seed=self.recipe.seed + view.layer,
                graph=self.stream.graphs(),
            )
        block.requires_grad_(False)
        name = f"{self.dense.prefix}layers.{view.layer}."
        for part, weight in block.named_parameters():
            inner = part.removeprefix("layer.")
            kept = self.dtype if inner == part else self.dense.checkpoint.dtype(name + inner)
            weight.copy_(weight.to(kept))
        router: dict[str, torch.Tensor] = {"weight": block.router_ED}
        if block.bias_E is not None:
            router["bias"] = block.bias_E
        found = LayerWeights(
            start.parts,
            router,
            block.gate_PD,
            block.up_PD,
            block.down_PD,
            dict(block.layer.named_parameters()),
        )
        return found, _in_parts(block, self.moe_BCD).flatten(0, 1)

    def _block(self, view: LayerView, made: ConvertedLayer, start: LayerWeights) -> RoutedBlock:
        layer: Any = self.stream.load(view.layer)
        changed = {part: weight.clone() for part, weight in start.others.items()}
        layer.load_state_dict(changed, strict=False, assign=True)
        gate_P, up_P = (
            None if bias_F is None else bias_F[made.order_P].clone()
            for bias_F in (view.gate_bias_F, view.up_bias_F)
        )
        bias_D = None if made.down_bias_D is None else made.down_bias_D.clone()
        fixed = Fixed(view.top_k, view.activation, gate_P, up_P, bias_D)
        return RoutedBlock(
            self.stream,
            layer,
            fixed,
            width=len(made.parts.experts[0]),
            gate_PD=start.gate_PD,
            up_PD=start.up_PD,
            down_PD=start.down_PD,
            router=start.router,
        )

    def _targets(self, layer: int, ahead: int | None) -> list[Target]:
        """The dense model's streams after a layer and after those ahead of it.

        Streams are kept from layer to layer while they take little room; those further on are made
        again for every batch.
        """
        places = self.dense.layers - layer
        if ahead is not None:
            places = min(places, ahead + 1)
        self._later = {place: it for place, it in self._later.items() if place > layer}
        found = [Target(self.dense_BCD, self.stream.norm_after(layer))]
        room = max(1, KEPT // (self.dense_BCD.numel() * 4))
        for later in range(layer + 1, layer + places):
            it = self._later.get(later)
            if it is None:
                lead = dense_block(self.stream, self.stream.load(later))
                it = Target(None, self.stream.norm_after(later), lead)
            before_BCD = found[-1].stream_BCD
            if it.stream_BCD is None and before_BCD is not None and len(found) < room:
                assert it.lead is not None
                with torch.no_grad():
                    it = replace(it, stream_BCD=_in_parts(it.lead, before_BCD))
            self._later[later] = it
            found.append(it)
        return found

    def _head(self, layer: int, settings: Distillation) -> Head | None:
        """The dense model's head, where `ahead` reaches the last layer and it counts."""
        behind = self.dense.layers - 1 - layer
        if not settings.kl or (settings.ahead is not None and settings.ahead < behind):
            return None
        if self._predicts is None:
            self._predicts = head_of(self.stream)
        return self._predicts

    def _rounded(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor.to(self.dtype).float() for name, tensor in tensors.items()}

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        if self.stream.device.type == "cuda":
            torch.cuda.synchronize(self.stream.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start


def _in_parts(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Apply a function to a few thousand tokens of [T, D] or [B, C, D] at a time."""
    made: torch.Tensor | None = None
    step = _PART if x.ndim == 2 else max(1, _PART // x.shape[1])
    for start in range(0, len(x), step):
        part = function(x[start : start + step])
        if made is None:
            made = part.new_empty(len(x), *part.shape[1:])
        made[start : start + step] = part
    assert made is not None
    return made


_PART = 8192
KEPT = 8 << 30
"""Bytes of the dense model's streams that are kept for refining."""
