"""Weight gradients on Hopper, in Gluon: sums of outer products over each expert's rows.

out[e] = sum over the sorted rows s of expert e of a[token of s] (x) b[s]. The per-token matrix is
gathered inside the kernel, 128 columns a tile; see `hopper_rows` for the partitions and the ring.
An expert without rows gets zeros.

A tile takes as long as its expert has rows. Programs therefore draw tiles from a counter when they
need one, those of the largest expert first, and the producer tells the consumers which. Who
computes a tile depends on timing, its bits do not: one program sums its rows in their order.
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

AHEAD = gl.constexpr(4)
"""Steps left to load of a tile when its producer asks for the next."""
SLOTS = gl.constexpr(4)
"""Tiles that consumers may be told about before they begin one."""


@gluon.jit
def _look(tile, tiles, per_expert, experts, tiles_m, tiles_n, group_m, by_size_ptr):
    """Where a tile lies: the expert's first and last row, row tile, column tile, expert."""
    tile = gl.minimum(tile, tiles - 1)
    rank = tile // per_expert
    m, n = swizzle(tile - rank * per_expert, tiles_m, tiles_n, group_m)
    begin = gl.load(by_size_ptr + rank)
    end = gl.load(by_size_ptr + experts + rank)
    return begin, end, m, n, gl.load(by_size_ptr + 2 * experts + rank)


