"""OpenMoE against the original program's golden numbers, and what it adds."""

from __future__ import annotations

import pytest

from tests.models.parity import IMPLEMENTATIONS, Parity

BALANCE = {"router_aux_loss_factor": 0.1, "router_z_loss_factor": 0.1}
FIXTURES = [Parity("openmoe", balance=BALANCE), Parity("openmoe_lowcap", balance=BALANCE)]
both = pytest.mark.parametrize("fixture", FIXTURES, ids=str)


@both
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_parity(fixture, implementation):
    fixture.check_cases(implementation)
    fixture.check_generation(implementation)


@both
def test_saved_as_released(fixture, tmp_path):
    fixture.check_round_trip(tmp_path)


@both
def test_training(fixture):
    fixture.check_experts_interface()
    fixture.check_training_step()
    fixture.check_gradient_checkpointing()
