"""Yuan2.0-M32 against the original program's golden numbers, and what it adds."""

from __future__ import annotations

import pytest
import torch

from tests.models.golden import family
from tests.models.parity import CLOSE, IMPLEMENTATIONS, Parity

BALANCE = {"router_aux_loss_coef": 0.1}
FIXTURES = [Parity("yuan2_moe", balance=BALANCE), Parity("yuan2_moe_nonorm", balance=BALANCE)]
both = pytest.mark.parametrize("fixture", FIXTURES, ids=str)


@both
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_parity(fixture, implementation):
    fixture.check_cases(implementation)
    fixture.check_generation(implementation)


@both
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_300_tokens(fixture, attention):
    """Angles in bfloat16: above 256 several positions share one."""
    inputs, expected = family(fixture.name)
    model = fixture.load(fixture.directory, attn_implementation=attention)
    with torch.no_grad():
        logits = model(inputs["long_input_ids"]).logits
    torch.testing.assert_close(logits[:, -20:], expected["long/logits_last20"], **CLOSE)


@both
def test_saved_as_released(fixture, tmp_path):
    fixture.check_round_trip(tmp_path)


@both
def test_training(fixture):
    fixture.check_experts_interface()
    fixture.check_training_step()
    fixture.check_gradient_checkpointing()
