"""``moesaic.json``: where a directory comes from (parent, step, config, versions, seed, time)."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from moesaic import __version__
from moesaic.core.errors import UserError
from moesaic.core.files import MADE_BY, write_text

FILE_NAME = MADE_BY
_PACKAGES = ("torch", "transformers", "numpy", "safetensors")


def write_lineage(
    directory: Path | str,
    *,
    step: str,
    parent: Path | str | None,
    config: Mapping[str, Any],
    seed: int | None = None,
    **facts: Any,
) -> None:
    """Write ``moesaic.json`` beside an output.

    `step` is the command that made it, `parent` the directory or hub id it was made from, `config`
    the resolved options; `facts` are figures that the step measured, such as ``exact``.
    The parent's own lineage, where it has one, is kept under ``parent_lineage``.
    """
    record: dict[str, Any] = {
        "step": step,
        "parent": None if parent is None else str(parent),
        "config": dict(config),
        "seed": seed,
        **facts,
        "versions": versions(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if parent is not None and (inherited := read_lineage(parent)):
        record["parent_lineage"] = inherited
    write_text(Path(directory) / FILE_NAME, json.dumps(record, indent=2, default=str) + "\n")


def read_lineage(directory: Path | str) -> dict[str, Any] | None:
    """Read ``moesaic.json`` of a directory, or return None where there is none."""
    path = Path(directory) / FILE_NAME
    if not path.is_file():
        return None
    try:
        lineage = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}). Remove or restore it.") from None
    return lineage if isinstance(lineage, dict) else None


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    found = {"python": sys.version.split()[0], "moesaic": __version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
