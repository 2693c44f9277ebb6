"""Published figures of the routing study, to see a model among others (see reference.yaml)."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

SOURCE = "arXiv 2505.16056"

Kind = Literal["models", "toys"]


@cache
def reference(kind: Kind = "models") -> tuple[dict[str, Any], ...]:
    """Return the study's models, or its toy models: rates and shares as fractions, not percent."""
    text = (Path(__file__).parent / "reference.yaml").read_text(encoding="utf-8")
    found = []
    for row in yaml.safe_load(text)[kind]:
        made = dict(row)
        for key in ("srp", "sch16", "rate2"):
            if key in row:
                made[key] = {
                    name: None if value is None else value / 100 for name, value in row[key].items()
                }
        made["load_deviation"] = row["load_deviation"] / 100
        found.append(made)
    return tuple(found)
