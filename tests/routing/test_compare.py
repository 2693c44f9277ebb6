"""Comparisons: differences against the first model, among the published ones."""

from __future__ import annotations

import json

import numpy as np
import pytest

import moesaic
from moesaic.core.errors import UserError
from moesaic.report.analysis import Analysis
from moesaic.report.compare_page import published_table
from moesaic.report.reference import reference
from moesaic.routing.compare import compare
from moesaic.routing.trace import Trace
from tests.helpers import SHARED, assert_user_error, run_cli
from tests.routing.synthetic import write_trace

QUICK = {"bootstrap": 40, "segments": (4, 16), "min_count": 3, "report": False}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Analyses of a base, of one that routes the same tokens otherwise, and of another model."""
    folder = tmp_path_factory.mktemp("compare")
    base = write_trace(folder / "base")
    write_trace(folder / "tuned")
    experts = np.fromfile(folder / "tuned" / "experts.bin", dtype=np.uint8).reshape(-1, 2, 2)
    experts[:, 1] = np.where(experts[:, 1] == 255, 255, (experts[:, 1] + 1) % 6)
    experts.tofile(folder / "tuned" / "experts.bin")
    write_trace(folder / "other", domains=["code", "law"], layers=(0, 1, 2), experts=9, seed=3)
    for name in ("base", "tuned", "other"):
        moesaic.analyze(folder / name, out=folder / f"{name}-report", **QUICK)
    assert base.rows > 0
    return folder


@pytest.fixture(scope="module")
def compared(place):
    reports = [place / f"{name}-report" for name in ("base", "tuned", "other")]
    out = place / "compared"
    result = run_cli("route", "compare", *reports, "-o", out, "--json")
    assert result.exit_code == 0, result.stderr
    return result.json


def test_differences_are_against_the_first(place, compared):
    base, tuned, other = (Analysis(place / f"{n}-report") for n in ("base", "tuned", "other"))
    assert compared["base"] == "base-report"
    assert [row["name"] for row in compared["models"]] == [
        "base-report", "tuned-report", "other-report",
    ]  # fmt: skip
    first, second = compared["differences"]
    for m in ("4", "16"):
        # experts of a layer renamed: the same consistency
        assert first["srp"][m]["absolute"] == pytest.approx(0, abs=1e-12)
        assert first["srp"][m]["distinct"] is False
        one, two = base.metrics["srp"][m], other.metrics["srp"][m]
        assert second["srp"][m]["absolute"] == two["srp"] - one["srp"]
        assert second["srp"][m]["relative"] == two["srp"] / one["srp"] - 1 or np.isclose(
            second["srp"][m]["relative"], two["srp"] / one["srp"] - 1
        )
        assert second["srp"][m]["rho"] == two["rho"] - one["rho"]
    assert set(second["by_domain"]) == {"code"}
    assert tuned.metrics["loss"] == base.metrics["loss"]


def test_choices_of_the_same_tokens(place, compared):
    first, second = compared["differences"]
    same = first["same_choices"]["by_layer"]
    assert same["1"] == 1.0
    one, two = Trace(place / "base"), Trace(place / "tuned")
    a_RK, b_RK = one.chosen()[:, 1], two.chosen()[:, 1]
    pairs = [len(set(a) & set(b) - {-1}) for a, b in zip(a_RK.tolist(), b_RK.tolist(), strict=True)]
    assert same["3"] == pytest.approx(sum(pairs) / (a_RK >= 0).sum())
    assert first["experts"]["srp"] < 0.99  # other experts now
    assert "experts" not in second
    assert any("other-report has other layers or experts" in note for note in compared["notes"])


def test_a_page_with_the_published_models(place, compared):
    text = (place / "compared" / "report.html").read_text()
    assert "https://" not in text.replace("http://www.w3.org", "")
    for name in ("llamamoe2", "olmoe", "switch dec", "overlb"):
        assert f'"{name}"' in text
    rows = {row["name"]: row for row in published_table(compared).rows}
    assert rows["olmoe"]["srp16"] == pytest.approx(50.91)
    assert rows["olmoe"]["sch2"] == pytest.approx(74.1)
    assert rows["tuned-report"]["srp16"] == pytest.approx(
        100 * compared["models"][1]["srp"]["16"]["srp"]
    )


def test_published_figures_are_those_of_the_specification():
    """Sums of every column, taken by hand from the table in spec/routing.md section 14."""
    models = reference()
    assert len(models) == 22  # 20 models; two of them encoder and decoder
    assert len(reference("toys")) == 10
    assert all(len(row["srp"]) == len(row["rho"]) == 4 for row in models)
    path = SHARED / "spec" / "routing.md"
    if not path.is_file():
        pytest.skip("the specification is not here")
    lines = {
        cells[0]: cells
        for line in path.read_text().splitlines()
        if line.count("|") == 11
        for cells in [[cell.strip() for cell in line.strip("|").split("|")]]
    }
    for row in models:
        cells = lines[row["name"]]
        for column, key, scale in (
            (2, "srp", 100),
            (3, "rho", 1),
            (4, "sch16", 100),
            (5, "rate2", 100),
        ):
            shown = [None if v.strip() == "-" else float(v) for v in cells[column].split("/")]
            held = [None if v is None else v * scale for v in row[key].values()]
            assert held == pytest.approx(shown), (row["name"], key)
        assert row["load_deviation"] == pytest.approx(float(cells[7]) / 100)
        assert row["log_ppl"] == (None if cells[6] == "-" else float(cells[6]))


def test_traces_are_analyzed_first_and_names_are_given(place, tmp_path, monkeypatch):
    from moesaic.report import compare_page, routing_page

    monkeypatch.setattr(routing_page, "draw", lambda analysis: None)
    monkeypatch.setattr(compare_page, "draw_comparison", lambda *given: None)
    write_trace(tmp_path / "a" / "trace", samples=3)
    out = compare(
        [tmp_path / "a" / "trace", place / "base-report", place / "base-report"],
        out=tmp_path / "out",
        names=["fresh", "one", "two"],
    )
    found = json.loads((out / "comparison.json").read_text())
    assert [row["name"] for row in found["models"]] == ["fresh", "one", "two"]
    assert (tmp_path / "out-a-trace" / "metrics.json").is_file()
    with pytest.raises(UserError, match="2 names for 3"):
        compare([place / "base-report"] * 3, out=tmp_path / "x", names=["a", "b"])


def test_what_cannot_be_compared(place, tmp_path):
    report = place / "base-report"
    assert_user_error(run_cli("route", "compare", report, "-o", tmp_path / "o"), "two or more")
    wrong = run_cli("route", "compare", report, place / "base" / "nothing", "-o", tmp_path / "o")
    assert_user_error(wrong, "no such folder")
    wrong = run_cli("route", "compare", report, tmp_path, "-o", tmp_path / "o")
    assert_user_error(wrong, "no routing analysis")
    moesaic.analyze(place / "base", out=tmp_path / "eight", **{**QUICK, "segments": (8,)})
    wrong = run_cli("route", "compare", report, tmp_path / "eight", "-o", tmp_path / "o")
    assert_user_error(wrong, "no segment length in common")
    wrong = run_cli("route", "compare", report, report, "-o", place / "other-report")
    assert_user_error(wrong, "not empty")
