from __future__ import annotations

import sys
import textwrap

import pytest

from moesaic.core.errors import MoesaicError, UserError
from moesaic.core.registry import Registry


@pytest.fixture
def room(tmp_path, monkeypatch):
    """A package `shapes` with two choices, one of which counts its imports."""
    package = tmp_path / "shapes"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from moesaic.core.registry import Registry\nSHAPES = Registry('shape', 'shapes')\n"
    )
    for name in ("circle", "round_square"):
        (package / f"{name}.py").write_text(
            textwrap.dedent(f'''
            from shapes import SHAPES

            @SHAPES.register
            def draw():
                """Draw a {name}.

                More words.
                """
                return "{name}"
            ''')
        )
    (package / "_helper.py").write_text("raise RuntimeError('never imported')")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for module in [m for m in sys.modules if m.split(".")[0] == "shapes"]:
        del sys.modules[module]


def test_files_are_found_by_name_and_imported_on_use(room):
    from shapes import SHAPES

    assert SHAPES.names() == ["circle", "round-square"]
    assert "shapes.circle" not in sys.modules
    assert SHAPES.get("round-square")() == "round_square"
    assert "shapes.circle" not in sys.modules
    assert SHAPES.describe() == {"circle": "Draw a circle.", "round-square": "Draw a round_square."}


def test_unknown_names_get_the_nearest(room):
    from shapes import SHAPES

    with pytest.raises(
        UserError, match=r"Unknown shape 'cirlce'. Did you mean 'circle'\? Available"
    ):
        SHAPES.get("cirlce")


def test_a_collision_is_an_error():
    registry: Registry = Registry("thing", "tests.core")

    def one():
        """One."""

    def two():
        """Two."""

    registry.register(one)
    with pytest.raises(MoesaicError, match="Two things are called 'test-registry'"):
        registry.register(two)
