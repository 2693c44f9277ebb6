"""OpenMoE against the original program's golden numbers, and what it adds."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import DynamicCache

import moesaic
from moesaic.core.errors import UserError
from moesaic.models.balance import balance_loss, router_z_loss
from moesaic.models.families.openmoe import (
    HFOpenMoeConfig,
    HFOpenMoeExperts,
    HFOpenMoeForCausalLM,
    HFOpenMoeMLP,
    HFOpenMoeTop2Router,
    smoothed_cross_entropy,
)
from tests.models.golden import FAMILIES, family
from tests.models.parity import CLOSE, IMPLEMENTATIONS, Parity

BALANCE = {"router_aux_loss_factor": 0.1, "router_z_loss_factor": 0.1}
FIXTURES = [Parity("openmoe", balance=BALANCE), Parity("openmoe_lowcap", balance=BALANCE)]
ROOMY = {"router_capacity_factor_eval": 100.0}
both = pytest.mark.parametrize("fixture", FIXTURES, ids=str)


def tiny(**fields):
    """A config of four layers, two of them with experts."""
    small = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 20,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "num_experts": 6,
        "moe_layer_interval": 2,
        "initializer_range": 0.2,
    }
    return HFOpenMoeConfig(**{**small, **fields})


def build(**fields):
    torch.manual_seed(0)
    return HFOpenMoeForCausalLM(tiny(**fields)).eval()


@both
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_parity(fixture, implementation):
    fixture.check_cases(implementation)
    fixture.check_generation(implementation)


@both
def test_parity_of_eager_attention(fixture):
    fixture.check_cases("moesaic", attn_implementation="eager")


@both
def test_saved_as_released(fixture, tmp_path):
    fixture.check_round_trip(tmp_path)


@both
def test_training(fixture):
    fixture.check_experts_interface()
    fixture.check_training_step()
    fixture.check_gradient_checkpointing()


@both
def test_capacity_in_use(fixture):
    _, expected = family(fixture.name)
    model = fixture.build()
    for case in fixture.cases():
        with fixture.routed(model) as routed, torch.no_grad():
            model(**fixture.inputs(case))
        for where, routing in routed.items():
            layer = where.removeprefix("/")
            capacity = model.config.capacity(len(routing.ids), training=False)
            assert capacity == expected[f"{case}/capacity/{layer}"].item()
            taken = torch.bincount(routing.ids[routing.kept], minlength=8)
            assert torch.equal(taken, expected[f"{case}/used_capacity/{layer}"])


@pytest.mark.parametrize(
    ("tokens", "experts", "factor", "training"),
    [(1, 2, 1.0, False), (63, 5, 0.5, False), (64, 7, 0.3, True), (40, 32, 2.0, False)],
)
def test_queues(tokens, experts, factor, training):
    """First choices are served before second ones, tokens in order, as many as the capacity."""
    fields = {f"router_capacity_factor_{'train' if training else 'eval'}": factor}
    config = tiny(num_experts=experts, router_min_capacity=2, **fields)
    router = HFOpenMoeTop2Router(config).train(training)
    torch.manual_seed(tokens)
    torch.nn.init.normal_(router.weight)
    logits, weights, ids, kept = router(torch.randn(tokens, 32) + 0.5)
    probs = logits.softmax(-1)
    wanted, order = probs.topk(2)
    assert torch.equal(ids, order)
    capacity = math.floor(2 * factor * tokens / experts)
    capacity = max(capacity + capacity % 2, 2)
    free = [capacity] * experts
    for choice in (0, 1):
        for token in range(tokens):
            expert = ids[token, choice].item()
            assert kept[token, choice].item() == (free[expert] > 0)
            free[expert] -= free[expert] > 0
    torch.testing.assert_close(weights, wanted * kept)
    assert training or tokens < 63 or not kept.all()  # the case tests dropping


def test_experts_are_the_dense_mlp():
    """Three stacked parameters compute what the dense layer's three projections do."""
    config = tiny()
    config._experts_implementation = "eager"
    experts, dense = HFOpenMoeExperts(config), HFOpenMoeMLP(config)
    torch.manual_seed(0)
    for weight in (experts.gate_up_proj, experts.down_proj):
        torch.nn.init.normal_(weight)
    x = torch.randn(5, 32)
    ids, weights = torch.tensor([[0, 3]] * 5), torch.tensor([[0.25, 2.0]] * 5)
    out = experts(x, ids, weights)
    wanted = 0.0
    for expert, weight in ((0, 0.25), (3, 2.0)):
        gate, up = experts.gate_up_proj.data[expert].split([40, 20])
        dense.gate_proj.weight.data, dense.up_proj.weight.data = gate, up
        dense.down_proj.weight.data = experts.down_proj.data[expert]
        wanted = wanted + weight * dense(x)
    torch.testing.assert_close(out, wanted)


@pytest.mark.parametrize("width", [1, 13])
def test_widths_that_divide_nothing(width):
    """Where the grouped matmul refuses a width, "moesaic" finds another way by itself."""
    model = build(intermediate_size=width, hidden_size=30)
    ids = torch.randint(3, 96, (2, 5), generator=torch.Generator().manual_seed(0))
    found = []
    for implementation in ("eager", "moesaic"):
        model.set_experts_implementation(implementation)
        loss = model(ids, labels=ids, output_router_logits=True).loss
        found.append((loss, torch.autograd.grad(loss, list(model.parameters()))))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)


