"""What does not fit is refused in one line that says what was given and what would do."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from moesaic.construct.router import RouterInit
from moesaic.construct.split import NeuronSplit
from tests.construct.dense_models import changed_dense, write_dense, write_text_tokenizer
from tests.helpers import assert_user_error, run_cli

LETTERS = "abcdefghijklmnopqrstuvwxyz "


def write_text(path, letters):
    path.write_text("".join(np.random.default_rng(0).choice(list(LETTERS), letters)))
    return path


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    write_dense(folder / "model")
    write_text_tokenizer(folder / "model")
    write_text(folder / "text.txt", 3000)
    return folder


def construct(dense, out, *more, model=None, data=None):
    given = {"experts": 4, "top_k": 2, "context": 32, "tokens": 512, "device": "cpu"}
    sets = [part for key, value in given.items() for part in ("--set", f"{key}={value}")]
    places = ("--model", model or dense / "model", "--data", data or dense / "text.txt", "-o", out)
    return run_cli("construct", "energy", *places, *sets, *more)


def refused(result, out, *words):
    assert_user_error(result, *words)
    assert not out.exists()


def test_text_too_short_for_the_experts(dense, tmp_path):
    short = write_text(tmp_path / "short.txt", 100)
    done = construct(dense, tmp_path / "moe", "--set", "experts=8", data=short)
    refused(done, tmp_path / "moe", "96 tokens, too few for 8 experts", "at least 128 are")
    none = write_text(tmp_path / "none.txt", 10)
    refused(
        construct(dense, tmp_path / "moe", data=none),
        tmp_path / "moe",
        "less than one row of 32 tokens",
        "4 experts need at least 64 tokens",
    )


def test_held_out_text_that_cannot_be_read_is_said_before_the_work(dense, tmp_path):
    broken = tmp_path / "held.jsonl"
    broken.write_text('{"words": "a"}\n')
    other = NeuronSplit.from_labels([np.arange(48) % 4] * 5, experts=4)  # refused where work begins
    split = other.save(tmp_path / "s.safetensors")
    done = construct(dense, tmp_path / "moe", "--held-out", broken, "--set", f"split={split}")
    refused(done, tmp_path / "moe", "held.jsonl:1: has no 'text'")


@pytest.mark.parametrize(
    "method", ["energy", "cmoe", "expertweaver", "static", "coactivation", "select"]
)
def test_text_too_short_for_a_split_or_router_by_itself(dense, tmp_path, method):
    short, settings = write_text(tmp_path / "short.txt", 100), tmp_path / "settings.yaml"
    settings.write_text(f"method: {method}\ncontext: 32\n")
    given = (dense / "model", "-o", tmp_path / "out", "--method", settings)
    words = ("96 tokens, too few for 8 experts", "at least 128 are needed")
    if method != "select":
        split = run_cli("split", *given, "--experts", 8, "--data", short)
        refused(split, tmp_path / "out", *words)
    if method in ("energy", "select"):
        labels = [np.arange(48) % 8] * 2
        split = NeuronSplit.from_labels(labels, experts=8).save(tmp_path / "s.safetensors")
        given = (*given, "--split", split, "--gate", "linear")
        refused(run_cli("router", *given, "--data", short), tmp_path / "out", *words)


def test_all_idle_experts_are_named(dense, tmp_path):
    same = tmp_path / "same.txt"  # one token: one choice in every layer
    same.write_text("a" * 3000)
    done = construct(dense, tmp_path / "moe", "--set", "experts=16", data=same)
    said = " ".join(done.stderr.split())
    for layer in range(2):
        named = re.search(rf"layer {layer} experts ([\d, ]+)", said)
        assert named is not None
        assert len({int(number) for number in named[1].split(",")}) >= 10
    assert "more" not in said.partition("chose")[2].partition(". More text")[0]


def test_a_split_that_drops_neurons_is_said_not_to_be_the_dense_model(dense, tmp_path):
    parts = [[list(range(12 * e, 12 * e + 11)) for e in range(4)] for _ in range(2)]
    torch.save(dict(enumerate(parts)), tmp_path / "neuron_indices.pt")
    plain = [part for key in ("refit", "attention") for part in ("--set", f"{key}=null")]
    split = ("--set", f"split={tmp_path}/neuron_indices.pt")
    done = construct(dense, tmp_path / "moe", *split, *plain)
    assert "91.7% of the neurons are covered" in " ".join(done.stderr.split())
    assert json.loads((tmp_path / "moe/construct.json").read_text())["exact"] is False
    done = construct(dense, tmp_path / "whole", *plain)
    assert "covered" not in done.stderr
    assert json.loads((tmp_path / "whole/construct.json").read_text())["exact"] is True


def test_experts_that_never_win_are_named(dense, tmp_path):
    # the last expert's neurons give nothing, so that its energy is never among the highest
    def weaken(model):
        for number, layer in enumerate(model.model.layers):
            layer.mlp.down_proj.weight[:, 36 - 12 * number : 48 - 12 * number] *= 1e-3

    path = changed_dense(tmp_path / "weak", weaken)
    router = "router={method: energy, intercept: true}"
    sets = ("--set", "split=sequential", "--set", router)
    done = construct(dense, tmp_path / "moe", *sets, model=path)
    assert done.exit_code == 0, done.stderr
    said = " ".join(done.stderr.split())
    assert "no calibration token chose layer 0 expert 3; layer 1 expert 2." in said
    page = (tmp_path / "moe/report.html").read_text()
    assert "Idle" in page


def test_a_gram_matrix_that_is_not_positive_definite(dense, tmp_path):
    def enlarge(model):
        model.model.layers[1].mlp.up_proj.weight *= 1e25  # squares overflow in float32

    path = changed_dense(tmp_path / "large", enlarge)
    for split in ("energy", "random"):
        done = construct(dense, tmp_path / "moe", "--set", f"split={split}", model=path)
        refused(done, tmp_path / "moe", "Layer 1", "not positive definite", "other text")


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([np.arange(48) % 4] * 3, ("3 layers of 48 neurons", "2 layers of 48")),
        ([np.arange(40) % 4] * 2, ("2 layers of 40 neurons", "2 layers of 48")),
        ([np.arange(48) % 6] * 2, ("experts=4", "6 experts")),
    ],
)
def test_a_split_file_of_another_model(dense, tmp_path, labels, words):
    experts = int(labels[0].max()) + 1
    file = NeuronSplit.from_labels(labels, experts=experts).save(tmp_path / "s.safetensors")
    done = construct(dense, tmp_path / "moe", "--set", f"split={file}")
    refused(done, tmp_path / "moe", *words)


@pytest.mark.parametrize(("layers", "experts", "hidden"), [(3, 4, 32), (2, 6, 32), (2, 4, 24)])
def test_a_router_file_of_another_model(dense, tmp_path, layers, experts, hidden):
    weights = [{"weight": torch.randn(experts, hidden)} for _ in range(layers)]
    file = RouterInit(weights, [None] * layers).save(tmp_path / "router.safetensors")
    done = construct(dense, tmp_path / "moe", "--set", f"router={file}")
    words = f"{layers} layers, {experts} experts and hidden size {hidden}"
    refused(done, tmp_path / "moe", words, "2, 4 and 32")


@pytest.mark.parametrize("kind", ["split", "router", "held_out"])
def test_what_a_construction_reads_is_not_replaced_by_it(dense, tmp_path, kind):
    made = tmp_path / "made"
    given = (dense / "model", "-o", made)
    assert run_cli("split", *given, "--experts", 4).exit_code == 0
    if kind == "router":
        layers = [{"weight": torch.ones(4, 32)} for _ in range(2)]
        RouterInit(layers, [None] * 2).save(made / "router.safetensors")
    elif kind == "held_out":
        write_text(made / "held.txt", 500)
    path = made / "held.txt" if kind == "held_out" else made
    before = sorted(made.iterdir())
    done = construct(dense, made, "--overwrite", "--set", f"{kind}={path}")
    assert_user_error(done, "holds an input of this step")
    assert sorted(made.iterdir()) == before
