"""Analyses: figures equal those of the plain functions, survive a kill, and are shown."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import moesaic
from moesaic.core.errors import UserError
from moesaic.report.analysis import Analysis, read_table
from moesaic.routing import analyze as analyzer
from moesaic.routing import caches, metrics, reading
from moesaic.routing.trace import Shape, Trace, TraceWriter
from tests.helpers import assert_user_error, run_cli
from tests.routing import golden
from tests.routing.synthetic import arrays_of, write_trace

QUICK = {"bootstrap": 40, "segments": (4, 16, 64), "min_count": 3, "report": False}


def tables(directory: Path) -> dict[str, dict[str, np.ndarray]]:
    return {file.stem: read_table(file) for file in sorted((directory / "tables").glob("*"))}


def assert_same_tables(one: Path, two: Path) -> None:
    first, second = tables(one), tables(two)
    assert first.keys() == second.keys()
    for name, columns in first.items():
        for key, column in columns.items():
            other = second[name][key]
            if column.dtype.kind == "f":
                assert column.tobytes() == other.tobytes(), (name, key)
            else:
                assert column.tolist() == other.tolist(), (name, key)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A trace and its analysis."""
    folder = tmp_path_factory.mktemp("analyze")
    trace = write_trace(folder / "trace")
    moesaic.analyze(trace, out=folder / "out", **QUICK)
    return folder


def test_segment_routing_is_that_of_all_samples(place):
    trace, analysis = Trace(place / "trace"), Analysis(place / "out")
    chosen, domain = arrays_of(trace)
    for m in (4, 16):
        for level in ("model", "layer", "expert"):
            for number, name in ((None, "all"), (0, "news"), (1, "code")):
                own = [c for c, d in zip(chosen, domain, strict=True) if number in (None, d)]
                wanted = metrics.srp(own, num_experts=6, segment=m, level=level)
                table = analysis.table(f"segments_{level}", domain=name, segment=m)
                for key in ("srp", "rho", "activation"):
                    assert np.allclose(table[key], np.ravel(getattr(wanted, key)), rtol=1e-12)
                if level != "expert":
                    assert (table["low"] < table["srp"]).all()
                    assert (table["high"] > table["srp"]).all()
        wanted = metrics.position_srp(chosen, num_experts=6, segment=m)
        found = analysis.table("positions", domain="all", segment=m)
        assert np.allclose(found["srp"], wanted.srp, rtol=1e-12)
    assert (
        analysis.metrics["srp"]["16"]["srp"]
        == analysis.table("segments_model", domain="all", segment=16)["srp"]
    )


def test_hit_rates_are_those_of_the_samples(place):
    trace, analysis = Trace(place / "trace"), Analysis(place / "out")
    chosen, domain = arrays_of(trace)
    policies = {"lru": {}, "lfu": {}, "belady": {}, "sch-16": {"policy": "sch", "window": 16}}
    for name, options in policies.items():
        given = {"policy": name, **options}
        for scope in ("layer", "model"):
            means = []
            for number, label in enumerate(trace.domains):
                own = [c for c, d in zip(chosen, domain, strict=True) if d == number]
                rates = caches.hit_rates(own, num_experts=6, scope=scope, **given).mean(axis=0)
                found = analysis.table(f"hits_{scope}", domain=label, policy=name)
                assert np.allclose(found["rate"], rates.ravel(), atol=1e-6), (name, scope)
                assert (found["high"][:3] > found["low"][:3]).all()
                means.append(rates.ravel())
            found = analysis.table(f"hits_{scope}", domain="all", policy=name)
            assert np.allclose(found["rate"], np.mean(means, axis=0), atol=1e-6)
            assert np.allclose(found["ratio"], found["size"] / (2 if scope == "layer" else 4))
    # which experts are fixed is decided by all domains together
    rates = caches.hit_rates(chosen, num_experts=6, policy="fixed")
    for number, label in enumerate(trace.domains):
        found = analysis.table("hits_layer", domain=label, policy="fixed")
        assert np.allclose(found["rate"], rates[domain == number].mean(axis=0).ravel(), atol=1e-6)


