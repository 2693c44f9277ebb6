"""What a model directory is, from its files alone: nothing is loaded."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moesaic.core.lineage import read_lineage
from moesaic.models.anatomy import Anatomy, anatomy_of
from moesaic.models.catalog import aliases, find, refusal
from moesaic.models.checkpoint import Checkpoint


@dataclass(frozen=True)
class Weights:
    """The weight files: number, bytes, weights, and weights by number format."""

    files: int
    bytes: int
    parameters: int
    dtypes: dict[str, int]


@dataclass(frozen=True)
class Description:
    """A model as its files tell it.

    `refused` says why this version does not load it (then `anatomy` is None), `corrected`
    what transformers' class gets wrong and `moesaic.load` puts right; `weights` is None where only
    config.json is there; `catalogued` says that `config` is what moesaic knows of a published file
    that was not downloaded.
    """

    model: str
    path: str
    alias: str | None
    architecture: str | None
    model_type: str | None
    dtype: str | None
    refused: str | None
    corrected: dict[str, str]
    anatomy: Anatomy | None
    weights: Weights | None
    config: dict[str, Any]
    catalogued: bool
    lineage: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def describe(model: str | Path) -> Description:
    """Describe a directory, an alias, or a hub id whose config.json was downloaded before.

    Raises UserError when nothing of that name is there and when a file is damaged.
    """
    source = find(model, config_only=True, local_files_only=True)
    config, directory = source.config, source.directory
    refused = refusal(config)
    weights = None
    if directory is not None and any(
        file.suffix in (".safetensors", ".bin") for file in directory.iterdir()
    ):
        weights = _weights(Checkpoint(directory))
    built = None if refused else anatomy_of(source)
    named = config.get("architectures") or [None]
    stored = max(weights.dtypes, key=weights.dtypes.__getitem__) if weights else None
    configured = config.get("dtype") or config.get("torch_dtype")
    hubs = {entry.hub: alias for alias, entry in aliases().items()}
    return Description(
        model=source.name,
        path=source.location,
        alias=source.name if source.name in aliases() else hubs.get(source.location),
        architecture=built.architecture if built else named[0],
        model_type=config.get("model_type"),
        dtype=stored or configured,
        refused=refused,
        corrected={name: override.summary for name, override in source.overrides.items()},
        anatomy=built,
        weights=weights,
        config=config,
        catalogued=source.catalogued,
        lineage=read_lineage(directory) if directory is not None else None,
    )


def _weights(checkpoint: Checkpoint) -> Weights:
    dtypes: Counter[str] = Counter()
    for key in checkpoint.keys():  # noqa: SIM118 - a Checkpoint is no dict
        name = str(checkpoint.dtype(key)).removeprefix("torch.")
        dtypes[name] += checkpoint.nbytes(key) // checkpoint.dtype(key).itemsize
    return Weights(
        files=len(checkpoint.files),
        bytes=sum(file.stat().st_size for file in checkpoint.files),
        parameters=checkpoint.parameters,
        dtypes=dict(dtypes),
    )
