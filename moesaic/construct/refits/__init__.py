"""The refits: named ways to make up for the dropped experts in closed form, one file each.

A refit is a `Refit` (see `moesaic.construct.refit`) decorated with `@REFITS.register`; its key is
its file's name. This package imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moesaic.core.registry import Registry

if TYPE_CHECKING:
    from moesaic.construct.refit import Refit

__all__ = ["REFITS"]

REFITS: Registry[type[Refit]] = Registry("refit", "moesaic.construct.refits")
