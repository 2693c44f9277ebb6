"""Which model a name means (directory, hub id or alias) and what its config.json says it is.

A model_type alone misleads (LLaMA-MoE-v2 calls itself mixtral, MiniCPM has none), so the whole
config is looked at before any class is chosen: our own families recognise their files, and
transformers' classes that compute something other than the original are corrected (`overrides`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from moesaic.core.config import Config, parse, read_yaml
from moesaic.core.errors import UserError, nearest
from moesaic.models.checkpoint import read_json
from moesaic.models.families import recognise
from moesaic.models.overrides import Override, overrides_of

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token", "subfolder")


class Entry(Config):
    """One model of the catalog."""

    hub: str | None
    """Hub id; None where it is not public."""
    family: str
    """The family's model_type in moesaic."""
    total: float
    """Parameters in billions, as published."""
    active: float
    """Parameters a token visits, in billions."""
    config: dict[str, Any]
    """The values of config.json that decide what is built."""
    note: str = ""
    also: tuple[str, ...] = ()
    """Further aliases."""

    @property
    def status(self) -> str:
        """Whether and by whose class this version loads it."""
        reason = refusal(self.config)
        if reason is not None:
            return f"not loaded: {reason}"
        if recognise(self.config) is not None:
            return "moesaic's class"
        corrections = [override.summary for override in overrides_of(self.config).values()]
        return "; ".join(["transformers' class", *corrections])


@dataclass(frozen=True)
class Source:
    """A model that was found: the name given, where it lies, and its config.json."""

    name: str
    location: str
    """The directory or hub id."""
    directory: Path | None
    """The directory, when it is local."""
    config: dict[str, Any]
    """config.json as it is, or what the catalog holds of it."""
    catalogued: bool = False
    """Whether `config` is the catalog's: the published file was not downloaded."""

    @cached_property
    def overrides(self) -> dict[str, Override]:
        """Corrections of transformers' class that the model needs."""
        return overrides_of(self.config) if recognise(self.config) is None else {}

    @cached_property
    def fields(self) -> dict[str, Any]:
        """What the config class reads: model_type and names ours where the family is, no auto_map.

        Released files may name another family in model_type, or none.
        """
        recognised = recognise(self.config)
        fields = dict(self.config) if recognised is None else recognised[1]
        for override in self.overrides.values():
            fields = override.read(fields)
        fields.pop("auto_map", None)
        return fields


@cache
def catalog() -> dict[str, Entry]:
    """Return the 27 models by alias."""
    path = Path(__file__).with_name("catalog.yaml")
    return {alias: parse(Entry, row, source=str(path)) for alias, row in read_yaml(path).items()}


def find(model: str | Path, *, config_only: bool = False, **options: Any) -> Source:
    """Find a model and read its config.json.

    An existing directory wins over an alias, an alias over a hub id. A Path is never looked for on
    the hub. `options` are those of `from_pretrained`; the hub's are used (revision, token,
    local_files_only, ...). With `config_only` no weights are wanted: a model of the catalog whose
    config.json was not downloaded is described by the catalog, without the network.

    Raises:
        UserError: nothing of that name, a directory without a readable config.json, or a hub id
            that cannot be fetched.
    """
    name = str(model)
    path = Path(model).expanduser()
    if path.exists():
        path = path / str(options.get("subfolder") or "")
        return Source(name, str(path), path, _read_config(path))
    entry = _entry(model) if config_only else None
    if entry is not None:
        return _from_catalog(name, entry, options)
    hub = _hub_id(model)
    if hub is None:
        raise UserError(
            f"{name} does not exist.{nearest(name, aliases())} Give a model directory, a hub id "
            f"(organisation/name) or an alias ({', '.join(sorted(catalog()))})."
        )
    if name == hub and Path(hub.split("/")[0]).exists():
        # runs/typo where runs/ is here: likely a wrong path, so no minute is lost on the network
        options["local_files_only"] = True
    return Source(name, hub, None, _fetch_config(name, hub, options))


def refusal(config: Mapping[str, Any]) -> str | None:
    """Say why this version does not load a model with this config.json, or return None."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = config.get("model_type")
    if recognise(config) is not None or model_type in CONFIG_MAPPING:
        return None
    named = ", ".join(config.get("architectures") or ()) or "no architecture"
    what = (
        f"model_type '{model_type}' ({named}) is known neither to moesaic nor to transformers"
        if model_type
        else f"config.json names no model_type (and {named})"
    )
    if config.get("auto_map"):
        file = re.sub(r"\W+", "_", str(model_type or named).lower()).strip("_")
        what += (
            ". Its own code (auto_map in config.json) is never run: write "
            f"moesaic/models/families/{file}.py, as docs/add-a-family.md shows"
        )
    return what


def aliases() -> dict[str, Entry]:
    """Return the catalog by every alias, the second names of a model included."""
    found = dict(catalog())
    for entry in catalog().values():
        found |= dict.fromkeys(entry.also, entry)
    return found


def _entry(model: str | Path) -> Entry | None:
    """The catalog's entry of an alias or hub id."""
    by_hub = {entry.hub: entry for entry in catalog().values() if entry.hub}
    return aliases().get(str(model)) or by_hub.get(str(model))


def _from_catalog(name: str, entry: Entry, options: Mapping[str, Any]) -> Source:
    if entry.hub is not None:
        try:
            here = {**options, "local_files_only": True}
            return Source(name, entry.hub, None, _fetch_config(name, entry.hub, here))
        except UserError:
            pass  # not downloaded
    return Source(name, entry.hub or name, None, dict(entry.config), catalogued=True)


def _hub_id(model: str | Path) -> str | None:
    entry = aliases().get(str(model))
    if entry is not None:
        if entry.hub is None:
            raise UserError(f"{model}: {entry.note}. Give a directory that holds it.")
        return entry.hub
    parts = str(model).split("/")
    if isinstance(model, Path) or len(parts) != 2 or not all(parts) or parts[0] in (".", "..", "~"):
        return None
    return str(model)


def _read_config(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise UserError(f"{directory} is a file. Give the directory that holds config.json.")
    file = directory / "config.json"
    if not file.is_file():
        raise UserError(f"{directory} has no config.json. Give a model directory.")
    return read_json(file, cure="Download it again.")


def _fetch_config(name: str, hub: str, options: Mapping[str, Any]) -> dict[str, Any]:
    from transformers.utils.hub import cached_file

    wanted = {key: options[key] for key in _HUB_OPTIONS if key in options}
    try:
        file = cached_file(hub, "config.json", **wanted)
    except (OSError, ValueError) as error:
        where = name if name == hub else f"{name} ({hub})"
        if options.get("local_files_only"):
            raise UserError(
                f"{where} is no local directory, and its config.json was not downloaded before. "
                f"Download it (hf download {hub} config.json), or give a directory."
            ) from error
        reason = " ".join(str(error).split("\n")[0].split())
        raise UserError(
            f"{where} is no local directory, and its config.json could not be had from the hub: "
            f"{reason} Check the name and the network, or give a directory."
        ) from error
    return read_json(Path(str(file)), cure="Download it again.")
