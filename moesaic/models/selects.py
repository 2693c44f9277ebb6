"""How many experts a token uses: one number for all layers, or one for each.

Notation: L layers, E experts of a layer, K experts a token uses.
"""

from __future__ import annotations

from collections.abc import Sequence

from moesaic.core.errors import UserError

__all__ = ["Selects", "check_selects", "selects_of", "together"]

Selects = int | list[int]
"""K of every layer: one number, or [L]."""


def selects_of(selects: int | Sequence[int], layer: int) -> int:
    """K of one layer."""
    return selects if isinstance(selects, int) else selects[layer]


def together(selects: Sequence[int]) -> Selects:
    """The numbers of the layers as a config holds them: one where all are the same."""
    return selects[0] if len(set(selects)) == 1 else list(selects)


def check_selects(
    field: str, selects: int | Sequence[int], *, layers: int, experts: int, advice: str
) -> None:
    """Raise UserError unless `selects` is 1 to `experts`, or that for each of `layers` layers.

    `field` and `advice` are of the message: what was given, what to do.
    """
    given = [selects] if isinstance(selects, int) else selects
    if not isinstance(selects, int) and len(given) != layers:
        raise UserError(
            f"{field} has {len(given)} numbers but the model has {layers} layers. "
            "Give one number, or one for each layer."
        )
    for layer, number in enumerate(given):
        if not 1 <= number <= experts:
            name = field if isinstance(selects, int) else f"{field}[{layer}]"
            raise UserError(f"{name}={number} but the model has {experts} experts. {advice}")
