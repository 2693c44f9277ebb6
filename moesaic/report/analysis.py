"""A finished routing analysis, read from its directory: what figures and pages are made of."""

from __future__ import annotations

import base64
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.core.errors import UserError

ALL = "all"
"""The name of all domains together in every table."""

Columns = dict[str, np.ndarray]


class Analysis:
    """The directory that `moesaic.analyze` wrote. Raises UserError when it holds no analysis."""

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory).expanduser()
        path = self.directory / "metrics.json"
        if not path.is_file():
            raise UserError(
                f"{self.directory} holds no routing analysis (metrics.json). Make one with "
                "`moesaic route analyze TRACE -o DIR`."
            )
        try:
            self.metrics: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            _ = self.metrics["srp"], self.metrics["model"], self.metrics["hit_rates"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is no routing analysis, or damaged ({error!r}). Analyze the trace again."
            ) from error
        self.label: str | None = None
        """A name to be shown instead of the model's."""
        self._tables: dict[str, Columns] = {}

    def __repr__(self) -> str:
        return f"Analysis({self.directory}: {self.name})"

    @property
    def name(self) -> str:
        """The label; else the model's name without its folder, or the directory's."""
        if self.label is not None:
            return self.label
        given = self.metrics["model"].get("name")
        return Path(str(given)).name if given else self.directory.name

    @property
    def segments(self) -> list[int]:
        """Segment lengths, in tokens."""
        return [int(m) for m in self.metrics["srp"]]

    @property
    def headline(self) -> int:
        """The segment length of figures that have one only."""
        return int(self.metrics["segment"])

    @property
    def domains(self) -> list[str]:
        """Names of the domains."""
        return list(self.metrics["trace"]["domains"])

    @property
    def shape(self) -> tuple[list[int], list[int]]:
        """Layer numbers and the number of experts of each."""
        return self.metrics["model"]["layers"], self.metrics["model"]["num_experts"]

    @cached_property
    def cases(self) -> list[dict[str, Any]]:
        """Samples word by word: domain, words, experts [tokens, layers, K] (-1: none), best."""
        path = self.directory / "cases.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        layers = len(self.metrics["model"]["layers"])
        for case in found:
            kind = np.dtype("<u1" if case["bytes"] == 1 else "<u2")
            raw = np.frombuffer(base64.b64decode(case["experts"]), kind)
            ids = raw.reshape(len(case["ids"]), layers, -1).astype(np.int64)
            case["chosen"] = np.where(ids == np.iinfo(kind).max, -1, ids)
        return list(found)

    def table(self, name: str, **where: Any) -> Columns:
        """Return the columns of a table, only of rows that have the values given."""
        if name not in self._tables:
            self._tables[name] = read_table(self.directory / "tables" / f"{name}.parquet")
        columns = self._tables[name]
        if not where:
            return columns
        rows = np.ones(len(next(iter(columns.values()))), dtype=bool)
        for key, value in where.items():
            rows &= columns[key] == value
        return {key: column[rows] for key, column in columns.items()}

    def by_layer(self, name: str, key: str, **where: Any) -> list[np.ndarray]:
        """Return a column of a table of experts as one array for each layer."""
        table = self.table(name, **where)
        return [table[key][table["layer"] == layer] for layer in self.metrics["model"]["layers"]]


def read_table(path: Path) -> Columns:
    """Read a parquet file as columns. Raises UserError when it is missing or damaged."""
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} cannot be read ({error}). Analyze the trace again.") from error
    return {name: table[name].to_numpy() for name in table.column_names}
