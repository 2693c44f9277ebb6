import torch

from moesaic.training.config import OptimizerConfig
from moesaic.training.optimizer import Optimizer, decays, is_router, router_lr
from tests.training import models


def test_decay_leaves_out_norms_and_biases_and_nothing_else():
    model = models.dense(attention_bias=True)
    skipped = {n for n, p in model.named_parameters() if not decays(n, p)}
    assert skipped == {n for n, _ in model.named_parameters() if "norm" in n or n.endswith("bias")}
    optimizer = Optimizer(model, OptimizerConfig(weight_decay=0.3))
    by_id = {
        id(p): group["weight_decay"]
        for group in optimizer.inner.param_groups
        for p in group["params"]
    }
    for name, parameter in model.named_parameters():
        assert by_id[id(parameter)] == (0.0 if name in skipped else 0.3)


def test_routers_are_told_from_gate_projections():
    named = dict(models.llama_moe().named_parameters()) | dict(models.mixtral().named_parameters())
    routers = {n for n in named if is_router(n)}
    assert routers == {n for n in named if ".gate." in n}
    assert not any(is_router(n) for n, _ in models.dense().named_parameters())


def test_routers_may_learn_at_a_rate_of_their_own():
    model = models.llama_moe()
    optimizer = Optimizer(model, OptimizerConfig(router_lr=0.1))
    names = {id(p): n for n, p in model.named_parameters()}
    for group in optimizer.inner.param_groups:
        for p in group["params"]:
            assert group["lr_scale"] == (0.1 if is_router(names[id(p)]) else 1.0)


def test_fitted_routers_learn_slowly_unless_told_and_their_exponents_do_not():
    model = models.llama_moe(gate_weighting="tempered", gate_add_noise=False)
    scales = {}
    optimizer = Optimizer(model, OptimizerConfig())
    names = {id(p): n for n, p in model.named_parameters()}
    for group in optimizer.inner.param_groups:
        scales |= {names[id(p)]: group["lr_scale"] for p in group["params"]}
    slow = {name for name, scale in scales.items() if scale == 0.1}
    assert slow == {name for name in scales if ".gate_network." in name}
    assert router_lr(model, OptimizerConfig(router_lr=2.0)) == 2.0
    assert router_lr(models.llama_moe(), OptimizerConfig()) == 1.0


def test_clipping_bounds_the_gradient_and_reports_its_norm():
    model = models.dense()
    optimizer = Optimizer(model, OptimizerConfig(clip=0.5))
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    expected = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in model.parameters()]))
    seen = {}
    optimizer.inner.register_step_post_hook(
        lambda *_: seen.update(g=[p.grad.clone() for p in model.parameters()])
    )
    norm = optimizer.step()
    torch.testing.assert_close(norm, expected)
    clipped = torch.linalg.vector_norm(torch.cat([g.flatten() for g in seen["g"]]))
    torch.testing.assert_close(clipped, torch.tensor(0.5), rtol=1e-4, atol=0)


def test_master_copies_keep_changes_that_bf16_would_lose():
    model = models.dense().to(torch.bfloat16)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = Optimizer(model, OptimizerConfig(lr=1e-5, weight_decay=0.0))
    optimizer.inner.param_groups[0]["lr"] = 1e-5
    for _ in range(2000):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    weight = dict(model.named_parameters())["model.norm.weight"]
    # 1.0 - 1e-5 rounds back to 1.0 in bf16 each time; 2000 such steps are -0.02 in the master copy.
    change = weight.detach().float() - before["model.norm.weight"].float()
    assert float(change.max()) < -0.015
    assert weight.dtype == torch.bfloat16
    assert all(p.grad is None for p in model.parameters())


def test_bf16_updates_equal_fp32_updates_up_to_rounding():
    full, half = models.dense(), models.dense().to(torch.bfloat16)
    with torch.no_grad():
        for p, q in zip(full.parameters(), half.parameters(), strict=True):
            p.copy_(q)
    a, b = Optimizer(full, OptimizerConfig(lr=1e-3)), Optimizer(half, OptimizerConfig(lr=1e-3))
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        for p, q in zip(full.parameters(), half.parameters(), strict=True):
            q.grad = torch.randn(p.shape, generator=generator).to(torch.bfloat16)
            p.grad = q.grad.float()
        a.step(), b.step()
    for (_, p), (_, q) in zip(a.parameters, b.parameters, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


def test_state_round_trip_continues_bit_for_bit():
    for dtype in (torch.float32, torch.bfloat16):
        model = models.llama_moe().to(dtype)
        optimizer = Optimizer(model, OptimizerConfig())

        def update(model, optimizer, seed):
            generator = torch.Generator().manual_seed(seed)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            optimizer.step()

        for seed in range(3):
            update(model, optimizer, seed)
        twin = models.llama_moe().to(dtype)
        twin.load_state_dict(model.state_dict())
        other = Optimizer(twin, OptimizerConfig())
        other.load_tensors({n: t.clone() for n, t in optimizer.tensors().items()})
        update(model, optimizer, 9), update(twin, other, 9)
        for (name, p), (_, q) in zip(
            model.named_parameters(), twin.named_parameters(), strict=True
        ):
            assert torch.equal(p, q), name
