"""The splits: named ways to divide the neurons of a layer among experts, one file each.

A split is a `SplitMethod` (see `moesaic.construct.method`) decorated with `@SPLITS.register`; its
key is its file's name with dashes. This package imports no torch, so that listing the splits stays
quick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moesaic.core.registry import Registry

if TYPE_CHECKING:
    from moesaic.construct.method import SplitMethod

__all__ = ["SPLITS"]

SPLITS: Registry[type[SplitMethod]] = Registry("split", "moesaic.construct.splits")
