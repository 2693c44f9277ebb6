"""One self-contained HTML page from text, tables and figures: no scripts, no external files.

A `Page` collects sections of blocks and is written through a jinja2 template. Everything given as
text is escaped; only the SVG of our own figures is inserted as it is. The page follows the
reader's light or dark setting, prints well, and works from a USB stick.
"""

from __future__ import annotations

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
    kind: Literal["text", "facts", "table", "figure", "samples", "code"]
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
        return environment.get_template("page.html.j2").render(page=self, css=theme.css)

    def write(self, path: Path) -> Path:
        """Write the page to `path`, whole or not at all."""
        write_text(path, self.html())
        return path
