"""Layer-wise score scale factors: give each mixture layer the weight its dense layer had.

Source: LLaMA-MoE's `get_layer_wise_score_scale_factor` (spec llama-moe-v1, section 1.10): from the
first layer on, factor = (mean |residual| / mean |feed-forward output|) of the mixture with factor
1, divided by the same ratio of the dense model; the factor is in force before the next layer is
measured. Notation: T tokens, D hidden size, E routed experts, K chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moesaic.construct.activations import LayerStream, text_sample
from moesaic.construct.dense import DenseModel
from moesaic.construct.router import RouterInit
from moesaic.construct.routers.select import router_logits
from moesaic.construct.split import NeuronSplit
from moesaic.core.console import track
from moesaic.core.errors import UserError


@torch.inference_mode()
def layer_scales(
    dense: DenseModel,
    division: NeuronSplit,
    router: RouterInit,
    *,
    top_k: int,
    data: Any,
    tokens: int = 8192,
    context: int = 256,
) -> list[float]:
    """Measure one score scale factor per layer on text.

    Both models run side by side, one layer in memory.

    Raises UserError without data, with shared experts (the rule is not defined for two parts), or
    when a layer's mixture gives nothing but zeros.
    """
    if data is None:
        raise UserError(
            "scale=layerwise is measured on text, but no data was given. Give data: a .jsonl or "
            ".txt file, a folder, or the name of a dataset."
        )
    if division.num_shared:
        raise UserError(
            "scale=layerwise is not defined for a split with shared experts. "
            "Give a number as scale, or a split without shared experts."
        )
    if dense.config.get("mlp_bias"):
        raise UserError(
            "scale=layerwise is not defined for feed-forward layers with biases, which no factor "
            "scales. Give a number as scale."
        )
    ids_BC = text_sample(dense.checkpoint.path, data, tokens=tokens, context=context)
    stream = LayerStream(dense, context=context)
    dense_BCD = mixture_BCD = stream.embed(ids_BC)
    factors: list[float] = []
    for layer in track(range(dense.layers), "measuring scale factors"):
        module: Any = stream.load(layer)
        residual_TD, normed_TD = stream.attend(module, dense_BCD)
        out_TD = module.mlp(normed_TD)
        wanted = _mean(residual_TD) / _mean(out_TD)
        dense_BCD = stream.finish(module, residual_TD, out_TD).view_as(dense_BCD)

        residual_TD, normed_TD = stream.attend(module, mixture_BCD)
        weights = [w.float() for _, w in sorted(router.layers[layer].items())]
        routed_TD = _routed(module.mlp, normed_TD, division.experts[layer], weights, top_k)
        size = _mean(routed_TD)
        if size == 0:
            raise UserError(
                f"The experts of layer {layer} give nothing but zeros on this text. "
                "Give a number as scale."
            )
        factors.append(_mean(residual_TD) / size / wanted)
        scaled_TD = routed_TD * factors[-1]
        mixture_BCD = stream.finish(module, residual_TD, scaled_TD).view_as(mixture_BCD)
    return factors


def _routed(
    mlp: Any,
    x_TD: torch.Tensor,
    experts: Sequence[Any],
    router: Sequence[torch.Tensor],
    top_k: int,
) -> torch.Tensor:
    top_TK = router_logits(x_TD, router).topk(top_k, dim=1)
    scores_TE = torch.zeros(len(x_TD), len(experts)).scatter_(
        1, top_TK.indices, top_TK.values.softmax(1)
    )
    neurons_TF = mlp.act_fn(mlp.gate_proj(x_TD)) * mlp.up_proj(x_TD)
    # An expert's score multiplies its neurons; a neuron of several experts gets their sum.
    weights_TF = torch.zeros_like(neurons_TF)
    for expert, ids in enumerate(experts):
        weights_TF[:, torch.from_numpy(ids)] += scores_TE[:, expert, None]
    return mlp.down_proj(neurons_TF * weights_TF)


def _mean(values_TD: torch.Tensor) -> float:
    return float(values_TD.abs().mean())
