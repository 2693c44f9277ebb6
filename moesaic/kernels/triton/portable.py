"""The six products of an experts layer in plain Triton: any GPU from compute capability 8.0.

The meaning is that of `products`, which is faster on Hopper; these take float32 as well, and any
widths and strides of weights. One program computes one tile, in float32, and is the only one that
writes it: no atomics, the same bits every time. Under TRITON_INTERPRET=1 they run on a CPU.

T tokens, D hidden size, I expert width, J = 2I, E experts, N routed rows sorted by expert, of which
a `Routing` says where each expert's lie. K, P, Q: lengths of the dimensions of a product.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from moesaic.kernels.reference import Activation
from moesaic.kernels.triton.activations import activate
from moesaic.kernels.triton.launch import Launcher
from moesaic.kernels.triton.metadata import Routing

_GROUP = 8  # row tiles that follow each other on the same columns of a weight
_SMALL_SHARED = 99 * 1024  # bytes a program may use on the smallest GPUs of capability 8.x
_WIDE_SHARED = 200 * 1024  # from here on tiles of 256 columns: Hopper's products keep few registers


@dataclass(frozen=True)
class Tile:
    """How one product is cut: columns and depth of a tile, warps, steps that are loaded ahead."""

    columns: int
    depth: int
    warps: int
    stages: int


def tile_for(
    tile_rows: int,
    columns: int,
    depth: int,
    *,
    itemsize: int,
    aligned: bool = True,
    shared: int = _SMALL_SHARED,
) -> Tile:
    """Choose a tile of `tile_rows` rows for a product with so many columns, summed over `depth`.

    `shared` is the shared memory in bytes that one program may use; `aligned` says that all rows
    begin at multiples of 16 bytes.
    """
    if itemsize > 2:  # no tensor cores: each thread multiplies for itself
        widest, deepest, warps = 64, 16, 8 if tile_rows > 64 else 4
    else:
        roomy = tile_rows in (64, 128) and shared >= _WIDE_SHARED
        widest, deepest = (256 if roomy else 128), 64
        warps = 8 if tile_rows >= 128 else 4
    if not aligned:  # loads of single elements go through registers
        widest, deepest = 64, min(deepest, 32)
    width = min(widest, max(16, triton.next_power_of_2(columns)))
    steps = min(deepest, max(16, triton.next_power_of_2(depth)))
    while True:
        stages = min(4, (shared - 1024) // ((tile_rows + width) * steps * itemsize))
        if stages >= 3 or width <= 64:
            return Tile(width, steps, warps, max(1, stages))
        width //= 2


@cache
def _shared(device: torch.device) -> int:
    if device.type != "cuda":
        return _SMALL_SHARED
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", _SMALL_SHARED))


def _launch(
    kernel: Launcher, tiles_of_rows: int, columns: int, tile: Tile, *args: Any, **sizes: Any
):
    programs = tiles_of_rows * triton.cdiv(columns, tile.columns)
    if programs:
        kernel(
            (programs,), *args, BN=tile.columns, BK=tile.depth, **sizes,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def up(
    x_TD: torch.Tensor,
    gate_up_EJD: torch.Tensor,
    routing: Routing,
    *,
    keep_h: bool = True,
    activation: Activation = "silu",
    h_NJ: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return a = act(gate) * up of the gathered rows [N, I], and h = [gate, up] [N, J] if kept.

    In `h_NJ`, if given.
    """
    x_TD = x_TD.contiguous()
    rows, depth, width = routing.token_N.shape[0], x_TD.shape[1], gate_up_EJD.shape[1] // 2
    a_NI = x_TD.new_empty(rows, width)
    if h_NJ is None and keep_h:
        h_NJ = x_TD.new_empty(rows, 2 * width)
    most = _beside_much(routing.tile_rows) if activation == "gelu" else 2 * width
    tile = _tile(routing.tile_rows, min(2 * width, most), depth, x_TD, gate_up_EJD)
    _launch(
        _start_up, routing.most_tiles if rows else 0, 2 * width, tile,
        x_TD, routing.token_N, gate_up_EJD, *gate_up_EJD.stride(), h_NJ, a_NI, *_places(routing),
        width, depth,
        ACTIVATION=activation, BM=routing.tile_rows, GROUP=_GROUP,
    )  # fmt: skip
    return a_NI, h_NJ


