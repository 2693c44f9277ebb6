"""The experts layer out of Triton kernels, as one operator with its gradient.

T tokens, D hidden size, E experts, I expert width, J = 2I, K experts a token, N = T*K routed rows.

Forward: routing metadata, h and a = act(gate) * up in one product with the gather in front and the
activation behind it, y = a @ down, weighted sum over a token's rows. Kept for the backward pass: x
and h (2D + 4KI bytes a token in bf16) and the metadata. Backward: one product gives dh, weight * a
and the routing weights' gradient; the two weight gradients gather x and the output's gradient
inside; dx is summed over a token's rows. dh takes the place of h, which a second pass through the
same graph computes anew. Where these would hold more than what is kept and returned, products are
taken in the pieces that `budget` names. The algebra is that of SonicMoE (arXiv 2512.14080, section
4); kernels and code are our own.

On Hopper the products are those of `products`, elsewhere those of `portable`; a few tokens without
gradient take `decode`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from moesaic.kernels import options
from moesaic.kernels.operator import Notes, Operator
from moesaic.kernels.reference import Activation
from moesaic.kernels.triton import decode
from moesaic.kernels.triton.budget import ranges
from moesaic.kernels.triton.combine import combine, weight_gradient
from moesaic.kernels.triton.metadata import TILE_ROWS, Routing, count_ints, route
from moesaic.kernels.triton.multiply import Products, hopper
from moesaic.kernels.triton.parts import split

_FEW_TOKENS = 64
_WIDE_FROM = 64  # rows an expert, from which portable tiles are wide


def compute(
    x_TD: torch.Tensor,
    gate_up_EJD: torch.Tensor,
    down_EDI: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    *,
    activation: Activation,
    sentinels: bool,
) -> torch.Tensor:
    """Compute what `reference.experts` computes; differentiable in all but the ids, once.

    All of x and the weights in one dtype. With `sentinels`, ids outside [0, E) are rows of nobody
    here: they enter no product and add nothing.
    """
    tensors = (x_TD.contiguous(), gate_up_EJD, down_EDI, ids_TK, weights_TK.contiguous())
    keep = torch.is_grad_enabled()
    traced = torch.compiler.is_compiling()
    if traced or (keep and any(tensor.requires_grad for tensor in tensors)):
        return _operator(*tensors, activation, sentinels, keep)
    return _forward(*tensors, activation, sentinels, False)[0]


def tile_rows(device: torch.device, rows: int, experts: int) -> int:
    """Rows of a tile for `rows` routed rows on this device, or what the user chose."""
    chosen = options.current().block_m
    if chosen is not None:
        return chosen
    if hopper(device):
        return TILE_ROWS
    return 128 if rows >= _WIDE_FROM * experts else 16


def _forward(
    x_TD: torch.Tensor,
    gate_up_EJD: torch.Tensor,
    down_EDI: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    activation: Activation,
    sentinels: bool,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return out_TD, and for the backward pass h_NJ and the routing's two tensors."""
    with _on(x_TD.device):
        return _forward_here(x_TD, gate_up_EJD, down_EDI, ids_TK, weights_TK, activation, keep)


