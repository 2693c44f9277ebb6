"""moesaic: make, train, run and study mixture-of-experts language models.

Everything here is loaded on first use, so that ``import moesaic`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "load": "moesaic.models.load",
    "anatomy": "moesaic.models.anatomy",
    "convert": "moesaic.construct.convert",
    "split": "moesaic.construct.split",
    "upcycle": "moesaic.construct.upcycle",
    "init": "moesaic.construct.scratch",
    "train": "moesaic.training.loop",
    "generate": "moesaic.generation",
    "record": "moesaic.routing.record",
    "recording": "moesaic.routing.recording",
    "Trace": "moesaic.routing.trace",
    "analyze": "moesaic.routing.analyze",
    "offload": "moesaic.routing.offload",
}

__all__ = [
    "Trace",
    "__version__",
    "analyze",
    "anatomy",
    "convert",
    "generate",
    "init",
    "load",
    "offload",
    "record",
    "recording",
    "split",
    "train",
    "upcycle",
]

if TYPE_CHECKING:
    from moesaic.construct.convert import convert
    from moesaic.construct.scratch import init
    from moesaic.construct.split import split
    from moesaic.construct.upcycle import upcycle
    from moesaic.generation import generate
    from moesaic.models.anatomy import anatomy
    from moesaic.models.load import load
    from moesaic.routing.analyze import analyze
    from moesaic.routing.offload import offload
    from moesaic.routing.record import record
    from moesaic.routing.recording import recording
    from moesaic.routing.trace import Trace
    from moesaic.training.loop import train


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'moesaic' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
