"""Routed experts as one autograd function over grouped matrix products, for training and inference on any device.

T tokens, D hidden size, E experts, I expert width, J = 2I, K experts a token, N = T*K routed rows sorted by expert.

Only the input x and the first product h are kept for the backward pass (spec: 2D + 4KI bytes a token in bf16);
everything else there is recomputed or follows from them. The routing weight is multiplied into the activated rows
before the second product, so the combine is a plain sum and the gradient of a routing weight is a dot product of
length I instead of D. No host synchronisation on the grouped backend; every step is deterministic (stable sort,
gathers and sums, no atomics). The algebra follows SonicMoE (arXiv 2512.14080, section 4); the code is our own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from moesaic.kernels.matmul import Backend, outer, rows, why_not_grouped
from moesaic.kernels.reference import Activation, activate


def choose_backend(
    x_TD: torch.Tensor, gate_up_EJD: torch.Tensor, down_EDI: torch.Tensor
) -> tuple[Backend, str | None]:
    """Return the backend for these tensors and, where it is the loop over experts, the reason in words."""
    compute = _compute_dtype(x_TD, gate_up_EJD)
    width, hidden = down_EDI.shape[2], down_EDI.shape[1]
    reason = why_not_grouped(compute, x_TD.device, (hidden, width))
    if reason is None and torch.compiler.is_compiling():
        if x_TD.device.type == "cpu" or compute != torch.bfloat16:
            return (
                "loop",
                None,
            )  # an opaque operator in the graph: nothing is lost, so nothing to tell
    elif reason is None and _misplaced(gate_up_EJD, down_EDI):
        reason = "weights are not contiguous or start off a 16-byte boundary"
    return ("grouped", None) if reason is None else ("loop", reason)


def experts(
    x_TD: torch.Tensor,
    gate_up_EJD: torch.Tensor,
    down_EDI: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    *,
    activation: Activation = "silu",
    backend: Backend | None = None,
) -> torch.Tensor:
    """Compute what `reference.experts` computes, fast; gradients for x, both weights and the routing weights.

    Shapes as in the module legend; ids in any integer dtype, each in [0, E). The result has the shape and dtype of
    `x_TD`. Products run in the dtype of the weights, or in autocast's where that is enabled. `backend=None` picks
    one by `choose_backend`. Gradients can be taken once (no double backward).
    """
    if backend is None:
        backend, _ = choose_backend(x_TD, gate_up_EJD, down_EDI)
    if x_TD.shape[0] == 0:
        backend = "loop"
    out_TD: torch.Tensor = _Experts.apply(
        x_TD, gate_up_EJD, down_EDI, ids_TK, weights_TK, activation, backend
    )
    return out_TD


def _compute_dtype(x_TD: torch.Tensor, gate_up_EJD: torch.Tensor) -> torch.dtype:
    if torch.is_autocast_enabled(x_TD.device.type):
        return torch.get_autocast_dtype(x_TD.device.type)
    return gate_up_EJD.dtype


def _misplaced(*weights: torch.Tensor) -> bool:
    """Whether a weight cannot be handed to the grouped matmul as it lies (memory-mapped files start anywhere)."""
    return any(not w.is_contiguous() or w.data_ptr() % 16 for w in weights)


def _sorted_rows(ids_TK: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return order_N (flat position t*K+k of each sorted row) and ends_E, both int32."""
    # A narrow key: radix sort on a GPU takes one pass a byte.
    key_N = ids_TK.reshape(-1).to(torch.int16 if experts < 2**15 else torch.int64)
    sorted_N, order_N = torch.sort(key_N, stable=True)
    expert_E = torch.arange(experts, dtype=key_N.dtype, device=key_N.device)
    # searchsorted, since bincount synchronises with the host and histc takes different dtypes on CPU and GPU
    ends_E = torch.searchsorted(sorted_N, expert_E, right=True, out_int32=True)
    return order_N.to(torch.int32), ends_E


def _inverse(order_N: torch.Tensor) -> torch.Tensor:
    position_N = torch.arange(order_N.shape[0], dtype=torch.int32, device=order_N.device)
    return torch.empty_like(position_N).scatter_(0, order_N.long(), position_N)