def test_load_words_and_loss(place):
    trace, analysis = Trace(place / "trace"), Analysis(place / "out")
    ids = np.asarray(trace.experts)
    for layer, name in enumerate(trace.layers):
        counts = np.bincount(ids[:, layer].ravel(), minlength=256)[:6]
        assert np.array_equal(analysis.table("load", domain="all", layer=name)["count"], counts)
    words = analysis.table("words", kind="input", layer=3, rank=0)
    for expert, word, frequency in zip(
        words["expert"], words["id"], words["frequency"], strict=True
    ):
        own = (trace.token_ids == word) & (ids[:, 1, 0] != 255)
        assert frequency == (ids[own, 1, 0] == expert).mean()
    losses = [
        np.mean([np.nanmean(trace.loss[a:b]) for a, b, d in samples if d == number])
        for number in range(2)
        for samples in [list(zip(trace.samples()[:-1], trace.samples()[1:],
                                 trace.domain[trace.samples()[:-1]], strict=True))]
    ]  # fmt: skip
    assert analysis.metrics["loss"] == pytest.approx(np.mean(losses))


def test_what_is_unknown_is_null_and_said(place, tmp_path):
    found = Analysis(place / "out").metrics
    assert found["srp"]["64"]["srp"] is None  # the longest sample has 40 tokens
    assert any("64 tokens" in note for note in found["notes"])
    one = write_trace(tmp_path / "one", domains=["x"], samples=1, last=1, predictions=False)
    metrics_ = moesaic.analyze(one, out=tmp_path / "out", bootstrap=0, report=False).metrics
    assert metrics_["trace"]["rows"] == 1
    assert all(row["srp"] is None for row in metrics_["srp"].values())
    assert metrics_["specialisation"]["domain"] is None
    assert metrics_["loss"] is None
    assert metrics_["hit_rates"]["layer"]["lru"]["2"] == 1.0  # the first experts fill it


