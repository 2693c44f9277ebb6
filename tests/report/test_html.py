from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

from moesaic.report import plots
from moesaic.report.html import Fact, Page, Sample
from moesaic.report.tables import Column, Table

EVIL = '<script>alert("x")</script> & more'


def _page() -> Page:
    page = Page(EVIL, subtitle=EVIL, footer=EVIL)
    page.section(EVIL).text(f"{EVIL}\n\nsecond").facts([Fact(EVIL, EVIL, EVIL)])
    table = Table([Column("a", EVIL, note=EVIL), Column("b", "B", "fixed", best="min")], [])
    rows = [{"a": EVIL, "b": 1.0}, {"a": "x", "b": 2.0}]
    page.section("Table").table(Table(table.columns, rows, caption=EVIL))
    figure = plots.curves({EVIL: [(0, 1), (1, 2)]}, x_label=EVIL, y_label="y")
    page.section("Figure").figure(figure, caption=EVIL)
    page.section("Rest").samples([Sample(EVIL, {EVIL: EVIL})]).code(EVIL, title=EVIL)
    return page


class _Reader(HTMLParser):
    """Collects tags, addresses, and checks that elements close in order."""

    VOID = frozenset({"meta", "br", "img", "link", "input", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in {"href", "src", "srcset", "data", "action"}:
                self.addresses.append(value or "")
            if name == "id":
                self.ids.append(value or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag


def test_everything_given_as_text_is_escaped():
    html = _page().html()
    assert "<script" not in html
    assert html.count("&lt;script&gt;") >= 14


def test_page_is_one_file_that_loads_nothing():
    html = _page().html()
    reader = _Reader()
    reader.feed(html)
    assert not reader.open, f"left open: {reader.open}"
    assert not {"script", "link", "img", "iframe", "object"} & set(reader.tags)
    for address in reader.addresses:
        assert address.startswith("#"), address
        assert address[1:] in reader.ids, f"{address} points nowhere"
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html), "CSS loads a file"
    assert "prefers-color-scheme: dark" in html


def test_same_content_gives_the_same_bytes(tmp_path: Path):
    first = _page().write(tmp_path / "a.html").read_bytes()
    assert first == _page().write(tmp_path / "b.html").read_bytes()
    assert len(list(tmp_path.iterdir())) == 2, "no partial files"


def test_best_cell_is_marked():
    html = _page().html()
    assert '<td class="number best">1.000</td>' in html
    assert '<td class="number">2.000</td>' in html


def test_reports_need_no_torch():
    code = (
        "import sys; from moesaic.report.html import Page; Page('x').html(); "
        "from moesaic.report import plots; plots.svg(plots.dots({'a': {'b': 1.0}}, x_label='l')); "
        "bad = {'torch', 'transformers', 'matplotlib.pyplot'} & set(sys.modules); "
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
