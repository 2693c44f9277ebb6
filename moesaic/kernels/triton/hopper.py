"""Grouped matrix products for Hopper in Gluon: a loading partition feeds two multiplying ones.

S routed rows sorted by expert, E experts, I expert width, D hidden size. `rows_kernel` multiplies
each expert's rows by its weight; `outer_kernel` sums the outer products of two row matrices expert
by expert. Both are persistent: a program walks over tiles; its producer warps fill a ring of shared
memory (weights and contiguous rows by tensor-memory copies, gathered rows by cp.async through the
token index), two consumer warpgroups of 64 tile rows each run wgmma on it, and results leave
through tensor-memory stores while the next tile is already being loaded. Nothing is padded in
memory: the last tile of an expert stores only its own rows, and its second warpgroup rests when
the rows fit into the first. No atomics: every output element is written by one program.
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

# Names that changed between Triton 3.6 and 3.9.
_sync = getattr(gl, "thread_barrier", None) or gl.barrier
_tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
_cp_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

HALF = gl.constexpr(64)  # rows of a tile that one consumer warpgroup multiplies


@gluon.jit
def _sigmoid(x):
    return 1.0 / (1.0 + gl.exp(-x))


@gluon.jit
def _swizzle(tile, tiles_m, tiles_n, GROUP_M: gl.constexpr):
    """Order tiles so that GROUP_M row tiles share the weights that lie in the cache."""
    group = tile // (GROUP_M * tiles_n)
    first = group * GROUP_M
    height = gl.minimum(tiles_m - first, GROUP_M)
    within = tile - group * (GROUP_M * tiles_n)
    return first + within % height, within // height


@gluon.jit
def _store(buffer, desc, ptr, stride, row, column, valid, columns, WIDTH: gl.constexpr):
    """Store a [64, WIDTH] buffer at (row, column): by tensor memory if whole, else masked."""
    if valid >= HALF:
        _tma_store(desc, [row, column], buffer)
    else:
        layout: gl.constexpr = gl.BlockedLayout(
            [1, 8],
            [32 // (WIDTH // 8) if WIDTH < 256 else 1, WIDTH // 8 if WIDTH < 256 else 32],
            [4, 1],
            [1, 0],
        )
        value = buffer.load(layout)
        r = gl.arange(0, HALF, layout=gl.SliceLayout(1, layout))
        c = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
        where = ptr + (row + r).to(gl.int64)[:, None] * stride + (column + c)[None, :]
        mask = (r < valid)[:, None] & ((column + c) < columns)[None, :]
        gl.store(where, value, mask=mask)


# ---------------------------------------------------------------------------------------------
# rows: out[s] = a[s] @ weight[expert of s]
# ---------------------------------------------------------------------------------------------


@gluon.jit
def _rows_producer(
    a_desc, a_ptr, token_ptr, b_desc, tile_expert_ptr, tile_row_ptr, ends_ptr, count_ptr,
    a_smem, b_smem, full, empty, N, K, b_rows, second,
    GATHER: gl.constexpr, B_KMAJOR: gl.constexpr, PAIR: gl.constexpr, BN: gl.constexpr,
    BK: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    tiles_m = gl.load(count_ptr)
    tiles_n = gl.cdiv(N, BN // 2 if PAIR else BN)
    k_tiles = gl.cdiv(K, BK)
    B_BYTES: gl.constexpr = BN * BK * 2
    A_BYTES: gl.constexpr = HALF * BK * 2
    LAG: gl.constexpr = STAGES - 1
    it = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        m, n = _swizzle(tile, tiles_m, tiles_n, GROUP_M)
        expert = gl.load(tile_expert_ptr + m)
        row = gl.load(tile_row_ptr + m)
        valid = gl.load(ends_ptr + expert) - row
        both = valid > HALF
        b_row = expert * b_rows
        if GATHER:
            layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
            r = gl.arange(0, HALF, layout=gl.SliceLayout(1, layout))
            c = gl.arange(0, BK, layout=gl.SliceLayout(0, layout))
            first = gl.load(token_ptr + row + gl.minimum(r, valid - 1))
            other = gl.load(token_ptr + row + gl.minimum(r + HALF, valid - 1))
            a0 = a_ptr + first.to(gl.int64)[:, None] * K + c[None, :]
            a1 = a_ptr + other.to(gl.int64)[:, None] * K + c[None, :]
        for k in range(k_tiles):
            stage = it % STAGES
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), ((it // STAGES) & 1) ^ 1)
            if GATHER:
                mbarrier.expect(bar, B_BYTES)
            else:
                mbarrier.expect(bar, B_BYTES + 2 * A_BYTES, pred=both)
                mbarrier.expect(bar, B_BYTES + A_BYTES, pred=valid <= HALF)
                _tma_load(a_desc, [row, k * BK], bar, a_smem.index(2 * stage))
                _tma_load(a_desc, [row + HALF, k * BK], bar, a_smem.index(2 * stage + 1), pred=both)
            if PAIR:
                column = n * (BN // 2)
                _tma_load(b_desc, [b_row + column, k * BK], bar, b_smem.index(2 * stage))
                _tma_load(
                    b_desc, [b_row + second + column, k * BK], bar, b_smem.index(2 * stage + 1)
                )
            elif B_KMAJOR:
                _tma_load(b_desc, [b_row + n * BN, k * BK], bar, b_smem.index(stage))
            else:
                _tma_load(b_desc, [b_row + k * BK, n * BN], bar, b_smem.index(stage))
            if GATHER:
                inside = (k * BK + c < K)[None, :]
                _cp_async(a_smem.index(2 * stage), a0 + k * BK, mask=inside)
                _cp_async(a_smem.index(2 * stage + 1), a1 + k * BK, mask=inside & both)
                async_copy.mbarrier_arrive(bar, increment_count=False)
            it += 1


@gluon.jit
def _release(empty, it, STAGES: gl.constexpr, pred):
    mbarrier.arrive(empty.index((it + STAGES) % STAGES), count=1, pred=pred)


@gluon.jit
def _rows_consumer(
    a_smem, b_smem, c_smem, full, empty, h_bar, tile_expert_ptr, tile_row_ptr, ends_ptr, count_ptr,
    out_desc, out_ptr, out2_desc, out2_ptr, out3_desc, out3_ptr, h_desc, h2_desc, weight_ptr,
    partial_ptr, N, K, out_stride, out3_stride,
    WG: gl.constexpr, EPILOGUE: gl.constexpr, GATHER: gl.constexpr, B_KMAJOR: gl.constexpr,
    BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr,
    KEEP_H: gl.constexpr,
):  # fmt: skip
    PAIR: gl.constexpr = EPILOGUE == "swiglu"
    WIDTH: gl.constexpr = BN // 2 if PAIR else BN
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    tiles_m = gl.load(count_ptr)
    tiles_n = gl.cdiv(N, WIDTH)
    k_tiles = gl.cdiv(K, BK)
    it = 0
    seen = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        m, n = _swizzle(tile, tiles_m, tiles_n, GROUP_M)
        expert = gl.load(tile_expert_ptr + m)
        row = gl.load(tile_row_ptr + m) + WG * HALF
        valid = gl.load(ends_ptr + expert) - row
        column = n * WIDTH
        if valid > 0:
            if EPILOGUE == "dact":
                # The rows of h arrive while the products run.
                tma.store_wait(0)
                _sync()
                mbarrier.expect(h_bar, 2 * HALF * WIDTH * 2)
                _tma_load(h_desc, [row, column], h_bar, c_smem.index(WG * 3))
                _tma_load(h2_desc, [row, column], h_bar, c_smem.index(WG * 3 + 1))
            zero = gl.zeros((HALF, WIDTH), gl.float32, layout=mma)
            acc = zero
            if PAIR:
                up = zero
            for k in range(k_tiles):
                stage = it % STAGES
                mbarrier.wait(full.index(stage), (it // STAGES) & 1)
                if GATHER:
                    fence_async_shared()
                a = a_smem.index(2 * stage + WG)
                if PAIR:
                    gate_w = b_smem.index(2 * stage).permute((1, 0))
                    up_w = b_smem.index(2 * stage + 1).permute((1, 0))
                    acc = warpgroup_mma(a, gate_w, acc, is_async=True)
                    up = warpgroup_mma(a, up_w, up, is_async=True)
                    acc, up = warpgroup_mma_wait(2, deps=(acc, up))
                else:
                    b = b_smem.index(stage)
                    if B_KMAJOR:
                        b = b.permute((1, 0))
                    acc = warpgroup_mma(a, b, acc, is_async=True)
                    acc = warpgroup_mma_wait(1, deps=(acc,))
                _release(empty, it - 1, STAGES, k > 0)
                it += 1
            if PAIR:
                acc, up = warpgroup_mma_wait(0, deps=(acc, up))
            else:
                acc = warpgroup_mma_wait(0, deps=(acc,))
            _release(empty, it - 1, STAGES, True)
            if EPILOGUE == "plain":
                buffer = c_smem.index(WG)
                value = acc.to(dtype)
                tma.store_wait(0)
                _sync()
                buffer.store(value)
                fence_async_shared()
                _sync()
                _store(buffer, out_desc, out_ptr, out_stride, row, column, valid, N, WIDTH)
            elif EPILOGUE == "swiglu":
                gate_buffer = c_smem.index(WG * 2)
                up_buffer = c_smem.index(WG * 2 + 1)
                gate = acc.to(dtype)
                upper = up.to(dtype)
                if KEEP_H:
                    tma.store_wait(0)
                    _sync()
                    gate_buffer.store(gate)
                    up_buffer.store(upper)
                    fence_async_shared()
                    _sync()
                    _store(gate_buffer, out_desc, out_ptr, out_stride, row, column, valid, N, WIDTH)
                    _store(up_buffer, out2_desc, out2_ptr, out_stride, row, column, valid, N, WIDTH)
                # From the rounded h, as the backward pass will see it.
                g = gate.to(gl.float32)
                value = (g * _sigmoid(g) * upper.to(gl.float32)).to(dtype)
                tma.store_wait(1 if KEEP_H else 0)
                _sync()
                gate_buffer.store(value)
                fence_async_shared()
                _sync()
                _store(gate_buffer, out3_desc, out3_ptr, out3_stride, row, column, valid, N, WIDTH)
            else:
                gate_buffer = c_smem.index(WG * 3)
                up_buffer = c_smem.index(WG * 3 + 1)
                wa_buffer = c_smem.index(WG * 3 + 2)
                mbarrier.wait(h_bar, seen & 1)
                seen += 1
                g = gate_buffer.load(mma).to(gl.float32)
                u = up_buffer.load(mma).to(gl.float32)
                r = gl.arange(0, HALF, layout=gl.SliceLayout(1, mma))
                weight = gl.load(weight_ptr + row + gl.minimum(r, valid - 1)).to(gl.float32)
                s = _sigmoid(g)
                act = g * s
                # Columns past the width hold neighbours: their da is zero, so nothing is added.
                part = gl.sum(acc * (act * u), axis=1)
                gl.store(partial_ptr + (row + r) * tiles_n + n, part, mask=r < valid)
                wa = (act * u * weight[:, None]).to(dtype)
                da = acc * weight[:, None]
                d_gate = (da * u * (s + act * (1.0 - s))).to(dtype)
                d_up = (da * act).to(dtype)
                _sync()
                gate_buffer.store(d_gate)
                up_buffer.store(d_up)
                wa_buffer.store(wa)
                fence_async_shared()
                _sync()
                _store(gate_buffer, out_desc, out_ptr, out_stride, row, column, valid, N, WIDTH)
                _store(up_buffer, out2_desc, out2_ptr, out_stride, row, column, valid, N, WIDTH)
                _store(wa_buffer, out3_desc, out3_ptr, out3_stride, row, column, valid, N, WIDTH)
        else:
            for k in range(k_tiles):
                stage = it % STAGES
                mbarrier.wait(full.index(stage), (it // STAGES) & 1)
                _release(empty, it, STAGES, True)
                it += 1
    tma.store_wait(0)


@gluon.jit
def rows_kernel(
    a_desc, a_ptr, token_ptr, b_desc, out_desc, out_ptr, out2_desc, out2_ptr, out3_desc, out3_ptr,
    h_desc, h2_desc, weight_ptr, partial_ptr, tile_expert_ptr, tile_row_ptr, ends_ptr, count_ptr,
    N, K, b_rows, second, out_stride, out3_stride,
    EPILOGUE: gl.constexpr, GATHER: gl.constexpr, B_KMAJOR: gl.constexpr, KEEP_H: gl.constexpr,
    BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr,
    PRODUCER_WARPS: gl.constexpr, CONSUMER_REGS: gl.constexpr, PRODUCER_REGS: gl.constexpr,
):  # fmt: skip
    """One of the four products along rows.

    EPILOGUE "plain": out[s] = a[s] @ B. "swiglu": B's tile is a pair of N/2 gate and N/2 up rows;
    out, out2 take the halves of h (if KEEP_H), out3 takes a = silu(gate) * up. "dact": the product
    is da; with h read back, out, out2 take the halves of dh, out3 takes weight * a and partial the
    sums <da, a> of each tile. N counts the columns of `out`; `second` is the distance of the up
    rows from the gate rows; `b_rows` the rows of B an expert has.
    """
    PAIR: gl.constexpr = EPILOGUE == "swiglu"
    dtype: gl.constexpr = a_ptr.dtype.element_ty
    a_smem = gl.allocate_shared_memory(dtype, [2 * STAGES, HALF, BK], a_desc.layout)
    if PAIR:
        b_smem = gl.allocate_shared_memory(dtype, [2 * STAGES, BN // 2, BK], b_desc.layout)
    elif B_KMAJOR:
        b_smem = gl.allocate_shared_memory(dtype, [STAGES, BN, BK], b_desc.layout)
    else:
        b_smem = gl.allocate_shared_memory(dtype, [STAGES, BK, BN], b_desc.layout)
    BUFFERS: gl.constexpr = 4 if PAIR else (6 if EPILOGUE == "dact" else 2)
    WIDTH: gl.constexpr = BN // 2 if PAIR else BN
    c_smem = gl.allocate_shared_memory(dtype, [BUFFERS, HALF, WIDTH], out_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    h_bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    # cp.async arrives once a thread (noinc): the count holds every producer thread and the copy.
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1 + (32 * PRODUCER_WARPS if GATHER else 0))
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(h_bars.index(i), count=1)
    fence_async_shared()
    _sync()
    gl.warp_specialize(
        [
            (_rows_consumer, (
                a_smem, b_smem, c_smem, full, empty, h_bars.index(0), tile_expert_ptr, tile_row_ptr,
                ends_ptr, count_ptr, out_desc, out_ptr, out2_desc, out2_ptr, out3_desc, out3_ptr,
                h_desc, h2_desc, weight_ptr, partial_ptr, N, K, out_stride, out3_stride,
                0, EPILOGUE, GATHER, B_KMAJOR, BN, BK, STAGES, GROUP_M, KEEP_H,
            )),
            (_rows_consumer, (
                a_smem, b_smem, c_smem, full, empty, h_bars.index(1), tile_expert_ptr, tile_row_ptr,
                ends_ptr, count_ptr, out_desc, out_ptr, out2_desc, out2_ptr, out3_desc, out3_ptr,
                h_desc, h2_desc, weight_ptr, partial_ptr, N, K, out_stride, out3_stride,
                1, EPILOGUE, GATHER, B_KMAJOR, BN, BK, STAGES, GROUP_M, KEEP_H,
            )),
            (_rows_producer, (
                a_desc, a_ptr, token_ptr, b_desc, tile_expert_ptr, tile_row_ptr, ends_ptr,
                count_ptr, a_smem, b_smem, full, empty, N, K, b_rows, second,
                GATHER, B_KMAJOR, PAIR, BN, BK, STAGES, GROUP_M,
            )),
        ],
        [4, PRODUCER_WARPS],
        [CONSUMER_REGS, PRODUCER_REGS],
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------
# outer: out[e] = sum over the rows s of expert e of a[s] (x) b[s]
# ---------------------------------------------------------------------------------------------


@gluon.jit
def _outer_producer(
    a_desc, a_ptr, b_desc, b_ptr, token_ptr, ends_ptr, a_smem, b_smem, full, empty,
    experts, M, N,
    GATHER_A: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    tiles_m = gl.cdiv(M, BM)
    tiles_n = gl.cdiv(N, BN)
    per_expert = tiles_m * tiles_n
    it = 0
    a_layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    b_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BN, BN // 8], [4, 1], [1, 0])
    for tile in range(gl.program_id(0), experts * per_expert, gl.num_programs(0)):
        expert = tile // per_expert
        m, n = _swizzle(tile - expert * per_expert, tiles_m, tiles_n, GROUP_M)
        begin = gl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
        end = gl.load(ends_ptr + expert)
        if GATHER_A:
            r = gl.arange(0, BK, layout=gl.SliceLayout(1, a_layout))
            c = m * BM + gl.arange(0, HALF, layout=gl.SliceLayout(0, a_layout))
            width = M
        else:
            r = gl.arange(0, BK, layout=gl.SliceLayout(1, b_layout))
            c = n * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, b_layout))
            width = N
        token = gl.load(token_ptr + begin + r, mask=begin + r < end, other=0)
        for row in range(begin, end, BK):
            stage = it % STAGES
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), ((it // STAGES) & 1) ^ 1)
            mine = (row + r < end)[:, None]
            where = token.to(gl.int64)[:, None] * width + c[None, :]
            if GATHER_A:
                mbarrier.expect(bar, BN * BK * 2)
                _tma_load(b_desc, [row, n * BN], bar, b_smem.index(stage))
                _cp_async(a_smem.index(2 * stage), a_ptr + where, mask=mine & (c < M)[None, :])
                _cp_async(
                    a_smem.index(2 * stage + 1),
                    a_ptr + where + HALF,
                    mask=mine & (c + HALF < M)[None, :],
                )
            else:
                mbarrier.expect(bar, BM * BK * 2)
                _tma_load(a_desc, [row, m * BM], bar, a_smem.index(2 * stage))
                _tma_load(a_desc, [row, m * BM + HALF], bar, a_smem.index(2 * stage + 1))
                _cp_async(b_smem.index(stage), b_ptr + where, mask=mine & (c < N)[None, :])
            async_copy.mbarrier_arrive(bar, increment_count=False)
            token = gl.load(token_ptr + row + BK + r, mask=row + BK + r < end, other=0)
            it += 1


@gluon.jit
def _outer_consumer(
    a_smem, b_smem, c_smem, full, empty, ends_ptr, out_desc, out_ptr, experts, M, N,
    WG: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    tiles_m = gl.cdiv(M, BM)
    tiles_n = gl.cdiv(N, BN)
    per_expert = tiles_m * tiles_n
    it = 0
    for tile in range(gl.program_id(0), experts * per_expert, gl.num_programs(0)):
        expert = tile // per_expert
        m, n = _swizzle(tile - expert * per_expert, tiles_m, tiles_n, GROUP_M)
        begin = gl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
        end = gl.load(ends_ptr + expert)
        acc = gl.zeros((HALF, BN), gl.float32, layout=mma)
        for row in range(begin, end, BK):
            stage = it % STAGES
            mbarrier.wait(full.index(stage), (it // STAGES) & 1)
            fence_async_shared()
            a = a_smem.index(2 * stage + WG).permute((1, 0))
            acc = warpgroup_mma(a, b_smem.index(stage), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            _release(empty, it - 1, STAGES, row > begin)
            it += 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        _release(empty, it - 1, STAGES, end > begin)
        buffer = c_smem.index(WG)
        value = acc.to(dtype)
        tma.store_wait(0)
        _sync()
        buffer.store(value)
        fence_async_shared()
        _sync()
        first = m * BM + WG * HALF
        where = expert * M + first
        _store(buffer, out_desc, out_ptr, N, where, n * BN, M - first, N, BN)
    tma.store_wait(0)


@gluon.jit
def outer_kernel(
    a_desc, a_ptr, b_desc, b_ptr, token_ptr, ends_ptr, out_desc, out_ptr, experts, M, N,
    GATHER_A: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr, GROUP_M: gl.constexpr,
    PRODUCER_WARPS: gl.constexpr, CONSUMER_REGS: gl.constexpr, PRODUCER_REGS: gl.constexpr,
):  # fmt: skip
    """out[e, m, n] = sum over rows s of expert e of a[s, m] * b[s, n]; out is [E * M, N].

    One of the two is gathered through the token index (`GATHER_A`, else b), the other is
    contiguous. An expert without rows gets zeros.
    """
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    a_smem = gl.allocate_shared_memory(dtype, [2 * STAGES, BK, HALF], a_desc.layout)
    b_smem = gl.allocate_shared_memory(dtype, [STAGES, BK, BN], b_desc.layout)
    c_smem = gl.allocate_shared_memory(dtype, [2, HALF, BN], out_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1 + 32 * PRODUCER_WARPS)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    _sync()
    gl.warp_specialize(
        [
            (_outer_consumer, (
                a_smem, b_smem, c_smem, full, empty, ends_ptr, out_desc, out_ptr, experts, M, N,
                0, BM, BN, BK, STAGES, GROUP_M,
            )),
            (_outer_consumer, (
                a_smem, b_smem, c_smem, full, empty, ends_ptr, out_desc, out_ptr, experts, M, N,
                1, BM, BN, BK, STAGES, GROUP_M,
            )),
            (_outer_producer, (
                a_desc, a_ptr, b_desc, b_ptr, token_ptr, ends_ptr, a_smem, b_smem, full, empty,
                experts, M, N, GATHER_A, BM, BN, BK, STAGES, GROUP_M,
            )),
        ],
        [4, PRODUCER_WARPS],
        [CONSUMER_REGS, PRODUCER_REGS],
    )  # fmt: skip
