"""Into how many pieces the products of a layer are cut, so that it holds no more than it must.

T tokens, D hidden size, E experts, I expert width, K experts a token, N = T*K routed rows. Bytes.

A step must hold what is kept for the backward pass (x, and h of 4KI bytes a token) and what it
returns (the gradients): that sum is the bound. What comes and goes in between can be more: a
token's K rows of width D before they are summed (y forward, dx backward), a (2KI bytes a token)
beside h. Then y and dx are computed for some columns at a time, each summed into its columns of the
result before the next take its place; weight * a likewise, and the columns of `down`'s gradient
that follow from it. `down` needs all columns of a, so that a is made for some tiles of rows at a
time, if need be. A sum's order is the same in all cases, and so are its bits. Every cut costs
launches: there are as few as the bound allows, and none where nothing is gained.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

_TILE = 256  # columns: a piece is a whole number of tiles wide
_NARROWEST = 512  # columns of a piece
_MOST_PARTS = 4
_TILE_ROWS = 128
_ALIGNED = 8  # rows: pointers stay aligned, and kernels are not compiled anew


@dataclass(frozen=True)
class Span:
    """A part of the row tiles and the rows that it may touch, whatever the routing."""

    tile: int
    """Its first tile."""
    tiles: int
    """The most tiles it has."""
    first: int
    """No row of it is before this one."""
    end: int
    """All rows of it are before this one."""

    @property
    def rows(self) -> slice:
        """The rows that it may touch."""
        return slice(self.first, self.end)


def spans(rows: int, experts: int, parts: int, *, tile_rows: int = _TILE_ROWS) -> list[Span]:
    """Cut the tiles of `rows` sorted rows into at most `parts` parts of the same number of tiles.

    Only an expert's last tile has fewer than `tile_rows` rows, and one at least.
    """
    most = -(-rows // tile_rows) + experts
    tiles = -(-most // parts)
    found = []
    for tile in range(0, most, tiles):
        first = tile * tile_rows - (tile_rows - 1) * min(experts, tile)
        first = max(0, min(first, rows - 1)) // _ALIGNED * _ALIGNED
        end = min(rows, (tile + tiles) * tile_rows)
        found.append(Span(tile, min(tiles, most - tile), first, end))
    return found


@dataclass(frozen=True)
class Cuts:
    """Columns that a product computes at once, and parts of the rows."""

    parts: int
    """Parts of the row tiles that `up` and `down` take one after the other."""
    y: int
    """Columns of y, of D."""
    wa: int
    """Columns of weight * a, of I."""
    dx: int
    """Columns of dx, of D."""
    copy_up: bool
    """Whether there is room for x in the order of its rows beside the results of `up`."""
    copy_gradient: bool
    """Whether there is room for the output's gradient in the order of its rows."""


def ranges(size: int, columns: int) -> list[tuple[int, int]]:
    """Cut `size` columns into ranges of `columns`; the last one may be narrower."""
    return [(start, min(start + columns, size)) for start in range(0, size, columns)]


