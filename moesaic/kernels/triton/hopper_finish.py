"""The activation's gradient on Hopper: what two warps do while others multiply the next tile.

The consumers of `hopper_rows` leave da = grad @ down, rounded, in shared memory. These warps fetch
h a chunk ahead by tensor-memory copies, and write dh, weight * a and each row's sum <da, a>. That
moves more bytes than any other product's end; were it done by the consumers themselves, their
tensor cores would rest meanwhile.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from moesaic.kernels.triton.hopper_common import CHUNK, activate, eights, look, sync, tma_load

_OLD_NAME = gl.constexpr(hasattr(gl.shared_memory_descriptor, "_reinterpret"))  # Triton 3.6

PART = gl.constexpr(32)
"""Rows, and columns, of a chunk that are worked on at once."""


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
def _write(
    da, gate, up, weight, out_ptr, out2_ptr, out3_ptr, N, stride, stride3, row, valid, column, r, c,
    ACTIVATION: gl.constexpr,
):  # fmt: skip
    """Write dh and weight * a of [32, 32] places; return the row sums of da * a."""
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    inside = (r < valid)[:, None] & (column + c < N)[None, :]
    at = (row + r).to(gl.int64)[:, None]
    place = (column + c)[None, :]
    act, slope = activate(gate.to(gl.float32), ACTIVATION)
    da = da.to(gl.float32)
    up = up.to(gl.float32)
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
    buffers, ready, free, h_smem, fetched, tile_expert_ptr, tile_row_ptr, tile_left_ptr, count_ptr,
    h_desc, out_ptr, out2_ptr, out3_ptr, weight_ptr, partial_ptr, N, apart, stride, stride3,
    group_m, BN: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    """Walk over the tiles as the consumers do; `ready` and `free` hand their buffers over.

    h's up columns lie `apart` from its gate columns.

    The loops are not unrolled: their body alone fills the instruction cache.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [gl.num_warps(), 1], [1, 0])
    CHUNKS: gl.constexpr = BN // CHUNK
    N = eights(N)
    stride = eights(stride)
    stride3 = eights(stride3)
    r = gl.arange(0, PART, layout=gl.SliceLayout(1, layout))
    c = gl.arange(0, PART, layout=gl.SliceLayout(0, layout))
    da_parts = _as_parts(buffers, 4 * CHUNKS)
    tiles_m = gl.load(count_ptr)
    tiles_n = gl.cdiv(N, BN)
    tiles = tiles_m * tiles_n
    begin = gl.program_id(0)
    first, left, column_tile, _ = look(
        0, tiles, tiles_m, tiles_n, group_m, tile_expert_ptr, tile_row_ptr, tile_left_ptr
    )
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
            weight = gl.load(weight_ptr + row + gl.minimum(r, valid - 1))
            total = gl.zeros((PART,), gl.float32, layout=gl.SliceLayout(1, layout))
            if p % 2 == 0:
                mbarrier.wait(ready.index(wg), gl.where(wg == 0, turn - 1, seconds) & 1)
            for j in range(count):
                side = j == count - 1
                last = side & (p == parts - 1)
                then_row = gl.where(last, next_first, gl.where(side, row + PART, row))
                then_column = gl.where(side, column, column + (j + 1) * CHUNK)
                then_column = gl.where(last, next_column_tile * BN, then_column)
                slot = it & 1
                sync()  # all have read what the next copy overwrites
                _fetch(
                    h_desc, h_smem, fetched, 1 - slot, apart, then_row, then_column,
                    more | (j < count - 1) | (p < parts - 1),
                )  # fmt: skip
                mbarrier.wait(fetched.index(slot), (it >> 1) & 1)
                da_part = da_parts.index((wg * CHUNKS + j) * 2 + p % 2)
                for SIDE in gl.static_range(2):  # there are no registers for both at once
                    da = da_part.slice(SIDE * PART, PART, dim=1).load(layout)
                    gate = h_smem.index(2 * slot).slice(SIDE * PART, PART, dim=1).load(layout)
                    up = h_smem.index(2 * slot + 1).slice(SIDE * PART, PART, dim=1).load(layout)
                    total += _write(
                        da, gate, up, weight, out_ptr, out2_ptr, out3_ptr, N, stride, stride3, row,
                        valid, column + j * CHUNK + SIDE * PART, r, c, ACTIVATION,
                    )  # fmt: skip
                it += 1
            gl.store(partial_ptr + (row + r) * tiles_n + column_tile, total, mask=r < valid)
            if (p % 2 == 1) | (p == parts - 1):
                sync()
                mbarrier.arrive(free.index(wg), count=1)
                seconds += wg
        first, left, column_tile = next_first, next_left, next_column_tile
