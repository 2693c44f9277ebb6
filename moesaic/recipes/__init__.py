"""Shipped YAML, each file a test case: training here, new models in ``init/``, dense models turned
into mixtures in ``construct/``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from moesaic.core.errors import UserError, unknown

Kind = Literal["train", "init", "construct"]

_FOLDERS: dict[Kind, Path] = {
    "train": Path(__file__).parent,
    "init": Path(__file__).parent / "init",
    "construct": Path(__file__).parent / "construct",
}


def recipes(kind: Kind) -> dict[str, Path]:
    """Map the name of every shipped recipe of a kind to its file."""
    return {file.stem: file for file in sorted(_FOLDERS[kind].glob("*.yaml"))}


def find(name: Path | str, *, kind: Kind) -> Path:
    """Return a YAML file given by path, or a shipped recipe: `cpt-tiny`, `recipes/cpt-tiny.yaml`.

    Raises UserError for a name that is neither, with the nearest and all names.
    """
    path = Path(name)
    shipped = recipes(kind)
    if path.parent == Path("recipes") and path.stem in shipped and not path.exists():
        return shipped[path.stem]  # recipes/cpt-tiny.yaml: the shipped one, from any folder
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return path  # a missing file is reported by who reads it
    if str(name) not in shipped:
        raise unknown("preset" if kind == "init" else "recipe", str(name), shipped)
    return shipped[str(name)]


def locate(name: str) -> tuple[Kind, Path]:
    """Return the kind and file of a recipe of any kind. Raises UserError for an unknown name."""
    for kind in _FOLDERS:
        if name in recipes(kind):
            return kind, recipes(kind)[name]
    raise unknown("recipe", name, [name for kind in _FOLDERS for name in recipes(kind)])


def summary(path: Path) -> str:
    """Return a recipe's leading comment as one line."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").rstrip())
    if not lines:
        raise UserError(f"{path} does not say what it is for. Begin it with a comment.")
    return " ".join(lines)