def test_blocks_do_not_change_the_figures(place, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_BLOCK_CHOICES", 200)
    moesaic.analyze(place / "trace", out=tmp_path / "out", **QUICK)
    one, two = tables(place / "out"), tables(tmp_path / "out")
    for name, columns in one.items():
        for key, column in columns.items():
            if column.dtype.kind == "f":
                same = np.allclose(column, two[name][key], rtol=1e-9, atol=1e-12, equal_nan=True)
                assert same, (name, key)
            else:
                assert column.tolist() == two[name][key].tolist(), (name, key)


def golden_trace(folder: Path, name: str) -> Trace:
    """The golden routing of a model as a trace; words where there are any."""
    (stack,) = golden.stacks(name)
    given, case = golden.arrays(name, "input"), golden.CASES[name]
    width = len(stack.layers)
    shape = Shape(tuple(stack.names), (case["E"],) * width, (case["k"],) * width)
    writer = TraceWriter(folder, shape, {"domains": list(stack.ids), "vocab_size": 97})
    for domain, (label, ids) in enumerate(stack.ids.items()):
        samples, tokens = ids.shape[:2]
        rows = samples * tokens
        writer.append(
            {
                "experts": ids.reshape(rows, width, -1),
                "weights": np.ones((rows, width, case["k"])),
                "token_ids": given[f"tokens_{label}"].ravel(),
                "predicted": given[f"preds_{label}"].ravel(),
                "loss": np.zeros(rows),
                "document": np.zeros(rows),
                "position": np.tile(np.arange(tokens), samples),
                "domain": np.full(rows, domain),
            }
        )
    writer.finish()
    return Trace(folder)


@pytest.mark.parametrize("name", ["uni8", "topone16"])
def test_figures_of_the_original_programs(tmp_path, name):
    """A golden trace from end to end: every table of segment routing, hit rates, vocabulary."""
    trace = golden_trace(tmp_path / "trace", name)
    every = golden.CASES[name]["N"]
    options = {"bootstrap": 0, "report": False}
    found = moesaic.analyze(trace, out=tmp_path / "all", **options)
    thin = moesaic.analyze(
        trace, out=tmp_path / "thin", cache_samples=-(-every // 16), **options
    )  # SCH: every 16th sample
    for letter, level in (("m", "model"), ("l", "layer"), ("e", "expert")):
        for kind in ("g", "d"):
            rows = golden.table(golden.folder(name) / f"srp_{letter}{kind}.csv.gz")
            assert rows
            for row in rows:
                where = {"domain": row.get("dataset", "all"), "segment": int(row["seg_len"])}
                where |= {k: int(row[f"{k}_idx"]) for k in ("layer", "expert") if f"{k}_idx" in row}
                own = found.table(f"segments_{level}", **where)
                for key, word in (("srp", "best_f1"), ("activation", "act_r"), ("rho", "best_m")):
                    assert own[key] == pytest.approx(float(row[word]), abs=1e-6)
    expected = golden.arrays(name, "expected")
    compared = 0
    for key, values in expected.items():
        if "_ci_" not in key:
            continue
        kind, _, where, domain = key.split("_")
        analysis, names = {
            "chr": (found, ["lru", "lfu", "belady"]),
            "sch": (thin, [f"sch-{m}" for m in golden.SEGMENTS]),
        }[kind]
        for policy, mean_E in zip(names, values[:, 1], strict=True):
            if where == "d":
                own = analysis.table("hits_model", domain=domain, policy=policy)
            else:
                own = analysis.table("hits_layer", domain=domain, policy=policy, layer=int(where))
            assert np.allclose(own["rate"], mean_E, atol=1e-6)
            compared += 1
    assert compared >= 7 * len(trace.layers)
    experts = found.table("experts")
    names_ = {"in": "input", "pred": "predicted", "out": "target"}
    path = golden.folder(name) / "vocab_gen.csv"
    for row in golden.table(path) if path.exists() else []:
        own = (experts["layer"] == int(row["layer_idx"])) & (
            experts["expert"] == int(row["expert_idx"])
        )
        value = experts[f"{names_[row['token_type']]}_specialisation"][own]
        assert value == pytest.approx(float(row["freq"]), abs=1e-6)


KILLED = """
import os, signal, sys
from moesaic.routing import analyze, reading, study
reading._BLOCK_CHOICES = 200
analyze.SAVE_SECONDS = 0
left = [int(sys.argv[3])]
update = study.Study.update
def killed(self, *given):
    update(self, *given)
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
study.Study.update = killed
analyze.analyze(sys.argv[1], out=sys.argv[2], bootstrap=40, segments=(4, 16, 64), min_count=3,
                report=False)
"""


def test_a_killed_analysis_goes_on_and_is_equal(place, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_BLOCK_CHOICES", 200)
    out = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED, str(place / "trace"), str(out), "11"]
    died = subprocess.run(command, capture_output=True, cwd=Path(__file__).parents[2])
    assert died.returncode == -9, died.stderr
    assert (out / ".work" / "state.npz").is_file()
    assert not (out / "metrics.json").exists()
    seen = []
    update = analyzer.Study.update
    monkeypatch.setattr(
        analyzer.Study, "update", lambda self, *g: (seen.append(g[1]), update(self, *g))[1]
    )
    moesaic.analyze(place / "trace", out=out, **QUICK)
    resumed = len(seen)
    moesaic.analyze(place / "trace", out=tmp_path / "whole", **QUICK)
    assert 0 < resumed < len(seen) - resumed
    assert_same_tables(out, tmp_path / "whole")
    assert not (out / ".work").exists()
    with pytest.raises(UserError, match="min_count"):
        moesaic.analyze(place / "trace", out=out, **{**QUICK, "min_count": 4})


def test_memory_does_not_grow_with_the_trace(tmp_path):
    sizes = []
    for samples in (4, 40):
        trace = write_trace(tmp_path / f"t{samples}", samples=samples)
        found = moesaic.analyze(trace, out=tmp_path / f"o{samples}", **QUICK)
        sizes.append(found.metrics["memory_bytes"])
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)  # a few words more are frequent


def test_fewer_samples_for_caches(place, tmp_path):
    found = moesaic.analyze(place / "trace", out=tmp_path / "out", cache_samples=3, **QUICK)
    chosen, domain = arrays_of(Trace(place / "trace"))
    own = [c for c, d in zip(chosen, domain, strict=True) if d == 0]
    rates = caches.hit_rates([own[0], own[2], own[5]], num_experts=6, policy="lru").mean(axis=0)
    table = found.table("hits_layer", domain="news", policy="lru")
    assert np.allclose(table["rate"], rates.ravel(), atol=1e-6)
    assert any("3 samples" in note for note in found.metrics["notes"])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("empty", ["holds no token"]),
        ("truncated", ["experts.bin", "truncated"]),
        ("expert", ["expert 200", "layer 3"]),
        ("domain", ["domain 7"]),
        ("position", ["position"]),
        ("folder", ["is no trace"]),
    ],
)
def test_bad_traces_are_refused(tmp_path, damage, words):
    trace = tmp_path / "trace"
    write_trace(trace, samples=0 if damage == "empty" else 3)
    if damage == "truncated":
        with (trace / "experts.bin").open("r+b") as file:
            file.truncate(50)
    elif damage == "folder":
        shutil.rmtree(trace)
        trace.mkdir()
    elif damage != "empty":
        name, place, value = {
            "expert": ("experts", 4 * 30 + 2, 200),
            "domain": ("domain", 2 * 30, 7),
            "position": ("position", 4 * 30, 9),
        }[damage]
        with (trace / f"{name}.bin").open("r+b") as file:
            file.seek(place)
            file.write(bytes([value]))
    result = run_cli("route", "analyze", trace, "-o", tmp_path / "out", "--bootstrap", 0)
    assert_user_error(result, *words)
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_bad_settings_are_refused(place, tmp_path):
    for options, word in (
        (["--segments", "4,x"], "4,16,64,256"),
        (["--segments", "0"], "segments"),
        (["--segments", "4,4"], "twice"),
        (["--bootstrap", 5], "replicates"),
        (["--cache-samples", 0], "cache_samples"),
        (["--tokenizer", tmp_path / "none"], "no such folder"),
    ):
        out = tmp_path / "out"
        result = run_cli("route", "analyze", place / "trace", "-o", out, "--no-report", *options)
        assert_user_error(result, word)
        shutil.rmtree(out, ignore_errors=True)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    result = run_cli("route", "analyze", place / "trace", "-o", tmp_path / "taken", "--overwrite")
    assert_user_error(result, "holds no analysis")
    assert (tmp_path / "taken" / "notes.txt").exists()


