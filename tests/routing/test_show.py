"""Words and their experts in the terminal."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import moesaic
from moesaic.cli.routed import print_routed
from moesaic.core.errors import UserError
from moesaic.routing import metrics
from moesaic.routing.cases import consistency
from moesaic.routing.samples import choose, read_samples
from moesaic.routing.show import show
from tests.helpers import assert_user_error, run_cli
from tests.models.golden import FAMILIES
from tests.routing import golden
from tests.routing.test_trace import make_tokenizer

PROMPT = "w3 w4 w5 w5 w6"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("show") / "model"
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=83, hidden_size=32, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=6,
        num_experts_per_tok=2, max_position_embeddings=64, eos_token_id=None,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder)
    make_tokenizer(83).save_pretrained(folder)
    return folder


def test_experts_are_those_of_a_forward_pass(model):
    shown = show(model, PROMPT, new_tokens=7).decoder
    assert shown.prompt == 6  # <s> before
    assert len(shown.ids) == len(shown.words) == 13
    assert shown.words[1].strip() == "w3"
    loaded = moesaic.load(model)
    ids = torch.tensor([shown.ids])
    with torch.no_grad(), moesaic.recording(loaded) as rec:
        logits = loaded(ids).logits[0]
    assert logits[5:-1].argmax(-1).tolist() == shown.ids[6:]  # greedy
    for place, layer in enumerate(shown.layers):
        assert np.array_equal(shown.experts_TLK[:, place], rec.experts[layer])


def test_the_most_consistent_layer():
    """The weighted mean of the experts' SRP, by its formula."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(1, 60, 3, 8))
    for token in range(1, 60):
        scores[:, token, 1] = 0.95 * scores[:, token - 1, 1] + 0.2 * scores[:, token, 1]
    ids = choose(scores, 2)
    found = consistency(read_samples(ids, num_experts=8))
    figures = metrics.srp(ids, num_experts=8, segment=16, level="expert")
    weight = figures.activation * (1 + figures.rho)
    assert np.allclose(found, (figures.srp * weight).sum(1) / weight.sum(1))
    assert found.argmax() == 1
    assert np.isfinite(consistency(read_samples(ids[:, :3], num_experts=8))).all()


def test_consistency_is_the_studys():
    """The weighted mean of the golden figures of single experts."""
    rows = golden.table(golden.OWN / "cases" / "srp.csv")
    given = dict(np.load(golden.OWN / "cases" / "input.npz"))
    for key, bits in given.items():
        model, layer = key.split("_")[:2]
        own = [
            tuple(float(row[word]) for word in ("act_r", "best_f1", "best_m"))
            for row in rows
            if (row["model"], int(row["layer_idx"]), row["seg_len"]) == (model, int(layer), "16")
        ]
        assert own
        weights = [active * (1 + rho) for active, _, rho in own]
        wanted = sum(w * srp for w, (_, srp, _) in zip(weights, own, strict=True)) / sum(weights)
        case = golden.CASES[model]
        ids = choose(golden.scores(bits)[:256], case["k"])[None]
        assert consistency(read_samples(ids, num_experts=case["E"])) == pytest.approx(wanted)


def test_the_command(model):
    result = run_cli("route", "show", model, "-p", PROMPT, "--new-tokens", 3, "--layer", "all")
    assert result.exit_code == 0, result.stderr
    assert [f"layer {layer}" in result.stdout for layer in (0, 1, 2)] == [True] * 3
    assert result.stdout.count("the most consistent") == 1
    found = run_cli("route", "show", model, "-p", PROMPT, "--new-tokens", 3, "--json").json
    experts = np.array(found["experts"])
    assert experts.shape == (9, 3, 2)
    best = found["layers"].index(found["best_layer"])
    text = run_cli("route", "show", model, "-p", PROMPT, "--new-tokens", 3).stdout
    numbers = re.findall(r"\[(\d+)\]", text.split("\n", 2)[2])
    assert numbers == [str(e) for e in experts[:, best, 0]]
    for arguments, words in (
        (["--layer", "7"], "routed layers are 0, 1, 2"),
        (["--new-tokens", 100], "64 at most"),
        (["--new-tokens", -1], "0 or more"),
        (["--tokenizer", model / "none"], "does not exist"),
    ):
        wrong = run_cli("route", "show", model, "-p", PROMPT, *arguments)
        assert_user_error(wrong, words)


def test_colours(model):
    shown = show(model, PROMPT, new_tokens=2).decoder
    for system, pattern in (("256", r"48;5;(\d+)"), ("standard", r"30;(\d+)m")):
        out = io.StringIO()
        console = Console(file=out, force_terminal=True, color_system=system, width=200)
        print_routed(shown, [1], console=console)
        words = out.getvalue().splitlines()[2]
        colours = re.findall(pattern, words)
        first = shown.experts_TLK[:, 1, 0].tolist()
        assert len(colours) == len(first)
        assert len(set(zip(colours, first, strict=True))) == len(set(first)) == len(set(colours))


def test_encoder_and_decoder():
    model = moesaic.load(FAMILIES / "nllb_moe")
    tokenizer = make_tokenizer(min(83, model.config.vocab_size))
    shown = show(model, PROMPT, new_tokens=3, tokenizer=tokenizer)
    assert shown.encoder is not None
    assert len(shown.encoder.ids) == 6
    assert shown.encoder.prompt == 6
    assert shown.decoder.prompt == 1
    assert "encoder" in shown.to_dict()


def test_a_dense_model_is_refused():
    config = LlamaConfig(
        vocab_size=83, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    with pytest.raises(UserError, match="rout"):
        show(LlamaForCausalLM(config), PROMPT, tokenizer=make_tokenizer(83))
