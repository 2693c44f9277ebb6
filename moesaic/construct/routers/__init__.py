"""The router inits: named ways to make the first weights of the routers, one file each.

A router init is a `RouterMethod` (see `moesaic.construct.router`) decorated with
`@ROUTERS.register`; its key is its file's name. This package imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moesaic.core.registry import Registry

if TYPE_CHECKING:
    from moesaic.construct.router import RouterMethod

__all__ = ["ROUTERS"]

ROUTERS: Registry[type[RouterMethod]] = Registry("router", "moesaic.construct.routers")
