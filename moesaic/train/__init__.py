"""Training: continual pre-training and training from scratch, one process for now.

`moesaic.train` is this package and, because the package root offers it as a function, also
callable: ``moesaic.train("recipe.yaml", model=..., out=...)`` is `moesaic.train.loop.train`.
"""

from __future__ import annotations

import sys
import types
from typing import Any


class _CallablePackage(types.ModuleType):
    """A package that can be called, so that the name serves as module and as function."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from moesaic.train.loop import train

        return train(*arguments, **options)


sys.modules[__name__].__class__ = _CallablePackage
