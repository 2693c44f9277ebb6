"""Parts of the rows: a routing that knows only some of the row tiles, and counts rows from there.

Where the tiles of a part begin is known on the device only; the rows that they may touch are known
here (`budget.spans`). Tensors of rows are cut at the first of these, and a part's tiles are moved
by as much: the kernels run on a part as they run on the whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import triton
import triton.language as tl

from moesaic.kernels.triton.budget import spans
from moesaic.kernels.triton.launch import Launcher
from moesaic.kernels.triton.metadata import Routing

_BLOCK = 256


def split(routing: Routing, parts: int) -> Iterator[tuple[Routing, slice]]:
    """Yield routings of at most `parts` parts of the tiles, and the rows that they may touch.

    Only what products along rows read is a part's: tokens, tiles and their number.
    """
    rows, experts = routing.token_N.shape[0], routing.ends_E.shape[0]
    found = spans(rows, experts, parts, tile_rows=routing.tile_rows)
    tiles = found[0].tiles
    width = triton.cdiv(tiles, 4) * 4  # 16 bytes: as the kernels are compiled for the whole
    table = torch.empty(len(found), 3 * width + 4, dtype=torch.int32, device=routing.ints.device)
    _start_part(
        (len(found), triton.cdiv(tiles, _BLOCK)),
        routing.tile_expert, routing.tile_row, routing.tile_left, routing.tiles, table,
        rows, experts, tiles, width, table.shape[1], routing.tile_rows, _BLOCK,
    )  # fmt: skip
    for span, part in zip(found, table, strict=True):
        expert, row, left, count = part.split([width, width, width, 4])
        yield (
            replace(
                routing,
                token_N=routing.token_N[span.rows],
                tile_expert=expert[: span.tiles],
                tile_row=row[: span.tiles],
                tile_left=left[: span.tiles],
                tiles=count[:1],
            ),
            span.rows,
        )


@triton.jit
def _part(
    expert_ptr, row_ptr, left_ptr, tiles_ptr, table_ptr, rows, experts, tiles, width, stride,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    begin = part * tiles
    first = begin * TILE - (TILE - 1) * tl.minimum(experts, begin)  # as `budget.spans` has it
    first = tl.maximum(tl.minimum(first, rows - 1), 0) // 8 * 8
    count = tl.minimum(tl.maximum(tl.load(tiles_ptr) - begin, 0), tiles)
    tile = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = tile < count
    out_ptr = table_ptr + part * stride
    expert = tl.load(expert_ptr + begin + tile, mask=there, other=0)
    row = tl.load(row_ptr + begin + tile, mask=there, other=0)
    left = tl.load(left_ptr + begin + tile, mask=there, other=1)
    # Where there is none, a place that may be read, though not used.
    tl.store(out_ptr + tile, expert, mask=tile < width)
    tl.store(out_ptr + width + tile, tl.where(there, row - first, 0), mask=tile < width)
    tl.store(out_ptr + 2 * width + tile, left, mask=tile < width)
    tl.store(out_ptr + 3 * width + tile, count + tile * 0, mask=tile < 1)


_start_part = Launcher(_part)
