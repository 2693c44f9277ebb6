"""One self-contained HTML page from text, tables and figures: no external files.

A `Page` collects sections of blocks and is written through a jinja2 template. Everything given as
text is escaped; only the SVG of our own figures is inserted as it is. The page follows the
reader's light or dark setting, prints well, and works from a USB stick. Only pages with a table to
sort or words to look at hold a script (`page.js`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moesaic.core.files import write_text
from moesaic.report import plots, theme
from moesaic.report.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Fact:
    """One headline number: what it is, the number, and a few words on it."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Sample:
    """Texts that several models wrote after the same prompt: {model: continuation}."""

    prompt: str
    texts: Mapping[str, str]


@dataclass(frozen=True)
class _Block:
    kind: Literal["text", "facts", "table", "figure", "samples", "code", "sortable", "routed"]
    content: Any
    caption: str = ""


@dataclass
class Section:
    """A titled part of a page; every method appends one block and returns the section."""

    title: str
    blocks: list[_Block] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        """The section's id in the page: its title in lower case with dashes."""
        return "-".join("".join(c if c.isalnum() else " " for c in self.title.lower()).split())

    def text(self, text: str) -> Section:
        """Add prose; blank lines separate paragraphs."""
        paragraphs = [part.strip() for part in text.split("\n\n") if part.strip()]
        return self._add("text", paragraphs)

    def facts(self, facts: Sequence[Fact]) -> Section:
        """Add a row of headline numbers."""
        return self._add("facts", list(facts))

    def table(self, table: Table) -> Section:
        """Add a table, with its caption and the notes of its columns."""
        return self._add("table", table, table.caption)

    def figure(self, figure: Figure, *, caption: str) -> Section:
        """Add a figure as inline SVG; the caption is also its text for screen readers."""
        from markupsafe import Markup

        return self._add("figure", Markup(plots.svg(figure)), caption)

    def samples(self, samples: Sequence[Sample]) -> Section:
        """Add texts of several models side by side, one row per prompt."""
        return self._add("samples", list(samples))

    def code(self, code: str, *, title: str) -> Section:
        """Add a folded listing: a config, a command."""
        return self._add("code", code.rstrip("\n"), title)

    def sortable(self, table: Table) -> Section:
        """Add a table that the reader sorts and filters; rows are drawn by a script."""
        columns = [
            {
                "key": column.key,
                "title": column.title,
                "numeric": column.numeric,
                "digits": 0 if column.format == "integer" else column.digits,
            }
            for column in table.columns
        ]
        rows = [[_plain(row.get(column.key)) for column in table.columns] for row in table.rows]
        data = {"columns": columns, "rows": rows}
        return self._add("sortable", {"data": _embedded(data), "table": table}, table.caption)

    def routed(
        self, layers: Sequence[int], cases: Sequence[Mapping[str, Any]], *, caption: str
    ) -> Section:
        """Add texts whose words are coloured by expert; the reader chooses text and layer.

        A case has domain, words, best (place of a layer), consistency [L] and experts: base64 of
        [tokens, L, K] little-endian numbers of `size` bytes, the largest for none.
        """
        data = {"layers": list(layers), "cases": list(cases)}
        return self._add("routed", _embedded(data), caption)

    def _add(self, kind: Any, content: Any, caption: str = "") -> Section:
        self.blocks.append(_Block(kind, content, caption))
        return self


@dataclass
class Page:
    """A report: title, one sentence on what it is, sections, and a line about how it was made."""

    title: str
    subtitle: str = ""
    footer: str = ""
    sections: list[Section] = field(default_factory=list)

    def section(self, title: str) -> Section:
        """Append a section and return it."""
        section = Section(title)
        self.sections.append(section)
        return section

    @property
    def scripted(self) -> bool:
        """Whether a block needs the script."""
        kinds = {block.kind for section in self.sections for block in section.blocks}
        return bool(kinds & {"sortable", "routed"})

    def html(self) -> str:
        """The whole page. The same content always gives the same text."""
        from jinja2 import Environment, PackageLoader, StrictUndefined

        environment = Environment(
            loader=PackageLoader("moesaic.report", "."),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        from markupsafe import Markup

        script = Markup((Path(__file__).parent / "page.js").read_text(encoding="utf-8"))
        template = environment.get_template("page.html.j2")
        return template.render(page=self, css=theme.css, script=script)

    def write(self, path: Path) -> Path:
        """Write the page to `path`, whole or not at all."""
        write_text(path, self.html())
        return path


def _plain(value: Any) -> Any:
    """A value for JSON: unknown numbers are null, long fractions are cut."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _embedded(data: Any) -> Any:
    """JSON that can stand inside a <script> element: no tag can begin or end in it."""
    from markupsafe import Markup

    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)