def test_any_chunks_through_the_cache():
    """Keys turn by their place, however the tokens came there, and whatever `position_ids` say."""
    model = build(**ROOMY)
    ids = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(ids).logits
        torch.testing.assert_close(model(ids, position_ids=ids).logits, whole)
        cache, parts = DynamicCache(config=model.config), []
        for part in ids.split([3, 1, 1, 5, 2], dim=1):
            parts.append(model(part, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, **CLOSE)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_padded_generation(cache):
    """With room for all, the cache changes no token, padding on the left included."""
    model = build(**ROOMY)
    ids = torch.randint(3, 96, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    given = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    recomputed = model.generate(ids, use_cache=False, **given)
    kept = model.generate(ids, cache_implementation=cache, **given)
    assert torch.equal(kept, recomputed)
    assert torch.equal(
        model.generate(ids, **{**given, "attention_mask": mask.bool()}, use_cache=False), recomputed
    )


def test_language_loss():
    """The loss's meaning, built with the whole target distribution; values and gradients."""
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 11, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (2, 5))
    for smoothing, factor in ((0.0, 0.0), (0.1, 0.0), (0.001, 0.01)):
        soft = torch.full_like(logits, smoothing / 10)
        soft.scatter_(-1, targets[..., None], 1 - smoothing)
        entropy = -(soft * (soft + 1e-20).log()).sum(-1)
        wanted = -(soft * logits.log_softmax(-1)).sum(-1) - entropy
        wanted = wanted + factor * logits.logsumexp(-1) ** 2
        found = smoothed_cross_entropy(logits, targets, smoothing=smoothing, z_factor=factor)
        torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-9)
        grads = [torch.autograd.grad(x.sum(), logits)[0] for x in (found, wanted)]
        torch.testing.assert_close(*grads)


def test_loss_of_the_model():
    model = build(label_smoothing=0.1, z_loss_factor=0.05, **BALANCE)
    ids = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :4] = -100
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    labels[0, 6:] = -100
    with torch.no_grad():
        out = model(ids, attention_mask=mask, labels=labels, output_router_logits=True)
        plain = model(ids, attention_mask=mask, labels=labels)
        share = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=20)
        model.config.loss_reduction = "original"
        summed = model(ids, attention_mask=mask, labels=labels).loss
    each = smoothed_cross_entropy(out.logits[:, :-1], ids[:, 1:], smoothing=0.1, z_factor=0.05)
    each = each[labels[:, 1:] != -100]
    torch.testing.assert_close(plain.loss, each.mean())
    torch.testing.assert_close(share.loss, each.sum() / 20)
    torch.testing.assert_close(summed, each.sum() / 2)
    assert plain.router_logits is None
    routing = 0.1 * out.aux_loss + 0.1 * out.router_z_loss
    torch.testing.assert_close(out.loss, plain.loss + routing)
    real = mask.flatten().bool()
    logits = [layer[real] for layer in out.router_logits]
    assert len(logits) == 2
    torch.testing.assert_close(out.aux_loss, balance_loss(logits, None, top_k=2))
    torch.testing.assert_close(out.router_z_loss, router_z_loss(logits, None))


def test_full_size():
    """The released config's 11.855 B parameters, four MoE layers of 32 experts."""
    released = {"hidden_size": 2048, "intermediate_size": 8192, "num_key_value_heads": 24}
    with torch.device("meta"):
        model = HFOpenMoeForCausalLM(HFOpenMoeConfig(vocab_size=256384, **released))
    assert round(model.num_parameters() / 1e9, 3) == 11.855
    routers = [name for name, m in model.named_modules() if isinstance(m, HFOpenMoeTop2Router)]
    assert routers == [f"model.layers.{layer}.mlp.gate" for layer in (5, 11, 17, 23)]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"router_topk": 1}, "router_topk=1"),
        ({"hidden_act": "silu"}, "swiglu"),
        ({"num_experts": 1}, "2 or more"),
        ({"num_key_value_heads": 3}, "do not divide"),
        ({"loss_reduction": "sum"}, "mean"),
        ({"router_noisy_policy": "Jitter"}, "router_noisy_policy"),
    ],
)
def test_wrong_configs(fields, words):
    with pytest.raises(UserError, match=words):
        tiny(**fields)


def test_bfloat16():
    """Close to float32; the router computes in float32."""
    exact = moesaic.load(FAMILIES / "openmoe", dtype=torch.float32)
    model = moesaic.load(FAMILIES / "openmoe", dtype=torch.bfloat16)
    ids = family("openmoe")[0]["input_ids"]
    with torch.no_grad():
        found, wanted = model(ids), exact(ids)
        router = model.model.layers[1].mlp.gate
        logits, *_ = router(torch.randn(3, 32, dtype=torch.bfloat16))
    assert logits.dtype == torch.float32
    error = (found.logits.float() - wanted.logits).norm() / wanted.logits.norm()
    assert error < 0.05
