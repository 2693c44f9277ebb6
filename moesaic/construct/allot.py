"""Active experts of each layer under one total, by what they cost the model.

Every layer is converted by itself, the others staying dense: divided and routed once, then run with
each number of active experts. What the model's predictions lose, as KL from the dense model's on
calibration rows that splits and routers have not seen, is the price of a number in a layer. Prices
are taken to add up over layers, and a dynamic programme finds the cheapest numbers of the total.
Each layer is read once: the streams that earlier layers changed move along with the dense one.
Notation: L layers, E routed experts, K candidates 1 to E - 1, B rows, C tokens a row, T = B*C,
D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from moesaic.construct.free.block import dense_block
from moesaic.construct.free.head import head_of
from moesaic.construct.free.view import LayerView
from moesaic.construct.layer_maker import LayerMaker
from moesaic.construct.weighting import Weighting
from moesaic.core.console import track

__all__ = ["TOKENS", "Allotment", "allot", "cheapest"]

TOKENS = 16_384
"""Calibration tokens looked at; prices are measured on an eighth of them."""
_ROWS = 8
_PART = 1024


@dataclass(frozen=True)
class Allotment:
    """The numbers that were chosen, and the prices that they were chosen by."""

    selects: list[int]
    """Routed experts of a token, [L]."""
    prices_LK: list[list[float]]
    """KL in nats a token of the model whose one layer uses 1, 2, ... E - 1 experts."""
    tokens: int
    """Tokens that the prices were measured on."""

    def facts(self) -> dict[str, Any]:
        """Plain values, for construct.json."""
        prices = [[round(price, 6) for price in row] for row in self.prices_LK]
        return {"routed": self.selects, "price": prices, "tokens": self.tokens}


@torch.inference_mode()
def allot(maker: LayerMaker, ids_BC: torch.Tensor, weighting: Weighting) -> Allotment:
    """Choose the routed experts of every layer, as many in all as the recipe's equal numbers.

    `maker` divides and routes the layers and is of no use afterwards. Of `ids_BC` [B, C], the
    calibration text, the first rows are looked at: every eighth is measured on, the others are seen
    by split and router (all are both where they are fewer than eight). The numbers are 1 to E - 1,
    or E where the recipe leaves nothing out.
    """
    stream, recipe, each = maker.stream, maker.recipe, maker.recipe.top_k - maker.recipe.shared
    layers, routed = maker.dense.layers, recipe.experts - recipe.shared
    context = ids_BC.shape[1]
    if each == routed:
        return Allotment([each] * layers, [], 0)
    dense_BCD = stream.embed(ids_BC[: max(1, TOKENS // context)])
    rows_B = torch.arange(len(dense_BCD), device=stream.device)
    measured_B, fitted_B = rows_B % 8 == 7, rows_B % 8 != 7
    if len(rows_B) < 8:
        measured_B = fitted_B
    changed: list[torch.Tensor] = []  # of every layer so far, [K * measured rows, C, D]
    for index in track(range(layers), "choosing experts per layer"):
        module: Any = stream.load(index)
        mlp, run = module.mlp, dense_block(stream, module)
        for moving_BCD in changed:
            for part in moving_BCD.split(_ROWS):
                part.copy_(run(part))
        residual_TD, x_TD = stream.attend(module, dense_BCD)
        neurons_TF = mlp.act_fn(mlp.gate_proj(x_TD)).mul_(mlp.up_proj(x_TD))
        few_x_TD, few_residual_TD, few_neurons_TF = (
            whole.unflatten(0, (-1, context))[measured_B].flatten(0, 1)
            for whole in (x_TD, residual_TD, neurons_TF)
        )
        dense_TD = stream.finish(module, residual_TD, mlp.down_proj(neurons_TF))
        dense_BCD = dense_TD.view_as(dense_BCD)
        view = LayerView.of(
            index,
            mlp,
            x_TD.unflatten(0, (-1, context))[fitted_B].flatten(0, 1),
            neurons_TF.unflatten(0, (-1, context))[fitted_B].flatten(0, 1),
            experts=recipe.experts,
            shared=recipe.shared,
            top_k=each,
            context=context,
            seed=recipe.seed,
        )
        made = maker.divide(view, mlp.down_proj.bias)
        after = []
        for number in range(1, routed):
            made.gate.num_selects = number
            fields = weighting.fields(routed=routed, selects=number)
            made.scale = float(fields.get("score_scale_factor", 1.0))
            out_TD = made.forward(few_neurons_TF, made.weights(few_x_TD))
            after.append(stream.finish(module, few_residual_TD, out_TD))
        changed.append(torch.cat(after).unflatten(0, (-1, context)))
    wanted_TD = dense_BCD[measured_B].flatten(0, 1)
    prices_LK = _divergence(
        maker, [moving.view(routed - 1, *wanted_TD.shape) for moving in changed], wanted_TD
    )
    return Allotment(cheapest(prices_LK, total=each * layers), prices_LK, len(wanted_TD))


def cheapest(prices_LK: Sequence[Sequence[float]], *, total: int) -> list[int]:
    """The numbers, one a layer, that sum to `total` and whose prices sum to the least.

    Row l of `prices_LK` has the prices of 1, 2, ... K in layer l; `total` is L to L * K. Of equal
    sums always the same one is kept.
    """
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for prices_K in prices_LK:
        longer: dict[int, tuple[float, list[int]]] = {}
        for used, (paid, numbers) in best.items():
            for number, price in enumerate(prices_K, start=1):
                known = longer.get(used + number)
                if used + number <= total and (known is None or paid + price < known[0]):
                    longer[used + number] = (paid + price, [*numbers, number])
        best = longer
    return best[total][1]


def _divergence(
    maker: LayerMaker, changed_LKTD: Sequence[torch.Tensor], wanted_TD: torch.Tensor
) -> list[list[float]]:
    """KL of the predictions behind changed streams from those behind the dense one: [L][K]."""
    norm = maker.stream.norm_after(maker.dense.layers - 1)
    head = head_of(maker.stream)
    sums_LK = torch.zeros(len(changed_LKTD), len(changed_LKTD[0]), dtype=torch.float64)
    for start in range(0, len(wanted_TD), _PART):
        tokens = slice(start, start + _PART)
        wanted_TV = head.log_probabilities(norm(wanted_TD[tokens]))
        for layer, changed_KTD in enumerate(changed_LKTD):
            for place, changed_TD in enumerate(changed_KTD):
                given_TV = head.log_probabilities(norm(changed_TD[tokens]))
                found = functional.kl_div(given_TV, wanted_TV, log_target=True, reduction="sum")
                sums_LK[layer, place] += float(found)
    return (sums_LK / len(wanted_TD)).tolist()
