from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from moesaic.core.errors import UserError
from moesaic.report import plots, theme


def _load(domains: int, layers: int, experts: int) -> dict[str, list[list[float]]]:
    rng = np.random.default_rng(0)
    return {
        f"domain{i}": rng.dirichlet([3.0] * experts, size=layers).tolist() for i in range(domains)
    }


def _fills(svg: str) -> list[str]:
    return re.findall(r"fill: var\(--(heat-\d+)\)", svg)


FIGURES = {
    "curves": lambda: plots.curves(
        {"train": [(i, 5 - i / 10) for i in range(40)], "valid": [(0, 5.0), (40, 2.0)]},
        x_label="tokens",
        y_label="loss",
        levels={"dense": 1.5},
        smooth=5,
    ),
    "dots": lambda: plots.dots(
        {"random": {"converted": 5.0, "trained": 3.0}, "cluster": {"converted": 4.0}},
        x_label="loss",
    ),
    "map": lambda: plots.load_map(_load(3, 4, 8)),
    "large map": lambda: plots.load_map(_load(2, 12, 64)),
}


@pytest.mark.parametrize("name", FIGURES)
def test_svg_is_self_contained_themed_and_repeatable(name: str):
    svg = plots.svg(FIGURES[name]())
    assert svg == plots.svg(FIGURES[name]())
    assert "http" not in svg
    assert "xmlns" not in svg
    assert "font-family" not in svg
    left = set(re.findall(r"#[0-9a-f]{6}\b", svg)) - {"#000000", "#ffffff"}
    assert not left, f"colours outside the theme: {left}"
    root = ET.fromstring(svg)  # well-formed
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(set(ids)) == len(ids)
    referred = set(re.findall(r"url\(#([^)]+)\)", svg)) | set(re.findall(r'href="#([^"]+)"', svg))
    assert referred <= set(ids)


def test_ids_of_two_figures_do_not_meet():
    first, second = (
        set(re.findall(r'\bid="([^"]+)"', plots.svg(FIGURES[name]()))) for name in ("curves", "map")
    )
    assert not first & second


def test_load_map_colours_say_how_far_from_uniform():
    # Uniform, four times and more, a quarter and less: middle, last and first colour.
    load = [[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]]
    cells = _fills(plots.svg(plots.load_map({"text": load})))[: 2 * 4]
    middle, last = theme.HEAT_STEPS // 2, theme.HEAT_STEPS - 1
    assert cells[:4] == [f"heat-{middle}"] * 4
    assert cells[4:] == [f"heat-{last}", "heat-0", "heat-0", "heat-0"]


def test_load_map_writes_the_relative_load():
    svg = plots.svg(plots.load_map({"text": [[0.7, 0.1, 0.1, 0.1]]}))
    assert ">2.8<" in svg
    assert ">0.4<" in svg


def test_load_map_refuses_panels_that_do_not_match():
    with pytest.raises(UserError, match=r"code \(1, 4\), prose \(2, 4\)"):
        plots.load_map({"code": [[0.25] * 4], "prose": [[0.25] * 4] * 2})
    with pytest.raises(UserError, match="none"):
        plots.load_map({})


def test_running_mean_invents_nothing():
    values = np.array([1.0, 2.0, 6.0, 2.0, 1.0])
    assert plots._running_mean(values, 3) == pytest.approx([1.5, 3.0, 10 / 3, 3.0, 1.5])


def test_empty_series_are_named():
    with pytest.raises(UserError, match="'valid'"):
        plots.curves({"valid": []}, x_label="x", y_label="y")
    with pytest.raises(UserError, match="empty"):
        plots.dots({}, x_label="loss")


def test_figures_do_not_depend_on_the_users_settings(monkeypatch: pytest.MonkeyPatch):
    import matplotlib as mpl

    before = plots.svg(FIGURES["curves"]())
    with mpl.rc_context({"font.size": 30, "axes.edgecolor": "#ff0000", "svg.fonttype": "path"}):
        assert plots.svg(FIGURES["curves"]()) == before


def test_save_writes_by_suffix(tmp_path: Path):
    figure = FIGURES["map"]()
    assert plots.save(figure, tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")
    assert plots.save(figure, tmp_path / "load.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(UserError, match=r"\.png, \.pdf, \.svg"):
        plots.save(figure, tmp_path / "load.bmp")


def test_theme_colours_can_be_told_apart():
    lights = [pair[0] for pair in theme.LIGHT_AND_DARK.values()]
    assert len(set(lights)) == len(lights), "each light colour stands for one variable"

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(first: str, second: str) -> float:
        low, high = sorted((luminance(first), luminance(second)))
        return (high + 0.05) / (low + 0.05)

    for version in (0, 1):
        paper, card = (theme.LIGHT_AND_DARK[name][version] for name in ("paper", "card"))
        for name in ("ink", "muted", "accent"):  # WCAG AA for text
            colour = theme.LIGHT_AND_DARK[name][version]
            assert min(contrast(colour, paper), contrast(colour, card)) >= 4.5, (name, version)
        for name in theme.SERIES:  # WCAG for graphics
            assert contrast(theme.LIGHT_AND_DARK[name][version], paper) >= 2.9, (name, version)
