"""Named, registered choices: splits, routers, balancing rules, metrics.

A room keeps each choice in a file of its own; the file's name (``sharing_inter.py``) is the
choice's key (``sharing-inter``). Names are discovered by reading file names; a file is imported
when its choice is used or described. Other packages plug in through the entry-point group
``moesaic.plugins``: each entry point names a module that registers its choices when imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar

from moesaic.core.config import Config, parse
from moesaic.core.errors import MoesaicError, UserError, unknown

T = TypeVar("T")

PLUGIN_GROUP = "moesaic.plugins"


class Registry(Generic[T]):
    """A set of choices of one `kind`, discovered in the files of `package`."""

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package
        self._entries: dict[str, T] = {}
        self._plugins_loaded = False

    def register(self, entry: T) -> T:
        """Register a class or function under its file's name; MoesaicError on a collision."""
        name = str(getattr(entry, "__module__", "")).rpartition(".")[2].replace("_", "-")
        known = self._entries.get(name)
        if known is not None and _origin(known) != _origin(entry):
            raise MoesaicError(
                f"Two {self.kind}s are called '{name}': {_origin(known)} and {_origin(entry)}. "
                "Rename the file of one of them."
            )
        self._entries[name] = entry
        return entry

    def names(self) -> list[str]:
        """List every key, built-in and plugged in, in alphabetical order."""
        self._load_plugins()
        return sorted(self._files() | self._entries.keys())

    def get(self, name: str) -> T:
        """Return the choice called `name`. Raises UserError with the nearest name and all names."""
        if name not in self._entries and name in self._files():
            try:
                importlib.import_module(f"{self.package}.{name.replace('-', '_')}")
            except ModuleNotFoundError as error:
                if error.name is None or error.name.startswith("moesaic"):
                    raise
                raise UserError(
                    f"The {self.kind} '{name}' needs the package '{error.name}': "
                    f"pip install {error.name}"
                ) from error
        if name not in self._entries:
            self._load_plugins()
        if name not in self._entries:
            raise unknown(self.kind, name, self.names())
        return self._entries[name]

    def resolve(self, choice: str | Mapping[str, Any] | Config) -> Any:
        """Return the settings that a name, ``{"method": name, field: value}`` or an object mean.

        For kinds whose entries are Config classes. Raises UserError for an unknown name or field.
        """
        if isinstance(choice, Config):
            return choice
        settings = {"method": choice} if isinstance(choice, str) else dict(choice)
        if "method" not in settings:
            raise UserError(
                f"Settings of a {self.kind} with the keys {sorted(settings)} name no method. "
                f"Add method: one of {', '.join(self.names())}."
            )
        name = str(settings.pop("method"))
        cls: Any = self.get(name)
        return parse(cls, settings, source=f"{self.kind} {name}")

    def describe(self) -> dict[str, str]:
        """Map every key to the first line of its docstring (imports the files)."""
        return {name: _first_line(self._describable(name)) for name in self.names()}

    def _describable(self, name: str) -> Any:
        try:
            return self.get(name)
        except UserError as error:  # a choice whose optional package is absent is still listed
            return str(error)

    def _files(self) -> set[str]:
        spec = importlib.util.find_spec(self.package)
        folders = spec.submodule_search_locations if spec else None
        return {
            file.stem.replace("_", "-")
            for folder in folders or ()
            for file in Path(folder).glob("*.py")
            if not file.stem.startswith("_")
        }

    def _load_plugins(self) -> None:
        if not self._plugins_loaded:
            self._plugins_loaded = True
            for entry_point in entry_points(group=PLUGIN_GROUP):
                entry_point.load()


def _origin(entry: object) -> str:
    return f"{getattr(entry, '__module__', '?')}.{getattr(entry, '__qualname__', '?')}"


def _first_line(entry: Any) -> str:
    text = entry if isinstance(entry, str) else inspect.getdoc(entry) or ""
    return text.strip().partition("\n")[0]
