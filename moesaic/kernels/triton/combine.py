"""Bring tokens into the order of their rows, and the rows of a token together again: no atomics.

T tokens, K experts a token, D hidden size, N routed rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moesaic.kernels.triton.launch import Launcher


def combine(
    y_ND: torch.Tensor,
    inverse_N: torch.Tensor,
    out_TD: torch.Tensor,
    *,
    weights_TK: torch.Tensor | None = None,
) -> torch.Tensor:
    """Fill out_TD with the sum over k of (weight *) y[inverse]; rows of nobody count as zero.

    out_TD may be some columns of a contiguous tensor; the others are contiguous.
    """
    assert all(t is None or t.is_contiguous() for t in (y_ND, weights_TK))
    assert out_TD.stride(1) == 1
    tokens, hidden = out_TD.shape
    if tokens == 0:
        return out_TD
    top_k = inverse_N.shape[0] // tokens
    block = min(triton.next_power_of_2(hidden), 1024)
    _start_combine(
        (tokens, triton.cdiv(hidden, block)),
        y_ND, inverse_N, weights_TK, out_TD, hidden, out_TD.stride(0), top_k, block,
        weights_TK is not None, num_warps=max(1, block // 256),
    )  # fmt: skip
    return out_TD


def weight_gradient(
    partial_NP: torch.Tensor, inverse_N: torch.Tensor, out_TK: torch.Tensor
) -> torch.Tensor:
    """Fill out_TK with the sum of each row's partial sums; rows of nobody get zero.

    All tensors are contiguous.
    """
    assert partial_NP.is_contiguous()
    assert out_TK.is_contiguous()
    rows, parts = partial_NP.shape
    if rows == 0:
        return out_TK
    _start_weight_gradient(
        (triton.cdiv(rows, 64),),
        partial_NP, inverse_N, out_TK, rows, parts, triton.next_power_of_2(parts), 64,
    )  # fmt: skip
    return out_TK


def take(x_TD: torch.Tensor, token_N: torch.Tensor) -> torch.Tensor:
    """Return x[token_N], contiguous; a row with a token outside [0, T) is some token's."""
    rows, (tokens, hidden) = token_N.shape[0], x_TD.shape
    out_ND = x_TD.new_empty(rows, hidden)
    block = min(triton.next_power_of_2(hidden), 1024)
    _start_take(
        (rows, triton.cdiv(hidden, block)), x_TD, token_N, out_ND, tokens, hidden, block,
        num_warps=max(1, block // 256),
    )  # fmt: skip
    return out_ND


@triton.jit
def _take(x_ptr, token_ptr, out_ptr, tokens, hidden, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    token = tl.load(token_ptr + row)
    token = tl.minimum(tl.maximum(token, 0), tokens - 1).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < hidden
    value = tl.load(x_ptr + token * hidden + column, mask=inside)
    tl.store(out_ptr + row.to(tl.int64) * hidden + column, value, mask=inside)


@triton.jit
def _combine(
    y_ptr, inverse_ptr, weights_ptr, out_ptr, hidden, out_stride,
    TOP_K: tl.constexpr, BLOCK: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < hidden
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(inverse_ptr + token * TOP_K + k)
        where = y_ptr + row.to(tl.int64) * hidden + column
        # Not `inside & (row >= 0)`: the interpreter makes bytes of a scalar's truth value.
        width = tl.where(row >= 0, hidden, 0)
        value = tl.load(where, mask=column < width, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights_ptr + token * TOP_K + k).to(tl.float32)
        total += value
    tl.store(out_ptr + token * out_stride + column, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _weight_gradient(
    partial_ptr, inverse_ptr, out_ptr, rows, parts, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(inverse_ptr + row, mask=row < rows, other=-1)
    part = tl.arange(0, PARTS)
    mask = (source >= 0)[:, None] & (part < parts)[None, :]
    value = tl.load(partial_ptr + source[:, None] * parts + part[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + row, tl.sum(value, 1).to(out_ptr.dtype.element_ty), mask=row < rows)


_start_take, _start_combine = Launcher(_take), Launcher(_combine)
_start_weight_gradient = Launcher(_weight_gradient)
