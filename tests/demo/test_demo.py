"""The demo from end to end on a tiny model, and what it leaves behind when it fails."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import yaml

from moesaic.core.errors import UserError
from moesaic.data import open_domains
from moesaic.demo import run
from tests.helpers import assert_user_error, run_cli

UPDATE = run.SEQUENCES * run.CONTEXT
KEYS = {"dense", "methods", "trained_tokens", "seconds", "report", "checkpoint"}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaMA of 8 neurons an expert, with a tokenizer of one id a byte."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("dense")
    names = ["<eos>", "<bos>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>", pad_token="<pad>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(names),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=0,
        pad_token_id=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finished(dense: Path, tmp_path_factory: pytest.TempPathFactory):
    """One demo through the command line on some of the library: (directory, object, stderr)."""
    text = {}
    for split in ("train", "valid"):
        text[split] = tmp_path_factory.mktemp(split)
        for name, source in open_domains(f"stdlib@{split}").items():
            for i, document in enumerate(islice(source.documents(), 12)):
                (text[split] / name).mkdir(exist_ok=True)
                (text[split] / name / f"{i}.txt").write_text(document, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "TRAIN", str(text["train"]))
        patch.setattr(run, "VALID", str(text["valid"]))
        patch.setattr(run, "DOCUMENTS", 3)
        patch.setattr(run, "NEW_TOKENS", 4)
        out = tmp_path_factory.mktemp("demo") / "out"
        result = run_cli(
            *("demo", "-o", out, "--model", dense, "--experts", 4, "--tokens", 6 * UPDATE, "--json")
        )
        assert result.exit_code == 0, result
        yield out, result.json, result.stderr


def test_json_has_the_promised_shape(finished):
    out, printed, _ = finished
    assert set(printed) == KEYS
    domains = {"mean", "code", "docstrings", "prose"}
    assert set(printed["dense"]["loss"]) == domains
    assert len(printed["methods"]) >= 3
    for method in printed["methods"]:
        assert (method["experts"], method["top_k"]) == (4, 2)
        assert method["dense_check"] < 1e-4
        assert isinstance(method["loss_converted"], float)
        assert method["domains"]["converted"]["mean"] == method["loss_converted"]
    assert printed["trained_tokens"] == 6 * UPDATE
    assert printed["report"] == str(out / "report.html")
    assert printed["checkpoint"] == str(out / "moe")


def test_the_best_split_is_trained_and_gets_better(finished):
    _, printed, _ = finished
    trained = [m for m in printed["methods"] if m["loss_trained"] is not None]
    (best,) = trained
    assert best["loss_converted"] == min(m["loss_converted"] for m in printed["methods"])
    assert best["loss_trained"] < best["loss_converted"]


def test_everything_is_written_and_nothing_else(finished, dense: Path):
    out, printed, _ = finished
    assert {p.name for p in out.iterdir()} == {"report.html", "results.json", "moe", "converted"}
    assert [p for p in out.parent.iterdir() if p != out] == [], "no partial directory stays"
    results = json.loads((out / "results.json").read_text())
    assert {key: results[key] for key in KEYS} == printed
    for file in out.rglob("*"):
        if file.suffix in {".json", ".yaml", ".html", ".jsonl"}:
            assert "partial" not in file.read_text(), f"{file} names the place it was made in"
    parent = json.loads((out / "moe" / "moesaic.json").read_text())["parent"]
    (best,) = [m for m in printed["methods"] if m["loss_trained"] is not None]
    assert Path(parent) == out / "converted" / best["split"]
    assert (Path(parent) / "config.json").is_file()
    config = yaml.safe_load((out / "moe" / "train.yaml").read_text())
    assert config == yaml.safe_load(results["configs"]["train"])
    assert config["model"] == parent


def test_the_checkpoint_is_the_model_that_was_measured(finished):
    from moesaic.measure.loss import held_out_loss
    from moesaic.models.load import load
    from moesaic.models.tokenizer import load_tokenizer

    out, printed, _ = finished
    model, tokenizer = load(out / "moe", dtype="float32"), load_tokenizer(out / "moe")
    again = held_out_loss(model, tokenizer, run.VALID, context=run.CONTEXT, max_documents=3)
    (best,) = [m for m in printed["methods"] if m["loss_trained"] is not None]
    assert again == pytest.approx(best["domains"]["trained"], rel=1e-5)


def test_load_is_a_share_per_layer_and_domain(finished):
    out, _, _ = finished
    load = json.loads((out / "results.json").read_text())["load"]
    assert set(load) == {"converted", "trained"}
    for stage in load.values():
        assert set(stage) == {"code", "docstrings", "prose"}
        for table in stage.values():
            assert [len(row) for row in table] == [4, 4]
            assert [sum(row) for row in table] == pytest.approx([1.0, 1.0])


def test_curve_and_samples_are_complete(finished):
    out, printed, _ = finished
    results = json.loads((out / "results.json").read_text())
    assert [line["tokens"] for line in results["training"]["log"]] == [
        UPDATE * i for i in range(1, 7)
    ]
    points = results["training"]["held_out"]
    assert (points[0]["tokens"], points[-1]["tokens"]) == (0, 6 * UPDATE)
    (best,) = [m for m in printed["methods"] if m["loss_trained"] is not None]
    assert points[0]["loss"]["mean"] == best["loss_converted"]
    for sample in results["samples"]:
        assert list(sample["texts"]) == ["dense", "MoE, converted", "MoE, trained"]
    assert (out / "report.html").read_text().count("<svg") == 4


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_is_left_when_it_stops_halfway(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
):
    def stop(*_: object, **__: object) -> None:
        assert list(tmp_path.iterdir()), "the work is under way"
        raise error

    monkeypatch.setattr(run._Run, "convert", stop)
    monkeypatch.setattr(run._Run, "measure_dense", lambda self: None)
    with pytest.raises(error):
        run.demo(tmp_path / "out", model=dense)
    assert list(tmp_path.iterdir()) == []


def test_only_an_earlier_demo_is_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class ReachedError(Exception):
        pass

    def reached(self: object) -> None:
        raise ReachedError

    monkeypatch.setattr(run._Run, "measure_dense", reached)
    monkeypatch.setattr(run, "_check", lambda *_: None)
    earlier = tmp_path / "earlier"
    (earlier / "moe").mkdir(parents=True)
    (earlier / "results.json").write_text("{}")
    with pytest.raises(UserError, match="not empty"):
        run.demo(earlier)
    with pytest.raises(ReachedError):
        run.demo(earlier, overwrite=True)
    assert (earlier / "results.json").is_file(), "kept, since the new demo did not finish"
    (earlier / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        run.demo(earlier, overwrite=True)


def test_what_is_wrong_is_said_before_any_work(dense: Path, tmp_path: Path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").write_text("mine")
    assert_user_error(run_cli("demo", "-o", taken, "--model", dense), "not empty")
    out = tmp_path / "out"
    result = run_cli("demo", "-o", out, "--tokens", 4096, "--seconds", 3)
    assert_user_error(result, "both tokens and seconds")
    assert_user_error(run_cli("demo", "-o", out, "--tokens", 5), "tokens=5", str(UPDATE))
    assert_user_error(run_cli("demo", "-o", out, "--seconds", 0), "positive")
    assert_user_error(run_cli("demo", "-o", out, "--model", tmp_path / "no"), "config.json")
    result = run_cli("demo", "-o", out, "--model", dense, "--experts", 4, "--top-k", 9)
    assert_user_error(result, "top_k=9", "4 experts")
    result = run_cli("demo", "-o", out, "--model", dense, "--experts", 5)
    assert_user_error(result, "experts=5", "32 neurons")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_time_decides_the_tokens_in_whole_updates(monkeypatch: pytest.MonkeyPatch):
    class Nothing:
        def advance(self, *_: object) -> None:
            pass

    worker = run._Run(Path(), Path(), Path(), experts=4, top_k=2, seed=0, bar=Nothing())
    monkeypatch.setattr(run, "_load", lambda path: None)
    for speed, seconds, tokens in (
        (1000.0, 10.0, 10_000 // UPDATE * UPDATE),
        (1.0, 10.0, UPDATE),
        (1e9, None, run.MOST_TOKENS // UPDATE * UPDATE),
        (100.0, None, int(100 * run.SECONDS) // UPDATE * UPDATE),
    ):
        monkeypatch.setattr(run, "_training_speed", lambda model, speed=speed: speed)
        assert worker._affordable(Path(), seconds) == tokens


def test_shares_of_an_inner_bar_move_the_outer_one():
    from moesaic.core.console import current, progress, reporting

    class Count:
        total = 0.0

        def advance(self, steps: float = 1, **_: object) -> None:
            self.total += steps

    outer = Count()
    with reporting(run._Forward(current(), str, outer, "training", 55)):
        with progress("training", total=30) as bar:
            for step in range(30):
                bar.advance(1, loss=2.0)
                assert outer.total == 55 * (step + 1) // 30, "whole points, never ahead"
        with progress("something else", total=3) as bar:
            bar.advance(3)
    assert outer.total == 55


def test_the_shipped_model_fits_the_package():
    weights = list(run.DENSE.glob("*.safetensors"))
    if not weights:
        pytest.fail(f"{run.DENSE} has no weights: the demo cannot run")
    assert sum(file.stat().st_size for file in weights) <= 8 * 2**20
    assert (run.DENSE / "tokenizer.json").is_file()
    assert (run.DENSE / "README.md").is_file(), "a model card lists what it was trained on"