def _forward_here(
    x_TD: torch.Tensor,
    gate_up_EJD: torch.Tensor,
    down_EDI: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    activation: Activation,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    experts, width = gate_up_EJD.shape[0], down_EDI.shape[2]
    if not keep and _few(ids_TK):
        out_TD = decode.decode(
            x_TD, gate_up_EJD, down_EDI, ids_TK, weights_TK, activation=activation
        )
        return out_TD, x_TD.new_empty(0), ids_TK.new_empty(0, dtype=torch.int32), _no_weights(x_TD)
    rows = tile_rows(x_TD.device, ids_TK.numel(), experts)
    routing = route(ids_TK, weights_TK, experts=experts, tile_rows=rows)
    multiply = Products(routing, x_TD, down_EDI, activation)
    inverse_N, cuts = routing.inverse_N, multiply.cuts
    h_NJ = x_TD.new_empty(ids_TK.numel(), 2 * width) if keep else None
    if h_NJ is not None and cuts.parts > 1:
        y_ND = x_TD.new_empty(ids_TK.numel(), x_TD.shape[1])
        for part, here in split(routing, cuts.parts):
            a_NI = multiply.up(x_TD, gate_up_EJD, h=h_NJ[here], routing=part)
            multiply.down(a_NI, down_EDI, out=y_ND[here], routing=part)
            del a_NI
        out_TD = combine(y_ND, inverse_N, torch.empty_like(x_TD), weights_TK=weights_TK)
    else:
        a_NI = multiply.up(x_TD, gate_up_EJD, h=h_NJ)
        if keep and cuts.y < x_TD.shape[1]:
            out_TD = multiply.down_summed(a_NI, down_EDI, torch.empty_like(x_TD), weights_TK)
        else:  # a is gone when the output comes
            y_ND = multiply.down(a_NI, down_EDI)
            del a_NI
            out_TD = combine(y_ND, inverse_N, torch.empty_like(x_TD), weights_TK=weights_TK)
    return out_TD, x_TD.new_empty(0) if h_NJ is None else h_NJ, routing.ints, routing.weight_N


def _on(device: torch.device) -> Any:
    """Make `device` the current one: Triton starts kernels there, and a model may span several."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else contextlib.nullcontext()


def _few(ids_TK: torch.Tensor) -> bool:
    return ids_TK.shape[0] <= _FEW_TOKENS and ids_TK.numel() <= decode.MOST_PAIRS


def _no_weights(like: torch.Tensor) -> torch.Tensor:
    return like.new_empty(0, dtype=torch.float32)


def _backward(
    grad_TD: torch.Tensor,
    saved: Sequence[torch.Tensor],
    needs: Sequence[bool],
    notes: Notes | None,
    activation: Activation,
    sentinels: bool,
    keep: bool,
) -> list[torch.Tensor | None]:
    """Return the gradients of x, gate_up, down and the routing weights; None where not `needs`."""
    with _on(grad_TD.device):
        return _backward_here(grad_TD, saved, needs, notes, activation, sentinels)


def _backward_here(
    grad_TD: torch.Tensor,
    saved: Sequence[torch.Tensor],
    needs: Sequence[bool],
    notes: Notes | None,
    activation: Activation,
    sentinels: bool,
) -> list[torch.Tensor | None]:
    x_TD, gate_up_EJD, down_EDI, weights_TK, h_NJ, ints, weight_N = saved
    needs_x, needs_gate_up, needs_down, needs_weights = needs
    experts, width = gate_up_EJD.shape[0], down_EDI.shape[2]
    rows = _tile_rows_of(ints, weight_N.shape[0], experts, x_TD.device)
    routing = Routing.of(ints, weight_N, experts=experts, tile_rows=rows)
    multiply = Products(routing, x_TD, down_EDI, activation)
    grad_TD = grad_TD.contiguous()
    d_x = d_gate_up = d_down = d_weights = None
    # dh takes the place of h, but for sentinels: rows of nobody must be zeros in dh.
    spend = notes if multiply.hopper and not sentinels else None
    if spend is not None and "spent" in spend:
        h_NJ = torch.empty_like(h_NJ)
        multiply.up(x_TD, gate_up_EJD, h=h_NJ)
    dh_NJ: Any = None if spend is None else h_NJ
    pieces, partials = ranges(width, multiply.cuts.wa), []
    if needs_down and len(pieces) > 1:
        d_down = down_EDI.new_empty(down_EDI.shape)
    for columns in pieces:
        part = columns if len(pieces) > 1 else None
        dh_NJ, wa_NI, partial = multiply.activation_gradient(
            grad_TD, down_EDI, h_NJ, clear=sentinels, columns=part, dh=dh_NJ
        )
        partials.append(partial)
        if needs_down:
            piece = None if d_down is None else d_down[:, :, slice(*columns)]
            found = multiply.down_gradient(grad_TD, wa_NI, out=piece)
            d_down = found if d_down is None else d_down
        del wa_NI
    if spend is not None:
        spend["spent"] = True
    del h_NJ
    if needs_weights:
        partial = partials[0] if len(partials) == 1 else torch.cat(partials, 1)
        d_weights = weight_gradient(partial, routing.inverse_N, torch.empty_like(weights_TK))
    del partials, partial
    if needs_x:
        d_x = multiply.x_gradient_summed(dh_NJ, gate_up_EJD, torch.empty_like(x_TD))
    if needs_gate_up:
        d_gate_up = multiply.up_gradient(x_TD, dh_NJ)
    return [d_x, d_gate_up, d_down, d_weights]


def _tile_rows_of(ints: torch.Tensor, rows: int, experts: int, device: torch.device) -> int:
    """The tile rows that the forward pass took: options may have changed since."""
    for height in (tile_rows(device, rows, experts), 16, 32, 64, 128, 256):
        if count_ints(rows, experts, height) == ints.shape[0]:
            return height
    raise AssertionError("no tile height fits the saved routing")


def _shapes(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    activation: str,
    sentinels: bool,
    keep: bool,
) -> tuple[torch.Tensor, ...]:
    rows, experts = ids.numel(), gate_up.shape[0]
    if not keep and _few(ids):
        return (
            x.new_empty(x.shape),
            x.new_empty(0),
            ids.new_empty(0, dtype=torch.int32),
            _no_weights(x),
        )
    ints = count_ints(rows, experts, tile_rows(x.device, rows, experts))
    h = x.new_empty(rows, gate_up.shape[1]) if keep else x.new_empty(0)
    weight_N = x.new_empty(rows, dtype=torch.float32)
    return x.new_empty(x.shape), h, ids.new_empty(ints, dtype=torch.int32), weight_N


_operator = Operator(
    "fused_experts",
    _forward,
    _backward,
    shapes=_shapes,
    how="str activation, bool sentinels, bool keep",
)
