"""MiniCPM-MoE against the original program's golden numbers."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import moesaic
from moesaic.models.families.minicpm_moe import (
    MiniCPMForCausalLM,
    MiniCPMForSequenceClassification,
    MiniCPMMoEConfig,
    MiniCPMRotaryEmbedding,
)
from tests.models.parity import IMPLEMENTATIONS, Parity, check_full_size

ON = {"router_aux_loss_coef": 0.1}
FIXTURES = [
    Parity("minicpm_moe", balance=ON),
    Parity("minicpm_moe_untied", balance=ON),
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("fixture", FIXTURES, ids=str)
def test_parity(fixture, implementation):
    fixture.check_cases(implementation)
    fixture.check_generation(implementation)
    fixture.check_training_step(implementation)


@pytest.mark.parametrize("fixture", FIXTURES, ids=str)
def test_saving_and_training(fixture, tmp_path):
    fixture.check_round_trip(tmp_path)
    fixture.check_experts_interface()
    fixture.check_gradient_checkpointing()


@pytest.mark.parametrize("fixture", FIXTURES, ids=str)
def test_attention_and_static_cache(fixture):
    for attention in ("eager", "sdpa"):
        fixture.check_cases("moesaic", attn_implementation=attention)
    fixture.check_generation(cache_implementation="static", recomputed=False)


def test_released_config_has_no_model_type(tmp_path):
    """It is recognised by its class and experts; what we save says minicpm_moe, tied or not."""
    for fixture in FIXTURES:
        assert "model_type" not in json.loads((fixture.directory / "config.json").read_text())
        model = fixture.build()
        assert type(model) is MiniCPMForCausalLM
        tied = model.lm_head.weight is model.model.embed_tokens.weight
        assert tied == (fixture.name == "minicpm_moe")
        out = tmp_path / fixture.name
        model.save_pretrained(out)
        assert json.loads((out / "config.json").read_text())["model_type"] == "minicpm_moe"
        again = AutoModelForCausalLM.from_pretrained(out)
        assert type(again) is MiniCPMForCausalLM
        assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied


def test_positions_are_exact_in_bfloat16():
    """Far out, angles rounded to bf16 would turn queries by up to half a degree of phase."""
    config = MiniCPMMoEConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1)
    rotary = MiniCPMRotaryEmbedding(config=config)
    positions = torch.arange(4000, 4010)[None]
    exact = rotary(torch.zeros(1, 10, 32), positions)
    found = rotary(torch.zeros(1, 10, 32, dtype=torch.bfloat16), positions)
    for a, b in zip(exact, found, strict=True):
        assert b.dtype == torch.float32
        assert torch.equal(a, b)


@pytest.mark.parametrize("side", ["right", "left"])
def test_sequence_classification(side, tmp_path):
    """Scores of the last token, whatever the padding; the balance loss in training."""
    fixture = FIXTURES[0]
    torch.manual_seed(0)
    model = MiniCPMForSequenceClassification.from_pretrained(
        fixture.directory,
        config=MiniCPMMoEConfig(**fixture.build().config.to_dict() | {"num_labels": 3}),
    ).eval()
    given, labels = fixture.inputs(side), torch.tensor([0, 2])
    with torch.no_grad():
        out = model(**given, labels=labels)
        for row, (ids, mask) in enumerate(
            zip(given["input_ids"], given["attention_mask"], strict=True)
        ):
            alone = model(ids[mask.bool()][None]).logits[0]
            torch.testing.assert_close(out.logits[row], alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits, labels))
    trained = model.train()(**given, labels=labels)
    assert trained.loss > out.loss + 2  # three layers, at least 1 each
    model.save_pretrained(tmp_path)
    again = moesaic.load(tmp_path)
    assert type(again) is MiniCPMForSequenceClassification
    with torch.no_grad():
        assert torch.equal(again(**given).logits, model.eval()(**given).logits)


def test_full_size():
    config = MiniCPMMoEConfig(
        vocab_size=122753,
        hidden_size=2304,
        intermediate_size=5760,
        num_hidden_layers=40,
        num_attention_heads=36,
        num_key_value_heads=36,
        scale_emb=12,
        dim_model_base=256,
        scale_depth=1.4,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=4096,
    )
    check_full_size(config, total=13.873, active=4.3, top_k=2, layers=40)
