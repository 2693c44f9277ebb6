"""Own model families, one file each; every file ends with `FAMILY = Family(...)`.

Files are found by name: there is no list to edit. A file without a FAMILY holds parts of others.
`docs/add-a-family.md` shows how to write one.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Mapping
from typing import Any

import transformers
from transformers import AutoConfig
from transformers.conversion_mapping import register_checkpoint_conversion_mapping

from moesaic.models.family import Family

_REGISTERED: dict[str, Family] = {}


def register_all() -> None:
    """Register the family of every file of this folder; a second call changes nothing."""
    for file in pkgutil.iter_modules(__path__):
        family = getattr(importlib.import_module(f"{__name__}.{file.name}"), "FAMILY", None)
        if isinstance(family, Family):
            register(family)


def register(family: Family) -> None:
    """Make a family known to `moesaic.load` and to transformers' Auto classes.

    Of two families with one model_type the later counts, before a class of transformers too.
    """
    model_type = family.config.model_type
    AutoConfig.register(model_type, family.config, exist_ok=True)
    for auto, model in family.models.items():
        getattr(transformers, auto).register(family.config, model, exist_ok=True)
    if family.conversion is not None:
        # without it transformers gives custom code no conversion, whatever its model_type
        register_checkpoint_conversion_mapping(model_type, family.conversion(), overwrite=True)
    _REGISTERED[model_type] = family


def families() -> dict[str, Family]:
    """Return the registered families by model_type."""
    return dict(_REGISTERED)


def recognise(config: Mapping[str, Any]) -> tuple[Family, dict[str, Any]] | None:
    """Find the family of a config.json, and the arguments of its config class.

    A family that recognises the file comes before the model_type it names, which may be missing or
    another's. None for models of transformers and for unknown ones.
    """
    known = (family for family in _REGISTERED.values() if family.recognises(config))
    family = next(known, None)
    if family is not None:
        fields = dict(family.read(config))
    else:
        family = _REGISTERED.get(str(config.get("model_type")))
        if family is None:
            return None
        fields = dict(config)
    fields["model_type"] = family.config.model_type
    fields["architectures"] = _class_names(family, config.get("architectures"))
    fields.pop("auto_map", None)
    return family, fields


def _class_names(family: Family, released: list[str] | None) -> list[str] | None:
    """Say whose class a released name means: MixtralForCausalLM (a lie), GRIN-MoE (no class)."""
    ours = [model.__name__ for model in family.models.values()]
    if not released or released[0].lower() in (name.lower() for name in ours):
        return released
    ending = re.search(r"(For[A-Z]\w+|Model)$", released[0])
    if ending is None and released[0].isidentifier():
        return released  # some other class: an error later
    same = [name for name in ours if name.endswith(ending[0] if ending else "ForCausalLM")]
    return same[:1] or released
