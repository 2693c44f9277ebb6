"""The activation's gradient on Hopper: what a few warps do while others multiply the next tile.

The consumers of `hopper_rows` leave da = grad @ down, rounded, in shared memory. The finishing
warps read h beside it, and write dh, weight * a and each row's sum <da, a>. That moves more bytes
than any other product's end; were it done by the consumers themselves, their tensor cores would
rest meanwhile.

h comes a chunk ahead by tensor-memory copies. Two finishing warps may start them themselves, at the
price of barriers and of a fence that waits for their stores, or a LOADER does: one more warp, which
leaves them nothing but to read and to write. They are faster then, and in the way of the products'
loads sooner: which of the two is better depends on the shape.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from moesaic.kernels.triton.hopper_common import CHUNK, activate, eights, look, sync, tma_load

_OLD_NAME = gl.constexpr(hasattr(gl.shared_memory_descriptor, "_reinterpret"))  # Triton 3.6

PART = gl.constexpr(32)
"""Rows of a chunk that come at once."""
SIDE = gl.constexpr(16)
"""Rows of a part that are worked on at once."""


@gluon.jit
def _as_parts(memory, COUNT: gl.constexpr):
    """See chunks of [64, 64] as twice as many of [32, 64]."""
    if _OLD_NAME:
        result = memory._reinterpret(memory.dtype, [COUNT, PART, CHUNK], memory.layout)
    else:
        result = memory.reinterpret(memory.dtype, [COUNT, PART, CHUNK], memory.layout)
    return result


@gluon.jit
def _fetch(h_desc, h_smem, fetched, slot, apart, row, column, pred):
    """Start to copy [32, 64] places of gate and of up."""
    bar = fetched.index(slot)
    mbarrier.expect(bar, 2 * PART * CHUNK * 2, pred=pred)
    tma_load(h_desc, [row, column], bar, h_smem.index(2 * slot), pred=pred)
    tma_load(h_desc, [row, apart + column], bar, h_smem.index(2 * slot + 1), pred=pred)


@gluon.jit
def bring(
    h_smem, fetched, emptied, places, h_desc, N, apart, group_m, BN: gl.constexpr,
):  # fmt: skip
    """One warp, the LOADER: fetch h in `finish`'s order, a part as soon as there is room for it."""
    tile_expert_ptr, tile_row_ptr, tile_left_ptr, count_ptr = places
    N = eights(N)
    tiles_m = gl.load(count_ptr)
    tiles_n = gl.cdiv(N, BN)
    tiles = tiles_m * tiles_n
    first, left, column_tile, _ = look(
        0, tiles, tiles_m, tiles_n, group_m, tile_expert_ptr, tile_row_ptr, tile_left_ptr
    )
    turn = 0
    it = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        turn += 1
        next_first, next_left, next_column_tile, _ = look(
            turn, tiles, tiles_m, tiles_n, group_m, tile_expert_ptr, tile_row_ptr, tile_left_ptr
        )
        column = column_tile * BN
        count = gl.cdiv(gl.minimum(N - column, BN), CHUNK)
        for p in range(gl.minimum(gl.cdiv(left, PART), 4)):
            for j in range(count):
                slot = it & 1
                # Triton 3.6 keeps the first value of what a loop carries if the bound of a loop
                # inside is its only use: `left` has another one here. The minimum changes nothing.
                row = gl.minimum(first + p * PART, first + left - 1)
                mbarrier.wait(emptied.index(slot), ((it >> 1) & 1) ^ 1)
                _fetch(h_desc, h_smem, fetched, slot, apart, row, column + j * CHUNK, True)
                it += 1
        first, left, column_tile = next_first, next_left, next_column_tile


