from __future__ import annotations

import json

from moesaic.data.sources import open_domains, open_source
from moesaic.data.stdlib import StandardLibrary, docstrings, held_out


def test_three_domains_and_two_splits_that_share_nothing() -> None:
    assert list(open_domains("stdlib")) == ["code", "docstrings", "prose"]
    for kind in ("code", "prose"):
        names = {
            split: {name for name, _ in StandardLibrary(kind, split).named()}
            for split in ("all", "train", "valid")
        }
        assert names["train"] | names["valid"] == names["all"]
        assert not names["train"] & names["valid"]
        assert 0.03 < len(names["valid"]) / len(names["all"]) < 0.25
    assert {"argparse", "asyncio.events", "json"} <= {n for n, _ in StandardLibrary("code").named()}


def test_documents() -> None:
    source = next(t for n, t in StandardLibrary("code").named() if n == "json.decoder")
    assert "class JSONDecoder" in source
    prose = "".join(StandardLibrary("prose").documents())
    assert 'The "if" statement' in prose or 'The "if"' in prose
    assert len(prose) > 100_000


def test_docstrings_are_listed_under_their_names() -> None:
    source = '''"""Top."""
class A:
    """Of A.

    More:
        indented
    """
    def f(self, x, *, y=1):
        """Of f."""
    async def g(self): pass
'''
    assert docstrings(source, "m") == (
        "m\nTop.\n\nm.A\nOf A.\n\nMore:\n    indented\n\nm.A.f(self, x, *, y=1)\nOf f.\n"
    )
    assert docstrings("x = 1", "m") == ""
    assert docstrings("not python(", "m") == ""
    assert json.loads.__doc__.strip().splitlines()[0] in docstrings(
        next(t for n, t in StandardLibrary("code").named() if n == "json"), "json"
    )


def test_held_out_names_are_fixed() -> None:
    held = [
        name for name in ("argparse", "inspect", "json", "logging", "os", "re") if held_out(name)
    ]
    assert held == ["inspect", "json", "logging"]


def test_fingerprints_tell_splits_apart() -> None:
    found = {open_source(f"stdlib@{split}").fingerprint() for split in ("all", "train", "valid")}
    assert len(found) == 3


def test_no_paragraph_of_a_held_out_topic_is_trained_on():
    def paragraphs(split):
        documents = StandardLibrary("prose", split).documents()
        return {part.strip() for text in documents for part in text.split("\n\n") if part.strip()}

    held_out = paragraphs("valid")
    assert held_out
    assert not held_out & paragraphs("train")
    assert held_out & paragraphs("all") == held_out
