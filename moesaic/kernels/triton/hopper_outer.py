"""Weight gradients on Hopper, in Gluon: sums of outer products over each expert's rows.

out[e] = sum over the sorted rows s of expert e of a[token of s] (x) b[s]. The per-token matrix is
gathered inside the kernel, 128 columns a tile; see `hopper_rows` for the partitions and the ring.
An expert without rows gets zeros. No atomics: one program writes an element.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from moesaic.kernels.triton.hopper_common import (
    CHUNK,
    HALF,
    chunks,
    cp_async,
    eights,
    emit_all,
    release,
    swizzle,
    sync,
    tma_load,
)


@gluon.jit
def _look(tile, tiles, per_expert, tiles_m, tiles_n, group_m, ends_ptr):
    """Where a tile lies: the expert's first and last row, row tile, column tile."""
    tile = gl.minimum(tile, tiles - 1)
    expert = tile // per_expert
    m, n = swizzle(tile - expert * per_expert, tiles_m, tiles_n, group_m)
    begin = gl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    return begin, gl.load(ends_ptr + expert), m, n


@gluon.jit
def _tokens(token_ptr, row, end, r):
    return gl.load(token_ptr + row + r, mask=row + r < end, other=0)


@gluon.jit
def _producer(
    a_ptr, token_ptr, b_desc, ends_ptr, a_smem, b_smem, full, empty, experts, M, N,
    group_m,
    EVEN_M: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    M = eights(M)
    tiles_m = gl.cdiv(M, BM)
    tiles_n = gl.cdiv(N, BN)
    per_expert = tiles_m * tiles_n
    it = 0
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    r = gl.arange(0, BK, layout=gl.SliceLayout(1, layout))
    c = gl.arange(0, BM, layout=gl.SliceLayout(0, layout))
    tiles = experts * per_expert
    # The first tokens of the next tile are read while this one is loaded; within a tile two steps
    # of them are under way: no copy waits for its row's number.
    begin, end, m, n = _look(
        gl.program_id(0), tiles, per_expert, tiles_m, tiles_n, group_m, ends_ptr
    )
    token = _tokens(token_ptr, begin, end, r)
    next_token = _tokens(token_ptr, begin + BK, end, r)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        after_begin, after_end, after_m, after_n = _look(
            tile + gl.num_programs(0), tiles, per_expert, tiles_m, tiles_n, group_m, ends_ptr
        )
        after_token = _tokens(token_ptr, after_begin, after_end, r)
        after_next_token = _tokens(token_ptr, after_begin + BK, after_end, r)
        base = a_ptr + m * BM
        for row in range(begin, end, BK):
            stage = it % STAGES
            bar = full.index(stage)
            where = base + token.to(gl.int64)[:, None] * M + c[None, :]
            mine = (r < end - row)[:, None]
            token = next_token
            next_token = _tokens(token_ptr, row + 2 * BK, end, r)
            mbarrier.wait(empty.index(stage), ((it // STAGES) & 1) ^ 1)
            mbarrier.expect(bar, BN * BK * 2)
            tma_load(b_desc, [row, n * BN], bar, b_smem.index(stage))
            # Rows past the end are copied as zeros: b's rows there are the next expert's.
            if EVEN_M:
                cp_async(a_smem.index(stage), where, mask=mine)
            else:
                cp_async(a_smem.index(stage), where, mask=mine & (c < M - m * BM)[None, :])
            async_copy.mbarrier_arrive(bar, increment_count=False)
            it += 1
        begin, end, m, n = after_begin, after_end, after_m, after_n
        token, next_token = after_token, after_next_token


@gluon.jit
def _consumer(
    a_smem, b_smem, buffers, full, empty, ends_ptr, out_desc, out_ptr, experts, M, N,
    group_m, WG: gl.constexpr, TRANSPOSED: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    BK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    tiles_m = gl.cdiv(M, BM)
    tiles_n = gl.cdiv(N, BN)
    per_expert = tiles_m * tiles_n
    it = 0
    tiles = experts * per_expert
    begin, end, m, n = _look(
        gl.program_id(0), tiles, per_expert, tiles_m, tiles_n, group_m, ends_ptr
    )
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        after_begin, after_end, after_m, after_n = _look(
            tile + gl.num_programs(0), tiles, per_expert, tiles_m, tiles_n, group_m, ends_ptr
        )
        expert = tile // per_expert
        acc = gl.zeros((HALF, BN), gl.float32, layout=mma)
        for row in range(begin, end, BK):
            stage = it % STAGES
            mbarrier.wait(full.index(stage), (it // STAGES) & 1)
            fence_async_shared()
            a = a_smem.index(stage).slice(WG * HALF, HALF, dim=1).permute((1, 0))
            acc = warpgroup_mma(a, b_smem.index(stage), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            release(empty, it - 1, STAGES, row > begin)
            it += 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        release(empty, it - 1, STAGES, end > begin)
        parts = chunks(acc.to(dtype))
        first = m * BM + WG * HALF
        at = n * BN
        if TRANSPOSED:
            emit_all(
                parts, buffers, out_desc, out_ptr, M, expert * N + at, first, N - at, M,
                BN // CHUNK, TRANSPOSED=True,
            )  # fmt: skip
        else:
            emit_all(
                parts, buffers, out_desc, out_ptr, N, expert * M + first, at, M - first, N,
                BN // CHUNK,
            )  # fmt: skip
        begin, end, m, n = after_begin, after_end, after_m, after_n
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["group_m", "experts"])
def outer_kernel(
    a_ptr, token_ptr, b_desc, ends_ptr, out_desc, out_ptr, experts, M, N,
    group_m, EVEN_M: gl.constexpr, TRANSPOSED: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    BK: gl.constexpr, STAGES: gl.constexpr, BUFFERS: gl.constexpr,
    PRODUCER_WARPS: gl.constexpr, CONSUMER_REGS: gl.constexpr, PRODUCER_REGS: gl.constexpr,
):  # fmt: skip
    """out[e, m, n] = sum over rows s of expert e of a[token of s, m] * b[s, n].

    out is [E * M, N], or [E * N, M] if TRANSPOSED.
    """
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    a_smem = gl.allocate_shared_memory(dtype, [STAGES, BK, BM], b_desc.layout)
    b_smem = gl.allocate_shared_memory(dtype, [STAGES, BK, BN], b_desc.layout)
    buffers0 = gl.allocate_shared_memory(dtype, [BUFFERS, HALF, CHUNK], out_desc.layout)
    buffers1 = gl.allocate_shared_memory(dtype, [BUFFERS, HALF, CHUNK], out_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1 + 32 * PRODUCER_WARPS)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    sync()
    gl.warp_specialize(
        [
            (_consumer, (
                a_smem, b_smem, buffers0, full, empty, ends_ptr, out_desc, out_ptr,
                experts, M, N, group_m, 0, TRANSPOSED, BM, BN, BK, STAGES,
            )),
            (_consumer, (
                a_smem, b_smem, buffers1, full, empty, ends_ptr, out_desc, out_ptr,
                experts, M, N, group_m, 1, TRANSPOSED, BM, BN, BK, STAGES,
            )),
            (_producer, (
                a_ptr, token_ptr, b_desc, ends_ptr, a_smem, b_smem, full, empty, experts, M, N,
                group_m, EVEN_M, BM, BN, BK, STAGES,
            )),
        ],
        [4, PRODUCER_WARPS],
        [CONSUMER_REGS, PRODUCER_REGS],
    )  # fmt: skip