@gluon.jit
def _tell(notes, told, heard, turn, steps, m, n, expert):
    """Hand a tile to both consumers; fewer than no steps: there are no more."""
    slot = turn % SLOTS
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    i = gl.arange(0, 4, layout=layout)
    note = gl.where(i == 0, steps, gl.where(i == 1, m, gl.where(i == 2, n, expert)))
    mbarrier.wait(heard.index(slot), ((turn // SLOTS) & 1) ^ 1)
    notes.index(slot).store(note)
    sync()
    mbarrier.arrive(told.index(slot), count=1)


@gluon.jit
def _hear(notes, told, heard, turn):
    """Steps, row tile, column tile and expert of the program's tile number `turn`."""
    slot = turn % SLOTS
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    i = gl.arange(0, 4, layout=layout)
    mbarrier.wait(told.index(slot), (turn // SLOTS) & 1)
    note = notes.index(slot).load(layout)
    sync()
    mbarrier.arrive(heard.index(slot), count=1)
    steps = gl.sum(gl.where(i == 0, note, 0), 0)
    m = gl.sum(gl.where(i == 1, note, 0), 0)
    n = gl.sum(gl.where(i == 2, note, 0), 0)
    return steps, m, n, gl.sum(gl.where(i == 3, note, 0), 0)


@gluon.jit
def _tokens(token_ptr, row, end, r):
    return gl.load(token_ptr + row + r, mask=row + r < end, other=0)


@gluon.jit
def _fill(
    begin, end, last, it, token, next_token, base, token_ptr, b_desc, a_smem, b_smem, full, empty,
    column, left, M, r, c, EVEN_M: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Load the rows from begin to end of an expert that ends at `last`; two steps' tokens ahead."""
    for row in range(begin, end, BK):
        stage = it % STAGES
        bar = full.index(stage)
        where = base + token.to(gl.int64)[:, None] * M + c[None, :]
        mine = (r < last - row)[:, None]
        token = next_token
        next_token = _tokens(token_ptr, row + 2 * BK, last, r)
        mbarrier.wait(empty.index(stage), ((it // STAGES) & 1) ^ 1)
        mbarrier.expect(bar, BN * BK * 2)
        tma_load(b_desc, [row, column], bar, b_smem.index(stage))
        # Rows past the end are copied as zeros: b's rows there are the next expert's.
        if EVEN_M:
            cp_async(a_smem.index(stage), where, mask=mine)
        else:
            cp_async(a_smem.index(stage), where, mask=mine & (c < left)[None, :])
        async_copy.mbarrier_arrive(bar, increment_count=False)
        it += 1
    return it, token, next_token


@gluon.jit
def _producer(
    a_ptr, token_ptr, b_desc, by_size_ptr, tickets_ptr, a_smem, b_smem, notes, full, empty, told,
    heard, experts, M, N, group_m,
    EVEN_M: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    M = eights(M)
    tiles_m = gl.cdiv(M, BM)
    tiles_n = gl.cdiv(N, BN)
    per_expert = tiles_m * tiles_n
    tiles = experts * per_expert
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    r = gl.arange(0, BK, layout=gl.SliceLayout(1, layout))
    c = gl.arange(0, BM, layout=gl.SliceLayout(0, layout))
    it = 0
    turn = 0
    tile = gl.program_id(0)
    begin, end, m, n, expert = _look(
        tile, tiles, per_expert, experts, tiles_m, tiles_n, group_m, by_size_ptr
    )
    token = _tokens(token_ptr, begin, end, r)
    next_token = _tokens(token_ptr, begin + BK, end, r)
    while tile < tiles:
        steps = gl.cdiv(end - begin, BK)
        _tell(notes, told, heard, turn, steps, m, n, expert)
        base = a_ptr + m * BM
        late = begin + gl.maximum(steps - AHEAD, 0) * BK
        it, token, next_token = _fill(
            begin, late, end, it, token, next_token, base, token_ptr, b_desc, a_smem, b_smem, full,
            empty, n * BN, M - m * BM, M, r, c, EVEN_M, BN, BK, STAGES,
        )  # fmt: skip
        # Not sooner, or a program with a long tile would keep a short one from the others; not
        # later, so that the answer and the next tile's tokens are here when the tile is loaded.
        tile = gl.num_programs(0) + gl.atomic_add(tickets_ptr, 1, sem="relaxed")
        after_begin, after_end, after_m, after_n, after_expert = _look(
            tile, tiles, per_expert, experts, tiles_m, tiles_n, group_m, by_size_ptr
        )
        after_token = _tokens(token_ptr, after_begin, after_end, r)
        after_next_token = _tokens(token_ptr, after_begin + BK, after_end, r)
        it, token, next_token = _fill(
            late, end, end, it, token, next_token, base, token_ptr, b_desc, a_smem, b_smem, full,
            empty, n * BN, M - m * BM, M, r, c, EVEN_M, BN, BK, STAGES,
        )  # fmt: skip
        begin, end, m, n, expert = after_begin, after_end, after_m, after_n, after_expert
        token, next_token = after_token, after_next_token
        turn += 1
    _tell(notes, told, heard, turn, -1, 0, 0, 0)
    # The last program to come here leaves zeros for the next launch.
    if gl.atomic_add(tickets_ptr + 1, 1) == gl.num_programs(0) - 1:
        gl.store(tickets_ptr, 0)
        gl.store(tickets_ptr + 1, 0)


@gluon.jit
def _consumer(
    a_smem, b_smem, buffers, notes, full, empty, told, heard, out_desc, out_ptr, M, N,
    WG: gl.constexpr, TRANSPOSED: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    it = 0
    turn = 0
    steps, m, n, expert = _hear(notes, told, heard, turn)
    while steps >= 0:
        acc = gl.zeros((HALF, BN), gl.float32, layout=mma)
        for k in range(steps):
            stage = it % STAGES
            mbarrier.wait(full.index(stage), (it // STAGES) & 1)
            fence_async_shared()
            a = a_smem.index(stage).slice(WG * HALF, HALF, dim=1).permute((1, 0))
            acc = warpgroup_mma(a, b_smem.index(stage), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            release(empty, it - 1, STAGES, k > 0)
            it += 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        release(empty, it - 1, STAGES, steps > 0)
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
        turn += 1
        steps, m, n, expert = _hear(notes, told, heard, turn)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["group_m", "experts"])
def outer_kernel(
    a_ptr, token_ptr, b_desc, by_size_ptr, tickets_ptr, out_desc, out_ptr, experts, M, N,
    group_m, EVEN_M: gl.constexpr, TRANSPOSED: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    BK: gl.constexpr, STAGES: gl.constexpr, BUFFERS: gl.constexpr,
    PRODUCER_WARPS: gl.constexpr, CONSUMER_REGS: gl.constexpr, OTHER_REGS: gl.constexpr,
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
    notes = gl.allocate_shared_memory(gl.int32, [SLOTS, 4], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    told = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    heard = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(told.index(i), count=1)
        mbarrier.init(heard.index(i), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1 + 32 * PRODUCER_WARPS)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    sync()
    gl.warp_specialize(
        [
            (_consumer, (
                a_smem, b_smem, buffers0, notes, full, empty, told, heard, out_desc, out_ptr,
                M, N, 0, TRANSPOSED, BM, BN, STAGES,
            )),
            (_consumer, (
                a_smem, b_smem, buffers1, notes, full, empty, told, heard, out_desc, out_ptr,
                M, N, 1, TRANSPOSED, BM, BN, STAGES,
            )),
            (_producer, (
                a_ptr, token_ptr, b_desc, by_size_ptr, tickets_ptr, a_smem, b_smem, notes, full,
                empty, told, heard, experts, M, N, group_m, EVEN_M, BM, BN, BK, STAGES,
            )),
        ],
        [4, PRODUCER_WARPS],
        [CONSUMER_REGS, OTHER_REGS],
    )  # fmt: skip
