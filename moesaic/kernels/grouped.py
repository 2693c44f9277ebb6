"""Routed experts as one autograd function over grouped matrix products, on any device.

T tokens, D hidden size, E experts, I expert width, J = 2I, K experts a token, N = T*K routed rows
sorted by expert.

Only the input x and the first product h are kept for the backward pass (2D + 4KI bytes a token in
bf16); the rest follows from them. The routing weight is multiplied into the activated rows before
the second product, so the combine is a plain sum, and the gradient of a routing weight is a dot
product of length I instead of D. No host synchronisation on the grouped backend; every step is
deterministic (stable sort, gathers and sums, no atomics). The algebra is that of SonicMoE
(arXiv 2512.14080, section 4); the code is our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F

from moesaic.kernels.matmul import (
    ALIGNMENT,
    Backend,
    clear_tail,
    layout,
    outer,
    rows,
    why_not_grouped,
)
from moesaic.kernels.operator import Notes, Operator
from moesaic.kernels.reference import GELU, Activation, activate

_FEW_ROWS = 32  # routed rows, and experts
_NEW_TORCH = torch.__version__ >= "2.11"  # as versions, not as texts: a TorchVersion


def choose_backend(
    x_TD: torch.Tensor, gate_up_EJD: torch.Tensor, down_EDI: torch.Tensor
) -> tuple[Backend, str | None]:
    """Return the backend for these tensors and, where it is the loop, the reason in words."""
    compute = compute_dtype(x_TD, gate_up_EJD)
    reason = why_not_grouped(compute, x_TD.device, tuple(down_EDI.shape[1:]))
    # A traced tensor has no address: parameters of a compiled model are taken to be aligned.
    if reason is None and not (torch.compiler.is_compiling() or _aligned(gate_up_EJD, down_EDI)):
        reason = f"the weights are not contiguous or not aligned to {ALIGNMENT} bytes"
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
    sentinels: bool = False,
) -> torch.Tensor:
    """Compute what `reference.experts` computes; differentiable in all but the ids, once.

    Shapes as in the module's legend; weights may be transposed views. Ids of any integer dtype,
    each in [0, E), or with `sentinels` in [0, E]: E means "an expert of another rank", which stays
    out of every product and adds zero. The result has the shape and dtype of `x_TD`. Products run
    in the dtype of the weights, or in autocast's where that is enabled. `backend=None` picks one by
    `choose_backend`.
    """
    if backend is None:
        backend, _ = choose_backend(x_TD, gate_up_EJD, down_EDI)
    if x_TD.shape[0] == 0:
        backend = "loop"
    compute = compute_dtype(x_TD, gate_up_EJD)
    arguments = (x_TD, gate_up_EJD, down_EDI, ids_TK, weights_TK)
    how = (activation, backend, compute, sentinels)
    traced, plain = torch.compiler.is_compiling(), backend == "grouped" and not sentinels
    if not traced and plain and _few_on_a_cpu(ids_TK, gate_up_EJD, compute):
        return _few(*arguments, activation, compute)
    if traced or torch.is_grad_enabled():
        return _operator(*arguments, *how)
    return _forward(*arguments, *how)[0]


def compute_dtype(x_TD: torch.Tensor, gate_up_EJD: torch.Tensor) -> torch.dtype:
    """Return the dtype of the products: that of the weights, or autocast's where it is enabled."""
    if torch.is_autocast_enabled(x_TD.device.type):
        return torch.get_autocast_dtype(x_TD.device.type)
    return gate_up_EJD.dtype


def _aligned(*weights: torch.Tensor) -> bool:
    """Whether weights lie as the grouped matmul wants them (in a memory-mapped file they may not).

    Since torch 2.11 a CPU takes any address.
    """
    anywhere = weights[0].device.type == "cpu" and _NEW_TORCH
    return all(
        (w.is_contiguous() or w.transpose(1, 2).is_contiguous())
        and (anywhere or w.data_ptr() % ALIGNMENT == 0)
        for w in weights
    )