@dataclass(frozen=True)
class Layer:
    """The sizes that memory depends on; `itemsize` in bytes."""

    tokens: int
    hidden: int
    width: int
    experts: int
    top_k: int
    itemsize: int = 2

    @property
    def rows(self) -> int:
        """N."""
        return self.tokens * self.top_k

    def bound(self) -> int:
        """Bytes of x, h and the gradients of x, both weights and the routing weights."""
        return sum(self._sizes("x", "h", "x", "d_gate_up", "d_down", "routing", "d_weights"))

    def timeline(self, cuts: Cuts) -> dict[str, int]:
        """Return what is held at the fullest moment of each product, the caller's x not counted.

        The caller keeps the output until the end, as one that gives it to `backward` does. dh takes
        the place of h.
        """
        rows, size = self.rows, self.itemsize
        part = rows
        if cuts.parts > 1:
            part = max(s.end - s.first for s in spans(rows, self.experts, cuts.parts))
        x, h, y, w1, w2, fixed, dw = self._sizes(
            "x", "h", "y", "d_gate_up", "d_down", "routing", "d_weights"
        )
        a, copy = part * self.width * size, part * self.hidden * size
        y_part, dx_part = (rows * columns * size for columns in (cuts.y, cuts.dx))
        wa = rows * cuts.wa * size
        partial = 4 * rows * -(-self.width // _TILE)
        in_pieces = cuts.wa < self.width
        out = x  # of the size of x
        whole = cuts.y == self.hidden
        return {
            "up": fixed + h + a + (y if cuts.parts > 1 else 0) + (copy if cuts.copy_up else 0),
            "down": fixed + h + a + (y if whole else out + y_part),
            "combine": fixed + h + y_part + out,
            "activation_gradient": fixed + out + h + wa + partial
            + (w2 if in_pieces else 0) + (y if cuts.copy_gradient else 0),
            "down_gradient": fixed + out + h + wa + w2 + partial,
            "x_gradient": fixed + out + h + w2 + dw + x + dx_part,
            "up_gradient": fixed + out + h + w2 + dw + x + w1,
        }  # fmt: skip

    def _sizes(self, *names: str) -> tuple[int, ...]:
        rows, size = self.rows, self.itemsize
        tiles = -(-rows // _TILE_ROWS) + self.experts
        sizes = {
            "x": self.tokens * self.hidden * size,
            "h": rows * 2 * self.width * size,
            "y": rows * self.hidden * size,
            "d_gate_up": self.experts * 2 * self.width * self.hidden * size,
            "d_down": self.experts * self.width * self.hidden * size,
            "routing": 4 * (3 * rows + 3 * tiles + 5 * self.experts + 5),
            "d_weights": rows * size,
        }
        return tuple(sizes[name] for name in names)


@lru_cache(4096)  # batches have many lengths
def cut(layer: Layer) -> Cuts:
    """Return the fewest cuts with which no moment holds more than the bound.

    Where no cuts do, those that hold least. All gradients are taken to be wanted.
    """
    bound = layer.bound()

    def choose(options: Iterable[Cuts], *moments: str) -> Cuts:
        held = {}
        for option in options:
            timeline = layer.timeline(option)
            held[option] = max(timeline[moment] for moment in moments)
            if held[option] <= bound:
                return option
        return min(held, key=held.__getitem__)

    hidden, width = layer.hidden, layer.width
    cuts = Cuts(1, hidden, width, hidden, copy_up=False, copy_gradient=False)
    if layer.rows == 0:
        return cuts
    cuts = choose(
        [
            *(replace(cuts, y=columns) for columns in _columns(hidden)),
            *(replace(cuts, parts=parts) for parts in range(2, _MOST_PARTS + 1)),
        ],
        *("up", "down", "combine"),
    )
    # The kernel of `down`'s gradient writes some columns of it only where D is a multiple of 64.
    wa = [width] if hidden % 64 else _columns(width)
    cuts = choose(
        [replace(cuts, wa=columns) for columns in wa], "activation_gradient", "down_gradient"
    )
    cuts = choose([replace(cuts, dx=columns) for columns in _columns(hidden)], "x_gradient")
    copies = replace(cuts, copy_up=True, copy_gradient=cuts.wa == width)
    timeline = layer.timeline(copies)
    return replace(
        cuts,
        copy_up=timeline["up"] <= bound,
        copy_gradient=copies.copy_gradient and timeline["activation_gradient"] <= bound,
    )


def _columns(columns: int) -> list[int]:
    """Return the widths of pieces to try, the widest first."""
    narrower = {
        _TILE * -(-columns // (_TILE * pieces)) for pieces in range(2, columns // _NARROWEST + 1)
    }
    return [columns, *sorted(narrower, reverse=True)]
