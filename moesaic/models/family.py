"""What a model family tells the rest of the package: its classes, and how to know its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Family:
    """One family of models; a file of `moesaic.models.families` ends with `FAMILY = Family(...)`.

    The keys of `models` are names of Auto classes: "AutoModel", "AutoModelForCausalLM", ... A
    config.json belongs to the family when its model_type is the config class's, or when
    `recognises` says so (released files may name another family, or none).
    """

    config: type[PreTrainedConfig]
    models: Mapping[str, type[PreTrainedModel]]
    recognises: Callable[[Mapping[str, Any]], bool] = lambda config: False
    """Whether an original config.json, whose model_type says otherwise, is of this family."""
    read: Callable[[Mapping[str, Any]], dict[str, Any]] = dict
    """Turn the original config.json into the keyword arguments of `config`."""
    conversion: Callable[[], list[Any]] | None = None
    """Weight conversions of transformers between released tensor names and ours, if they differ."""
    harmless: tuple[str, ...] = field(default=())
    """Endings of tensor names that released files hold and that are computed, never read."""