@pytest.fixture(scope="module")
def page(place):
    """The analysis with figures and report, made by the command."""
    out = place / "page"
    result = run_cli(
        "route", "analyze", place / "trace", "-o", out, "--bootstrap", 40,
        "--segments", "4,16", "--min-count", 3, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert result.json["path"] == str(out)
    assert result.json["srp"]["16"]["srp"] > 0.4
    return out


def test_the_page_is_whole(page):
    text = (page / "report.html").read_text()
    for title in ("Overview", "Consistency", "Expert caches", "Domains", "Texts", "Experts"):
        assert f">{title}</h2>" in text
    for outside in ("http://", "https://", "src=", "@import", "<link"):
        assert outside not in text.replace("http://www.w3.org", ""), outside
    names = {file.stem for file in (page / "figures").glob("*.png")}
    assert names == {file.stem for file in (page / "figures").glob("*.svg")}
    assert {"srp-rho", "srp-loss", "srp-layers", "srp-experts", "srp-domains", "domain-likeness",
            "specialisation-models", "specialisation-experts", "load", "sch-models", "sch-layers",
            "policies-models", "hits-policies", "srp-positions", "cases"} <= names  # fmt: skip
    assert all(file.stat().st_size > 5000 for file in (page / "figures").glob("*.png"))


CLICKS = """
<script>
const text = (place) => [...document.querySelectorAll(place)].map((x) => x.textContent);
const tables = document.querySelectorAll("[data-sortable]");
const experts = tables[tables.length - 1];
const rows = () => [...experts.querySelectorAll("tbody tr")];
const loads = () => rows().map((row) => Number(row.children[2].textContent));
const all = rows().length;
experts.querySelectorAll("th button")[2].click();
const falling = loads();
experts.querySelectorAll("th button")[2].click();
const rising = loads();
const filter = experts.querySelector("input");
filter.value = "layer=3 load>1";
filter.dispatchEvent(new Event("input"));
const words = document.querySelectorAll(".words span").length;
document.querySelector(".legend button").click();
document.title = JSON.stringify({
  all, falling, rising, left: rows().map((row) => row.children[0].textContent), kept: loads(),
  words, faded: document.querySelectorAll(".words .faded").length,
  legend: text(".legend button")[0],
});
</script>
"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the browser chromium")
def test_the_page_works_in_a_browser(page, tmp_path):
    copy = tmp_path / "page.html"
    copy.write_text((page / "report.html").read_text().replace("</body>", CLICKS + "</body>"))
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
        f"--user-data-dir={tmp_path / 'profile'}", copy.as_uri(),
    ]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    found = json.loads(dom.split("<title>")[1].split("</title>")[0].replace("&gt;", ">"))
    assert found["all"] == 12
    assert found["falling"] == sorted(found["falling"], reverse=True)
    assert found["rising"] == sorted(found["rising"])
    assert set(found["left"]) == {"3"}
    assert found["kept"]
    assert min(found["kept"]) >= 1
    assert found["words"] == 40
    count = int(found["legend"].split(": ")[1])
    assert found["faded"] == 40 - count


def test_report_draws_again(page, monkeypatch):
    from moesaic.report import routing_page

    monkeypatch.setattr(routing_page, "figures_of", lambda analysis: {})  # they take seconds
    (page / "report.html").unlink()
    result = run_cli("route", "report", page)
    assert result.exit_code == 0, result.stderr
    assert (page / "report.html").is_file()
    assert_user_error(run_cli("route", "report", page / "tables"), "no routing analysis")