def rows(
    a_NK: torch.Tensor,
    weight: torch.Tensor,
    routing: Routing,
    *,
    transposed: bool,
    out_NM: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return a @ weight[e] (weight [E, K, M]), or a @ weight[e].T if `transposed` ([E, M, K]).

    In `out_NM` (contiguous), if given.
    """
    a_NK = a_NK.contiguous()
    weight_EKM = weight.transpose(1, 2) if transposed else weight
    count, depth = a_NK.shape
    columns = weight_EKM.shape[2]
    if out_NM is None:
        out_NM = a_NK.new_empty(count, columns)
    tile = _tile(routing.tile_rows, columns, depth, a_NK, weight)
    _launch(
        _start_rows, routing.most_tiles if count else 0, columns, tile,
        a_NK, weight_EKM, *weight_EKM.stride(), out_NM, *_places(routing), columns, depth,
        BM=routing.tile_rows, GROUP=_GROUP,
    )  # fmt: skip
    return out_NM


def activation_gradient(
    grad_TD: torch.Tensor,
    down_EDI: torch.Tensor,
    h_NJ: torch.Tensor,
    routing: Routing,
    *,
    activation: Activation = "silu",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return dh [N, J], weight * a [N, I] and the routing weights' gradient in parts [N, tiles]."""
    grad_TD, h_NJ = grad_TD.contiguous(), h_NJ.contiguous()
    count, depth, width = h_NJ.shape[0], grad_TD.shape[1], down_EDI.shape[2]
    dh_NJ, wa_NI = torch.empty_like(h_NJ), h_NJ.new_empty(count, width)
    most = _beside_much(routing.tile_rows)
    tile = _tile(routing.tile_rows, min(width, most), depth, grad_TD, down_EDI, h_NJ)
    parts = triton.cdiv(width, tile.columns)
    partial = torch.empty(count, parts, dtype=torch.float32, device=h_NJ.device)
    _launch(
        _start_activation_gradient, routing.most_tiles if count else 0, width, tile,
        grad_TD, routing.token_N, routing.weight_N, down_EDI, *down_EDI.stride(), h_NJ,
        dh_NJ, wa_NI, partial, *_places(routing), width, depth,
        ACTIVATION=activation, BM=routing.tile_rows, GROUP=_GROUP,
    )  # fmt: skip
    return dh_NJ, wa_NI, partial


def outer(
    a_TM: torch.Tensor, b_NC: torch.Tensor, routing: Routing, *, transposed: bool = False
) -> torch.Tensor:
    """Return [E, M, C], the sum over an expert's rows s of a[token of s] (x) b[s].

    `transposed`: [E, C, M] instead. An expert without rows gets zeros.
    """
    a_TM, b_NC = a_TM.contiguous(), b_NC.contiguous()
    left, right = (b_NC, a_TM) if transposed else (a_TM, b_NC)
    experts, p, q = routing.ends_E.shape[0], left.shape[1], right.shape[1]
    out_EPQ = a_TM.new_empty(experts, p, q)
    height = min(64 if a_TM.itemsize > 2 else 128, max(16, triton.next_power_of_2(p)))
    tile = _tile(height, q, 64, left, right)
    # The token numbers of a step must be there a step before its rows can be asked for.
    tile = replace(tile, stages=tile.stages + 1)
    _launch(
        _start_outer, experts * triton.cdiv(p, height), q, tile,
        left, right, routing.token_N, routing.ends_E, out_EPQ, p, q,
        LEFT=not transposed, BM=height, GROUP=_GROUP,
    )  # fmt: skip
    return out_EPQ


def _tile(tile_rows: int, columns: int, depth: int, *operands: torch.Tensor) -> Tile:
    size, shared = operands[0].itemsize, _shared(operands[0].device)
    strides = {stride * size for operand in operands for stride in operand.stride() if stride > 1}
    aligned = all(stride % 16 == 0 for stride in strides)
    return tile_for(tile_rows, columns, depth, itemsize=size, aligned=aligned, shared=shared)


def _beside_much(tile_rows: int) -> int:
    """Columns of a tile that leave registers to what follows: gradients, or an error function."""
    return 64 if tile_rows == 256 else 128


def _places(routing: Routing) -> tuple[torch.Tensor, ...]:
    return routing.tile_expert, routing.tile_row, routing.tile_left, routing.tiles


@triton.jit
def _swizzle(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Order tiles so that GROUP row tiles share the weights that lie in the cache."""
    group = tile // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    within = tile - group * GROUP * tiles_n
    return group * GROUP + within % height, within // height


@triton.jit
def _product(
    a_row_ptr, b_ptr, b_stride_k, b_column, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Rows [BM] of length K, each at its pointer, times a matrix [K, BN], in float32.

    `b_column` are the offsets [BN] of the matrix's columns, of which those below N are valid.
    """
    column, offset = b_column
    k = tl.arange(0, BK)
    a_ptr = a_row_ptr[:, None] + k[None, :]
    b_ptr = b_ptr + k.to(tl.int64)[:, None] * b_stride_k + offset[None, :]
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        inside = start + k < K
        a = tl.load(a_ptr, mask=inside[None, :], other=0.0)
        b = tl.load(b_ptr, mask=inside[:, None] & (column < N)[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        a_ptr += BK
        b_ptr += BK * b_stride_k
    return total


@triton.jit
def _up(
    x_ptr, token_ptr, w_ptr, w_stride_e, w_stride_j, w_stride_d, h_ptr, out_ptr,
    tile_expert_ptr, tile_row_ptr, tile_left_ptr, tiles_ptr, width, depth,
    ACTIVATION: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Columns alternate between gate and up: a thread holds both and needs no exchange."""
    tiles_m = tl.load(tiles_ptr)
    tiles_n = tl.cdiv(2 * width, BN)
    if tl.program_id(0) < tiles_m * tiles_n:
        m, n = _swizzle(tl.program_id(0), tiles_m, tiles_n, GROUP)
        first = tl.load(tile_row_ptr + m).to(tl.int64)
        left = tl.load(tile_left_ptr + m)
        expert = tl.load(tile_expert_ptr + m).to(tl.int64)
        r = tl.arange(0, BM)
        # Rows past the expert's end repeat its last one and are not stored.
        token = tl.load(token_ptr + first + tl.minimum(r, left - 1)).to(tl.int64)
        column = n * BN + tl.arange(0, BN)
        offset = (column // 2 + (column % 2) * width).to(tl.int64) * w_stride_j
        total = _product(
            x_ptr + token * depth, w_ptr + expert * w_stride_e, w_stride_d, (column, offset),
            2 * width, depth, BM, BN, BK,
        )  # fmt: skip
        gate, up_ = tl.split(tl.reshape(total, (BM, BN // 2, 2)))
        # From the rounded h, as the backward pass will see it.
        gate, up_ = gate.to(out_ptr.dtype.element_ty), up_.to(out_ptr.dtype.element_ty)
        at = n * (BN // 2) + tl.arange(0, BN // 2)
        mask = (r < left)[:, None] & (at < width)[None, :]
        row = (first + r)[:, None]
        if h_ptr is not None:
            where = h_ptr + row * (2 * width) + at[None, :]
            tl.store(where, gate, mask=mask)
            tl.store(where + width, up_, mask=mask)
        act, _ = activate(gate.to(tl.float32), ACTIVATION)
        value = (act * up_.to(tl.float32)).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * width + at[None, :], value, mask=mask)


@triton.jit
def _rows(
    a_ptr, w_ptr, w_stride_e, w_stride_k, w_stride_n, out_ptr,
    tile_expert_ptr, tile_row_ptr, tile_left_ptr, tiles_ptr, N, K,
    BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tiles_m = tl.load(tiles_ptr)
    tiles_n = tl.cdiv(N, BN)
    if tl.program_id(0) < tiles_m * tiles_n:
        m, n = _swizzle(tl.program_id(0), tiles_m, tiles_n, GROUP)
        first = tl.load(tile_row_ptr + m).to(tl.int64)
        left = tl.load(tile_left_ptr + m)
        expert = tl.load(tile_expert_ptr + m).to(tl.int64)
        r = tl.arange(0, BM)
        column = n * BN + tl.arange(0, BN)
        total = _product(
            a_ptr + (first + tl.minimum(r, left - 1)) * K, w_ptr + expert * w_stride_e, w_stride_k,
            (column, column.to(tl.int64) * w_stride_n), N, K, BM, BN, BK,
        )  # fmt: skip
        where = out_ptr + (first + r)[:, None] * N + column[None, :]
        mask = (r < left)[:, None] & (column < N)[None, :]
        tl.store(where, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _activation_gradient(
    grad_ptr, token_ptr, weight_ptr, w_ptr, w_stride_e, w_stride_d, w_stride_i, h_ptr, dh_ptr,
    wa_ptr, partial_ptr, tile_expert_ptr, tile_row_ptr, tile_left_ptr, tiles_ptr, width, depth,
    ACTIVATION: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The product is da without the routing weight; what needs h happens to the tile at once."""
    tiles_m = tl.load(tiles_ptr)
    tiles_n = tl.cdiv(width, BN)
    if tl.program_id(0) < tiles_m * tiles_n:
        m, n = _swizzle(tl.program_id(0), tiles_m, tiles_n, GROUP)
        first = tl.load(tile_row_ptr + m).to(tl.int64)
        left = tl.load(tile_left_ptr + m)
        expert = tl.load(tile_expert_ptr + m).to(tl.int64)
        r = tl.arange(0, BM)
        token = tl.load(token_ptr + first + tl.minimum(r, left - 1)).to(tl.int64)
        column = n * BN + tl.arange(0, BN)
        da = _product(
            grad_ptr + token * depth, w_ptr + expert * w_stride_e, w_stride_d,
            (column, column.to(tl.int64) * w_stride_i), width, depth, BM, BN, BK,
        )  # fmt: skip
        weight = tl.load(weight_ptr + first + r, mask=r < left, other=0.0)
        part = _finish(
            da, weight, first, left, n * BN, h_ptr, dh_ptr, wa_ptr, width, ACTIVATION, BM, BN
        )
        tl.store(partial_ptr + (first + r) * tiles_n + n, part, mask=r < left)


@triton.jit
def _finish(
    da, weight, first, left, start, h_ptr, dh_ptr, wa_ptr, width,
    ACTIVATION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Write dh and weight * a of BN columns from `start` on; return the rows' sums <da, a>."""
    if BN > 32:  # half by half, for the sake of registers
        one, two = tl.split(tl.permute(tl.reshape(da, (BM, 2, BN // 2)), (0, 2, 1)))
        part = _finish(
            one, weight, first, left, start, h_ptr, dh_ptr, wa_ptr, width, ACTIVATION, BM, BN // 2
        )
        start += BN // 2
        part += _finish(
            two, weight, first, left, start, h_ptr, dh_ptr, wa_ptr, width, ACTIVATION, BM, BN // 2
        )
    else:
        dtype = dh_ptr.dtype.element_ty
        r = tl.arange(0, BM)
        column = start + tl.arange(0, BN)
        mask = (r < left)[:, None] & (column < width)[None, :]
        row = (first + r)[:, None]
        at = row * (2 * width) + column[None, :]
        gate = tl.load(h_ptr + at, mask=mask, other=0.0).to(tl.float32)
        up_ = tl.load(h_ptr + at + width, mask=mask, other=0.0).to(tl.float32)
        act, slope = activate(gate, ACTIVATION)
        # Masked elements of h are zero, and so is act * up there: they add nothing.
        part = tl.sum(da * (act * up_), 1)
        wa = (weight[:, None] * (act * up_)).to(dtype)
        tl.store(wa_ptr + row * width + column[None, :], wa, mask=mask)
        da *= weight[:, None]
        tl.store(dh_ptr + at, (da * up_ * slope).to(dtype), mask=mask)
        tl.store(dh_ptr + at + width, (da * act).to(dtype), mask=mask)
    return part


@triton.jit
def _outer(
    left_ptr, right_ptr, token_ptr, ends_ptr, out_ptr, P, Q,
    LEFT: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out[e] = left^T right over the rows of e; one matrix is gathered: the left one if LEFT."""
    tiles_m = tl.cdiv(P, BM)
    tiles_n = tl.cdiv(Q, BN)
    expert = tl.program_id(0) // (tiles_m * tiles_n)
    m, n = _swizzle(tl.program_id(0) % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP)
    begin = tl.load(ends_ptr + tl.maximum(expert, 1) - 1)
    begin = tl.where(expert > 0, begin, 0)
    end = tl.load(ends_ptr + expert)
    p = m * BM + tl.arange(0, BM)
    q = n * BN + tl.arange(0, BN)
    r = tl.arange(0, BK)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(begin, end, BK):
        inside = start + r < end
        row = (start + r).to(tl.int64)
        token = tl.load(token_ptr + row, mask=inside, other=0).to(tl.int64)
        # Rows past the end are zeros on both sides: the next expert's may hold infinities.
        left_row, right_row = (token, row) if LEFT else (row, token)
        left_at = left_ptr + p[:, None] + left_row[None, :] * P
        left = tl.load(left_at, mask=(p < P)[:, None] & inside[None, :], other=0.0)
        right_at = right_ptr + right_row[:, None] * Q + q[None, :]
        right = tl.load(right_at, mask=inside[:, None] & (q < Q)[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    where = out_ptr + expert.to(tl.int64) * P * Q + p.to(tl.int64)[:, None] * Q + q[None, :]
    mask = (p < P)[:, None] & (q < Q)[None, :]
    tl.store(where, total.to(out_ptr.dtype.element_ty), mask=mask)


_start_up, _start_rows = Launcher(_up), Launcher(_rows)
_start_activation_gradient, _start_outer = Launcher(_activation_gradient), Launcher(_outer)
