"""The parts of the closed form: assignment, ridge, captured energy."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from moesaic.construct.free.assign import assign
from moesaic.construct.free.fit import RouterFit, captured, choose
from moesaic.construct.free.ridge import Moments, solve
from moesaic.core.errors import UserError


@pytest.mark.parametrize(("neurons", "experts"), [(1, 1), (6, 6), (12, 1), (48, 4), (96, 8)])
@pytest.mark.parametrize("kind", ["even", "ties", "skewed"])
def test_assignment_is_the_best_there_is(neurons, experts, kind):
    draw = np.random.default_rng(neurons + experts)
    gain_FE = draw.random((neurons, experts))
    if kind == "ties":
        gain_FE = np.round(gain_FE * 3)
    if kind == "skewed":
        gain_FE = gain_FE * np.geomspace(1, 1e4, experts)
    labels = assign(gain_FE)
    assert (np.bincount(labels, minlength=experts) == neurons // experts).all()
    wide = np.repeat(gain_FE, neurons // experts, axis=1)
    rows, columns = linear_sum_assignment(wide, maximize=True)
    found = gain_FE[np.arange(neurons), labels].sum()
    assert found == pytest.approx(wide[rows, columns].sum(), rel=1e-6)


def _moments(tokens, noise, seed=0, truth=None):
    draw = torch.Generator().manual_seed(seed)
    x_TP = torch.randn(tokens, 12, generator=draw)
    truth = torch.randn(12, 3, generator=draw) if truth is None else truth
    y_TQ = x_TP @ truth + noise * torch.randn(tokens, 3, generator=draw)
    made = Moments(12, 3)
    for part in (slice(0, tokens // 2), slice(tokens // 2, None)):
        made.add(x_TP[part], y_TQ[part])
    return made, truth, x_TP, y_TQ


def test_ridge_finds_the_map_and_counts_its_errors():
    fitted, truth, x_TP, y_TQ = _moments(400, 0.0)
    held, *_ = _moments(100, 0.0, seed=1, truth=truth)
    found = solve(fitted, held)
    torch.testing.assert_close(found.weights_PQ, truth, atol=1e-3, rtol=1e-3)
    assert found.missed_after < 1e-5 < found.missed_before
    start = torch.ones_like(truth)
    assert fitted.error(start) == pytest.approx(
        float((x_TP @ start - y_TQ).square().sum()), rel=1e-4
    )


def test_ridge_leaves_the_start_where_a_fit_would_only_hurt():
    # 14 tokens of pure noise for 12 inputs: every fit is worse on other tokens than zero
    fitted, *_ = _moments(14, 1.0, truth=torch.zeros(12, 3))
    held, *_ = _moments(4000, 1.0, seed=1, truth=torch.zeros(12, 3))
    found = solve(fitted, held, strengths=(1e-6, 1e-3))
    assert found.strength == float("inf")
    assert not found.weights_PQ.any()


def test_ridge_prefers_more_strength_with_fewer_tokens():
    truth = _moments(10, 0.0)[1]
    strengths = []
    for tokens in (16, 4000):
        fitted, *_ = _moments(tokens, 3.0, truth=truth)
        held, *_ = _moments(4000, 3.0, seed=2, truth=truth)
        strengths.append(solve(fitted, held).strength)
    assert strengths[0] > strengths[1]


def test_ridge_refuses_what_is_not_finite():
    fitted, *_ = _moments(40, 0.0)
    fitted.xx_PP[0, 0] = float("nan")
    with pytest.raises(UserError, match="not positive definite"):
        solve(fitted, fitted)


def test_ridge_says_when_a_gram_matrix_is_not_positive_definite():
    fitted, truth, *_ = _moments(40, 0.1)
    held, *_ = _moments(40, 0.1, seed=1, truth=truth)
    fitted.xx_PP[0, 1] = fitted.xx_PP[1, 0] = 2 * float(fitted.xx_PP.diagonal().max())
    with pytest.raises(UserError, match=r"40 calibration tokens and 12 inputs is not positive"):
        solve(fitted, held, strengths=(1e-6, 1e-3))
    # enough damping makes it definite: the small strengths are passed over
    assert solve(fitted, held, strengths=(1e-6, 10.0)).strength in (10.0, float("inf"))


def test_ridge_factors_serve_other_targets():
    fitted, truth, *_ = _moments(400, 0.1)
    held, *_ = _moments(100, 0.1, seed=1, truth=truth)
    factors = {}
    first = solve(fitted, held, factors=factors).weights_PQ
    made = dict(factors)
    again = solve(fitted, held, factors=factors).weights_PQ
    assert torch.equal(first, again)
    torch.testing.assert_close(first, solve(fitted, held).weights_PQ)
    assert {tokens for tokens, _ in factors} == {400, 500}
    assert all(factors[key] is made[key] for key in made)


def test_no_choice_captures_more_than_the_oracle():
    draw = torch.Generator().manual_seed(0)
    energy_TE = torch.rand(50, 6, generator=draw)
    best = captured(energy_TE, choose(energy_TE, 2))
    for _ in range(20):
        other = captured(energy_TE, choose(torch.rand(50, 6, generator=draw), 2))
        assert 0 < other < best
    assert captured(energy_TE, choose(energy_TE, 6)) == pytest.approx(1)


def test_a_router_without_an_intercept_tells_experts_apart_by_the_inputs_alone():
    draw = torch.Generator().manual_seed(4)
    x_TD, held_T = torch.randn(4000, 6, generator=draw), torch.arange(4000) % 8 == 7
    true_DE = torch.randn(6, 5, generator=draw)
    level_T = 30 * torch.rand(4000, 1, generator=draw) - 40  # says nothing about the choice
    energy_TE = (x_TD @ true_DE + level_T).exp()
    found_DE = RouterFit(x_TD, held_T, intercept=False).targets((x_TD @ true_DE).float())
    torch.testing.assert_close(found_DE, true_DE, atol=1e-3, rtol=1e-3)
    floor = 1e-3 * float(energy_TE.mean())
    plain = RouterFit(x_TD, held_T, intercept=False).log_energy(energy_TE)
    assert plain.shape == (6, 5)
    torch.testing.assert_close(plain.sum(1), torch.zeros(6), atol=1e-4, rtol=0)
    logs_TE = (energy_TE + floor).log()
    wanted = torch.linalg.lstsq(x_TD, logs_TE - logs_TE.mean(1, keepdim=True)).solution
    torch.testing.assert_close(plain, wanted, atol=2e-2, rtol=2e-2)
