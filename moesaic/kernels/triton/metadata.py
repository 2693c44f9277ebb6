"""Which row goes where: routed rows sorted by expert, without a sort and without asking the GPU.

T tokens, K experts a token, N = T*K routed rows, E experts. Rows keep their order within an expert
(a stable counting sort), so two runs give the same bits. An id outside [0, E) is a row that belongs
to nobody here (expert parallelism marks such rows with E): it gets position -1 and enters no
product. Three launches: histograms of blocks, a prefix sum for each expert, positions and tiles.

Experts are also listed by falling number of rows: kernels whose tiles sum over an expert's rows
take the long ones first, so that short ones fill the gaps at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from moesaic.kernels.triton.launch import Launcher

BLOCK = 256
"""Routed rows that one program counts and places."""
TILE_ROWS = 128
"""Rows of a tile of the Hopper kernels."""
_SCAN = 1024


@dataclass(frozen=True)
class Routing:
    """Where every routed row lies; all tensors stay on the device and are views of two."""

    ints: torch.Tensor
    """All of the integers below."""
    weight_N: torch.Tensor
    """Routing weight of each sorted row, float32."""
    token_N: torch.Tensor
    """Token of each sorted row, int32; undefined past the last expert's end."""
    inverse_N: torch.Tensor
    """Sorted position of flat row t*K + k, int32; -1 for a row of nobody here."""
    tile_expert: torch.Tensor
    """Expert of each row tile, int32 [tiles]; only the first `tiles[0]` count."""
    tile_row: torch.Tensor
    """First sorted row of each row tile, int32 [tiles]."""
    tile_left: torch.Tensor
    """Rows from there to the expert's end, int32 [tiles]; more than `tile_rows` if tiles follow."""
    ends_E: torch.Tensor
    """Where each expert's rows end, int32."""
    totals_E: torch.Tensor
    """Rows of each expert, int32."""
    by_size: torch.Tensor
    """Experts from most rows to fewest, int32 [3 * E]: first row, end, and number of each."""
    tickets: torch.Tensor
    """Counters of `hopper_outer`, int32 [4]: zeros between its launches."""
    tiles: torch.Tensor
    """Number of row tiles, int32 [1]."""
    tile_rows: int
    """Rows of a tile."""

    @classmethod
    def of(
        cls, ints: torch.Tensor, weight_N: torch.Tensor, *, experts: int, tile_rows: int
    ) -> Routing:
        """Cut `ints` into its parts."""
        parts: list[torch.Tensor] = list(ints.split(_sizes(weight_N.shape[0], experts, tile_rows)))
        token_N, inverse_N, expert, row, left, ends_E, totals_E, by_size, tickets, tiles = parts
        return cls(
            ints,
            weight_N,
            token_N,
            inverse_N,
            expert,
            row,
            left,
            ends_E,
            totals_E,
            by_size,
            tickets,
            tiles,
            tile_rows,
        )

    @property
    def most_tiles(self) -> int:
        """Upper bound of the number of row tiles, known without asking the device."""
        return int(self.tile_expert.shape[0])


