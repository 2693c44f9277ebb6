"""XVERSE-MoE against the original program's golden numbers."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import moesaic
from moesaic.core.errors import UserError
from moesaic.models.families.xverse_moe import XverseConfig, XverseForCausalLM
from tests.models.parity import IMPLEMENTATIONS, Parity, check_full_size

ON = {"router_aux_loss_coef": 0.1}
FIXTURES = [
    Parity("xverse_moe", balance=ON),
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


def test_original_config_loads_without_remote_code():
    model = AutoModelForCausalLM.from_pretrained(FIXTURES[0].directory)
    assert type(model) is XverseForCausalLM
    for attention in ("eager", "sdpa"):
        FIXTURES[0].check_cases("moesaic", attn_implementation=attention)
    FIXTURES[0].check_generation(cache_implementation="static", recomputed=False)


def test_router_stays_in_float32():
    """In a bf16 model the router's weights, logits and choice are those of float32."""
    fixture = FIXTURES[0]
    model = moesaic.load(fixture.directory, dtype=torch.bfloat16)
    exact = fixture.build()
    router, wanted = (m.model.layers[0].mlp.router for m in (model, exact))
    assert router.weight.dtype == torch.float32
    assert torch.equal(router.weight, wanted.weight)
    x = torch.randn(5, 32, dtype=torch.bfloat16)
    assert torch.equal(router(x).logits, wanted(x.float()).logits)
    assert torch.equal(router(x).ids, wanted(x.float()).ids)
    with torch.no_grad(), fixture.routed(model) as routed:
        assert model(**fixture.inputs()).logits.dtype == torch.bfloat16
    assert {r.logits.dtype for r in routed.values()} == {torch.float32}
    assert {r.weights.dtype for r in routed.values()} == {torch.bfloat16}


def test_dense_model_of_the_same_type_is_refused(tmp_path):
    given = json.loads((FIXTURES[0].directory / "config.json").read_text())
    for key in ("num_experts", "moe_top_k", "num_shared_experts"):
        del given[key]
    (tmp_path / "config.json").write_text(json.dumps(given))
    with pytest.raises(UserError, match="dense XVERSE model"):
        moesaic.load(tmp_path)


def test_full_size():
    check_full_size(XverseConfig(), total=25.778, active=4.2, top_k=6, layers=28)
