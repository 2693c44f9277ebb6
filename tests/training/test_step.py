import pytest
import torch

from moesaic.core.errors import UserError
from moesaic.training.balance import balance_kind, set_balance_coefficient
from moesaic.training.config import OptimizerConfig
from moesaic.training.optimizer import Optimizer, is_router
from moesaic.training.setup import recompute_activations
from moesaic.training.step import accumulate, build_pass, run_update
from tests.training import models

T = 12


def tokens(sequences: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 64, (sequences, T), generator=torch.Generator().manual_seed(seed))


def gradients(model, ids_ABT):
    model.zero_grad(set_to_none=True)
    result = accumulate(build_pass(model), ids_ABT)
    return result, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def router_gradient(gradients_by_name):
    return torch.cat([g.flatten() for n, g in gradients_by_name.items() if is_router(n)])


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).abs().max()) for n in a)


@pytest.mark.parametrize("passes", [2, 4])
def test_dense_gradients_do_not_depend_on_accumulation(passes):
    model, ids = models.dense(), tokens(4)
    whole, expected = gradients(model, ids.view(1, 4, T))
    parts, got = gradients(model, ids.view(passes, 4 // passes, T))
    assert float(parts.values["loss"]) == pytest.approx(float(whole.values["loss"]), rel=1e-6)
    assert largest_difference(expected, got) < 1e-6


def test_the_loss_is_the_mean_that_transformers_computes():
    model, ids = models.dense(), tokens(4)
    result, _ = gradients(model, ids.view(2, 2, T))
    expected = model(input_ids=ids, labels=ids).loss
    assert float(result.values["loss"]) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("build", [models.llama_moe, models.mixtral])
@pytest.mark.parametrize("passes", [2, 4])
def test_balance_gradient_does_not_grow_with_accumulation(build, passes):
    # The same sequence in every pass: its balance statistic is then the same in every split.
    model = build()
    model.eval()  # no routing noise; gradients flow all the same
    set_balance_coefficient(model, 0.5)
    ids = tokens(1).repeat(4, 1)
    whole, expected = gradients(model, ids.view(1, 4, T))
    parts, got = gradients(model, ids.view(passes, 4 // passes, T))
    assert float(whole.values["balance_loss"]) > 1e-3
    assert float(parts.values["balance_loss"]) == pytest.approx(
        float(whole.values["balance_loss"]), rel=1e-5
    )
    a, b = router_gradient(expected), router_gradient(got)
    assert float(a.norm()) > 0
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("build", [models.llama_moe, models.mixtral])
def test_balance_gradient_is_the_mean_over_passes_and_linear_in_its_coefficient(build):
    model, ids = build(), tokens(4)
    model.eval()

    def aux(ids_ABT, coefficient):
        set_balance_coefficient(model, coefficient)
        _, with_balance = gradients(model, ids_ABT)
        set_balance_coefficient(model, 0.0)
        _, without = gradients(model, ids_ABT)
        return router_gradient(with_balance) - router_gradient(without)

    halves = [aux(ids[i : i + 2].view(1, 2, T), 0.5) for i in (0, 2)]
    both = aux(ids.view(2, 2, T), 0.5)
    assert float(both.norm()) > 1e-4
    torch.testing.assert_close(both, (halves[0] + halves[1]) / 2, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(aux(ids.view(2, 2, T), 1.0), 2 * both, rtol=1e-3, atol=1e-6)


def test_native_balance_is_the_one_of_transformers():
    model, ids = models.mixtral(), tokens(4)
    set_balance_coefficient(model, 0.3)
    result, got = gradients(model, ids.view(1, 4, T))
    model.zero_grad(set_to_none=True)
    model.router_aux_loss_coef = 0.3
    outputs = model(input_ids=ids, labels=ids, output_router_logits=True)
    outputs.loss.backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert float(result.values["balance_loss"]) == pytest.approx(
        0.3 * float(outputs.aux_loss), rel=1e-5
    )
    assert largest_difference(expected, got) < 1e-6


@pytest.mark.parametrize("build", [models.llama_moe, models.mixtral])
def test_load_counts_every_routed_row(build):
    model, ids = build(), tokens(4)
    model.eval()
    result, _ = gradients(model, ids.view(2, 2, T))
    assert result.routing["load"].shape == (2, 4)
    assert result.routing["load"].sum(-1).tolist() == [4 * T * 2] * 2
    assert bool((result.routing["importance"] > 0).any())


def test_a_switched_off_balance_loss_adds_nothing():
    model, ids = models.llama_moe(), tokens(2)
    model.eval()
    model.set_moe_gate_use_balance(
        False
    )  # the model then reports -100 a layer, as the original does
    result, got = gradients(model, ids.view(1, 2, T))
    model.set_moe_gate_use_balance(True)
    set_balance_coefficient(model, 0.0)
    _, expected = gradients(model, ids.view(1, 2, T))
    assert float(result.values["balance_loss"]) == 0.0
    assert largest_difference(expected, got) == 0.0


def test_a_coefficient_without_effect_is_refused():
    assert balance_kind(models.dense()) is None
    assert set_balance_coefficient(models.dense(), None) is None
    with pytest.raises(UserError, match="has no effect: LlamaForCausalLM has no balance loss"):
        set_balance_coefficient(models.dense(), 0.01)
    moe = models.llama_moe()
    assert set_balance_coefficient(moe, 0.25) == 0.25 == moe.config.gate_balance_loss_weight


@pytest.mark.parametrize("build", [models.dense, models.llama_moe, models.mixtral])
def test_updates_lower_the_loss(build):
    model, ids = build(), tokens(4).view(2, 2, T)
    optimizer = Optimizer(model, OptimizerConfig(lr=1e-2))
    run_pass = build_pass(model)
    losses = [float(run_update(run_pass, optimizer, ids).values["loss"]) for _ in range(20)]
    assert losses[-1] < losses[0] - 0.5


def test_gradient_checkpointing_changes_no_gradient():
    model, ids = models.llama_moe(), tokens(2).view(1, 2, T)
    model.train()
    torch.manual_seed(3)
    _, expected = gradients(model, ids)
    recompute_activations(model)
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    torch.manual_seed(3)
    _, got = gradients(model, ids)
    assert largest_difference(expected, got) < 1e-7
