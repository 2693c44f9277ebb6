"""Losses on router logits: what they are least at, and what they count."""

from __future__ import annotations

import torch

from moesaic.models.balance import balance_loss, router_z_loss, share_of_step, valid_tokens


def test_balance_loss_is_least_when_balanced():
    even = 10.0 * torch.eye(4).repeat(3, 1) + 9.0 * torch.eye(4).roll(1, 0).repeat(3, 1)
    torch.testing.assert_close(balance_loss([even], None, top_k=2), torch.tensor(2.0))
    one_sided = torch.tensor([[5.0, 4.0, 0.0, 0.0]]).repeat(12, 1)
    assert balance_loss([one_sided], None, top_k=2) > 3.5
    # two layers that are unbalanced in opposite ways are not balanced together
    other = one_sided.flip(1)
    assert balance_loss([one_sided, other], None, top_k=2) > 3.5
    valid = torch.arange(24) < 12
    mixed = torch.cat([even, one_sided])
    torch.testing.assert_close(balance_loss([mixed], valid, top_k=2), torch.tensor(2.0))


def test_gradient_evens_out():
    """Steps against the gradient of the balance loss alone spread the load."""
    torch.manual_seed(0)
    x, weight = torch.randn(256, 16), torch.randn(8, 16)
    x, weight = x + 2 * weight[0] / weight[0].norm(), weight.requires_grad_()

    def busiest() -> float:
        ids = (x @ weight.T).topk(2).indices
        return torch.bincount(ids.flatten(), minlength=8).max().item() / len(x)

    before = busiest()
    for _ in range(200):
        (gradient,) = torch.autograd.grad(balance_loss([x @ weight.T], None, top_k=2), weight)
        weight.data -= 0.1 * gradient
    assert busiest() < 0.6 * before


def test_router_z_loss():
    logits, valid = torch.randn(6, 4), torch.tensor([1, 0, 1, 1, 0, 1]).bool()
    wanted = torch.logsumexp(logits[valid], -1).square().mean()
    torch.testing.assert_close(router_z_loss([logits], valid), wanted)
    other = torch.zeros(6, 4)
    found = router_z_loss([logits, other], valid)
    torch.testing.assert_close(found, (wanted + torch.tensor(4.0).log() ** 2) / 2)


def test_tokens_that_count():
    hidden = torch.zeros(2, 3, 5)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])  # one token in a cache
    assert valid_tokens(mask, hidden).tolist() == [True, True, True, True, True, False]
    assert valid_tokens(None, hidden) is None
    assert valid_tokens(torch.zeros(2, 1, 3, 4), hidden) is None
    labels = torch.tensor([[7, 8, -100, 9]])
    assert share_of_step(labels, None) == 1.0
    assert share_of_step(labels, 8) == 0.25
    assert share_of_step(labels, torch.tensor(8)) == 0.25