@gluon.jit
def _wide(x, FAST: gl.constexpr):
    """To float32; FAST: two neighbours of bfloat16 by one instruction each."""
    if FAST and x.dtype == gl.bfloat16:
        result = gl.inline_asm_elementwise(
            "{ .reg .b32 t; shl.b32 t, $2, 16; mov.b32 $0, t; "
            "and.b32 t, $2, 0xffff0000; mov.b32 $1, t; }",
            "=f,=f,r", [x], dtype=gl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        result = x.to(gl.float32)
    return result


@gluon.jit
def _read(da_part, h_smem, slot, WHICH: gl.constexpr, layout: gl.constexpr):
    """One side of a part of da, gate and up, in registers.

    A quarter of a warp reads a row of 64 numbers: no two of its lanes want the same bank.
    """
    da = da_part.slice(WHICH * SIDE, SIDE, dim=0).load(layout)
    gate = h_smem.index(2 * slot).slice(WHICH * SIDE, SIDE, dim=0).load(layout)
    up = h_smem.index(2 * slot + 1).slice(WHICH * SIDE, SIDE, dim=0).load(layout)
    return da, gate, up


@gluon.jit
def _write(
    da, gate, up, weight, out_ptr, out2_ptr, out3_ptr, N, stride, stride3, row, valid, column, r, c,
    ACTIVATION: gl.constexpr, FAST: gl.constexpr,
):  # fmt: skip
    """Write dh and weight * a of [16, 64] places; return the row sums of da * a."""
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    inside = (r < valid)[:, None] & (column + c < N)[None, :]
    at = (row + r).to(gl.int64)[:, None]
    place = (column + c)[None, :]
    act, slope = activate(_wide(gate, FAST), ACTIVATION)
    da = _wide(da, FAST)
    up = _wide(up, FAST)
    value = act * up
    # Columns past the width are zero in da: they add nothing.
    part = gl.sum(da * value, axis=1)
    gl.store(out3_ptr + at * stride3 + place, (value * weight[:, None]).to(dtype), mask=inside)
    da *= weight[:, None]
    gl.store(out2_ptr + at * stride + place, (da * act).to(dtype), mask=inside)
    gl.store(out_ptr + at * stride + place, (da * up * slope).to(dtype), mask=inside)
    return part


@gluon.jit
def finish(
    buffers, ready, free, h_smem, fetched, emptied, places, h_desc, out_ptr, out2_ptr, out3_ptr,
    weight_ptr, partial_ptr, N, apart, stride, stride3, group_m,
    BN: gl.constexpr, ACTIVATION: gl.constexpr, LOADER: gl.constexpr,
):  # fmt: skip
    """Walk over the tiles as the consumers do; `ready` and `free` hand their buffers over.

    h's up columns lie `apart` from its gate columns.

    The loops are not unrolled: their body alone fills the instruction cache.
    """
    tile_expert_ptr, tile_row_ptr, tile_left_ptr, count_ptr = places
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    CHUNKS: gl.constexpr = BN // CHUNK
    N = eights(N)
    stride = eights(stride)
    stride3 = eights(stride3)
    r = gl.arange(0, SIDE, layout=gl.SliceLayout(1, layout))
    c = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, layout))
    da_parts = _as_parts(buffers, 4 * CHUNKS)
    tiles_m = gl.load(count_ptr)
    tiles_n = gl.cdiv(N, BN)
    tiles = tiles_m * tiles_n
    begin = gl.program_id(0)
    first, left, column_tile, _ = look(
        0, tiles, tiles_m, tiles_n, group_m, tile_expert_ptr, tile_row_ptr, tile_left_ptr
    )
    if not LOADER:
        _fetch(h_desc, h_smem, fetched, 0, apart, first, column_tile * BN, begin < tiles)
    turn = 0
    seconds = 0  # tiles with rows for the second consumer
    it = 0
    for tile in range(begin, tiles, gl.num_programs(0)):
        turn += 1
        next_first, next_left, next_column_tile, _ = look(
            turn, tiles, tiles_m, tiles_n, group_m, tile_expert_ptr, tile_row_ptr, tile_left_ptr
        )
        more = tile + gl.num_programs(0) < tiles
        column = column_tile * BN
        count = gl.cdiv(gl.minimum(N - column, BN), CHUNK)
        parts = gl.minimum(gl.cdiv(left, PART), 4)
        for p in range(parts):
            row = first + p * PART
            valid = left - p * PART
            wg = p // 2
            weight0 = gl.load(weight_ptr + row + gl.minimum(r, valid - 1))
            weight1 = gl.load(weight_ptr + row + gl.minimum(SIDE + r, valid - 1))
            total0 = gl.zeros((SIDE,), gl.float32, layout=gl.SliceLayout(1, layout))
            total1 = gl.zeros((SIDE,), gl.float32, layout=gl.SliceLayout(1, layout))
            if p % 2 == 0:
                mbarrier.wait(ready.index(wg), gl.where(wg == 0, turn - 1, seconds) & 1)
            for j in range(count):
                slot = it & 1
                if not LOADER:
                    side = j == count - 1
                    last = side & (p == parts - 1)
                    then_row = gl.where(last, next_first, gl.where(side, row + PART, row))
                    then_column = gl.where(side, column, column + (j + 1) * CHUNK)
                    then_column = gl.where(last, next_column_tile * BN, then_column)
                    sync()  # all have read what the next copy overwrites
                    _fetch(
                        h_desc, h_smem, fetched, 1 - slot, apart, then_row, then_column,
                        more | (j < count - 1) | (p < parts - 1),
                    )  # fmt: skip
                mbarrier.wait(fetched.index(slot), (it >> 1) & 1)
                da_part = da_parts.index((wg * CHUNKS + j) * 2 + p % 2)
                at = column + j * CHUNK
                da, gate, up = _read(da_part, h_smem, slot, 0, layout)
                if LOADER:
                    da1, gate1, up1 = _read(da_part, h_smem, slot, 1, layout)
                    sync()  # all have read the slot
                    mbarrier.arrive(emptied.index(slot), count=1)
                total0 += _write(
                    da, gate, up, weight0, out_ptr, out2_ptr, out3_ptr, N, stride, stride3, row,
                    valid, at, r, c, ACTIVATION, LOADER,
                )  # fmt: skip
                if not LOADER:
                    da1, gate1, up1 = _read(da_part, h_smem, slot, 1, layout)
                total1 += _write(
                    da1, gate1, up1, weight1, out_ptr, out2_ptr, out3_ptr, N, stride, stride3,
                    row + SIDE, valid - SIDE, at, r, c, ACTIVATION, LOADER,
                )  # fmt: skip
                it += 1
            to_partial = partial_ptr + (row + r) * tiles_n + column_tile
            gl.store(to_partial, total0, mask=r < valid)
            gl.store(to_partial + SIDE * tiles_n, total1, mask=SIDE + r < valid)
            if (p % 2 == 1) | (p == parts - 1):
                sync()
                mbarrier.arrive(free.index(wg), count=1)
                seconds += wg
        first, left, column_tile = next_first, next_left, next_column_tile
