"""The weightings: named ways in which a converted model weighs its chosen experts, one file each.

A weighting is a `Weighting` (see `moesaic.construct.weighting`) decorated with
`@WEIGHTINGS.register`; its key is its file's name. This package imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moesaic.core.registry import Registry

if TYPE_CHECKING:
    from moesaic.construct.weighting import Weighting

__all__ = ["WEIGHTINGS"]

WEIGHTINGS: Registry[type[Weighting]] = Registry("weighting", "moesaic.construct.weightings")