def _combine(y_ND: torch.Tensor, inverse_N: torch.Tensor, top_k: int) -> torch.Tensor:
    """Sum the K rows of each token; torch sums half precision in float32."""
    if top_k == 1:
        return y_ND.index_select(0, inverse_N)
    return y_ND.index_select(0, inverse_N).unflatten(0, (-1, top_k)).sum(dim=1)


def _activation_backward(
    grad: torch.Tensor, gate: torch.Tensor, activation: Activation
) -> torch.Tensor:
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, gate)
    return torch.ops.aten.gelu_backward(
        grad, gate, approximate="tanh" if activation == "gelu_tanh" else "none"
    )


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        gate_up_EJD: torch.Tensor,
        down_EDI: torch.Tensor,
        ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        activation: Activation,
        backend: Backend,
    ) -> torch.Tensor:
        top_k = ids_TK.shape[1]
        compute = _compute_dtype(x_TD, gate_up_EJD)
        order_N, ends_E = _sorted_rows(ids_TK, gate_up_EJD.shape[0])
        x_ND = x_TD.index_select(0, order_N // top_k).to(compute)
        h_NJ = rows(x_ND, gate_up_EJD.to(compute).transpose(1, 2), ends_E, backend=backend)
        del x_ND
        gate_NI, up_NI = h_NJ.chunk(2, dim=1)
        a_NI = activate(gate_NI, activation).mul_(up_NI)
        # in place: a float32 weight on bf16 rows is multiplied in float32 and rounded once
        a_NI.mul_(weights_TK.reshape(-1).index_select(0, order_N).unsqueeze(1))
        y_ND = rows(a_NI, down_EDI.to(compute).transpose(1, 2), ends_E, backend=backend)
        ctx.save_for_backward(x_TD, gate_up_EJD, down_EDI, weights_TK, h_NJ, order_N, ends_E)
        ctx.activation, ctx.backend, ctx.compute, ctx.top_k = activation, backend, compute, top_k
        return _combine(y_ND, _inverse(order_N), top_k).to(x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TD, gate_up_EJD, down_EDI, weights_TK, h_NJ, order_N, ends_E = ctx.saved_tensors
        needs_x, needs_gate_up, needs_down, _, needs_weights = ctx.needs_input_grad[:5]
        backend, compute = ctx.backend, ctx.compute
        token_N, inverse_N = order_N // ctx.top_k, _inverse(order_N)
        weight_N1 = weights_TK.reshape(-1).index_select(0, order_N).unsqueeze(1)
        gate_NI, up_NI = h_NJ.chunk(2, dim=1)
        d_x = d_gate_up = d_down = d_weights = None

        act_NI = activate(gate_NI, ctx.activation)
        a_NI = act_NI * up_NI
        grad_ND = grad_TD.to(compute).index_select(0, token_N)
        da_NI = rows(
            grad_ND, down_EDI.to(compute), ends_E, backend=backend
        )  # of the weighted activations
        if needs_weights:
            d_weight_N = (da_NI * a_NI).sum(
                dim=1, dtype=torch.promote_types(compute, torch.float32)
            )
            d_weights = (
                d_weight_N.index_select(0, inverse_N).view_as(weights_TK).to(weights_TK.dtype)
            )
        if needs_down:
            d_down = outer(grad_ND, a_NI.mul_(weight_N1), ends_E, backend=backend).to(
                down_EDI.dtype
            )
        del a_NI, grad_ND
        if not (needs_x or needs_gate_up):
            return d_x, d_gate_up, d_down, None, d_weights, None, None

        da_NI.mul_(weight_N1)
        d_gate_NI = _activation_backward(da_NI * up_NI, gate_NI, ctx.activation)
        dh_NJ = torch.cat((d_gate_NI, da_NI.mul_(act_NI)), dim=1)
        del act_NI, da_NI, d_gate_NI
        if needs_x:
            dx_ND = rows(dh_NJ, gate_up_EJD.to(compute), ends_E, backend=backend)
            d_x = _combine(dx_ND, inverse_N, ctx.top_k).to(x_TD.dtype)
            del dx_ND
        if needs_gate_up:
            x_ND = x_TD.index_select(0, token_N).to(compute)
            d_gate_up = outer(dh_NJ, x_ND, ends_E, backend=backend).to(gate_up_EJD.dtype)
        return d_x, d_gate_up, d_down, None, d_weights, None, None
