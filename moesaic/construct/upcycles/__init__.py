"""The upcycling methods: named ways to make more experts than a dense layer has, one file each.

A method is an `UpcycleMethod` (see `moesaic.construct.upcycle_method`) decorated with
`@UPCYCLES.register`; its key is its file's name with dashes. This package imports no torch, so that
listing the methods stays quick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moesaic.core.registry import Registry

if TYPE_CHECKING:
    from moesaic.construct.upcycle_method import UpcycleMethod

__all__ = ["UPCYCLES"]

UPCYCLES: Registry[type[UpcycleMethod]] = Registry("upcycling method", "moesaic.construct.upcycles")