def _sizes(rows: int, experts: int, tile_rows: int) -> list[int]:
    tiles = -(-rows // tile_rows) + experts
    return [rows, rows, tiles, tiles, tiles, experts, experts, 3 * experts, 4, 1]


def count_ints(rows: int, experts: int, tile_rows: int) -> int:
    """Return the number of integers of a `Routing`."""
    return sum(_sizes(rows, experts, tile_rows))


def route(
    ids_TK: torch.Tensor, weights_TK: torch.Tensor, *, experts: int, tile_rows: int
) -> Routing:
    """Sort routed rows by expert and cut each expert's rows into tiles of `tile_rows`."""
    rows, device = ids_TK.numel(), ids_TK.device
    blocks = -(-rows // BLOCK)
    bins = triton.next_power_of_2(experts + 1)
    ids_TK, weights_TK = ids_TK.contiguous(), weights_TK.contiguous()
    ints = torch.empty(count_ints(rows, experts, tile_rows), dtype=torch.int32, device=device)
    weight_N = torch.empty(rows, dtype=torch.float32, device=device)
    routing = Routing.of(ints, weight_N, experts=experts, tile_rows=tile_rows)
    counts = torch.empty(blocks, experts, dtype=torch.int32, device=device)
    _start_count((blocks,), ids_TK, counts, rows, experts, bins, BLOCK)
    _start_scan((experts,), counts, routing.totals_E, blocks, experts, _SCAN)
    _start_place(
        (blocks + experts,),
        ids_TK, weights_TK, counts, routing.totals_E, routing.token_N, weight_N,
        routing.inverse_N, routing.ends_E, routing.tile_expert, routing.tile_row,
        routing.tile_left, routing.tiles, routing.by_size, routing.tickets, rows, experts, blocks,
        ids_TK.shape[1], bins, BLOCK, tile_rows,
    )  # fmt: skip
    return routing


@triton.jit
def _count(ids_ptr, counts_ptr, rows, experts, BINS: tl.constexpr, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    row = pid * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + row, mask=row < rows, other=-1).to(tl.int32)
    ids = tl.where((ids >= 0) & (ids < experts), ids, experts)
    counts = tl.histogram(ids, BINS)
    expert = tl.arange(0, BINS)
    tl.store(counts_ptr + pid * experts + expert, counts, mask=expert < experts)


@triton.jit
def _scan(counts_ptr, totals_ptr, blocks, experts, SCAN: tl.constexpr):
    expert = tl.program_id(0)
    total = 0
    for start in range(0, blocks, SCAN):
        block = start + tl.arange(0, SCAN)
        where = counts_ptr + block * experts + expert
        counts = tl.load(where, mask=block < blocks, other=0)
        tl.store(where, total + tl.cumsum(counts, 0) - counts, mask=block < blocks)
        total += tl.sum(counts, 0)
    tl.store(totals_ptr + expert, total)


@triton.jit
def _place(
    ids_ptr, weights_ptr, before_ptr, totals_ptr, token_ptr, weight_ptr, inverse_ptr, ends_ptr,
    tile_expert_ptr, tile_row_ptr, tile_left_ptr, tiles_ptr, by_size_ptr, tickets_ptr, rows,
    experts, blocks, TOP_K: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    bin_ = tl.arange(0, BINS)
    totals = tl.load(totals_ptr + bin_, mask=bin_ < experts, other=0)
    if pid < blocks:
        place = tl.arange(0, BLOCK)
        own = pid * BLOCK + place
        ids = tl.load(ids_ptr + own, mask=own < rows, other=-1).to(tl.int32)
        mine = (ids >= 0) & (ids < experts)
        tl.store(inverse_ptr + own, -1, mask=(own < rows) & ~mine)
        ids = tl.where(mine, ids, experts)
        # Sorting the block by expert, and by place within it, takes a tenth of the instructions of
        # comparing every two rows; and rows that go to neighbouring places are then neighbours.
        key = tl.sort(ids * BLOCK + place)
        id_ = key // BLOCK
        row = pid * BLOCK + key % BLOCK
        inside = id_ < experts
        here = tl.histogram(ids, BINS)
        before = tl.load(before_ptr + pid * experts + bin_, mask=bin_ < experts, other=0)
        # An expert's rows begin where the ones before it end, in all as in this block.
        shift = tl.cumsum(totals, 0) - totals + before - (tl.cumsum(here, 0) - here)
        position = tl.gather(shift, id_, 0) + place
        weight = tl.load(weights_ptr + row, mask=inside, other=0).to(tl.float32)
        tl.store(token_ptr + position, row // TOP_K, mask=inside)
        tl.store(weight_ptr + position, weight, mask=inside)
        tl.store(inverse_ptr + row, position, mask=inside)
    else:
        expert = pid - blocks
        tiles = (totals + TILE - 1) // TILE
        first = tl.sum(tl.where(bin_ < expert, tiles, 0), 0)
        start = tl.sum(tl.where(bin_ < expert, totals, 0), 0)
        owned = tl.sum(tl.where(bin_ == expert, tiles, 0), 0)
        size = tl.sum(tl.where(bin_ == expert, totals, 0), 0)
        # Here, not with the rows: without a single row there are ends, too.
        tl.store(ends_ptr + expert, start + size)
        larger = (totals > size) | ((totals == size) & (bin_ < expert))
        rank = tl.sum((larger & (bin_ < experts)).to(tl.int32), 0)
        tl.store(by_size_ptr + rank, start)
        tl.store(by_size_ptr + experts + rank, start + size)
        tl.store(by_size_ptr + 2 * experts + rank, expert)
        for tile in range(owned):
            tl.store(tile_expert_ptr + first + tile, expert)
            tl.store(tile_row_ptr + first + tile, start + tile * TILE)
            tl.store(tile_left_ptr + first + tile, size - tile * TILE)
        if expert == experts - 1:
            tl.store(tiles_ptr, first + owned)
            tl.store(tickets_ptr + tl.arange(0, 4), 0)
            if first + owned == 0:  # no row at all: a place that may be read, though not used
                tl.store(tile_expert_ptr, 0)
                tl.store(tile_row_ptr, 0)
                tl.store(tile_left_ptr, 1)
                if rows > 0:
                    tl.store(token_ptr, 0)


_start_count, _start_scan, _start_place = (Launcher(k) for k in (_count, _scan, _place))
