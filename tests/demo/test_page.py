"""The page is made from results alone, and says what they say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moesaic.demo import page

DOMAINS = ("code", "docstrings", "prose")


def _loss(mean: float) -> dict[str, float]:
    return {"mean": mean, **{name: mean + i / 10 - 0.1 for i, name in enumerate(DOMAINS)}}


def _method(split: str, converted: float, trained: float | None) -> dict[str, Any]:
    domains = {"converted": _loss(converted)}
    if trained is not None:
        domains["trained"] = _loss(trained)
    return {
        "split": split,
        "why": f"why {split}",
        "experts": 4,
        "top_k": 2,
        "exact": True,
        "dense_check": 1.5e-6,
        "loss_converted": converted,
        "loss_trained": trained,
        "domains": domains,
        "seconds": 1.5,
    }


@pytest.fixture
def results() -> dict[str, Any]:
    load = {name: [[0.4, 0.3, 0.2, 0.1], [0.97, 0.01, 0.01, 0.01]] for name in DOMAINS}
    return {
        "experts": 4,
        "top_k": 2,
        "dense": {"model": "somewhere/dense", "loss": _loss(3.0)},
        "methods": [
            _method("random", 6.0, None),
            _method("cluster", 5.0, 3.5),
            _method("gradient", 5.5, None),
        ],
        "training": {
            "log": [{"tokens": 100 * i, "loss": 5 - i / 20} for i in range(1, 31)],
            "held_out": [{"tokens": t, "loss": _loss(5 - t / 2000)} for t in (0, 1500, 3000)],
        },
        "trained_tokens": 3000,
        "parameters": {"total": 4_000_000, "active": 2_500_000},
        "load": {"converted": load, "trained": load},
        "samples": [
            {"prompt": "<b>def", "texts": {"dense": "one", "MoE, converted": "two & three"}}
        ],
        "configs": {"train": "tokens: 3000\n", "convert, random split": "a: 1\n"},
        "versions": {"python": "3.11.2", "torch": "2.13.0"},
        "machine": "2 CPU cores, x86_64",
        "seconds": 123.4,
        "report": "r.html",
        "checkpoint": "moe",
    }


def test_page_needs_no_torch_and_only_json(results: dict[str, Any], tmp_path: Path):
    file = tmp_path / "results.json"
    file.write_text(json.dumps(results))
    code = (
        "import json, pathlib, sys; from moesaic.demo import page; "
        "r = json.load(open(sys.argv[1])); page.write(r, pathlib.Path(sys.argv[2])); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, file, tmp_path / "a.html"], check=True)
    assert (tmp_path / "a.html").read_text() == page.page(results).html()


def test_loss_table_has_every_model_and_marks_the_lowest(results: dict[str, Any]):
    table = page.loss_table(results)
    assert [(row["model"], row["split"]) for row in table.rows] == [
        ("dense", None),
        ("MoE, just converted", "random"),
        ("MoE, just converted", "cluster"),
        ("MoE, just converted", "gradient"),
        ("MoE, trained", "cluster"),
    ]
    assert [row["mean"] for row in table.rows] == [3.0, 6.0, 5.0, 5.5, 3.5]
    assert [row["in prose"] for row in table.rows] == pytest.approx([3.1, 6.1, 5.1, 5.6, 3.6])
    best = [[cell.text for cell in row if cell.best] for row in table.cells()]
    assert best == [["3.000"], [], [], [], []]


def test_page_says_what_was_found(results: dict[str, Any]):
    html = page.page(results).html()
    text = re.sub(r"\s+", " ", re.sub(r"<style>.*?</style>|<[^>]+>", " ", html, flags=re.DOTALL))
    assert "won back 75%" in text, "(5.0 - 3.5) of (5.0 - 3.0)"
    assert "+2.000" in text and "+0.500 against dense" in text  # noqa: PT018
    assert "2.50 M of 4.00 M" in text
    assert "62%" in text
    assert text.count("1.5e-06") == 3
    assert "3,000 tokens" in text
    assert "3.9 times an even share; 9 of 24" in text, "0.97 of 4 experts; 0.01 is under a tenth"
    assert "&lt;b&gt;def" in html and "two &amp; three" in html  # noqa: PT018
    assert "tokens: 3000" in text
    assert "Made by moesaic demo in 123 s with python 3.11.2, torch 2.13.0." in text
    assert html.count("<svg") == 4, "losses, curve, load before and after"


def test_a_mixture_no_worse_than_dense_wins_back_nothing(results: dict[str, Any]):
    for method in results["methods"]:
        method["loss_converted"] = 2.9
    assert "won back" not in page.page(results).html()
