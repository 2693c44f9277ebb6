"""Corrections of transformers' classes where they compute something else than the original code.

One file each, named after the model_type it is for and what it corrects; every file ends with
`OVERRIDE = Override(...)`. `moesaic.load` builds a model with the corrected parts in place of
transformers' own, as long as the override's probe finds that the installed transformers needs it.
Nothing of transformers itself is changed: models that others load are as they were.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from moesaic.core.errors import MoesaicError


@dataclass(frozen=True)
class Override:
    """One correction."""

    model_type: str
    summary: str
    """What transformers does, and what this does instead: one sentence, as the user reads it."""
    probe: Callable[[], bool]
    """Whether the installed transformers still needs it: computes something tiny and looks."""
    applies: Callable[[Mapping[str, Any]], bool] = lambda config: True
    """Whether a model with this config.json is concerned."""
    read: Callable[[Mapping[str, Any]], dict[str, Any]] = dict
    """The fields of config.json, corrected."""
    config: type[PreTrainedConfig] | None = None
    """Corrected config class."""
    parts: Mapping[type[nn.Module], type[nn.Module]] = field(default_factory=dict)
    """Transformers' modules and the subclasses to put in their place: same parameters."""
    finish: Callable[[PreTrainedModel], None] | None = None
    """Changes to one built model that no part can make: a method of its own class."""


def overrides_of(config: Mapping[str, Any]) -> dict[str, Override]:
    """Return the corrections that a model with this config.json needs here, by name.

    Raises MoesaicError when a correction does not fit the installed transformers.
    """
    found = {}
    model_type = str(config.get("model_type"))
    for name in _names():
        if not name.startswith(model_type.replace("-", "_")):
            continue
        override = _override(name)
        if override.model_type == model_type and override.applies(config) and needed(name):
            found[name] = override
    return found


@cache
def needed(name: str) -> bool:
    """Ask an override's probe, once a process."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)  # what it says about a probe's tiny model concerns nobody
    try:
        return _override(name).probe()
    except Exception as error:  # a class that takes other arguments or gives other things
        raise _does_not_fit(name, error) from error
    finally:
        logger.setLevel(level)


def corrected(
    cls: type[PreTrainedModel], overrides: Mapping[str, Override]
) -> type[PreTrainedModel]:
    """Return a class that builds a `cls` with the corrected parts.

    What it builds is of type `cls` itself: saving, conversions and isinstance see no difference.
    """
    parts = {old: new for override in overrides.values() for old, new in override.parts.items()}
    finishes = [override.finish for override in overrides.values() if override.finish is not None]
    if not parts and not finishes:
        return cls

    def build(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, *args, **kwargs)
        for module in self.modules():
            part = parts.get(type(module))
            if part is not None:
                module.__class__ = part
        self.__class__ = cls
        for finish in finishes:
            finish(self)

    # transformers looks models up by these names (conversions, recorded outputs)
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), {"__init__": build, **names})


@cache
def _names() -> list[str]:
    return sorted(file.name for file in pkgutil.iter_modules(__path__))


@cache
def _override(name: str) -> Override:
    try:
        override: Override = importlib.import_module(f"{__name__}.{name}").OVERRIDE
    except (ImportError, AttributeError) as error:
        raise _does_not_fit(name, error) from error
    return override


def _does_not_fit(name: str, error: Exception) -> MoesaicError:
    return MoesaicError(
        f"The correction {name} does not fit transformers {transformers.__version__} ({error}). "
        "Install a version that moesaic is tested with (5.17 to 5.23)."
    )
