"""What the Hopper kernels share: tile order, the store of a chunk, names of two Triton versions.

A consumer warpgroup multiplies 64 tile rows and gives its result away in chunks of 64 columns:
through one of two buffers of shared memory into a tensor-memory store, so that a chunk is written
while the one before still leaves.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

# Names that changed between Triton 3.6 and 3.9.
sync = getattr(gl, "thread_barrier", None) or gl.barrier
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
cp_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

HALF = gl.constexpr(64)
"""Rows of a tile that one consumer warpgroup multiplies."""
CHUNK = gl.constexpr(64)
"""Columns of a result that leave at once."""


@gluon.jit
def eights(size):
    """The same size, known to be a multiple of eight: Triton finds out about 16 only."""
    return size // 8 * 8


@gluon.jit
def swizzle(tile, tiles_m, tiles_n, group_m):
    """Order tiles so that group_m row tiles share the weights that lie in the cache."""
    group = tile // (group_m * tiles_n)
    first = group * group_m
    height = gl.minimum(tiles_m - first, group_m)
    within = tile - group * (group_m * tiles_n)
    return first + within % height, within // height


@gluon.jit
def look(
    turn, tiles, tiles_m, tiles_n, group_m, tile_expert_ptr, tile_row_ptr, tile_left_ptr
):  # fmt: skip
    """Where this program's tile number `turn` lies: first row, rows left, column tile, expert."""
    tile = gl.minimum(gl.program_id(0) + turn * gl.num_programs(0), tiles - 1)
    tile = gl.maximum(tile, 0)
    m, n = swizzle(tile, tiles_m, tiles_n, group_m)
    row = gl.load(tile_row_ptr + m)
    return row, gl.load(tile_left_ptr + m), n, gl.load(tile_expert_ptr + m)


@gluon.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) in float32 by the two approximations of the special-function unit."""
    return gl.inline_asm_elementwise(
        "{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; "
        "add.f32 t, t, 0f3F800000; rcp.approx.ftz.f32 $0, t; }",
        "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def activate(x, ACTIVATION: gl.constexpr):
    """silu, gelu or gelu_tanh of x and its derivative, in float32."""
    if ACTIVATION == "silu":
        s = sigmoid(x)
        act = x * s
        slope = s + act - act * s
    elif ACTIVATION == "gelu_tanh":
        u = 1.5957691216057308 * x * (1.0 + 0.044715 * x * x)  # twice tanh's argument
        s = sigmoid(u)
        act = x * s
        slope = s + act * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    else:
        s = 0.5 + 0.5 * gl.erf(x * 0.7071067811865476)
        act = x * s
        slope = s + x * gl.exp(-0.5 * x * x) * 0.3989422804014327
    return act, slope


@gluon.jit
def halves(x):
    """Split [rows, columns] into its left and right columns; no data moves between threads."""
    return x.reshape((x.shape[0], 2, x.shape[1] // 2)).permute((0, 2, 1)).split()


@gluon.jit
def chunks(x):
    """Split [64, columns] into a tuple of [64, 64] chunks, left to right."""
    if x.shape[1] == CHUNK:
        result = (x,)
    else:
        left, right = halves(x)
        result = chunks(left) + chunks(right)
    return result


@gluon.jit
def release(empty, it, STAGES: gl.constexpr, pred):
    """Tell the producer that the stage of step `it` may be filled again."""
    mbarrier.arrive(empty.index((it + STAGES) % STAGES), count=1, pred=pred)


@gluon.jit
def leave(buffer, desc, ptr, stride, row, column, valid, columns):
    """Store a [64, 64] buffer: by tensor memory if all its rows are ours, else masked."""
    if valid >= HALF:
        tma_store(desc, [row, column], buffer)
    elif valid > 0:
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        r = gl.arange(0, HALF, layout=gl.SliceLayout(1, layout))
        c = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, layout))
        where = ptr + (row + r).to(gl.int64)[:, None] * stride + (column + c)[None, :]
        mask = (r < valid)[:, None] & ((column + c) < columns)[None, :]
        gl.store(where, buffer.load(layout), mask=mask)


@gluon.jit
def emit(value, buffers, TURN: gl.constexpr, desc, ptr, stride, row, column, valid, columns):
    """Give a [64, 64] chunk to (row, column) of a matrix, of whose rows `valid` are ours.

    By tensor memory when all are; else masked, since the next rows are another expert's.
    """
    buffer = buffers.index(TURN % 2)
    if valid >= HALF:
        tma.store_wait(1)
    else:
        tma.store_wait(0)
    sync()
    buffer.store(value)
    fence_async_shared()
    sync()
    leave(buffer, desc, ptr, stride, row, column, valid, columns)


@gluon.jit
def emit_all(
    parts, buffers, desc, ptr, stride, row, column, valid, columns,
    COUNT: gl.constexpr, TRANSPOSED: gl.constexpr = False,
):  # fmt: skip
    """`emit` COUNT chunks side by side (TRANSPOSED: below each other), a bufferful at a time."""
    AT_ONCE: gl.constexpr = min(COUNT, buffers.shape[0])
    for first in gl.static_range(0, COUNT, AT_ONCE):
        tma.store_wait(0)
        sync()
        for i in gl.static_range(AT_ONCE):
            if TRANSPOSED:
                buffers.index(i).permute((1, 0)).store(parts[first + i])
            else:
                buffers.index(i).store(parts[first + i])
        fence_async_shared()
        sync()
        for i in gl.static_range(AT_ONCE):
            at = (first + i) * CHUNK
            if TRANSPOSED:
                leave(buffers.index(i), desc, ptr, stride, row + at, column, valid - at, columns)
            else:
                leave(buffers.index(i), desc, ptr, stride, row, column + at, valid, columns)
