"""Tables as plain data, written as text, Markdown or HTML cells.

A `Table` is a list of `Column`s (how a field is titled, formatted and judged) and a list of
records. Nothing is computed here beyond formatting: the same table is printed in the terminal,
pasted into a document and drawn in a report, so the three can never disagree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Format = Literal["text", "integer", "fixed", "signed", "scientific", "percent"]

MISSING = "–"  # an en dash, so that an absent figure is not read as a minus sign


@dataclass(frozen=True)
class Column:
    """One column: the record's key, its title, and how its values are written.

    `best` marks the smallest or largest value of the column. `digits` counts decimals and is
    ignored for text and integers. `note` explains the column under the table.
    """

    key: str
    title: str
    format: Format = "text"
    digits: int = 3
    best: Literal["min", "max"] | None = None
    note: str = ""

    @property
    def numeric(self) -> bool:
        return self.format != "text"

    def write(self, value: Any) -> str:
        """Write one value; None is an en dash, a bool is yes or no."""
        if value is None:
            return MISSING
        if isinstance(value, bool):
            return "yes" if value else "no"
        match self.format:
            case "text":
                return str(value)
            case "integer":
                return f"{int(value):,}"
            case "fixed":
                return f"{float(value):.{self.digits}f}"
            case "signed":
                return f"{float(value):+.{self.digits}f}"
            case "scientific":
                return f"{float(value):.{self.digits}e}" if value else "0"
            case "percent":
                return f"{100 * float(value):.{self.digits}f} %"


@dataclass(frozen=True)
class Cell:
    """One written cell, ready for any of the three outputs."""

    text: str
    numeric: bool
    best: bool


@dataclass(frozen=True)
class Table:
    """Records under typed columns; a record may lack any of them."""

    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]
    caption: str = ""

    def cells(self) -> list[list[Cell]]:
        """Every cell in row order. Ties for the best value are all marked; a lone value is not."""
        best = {column.key: self._best(column) for column in self.columns}
        return [
            [
                Cell(
                    text=column.write(row.get(column.key)),
                    numeric=column.numeric,
                    best=best[column.key] is not None and row.get(column.key) == best[column.key],
                )
                for column in self.columns
            ]
            for row in self.rows
        ]

    def notes(self) -> list[tuple[str, str]]:
        """(column title, note) of the columns that carry one."""
        return [(column.title, column.note) for column in self.columns if column.note]

    def _best(self, column: Column) -> Any:
        if column.best is None:
            return None
        values = [row[column.key] for row in self.rows if row.get(column.key) is not None]
        if len(values) < 2:
            return None
        return min(values) if column.best == "min" else max(values)

    def text(self) -> str:
        """Aligned columns for a terminal; the best values carry a star."""
        body = [[cell.text + ("*" if cell.best else "") for cell in row] for row in self.cells()]
        titles = [column.title for column in self.columns]
        widths = [max(len(r[i]) for r in [titles, *body]) for i in range(len(titles))]
        right = [column.numeric for column in self.columns]

        def line(values: Sequence[str]) -> str:
            padded = (
                v.rjust(w) if r else v.ljust(w)
                for v, w, r in zip(values, widths, right, strict=True)
            )
            return "  ".join(padded).rstrip()

        return "\n".join([line(titles), line(["-" * w for w in widths]), *map(line, body)])

    def markdown(self) -> str:
        """A GitHub table; the best values are bold, bars inside cells are escaped."""

        def row(values: Sequence[str]) -> str:
            return "| " + " | ".join(value.replace("|", "\\|") for value in values) + " |"

        rules = ["---:" if column.numeric else "---" for column in self.columns]
        lines = [row([column.title for column in self.columns]), row(rules)]
        for cells in self.cells():
            lines.append(row([f"**{cell.text}**" if cell.best else cell.text for cell in cells]))
        return "\n".join(lines)