def sort_rows(ids_TK: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return order_N (the flat position t*K + k of each sorted row) and ends_E, int32.

    On a CPU order_N stays int64: there a conversion costs more than four bytes a row.
    """
    # A narrow key: a radix sort on a GPU takes one pass a byte.
    key_N = ids_TK.reshape(-1).to(torch.int16 if experts < 2**15 else torch.int64)
    sorted_N, order_N = torch.sort(key_N, stable=True)
    expert_E = torch.arange(experts, dtype=key_N.dtype, device=key_N.device)
    # Not bincount, which waits for the GPU, nor histc, whose dtypes differ between CPU and GPU.
    ends_E = torch.searchsorted(sorted_N, expert_E, right=True, out_int32=True)
    return order_N.to(_order_dtype(ids_TK)), ends_E


def _order_dtype(ids_TK: torch.Tensor) -> torch.dtype:
    return torch.int64 if ids_TK.device.type == "cpu" else torch.int32


def invert(order_N: torch.Tensor) -> torch.Tensor:
    """Return where each flat position t*K + k lies among the sorted rows."""
    row_N = torch.arange(order_N.shape[0], dtype=torch.int32, device=order_N.device)
    return torch.empty_like(row_N).scatter_(0, order_N.long(), row_N)


def combine(y_ND: torch.Tensor, order_N: torch.Tensor, top_k: int) -> torch.Tensor:
    """Sum the K rows of each token (torch adds half-precision numbers in float32)."""
    if y_ND.shape[0] == top_k:  # one token: its rows in any order
        return y_ND.sum(dim=0, keepdim=True)
    y_TKD = y_ND.index_select(0, invert(order_N)).view(-1, top_k, y_ND.shape[1])
    if top_k == 2:  # the same number, three times faster than a reduction on a CPU
        return y_TKD[:, 0] + y_TKD[:, 1]
    return y_TKD[:, 0] if top_k == 1 else y_TKD.sum(dim=1)


def _few_on_a_cpu(ids_TK: torch.Tensor, gate_up_EJD: torch.Tensor, compute: torch.dtype) -> bool:
    """Whether the Python of our backward pass would cost more than what it saves.

    Measured: one token on 8 experts 8 % slower through `_operator` than through torch's autograd.
    Half precision takes padded slices from the second token on, and many experts the loop.
    """
    if ids_TK.device.type != "cpu" or gate_up_EJD.shape[0] > _FEW_ROWS:
        return False
    return ids_TK.shape[0] == 1 or (compute == torch.float32 and ids_TK.numel() <= _FEW_ROWS)


def _few(
    x_TD: torch.Tensor,
    gate_up_EJD: torch.Tensor,
    down_EDI: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    activation: Activation,
    compute: torch.dtype,
) -> torch.Tensor:
    """Compute `_forward` on torch's own autograd, which keeps more."""
    top_k = ids_TK.shape[1]
    order_N, ends_E = sort_rows(ids_TK, gate_up_EJD.shape[0])
    x_ND = x_TD.to(compute).index_select(0, order_N // top_k)
    h_NJ = F.grouped_mm(x_ND, gate_up_EJD.to(compute).transpose(1, 2), offs=ends_E)
    gate_NI, up_NI = h_NJ.chunk(2, dim=1)
    weight_N1 = weights_TK.reshape(-1, 1).index_select(0, order_N)
    a_NI = activate(gate_NI, activation) * up_NI
    y_ND = F.grouped_mm(a_NI, down_EDI.to(compute).transpose(1, 2), offs=ends_E)
    # Weighted last: the gradient of a bare sum has strides that the grouped matmul refuses.
    return combine(y_ND * weight_N1, order_N, top_k).to(x_TD.dtype)


def _activation_backward(
    d_act_NI: torch.Tensor, gate_NI: torch.Tensor, activation: Activation, **out: torch.Tensor
) -> torch.Tensor:
    """Return the gradient of `activate`; `grad_input=` names a tensor to write it into."""
    overload = "grad_input" if out else "default"
    if activation == "silu":
        operator = getattr(torch.ops.aten.silu_backward, overload)
    else:
        operator = getattr(torch.ops.aten.gelu_backward, overload)
        operator = partial(operator, approximate=GELU[activation])
    d_gate_NI: torch.Tensor = operator(d_act_NI, gate_NI, **out)
    return d_gate_NI


def _gate_backward(
    da_NI: torch.Tensor,
    act_NI: torch.Tensor,
    gate_NI: torch.Tensor,
    up_NI: torch.Tensor,
    activation: Activation,
) -> torch.Tensor:
    """Return dh_NJ of a = act(gate) * up, given da, act(gate) and both; overwrites `da_NI`."""
    dh_NJ = gate_NI.new_empty(gate_NI.shape[0], 2 * gate_NI.shape[1])
    d_gate_NI, d_up_NI = dh_NJ.chunk(2, dim=1)
    torch.mul(da_NI, act_NI, out=d_up_NI)
    _activation_backward(da_NI.mul_(up_NI), gate_NI, activation, grad_input=d_gate_NI)
    return dh_NJ


def _forward(
    x_TD: torch.Tensor,
    gate_up_EJD: torch.Tensor,
    down_EDI: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    activation: Activation,
    backend: Backend,
    compute: torch.dtype,
    sentinels: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return out_TD and what the backward pass needs besides the inputs: h_NJ, order_N, ends_E."""
    top_k = ids_TK.shape[1]
    order_N, ends_E = sort_rows(ids_TK, gate_up_EJD.shape[0])
    how = layout(ends_E, len(order_N), compute, backend=backend)
    x_ND = x_TD.index_select(0, order_N // top_k).to(compute)
    h_NJ = rows(x_ND, gate_up_EJD.to(compute).transpose(1, 2), how)
    del x_ND
    if sentinels:
        clear_tail(h_NJ, ends_E)
    gate_NI, up_NI = h_NJ.chunk(2, dim=1)
    a_NI = activate(gate_NI, activation).mul_(up_NI)
    # In place: a float32 weight times a bf16 row is computed in float32 and rounded once.
    a_NI.mul_(weights_TK.reshape(-1, 1).index_select(0, order_N))
    y_ND = rows(a_NI, down_EDI.to(compute).transpose(1, 2), how)
    if sentinels:
        clear_tail(y_ND, ends_E)
    return combine(y_ND, order_N, top_k).to(x_TD.dtype), h_NJ, order_N, ends_E


def _backward(
    grad_TD: torch.Tensor,
    saved: Sequence[torch.Tensor],
    needs: Sequence[bool],
    notes: Notes | None,
    activation: Activation,
    backend: Backend,
    compute: torch.dtype,
    sentinels: bool,
) -> list[torch.Tensor | None]:
    """Return the gradients of x, gate_up, down and the routing weights; None where not `needs`."""
    x_TD, gate_up_EJD, down_EDI, weights_TK, h_NJ, order_N, ends_E = saved
    needs_x, needs_gate_up, needs_down, needs_weights = needs
    top_k = weights_TK.shape[1]
    how = layout(ends_E, len(order_N), compute, backend=backend)
    token_N = order_N // top_k
    weight_N1 = weights_TK.reshape(-1, 1).index_select(0, order_N)
    d_x = d_gate_up = d_down = d_weights = None

    gate_NI, up_NI = h_NJ.chunk(2, dim=1)
    act_NI = activate(gate_NI, activation)
    a_NI = act_NI * up_NI
    grad_ND = grad_TD.to(compute).index_select(0, token_N)
    da_NI = rows(grad_ND, down_EDI.to(compute), how)  # of weight * a
    if sentinels:
        clear_tail(da_NI, ends_E)
    if needs_weights:
        wide = torch.promote_types(compute, torch.float32)
        d_weight_N = (da_NI * a_NI).sum(dim=1, dtype=wide)
        d_weights = torch.empty_like(d_weight_N).scatter_(0, order_N.long(), d_weight_N)
        d_weights = d_weights.view(weights_TK.shape).to(weights_TK.dtype)
    if needs_down:
        d_down = outer(grad_ND, a_NI.mul_(weight_N1), how).to(down_EDI.dtype)
    del a_NI, grad_ND
    if needs_x or needs_gate_up:
        dh_NJ = _gate_backward(da_NI.mul_(weight_N1), act_NI, gate_NI, up_NI, activation)
        del da_NI, act_NI
        if needs_x:
            dx_ND = rows(dh_NJ, gate_up_EJD.to(compute), how)
            if sentinels:
                clear_tail(dx_ND, ends_E)
            d_x = combine(dx_ND, order_N, top_k).to(x_TD.dtype)
            del dx_ND
        if needs_gate_up:
            x_ND = x_TD.index_select(0, token_N).to(compute)
            d_gate_up = outer(dh_NJ, x_ND, how).to(gate_up_EJD.dtype)
    return [d_x, d_gate_up, d_down, d_weights]


def _shapes(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    activation: str,
    backend: str,
    compute: torch.dtype,
    sentinels: bool,
) -> tuple[torch.Tensor, ...]:
    rows_N = ids.numel()
    h_NJ = x.new_empty(rows_N, gate_up.shape[1], dtype=compute)
    order_N = ids.new_empty(rows_N, dtype=_order_dtype(ids))
    ends_E = ids.new_empty(gate_up.shape[0], dtype=torch.int32)
    return x.new_empty(x.shape), h_NJ, order_N, ends_E


_operator = Operator(
    "experts",
    _forward,
    _backward,
    shapes=_shapes,
    how="str activation, str backend, ScalarType compute, bool sentinels",
)
