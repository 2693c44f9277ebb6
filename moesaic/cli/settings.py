"""Turn the text of an option into what the library takes: a name, settings from YAML, numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def settings_or_name(text: str) -> Any:
    """A mapping read from `text` when it names a YAML file, else the text itself."""
    if not text.endswith((".yaml", ".yml")):
        return text
    from moesaic.core.config import read_yaml

    return read_yaml(Path(text))


def number_or_name(text: str) -> Any:
    """A number, a list of numbers when there are commas, else the text itself."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        return text
    return numbers[0] if len(numbers) == 1 else numbers
