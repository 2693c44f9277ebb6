"""Products along sorted rows on Hopper, in Gluon: a loading partition feeds two multiplying ones.

out[s] = a[s] @ weight[expert of s] for S routed rows sorted by expert. Persistent: a program walks
over tiles of 128 rows. Its producer warps fill a ring of shared memory, weights and contiguous rows
by tensor-memory copies, gathered rows by cp.async through the token index; two consumer warpgroups
of 64 rows each run wgmma on it and give the results away while the next tile is being loaded. The
activation's gradient is taken by a fourth group of warps, `hopper_finish`.
Nothing is padded in memory: the last tile of an expert stores only its own rows, and its second
warpgroup rests when the rows fit into the first. No atomics: one program writes an element.
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
    activate,
    chunks,
    cp_async,
    eights,
    emit,
    emit_all,
    halves,
    look,
    release,
    sync,
    tma_load,
)
from moesaic.kernels.triton.hopper_finish import PART, bring, finish


@gluon.jit
def _tokens(token_ptr, row, left, r):
    """Tokens of a tile's rows; past the expert's end its last one, which is never stored."""
    return gl.load(token_ptr + row + gl.minimum(r, left - 1))


@gluon.jit
def _producer(
    a_desc, a_ptr, token_ptr, b_desc, places, a_smem, b_smem, full, empty,
    N, K, b_rows, second, group_m,
    GATHER: gl.constexpr, EVEN_K: gl.constexpr, B_KMAJOR: gl.constexpr, PAIR: gl.constexpr,
    BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    tile_expert_ptr, tile_row_ptr, tile_left_ptr, count_ptr = places
    K = eights(K)
    WIDTH: gl.constexpr = BN // 2 if PAIR else BN
    A_BYTES: gl.constexpr = 2 * HALF * BK * 2
    B_BYTES: gl.constexpr = BN * BK * 2
    tiles_m = gl.load(count_ptr)
    tiles_n = gl.cdiv(N, WIDTH)
    k_tiles = gl.cdiv(K, BK)
    it = 0
    tiles = tiles_m * tiles_n
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    r = gl.arange(0, 2 * HALF, layout=gl.SliceLayout(1, layout))
    c = gl.arange(0, BK, layout=gl.SliceLayout(0, layout))
    # The place of the next tile and its tokens are read while this one is loaded, and the place of
    # the one after: no load ever waits for the number that says what to load.
    now = look(0, tiles, tiles_m, tiles_n, group_m, tile_expert_ptr, tile_row_ptr, tile_left_ptr)
    then = look(1, tiles, tiles_m, tiles_n, group_m, tile_expert_ptr, tile_row_ptr, tile_left_ptr)
    row, left, column_tile, expert = now
    next_row, next_left, next_column_tile, next_expert = then
    if GATHER:
        token = _tokens(token_ptr, row, left, r)
    turn = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        after_row, after_left, after_column_tile, after_expert = look(
            turn + 2, tiles, tiles_m, tiles_n, group_m, tile_expert_ptr, tile_row_ptr, tile_left_ptr
        )
        b_row = expert * b_rows
        column = column_tile * WIDTH
        if GATHER:
            source = a_ptr + token.to(gl.int64)[:, None] * K + c[None, :]
            token = _tokens(token_ptr, next_row, next_left, r)
        for k in range(k_tiles):
            stage = it % STAGES
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), ((it // STAGES) & 1) ^ 1)
            if GATHER:
                mbarrier.expect(bar, B_BYTES)
            else:
                mbarrier.expect(bar, B_BYTES + A_BYTES)
                tma_load(a_desc, [row, k * BK], bar, a_smem.index(stage))
            if PAIR:
                b_gate = b_smem.index(stage).slice(0, WIDTH, dim=0)
                b_up = b_smem.index(stage).slice(WIDTH, WIDTH, dim=0)
                tma_load(b_desc, [b_row + column, k * BK], bar, b_gate)
                tma_load(b_desc, [b_row + second + column, k * BK], bar, b_up)
            elif B_KMAJOR:
                tma_load(b_desc, [b_row + column, k * BK], bar, b_smem.index(stage))
            else:
                tma_load(b_desc, [b_row + k * BK, column], bar, b_smem.index(stage))
            if GATHER:
                if EVEN_K:
                    cp_async(a_smem.index(stage), source)
                else:
                    cp_async(a_smem.index(stage), source, mask=(k * BK + c < K)[None, :])
                source += BK
                async_copy.mbarrier_arrive(bar, increment_count=False)
            it += 1
        row, left, column_tile, expert = next_row, next_left, next_column_tile, next_expert
        next_row, next_left, next_column_tile = after_row, after_left, after_column_tile
        next_expert = after_expert
        turn += 1


@gluon.jit
def _tile(
    a_smem, b_smem, buffers, full, empty, ready, free, it, given, row, column, valid, k_tiles,
    out_ptr, out_desc, out2_ptr, out2_desc, out3_ptr, out3_desc, N, out_stride, out3_stride,
    WG: gl.constexpr, EPILOGUE: gl.constexpr, GATHER: gl.constexpr, B_KMAJOR: gl.constexpr,
    KEEP_H: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
    WIDTH: gl.constexpr, ACTIVATION: gl.constexpr, LOADER: gl.constexpr,
):  # fmt: skip
    """Multiply and give away 64 rows of a tile, WIDTH columns of each matrix; return the step."""
    PAIR: gl.constexpr = EPILOGUE == "swiglu"
    # Two products of half the columns: one of 256 wants more registers than there are for 16 warps.
    TWO: gl.constexpr = LOADER and WIDTH == 256
    MMA_WIDTH: gl.constexpr = WIDTH // 2 if TWO else WIDTH
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, MMA_WIDTH, 16])
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    SPLIT: gl.constexpr = PAIR and 2 * WIDTH < BN  # gate and up columns that are not neighbours
    if PAIR and not SPLIT:
        both: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
        acc = gl.zeros((HALF, BN), gl.float32, layout=both)
    else:
        acc = gl.zeros((HALF, MMA_WIDTH), gl.float32, layout=mma)
    if SPLIT or TWO:
        acc2 = gl.zeros((HALF, MMA_WIDTH), gl.float32, layout=mma)
    for k in range(k_tiles):
        stage = it % STAGES
        mbarrier.wait(full.index(stage), (it // STAGES) & 1)
        if GATHER:
            fence_async_shared()
        a = a_smem.index(stage).slice(WG * HALF, HALF, dim=0)
        if SPLIT:
            b_gate = b_smem.index(stage).slice(0, WIDTH, dim=0).permute((1, 0))
            b_up = b_smem.index(stage).slice(BN // 2, WIDTH, dim=0).permute((1, 0))
            acc = warpgroup_mma(a, b_gate, acc, is_async=True)
            acc2 = warpgroup_mma(a, b_up, acc2, is_async=True)
            acc, acc2 = warpgroup_mma_wait(2, deps=(acc, acc2))
        elif TWO:
            b_left = b_smem.index(stage).slice(0, MMA_WIDTH, dim=1)
            b_right = b_smem.index(stage).slice(MMA_WIDTH, MMA_WIDTH, dim=1)
            acc = warpgroup_mma(a, b_left, acc, is_async=True)
            acc2 = warpgroup_mma(a, b_right, acc2, is_async=True)
            acc, acc2 = warpgroup_mma_wait(2, deps=(acc, acc2))
        else:
            if PAIR:
                b = b_smem.index(stage).permute((1, 0))
            elif B_KMAJOR:
                b = b_smem.index(stage).slice(0, WIDTH, dim=0).permute((1, 0))
            else:
                b = b_smem.index(stage).slice(0, WIDTH, dim=1)
            acc = warpgroup_mma(a, b, acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
        release(empty, it - 1, STAGES, k > 0)
        it += 1
    if SPLIT or TWO:
        acc, acc2 = warpgroup_mma_wait(0, deps=(acc, acc2))
    else:
        acc = warpgroup_mma_wait(0, deps=(acc,))
    release(empty, it - 1, STAGES, True)
    COUNT: gl.constexpr = WIDTH // CHUNK
    if EPILOGUE == "plain":
        parts = chunks(acc.to(dtype))
        emit_all(parts, buffers, out_desc, out_ptr, out_stride, row, column, valid, N, COUNT)
    elif EPILOGUE == "swiglu":
        if SPLIT:
            gates = chunks(acc.to(dtype))
            ups = chunks(acc2.to(dtype))
        else:
            gate_half, up_half = halves(acc.to(dtype))
            gates = chunks(gate_half)
            ups = chunks(up_half)
        for j in gl.static_range(COUNT):
            at = column + j * CHUNK
            if KEEP_H:
                emit(gates[j], buffers, 3 * j, out_desc, out_ptr, out_stride, row, at, valid, N)
                emit(ups[j], buffers, 3 * j + 1, out2_desc, out2_ptr, out_stride, row, at, valid, N)
            # From the rounded h, as the backward pass will see it.
            act, _ = activate(gates[j].to(gl.float32), ACTIVATION)
            value = (act * ups[j].to(gl.float32)).to(dtype)
            emit(value, buffers, 3 * j + 2, out3_desc, out3_ptr, out3_stride, row, at, valid, N)
    else:
        parts = chunks(acc.to(dtype)) + chunks(acc2.to(dtype)) if TWO else chunks(acc.to(dtype))
        mbarrier.wait(free.index(WG), (given & 1) ^ 1)
        for j in gl.static_range(COUNT):
            buffers.index(WG * (BN // CHUNK) + j).store(parts[j])
        sync()
        mbarrier.arrive(ready.index(WG), count=1)
    return it


@gluon.jit
def _consumer(
    a_smem, b_smem, buffers, handed, places, outputs, sizes,
    WG: gl.constexpr, EPILOGUE: gl.constexpr, GATHER: gl.constexpr, B_KMAJOR: gl.constexpr,
    KEEP_H: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
    ACTIVATION: gl.constexpr, LOADER: gl.constexpr,
):  # fmt: skip
    full, empty, ready, free = handed
    tile_expert_ptr, tile_row_ptr, tile_left_ptr, count_ptr = places
    out_ptr, out_desc, out2_ptr, out2_desc, out3_ptr, out3_desc = outputs
    N, K, out_stride, out3_stride, group_m = sizes
    WIDTH: gl.constexpr = BN // 2 if EPILOGUE == "swiglu" else BN
    NARROW: gl.constexpr = WIDTH // 2 if WIDTH > CHUNK else WIDTH
    tiles_m = gl.load(count_ptr)
    tiles_n = gl.cdiv(N, WIDTH)
    k_tiles = gl.cdiv(K, BK)
    it = 0
    tiles = tiles_m * tiles_n
    first, left, column_tile, _ = look(
        0, tiles, tiles_m, tiles_n, group_m, tile_expert_ptr, tile_row_ptr, tile_left_ptr
    )
    turn = 0
    given = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        turn += 1
        next_first, next_left, next_column_tile, _ = look(
            turn, tiles, tiles_m, tiles_n, group_m, tile_expert_ptr, tile_row_ptr, tile_left_ptr
        )
        row = first + WG * HALF
        valid = left - WG * HALF
        column = column_tile * WIDTH
        if valid <= 0:
            for k in range(k_tiles):
                mbarrier.wait(full.index(it % STAGES), (it // STAGES) & 1)
                release(empty, it, STAGES, True)
                it += 1
        elif N - column > NARROW or NARROW == WIDTH:
            it = _tile(
                a_smem, b_smem, buffers, full, empty, ready, free, it, given, row, column, valid,
                k_tiles, out_ptr, out_desc, out2_ptr, out2_desc, out3_ptr, out3_desc, N,
                out_stride, out3_stride,
                WG, EPILOGUE, GATHER, B_KMAJOR, KEEP_H, BN, BK, STAGES, WIDTH, ACTIVATION,
                LOADER,
            )  # fmt: skip
            given += 1
        else:
            # The last columns fit into half the width: half the products.
            it = _tile(
                a_smem, b_smem, buffers, full, empty, ready, free, it, given, row, column, valid,
                k_tiles, out_ptr, out_desc, out2_ptr, out2_desc, out3_ptr, out3_desc, N,
                out_stride, out3_stride,
                WG, EPILOGUE, GATHER, B_KMAJOR, KEEP_H, BN, BK, STAGES, NARROW, ACTIVATION,
                LOADER,
            )  # fmt: skip
            given += 1
        first, left, column_tile = next_first, next_left, next_column_tile
    if EPILOGUE != "dact":
        tma.store_wait(0)


@gluon.jit(do_not_specialize=["group_m"])
def rows_kernel(
    a_desc, a_ptr, token_ptr, b_desc, out_ptr, out_desc, out2_ptr, out2_desc, out3_ptr, out3_desc,
    h_desc, weight_ptr, partial_ptr, tile_expert_ptr, tile_row_ptr, tile_left_ptr,
    count_ptr, N, K, b_rows, second, out_stride, out3_stride, group_m,
    EPILOGUE: gl.constexpr, GATHER: gl.constexpr, EVEN_K: gl.constexpr, B_KMAJOR: gl.constexpr,
    KEEP_H: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
    BUFFERS: gl.constexpr, ACTIVATION: gl.constexpr, PRODUCER_WARPS: gl.constexpr,
    CONSUMER_REGS: gl.constexpr, OTHER_REGS: gl.constexpr, FINISHER_WARPS: gl.constexpr,
    LOADER: gl.constexpr,
):  # fmt: skip
    """One of the four products along rows.

    EPILOGUE "plain": out[s] = a[s] @ B. "swiglu": B's tile is a pair of gate and up rows; out, out2
    take the halves of h (if KEEP_H), out3 takes a = act(gate) * up. "dact": the product is da; with
    h read back, out, out2 take the halves of dh, out3 takes weight * a and partial the sums <da, a>
    of each tile. N counts the columns of `out`; `second` is the distance of B's up rows from the
    gate rows, or ("dact") of h's up columns from the gate columns; `b_rows` the rows of B from one
    expert to the next. FINISHER_WARPS and LOADER ("dact"): see `hopper_finish`.
    """
    PAIR: gl.constexpr = EPILOGUE == "swiglu"
    dtype: gl.constexpr = a_ptr.dtype.element_ty
    swizzled: gl.constexpr = b_desc.layout
    a_smem = gl.allocate_shared_memory(dtype, [STAGES, 2 * HALF, BK], swizzled)
    if B_KMAJOR:
        b_smem = gl.allocate_shared_memory(dtype, [STAGES, BN, BK], swizzled)
    else:
        b_smem = gl.allocate_shared_memory(dtype, [STAGES, BK, BN], swizzled)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    # Every gathering thread arrives when its copies have, and tensor memory counts for one.
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1 + (32 * PRODUCER_WARPS if GATHER else 0))
        mbarrier.init(empty.index(i), count=2)
    # Only barriers that are waited for: Triton gives the memory of others to the buffers, and where
    # a barrier was, a GPU that interrupts the kernel (another process comes or goes) may put it
    # back, 32 bytes of NaN in a result.
    ready, free = full, empty
    if EPILOGUE == "dact":
        ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        # The finisher sees both consumers' buffers as one.
        buffers0 = gl.allocate_shared_memory(dtype, [2 * BUFFERS, HALF, CHUNK], swizzled)
        buffers1 = buffers0
        h_smem = gl.allocate_shared_memory(dtype, [4, PART, CHUNK], swizzled)
        fetched = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        emptied = fetched
        if LOADER:
            emptied = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(2):
            mbarrier.init(ready.index(i), count=1)
            mbarrier.init(free.index(i), count=1)
            mbarrier.init(fetched.index(i), count=1)
            if LOADER:
                mbarrier.init(emptied.index(i), count=1)
    else:
        buffers0 = gl.allocate_shared_memory(dtype, [BUFFERS, HALF, CHUNK], swizzled)
        buffers1 = gl.allocate_shared_memory(dtype, [BUFFERS, HALF, CHUNK], swizzled)
    fence_async_shared()
    sync()
    places = (tile_expert_ptr, tile_row_ptr, tile_left_ptr, count_ptr)
    handed = (full, empty, ready, free)
    outputs = (out_ptr, out_desc, out2_ptr, out2_desc, out3_ptr, out3_desc)
    sizes = (N, K, out_stride, out3_stride, group_m)
    if LOADER:
        gl.warp_specialize(
            [
                (_consumer, (
                    a_smem, b_smem, buffers0, handed, places, outputs, sizes,
                    0, EPILOGUE, GATHER, B_KMAJOR, KEEP_H, BN, BK, STAGES, ACTIVATION, LOADER,
                )),
                (_consumer, (
                    a_smem, b_smem, buffers1, handed, places, outputs, sizes,
                    1, EPILOGUE, GATHER, B_KMAJOR, KEEP_H, BN, BK, STAGES, ACTIVATION, LOADER,
                )),
                (_producer, (
                    a_desc, a_ptr, token_ptr, b_desc, places, a_smem, b_smem, full, empty,
                    N, K, b_rows, second, group_m,
                    GATHER, EVEN_K, B_KMAJOR, PAIR, BN, BK, STAGES,
                )),
                (bring, (h_smem, fetched, emptied, places, h_desc, N, second, group_m, BN)),
                (finish, (
                    buffers0, ready, free, h_smem, fetched, emptied, places, h_desc, out_ptr,
                    out2_ptr, out3_ptr, weight_ptr, partial_ptr, N, second, out_stride, out3_stride,
                    group_m, BN, ACTIVATION, LOADER,
                )),
            ],
            [4, PRODUCER_WARPS, 1, FINISHER_WARPS],
            [CONSUMER_REGS, OTHER_REGS, OTHER_REGS, OTHER_REGS],
        )  # fmt: skip
    elif EPILOGUE == "dact":
        gl.warp_specialize(
            [
                (_consumer, (
                    a_smem, b_smem, buffers0, handed, places, outputs, sizes,
                    0, EPILOGUE, GATHER, B_KMAJOR, KEEP_H, BN, BK, STAGES, ACTIVATION, LOADER,
                )),
                (_consumer, (
                    a_smem, b_smem, buffers1, handed, places, outputs, sizes,
                    1, EPILOGUE, GATHER, B_KMAJOR, KEEP_H, BN, BK, STAGES, ACTIVATION, LOADER,
                )),
                (_producer, (
                    a_desc, a_ptr, token_ptr, b_desc, places, a_smem, b_smem, full, empty,
                    N, K, b_rows, second, group_m,
                    GATHER, EVEN_K, B_KMAJOR, PAIR, BN, BK, STAGES,
                )),
                (finish, (
                    buffers0, ready, free, h_smem, fetched, emptied, places, h_desc, out_ptr,
                    out2_ptr, out3_ptr, weight_ptr, partial_ptr, N, second, out_stride, out3_stride,
                    group_m, BN, ACTIVATION, LOADER,
                )),
            ],
            [4, PRODUCER_WARPS, FINISHER_WARPS],
            [CONSUMER_REGS, OTHER_REGS, OTHER_REGS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consumer, (
                    a_smem, b_smem, buffers0, handed, places, outputs, sizes,
                    0, EPILOGUE, GATHER, B_KMAJOR, KEEP_H, BN, BK, STAGES, ACTIVATION, LOADER,
                )),
                (_consumer, (
                    a_smem, b_smem, buffers1, handed, places, outputs, sizes,
                    1, EPILOGUE, GATHER, B_KMAJOR, KEEP_H, BN, BK, STAGES, ACTIVATION, LOADER,
                )),
                (_producer, (
                    a_desc, a_ptr, token_ptr, b_desc, places, a_smem, b_smem, full, empty,
                    N, K, b_rows, second, group_m,
                    GATHER, EVEN_K, B_KMAJOR, PAIR, BN, BK, STAGES,
                )),
            ],
            [4, PRODUCER_WARPS],
            [CONSUMER_REGS, OTHER_REGS],
        )  # fmt: skip
