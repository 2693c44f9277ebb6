"""Offloaded experts: the same outputs, hits as simulated, everything put back."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import moesaic
from moesaic.core.errors import MoesaicError, UserError
from moesaic.routing import caches
from moesaic.routing.policy import PriorityPolicy
from moesaic.routing.slots import Bank, Lane
from tests.helpers import GOLDEN
from tests.kernels.families import FAMILIES, tiny

EXPERTS = 6


def prompt(rows: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 97, (rows, length), generator=generator)


def run(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, output_router_logits=False).logits


def greedy(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model.generate(
        ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, output_router_logits=False
    )


def chosen(rec) -> np.ndarray:
    """All that was asked for as one sample: [1, rows, layers, K]."""
    experts = getattr(rec, "experts", rec)
    return np.stack([experts[layer].numpy() for layer in sorted(experts)], axis=1)[None]


def simulated(rec, off, policy="lru") -> list[int]:
    """Hits of every cache, which are those of `caches.hit_rates`."""
    ids, experts = chosen(rec), max(off.num_experts)
    rates = caches.hit_rates(ids, num_experts=experts, policy=policy, scope=off.scope)[0]
    rates = rates if off.scope == "layer" else rates[None]
    for rate, size, hits, asked in zip(rates, off.slots, off.hits, off.requests, strict=True):
        assert np.float32(hits / asked) == rate[size - 1]
    return off.hits.tolist()


@pytest.mark.parametrize("family", list(FAMILIES))
def test_tokens_and_logits_are_those_of_the_model(family):
    model, ids = tiny(family, layers=3), prompt()
    logits, tokens = run(model, ids), greedy(model, ids)
    for cache, policy, scope in (
        (1.0, "lru", "layer"),
        (1.5, "lfu", "model"),
        (2.0, "lru", "layer"),
    ):
        with (
            moesaic.offload(model, cache=cache, policy=policy, scope=scope) as off,
            moesaic.recording(model, logits=False) as rec,
        ):
            assert torch.equal(greedy(model, ids), tokens)
            torch.testing.assert_close(run(model, ids), logits, rtol=1e-5, atol=1e-5)
        assert 0 < sum(simulated(rec, off, policy)) < off.requests.sum()
        assert off.loads > sum(off.slots)


OTHERS = ("jetmoe", "nllb_moe", "switch_transformers")  # whose experts are no 3-D weights
RELEASED = [
    path.name
    for path in sorted((GOLDEN / "families").iterdir())
    if not path.name.startswith(OTHERS)
]


@pytest.mark.parametrize("fixture", RELEASED)
def test_every_family_with_3d_experts(fixture):
    model, ids = moesaic.load(GOLDEN / "families" / fixture, dtype=torch.float32), prompt()
    ids %= model.config.get_text_config().vocab_size
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    uneven = fixture == "llama_moe_uneven"
    for cache, scope in ((1.0, "layer"), (1.5, "layer" if uneven else "model")):
        with (
            moesaic.offload(model, cache=cache, scope=scope) as off,
            moesaic.recording(model, logits=False) as rec,
            torch.no_grad(),
        ):
            logits = model(input_ids=ids).logits
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=2e-5)
        widest = max(found.shape[1] for found in rec.experts.values())
        rec = {  # layers that choose fewer are filled up with "no choice"
            layer: nn.functional.pad(found, (0, widest - found.shape[1]), value=-1)
            for layer, found in rec.experts.items()
        }
        simulated(rec, off)
    if uneven:
        with pytest.raises(UserError, match="scope='layer'"), moesaic.offload(model, scope="model"):
            pass


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("policy", ["lru", "lfu"])
@pytest.mark.parametrize("prefetch", [True, False])
def test_hits_are_the_simulated_ones(policy, scope, prefetch):
    model = tiny("mixtral", layers=3)
    for cache in (0.1, 1.0, 1.3, 2.0, 2.5, 9.0):
        with (
            moesaic.offload(
                model, cache=cache, policy=policy, scope=scope, prefetch=prefetch
            ) as off,
            moesaic.recording(model, logits=False) as rec,
        ):
            for seed, rows, length in ((0, 1, 7), (1, 3, 5), (2, 1, 1), (3, 1, 1), (4, 70, 1)):
                run(model, prompt(rows, length, seed))
            simulated(rec, off, policy)
            assert (off.guesses > 0) == (prefetch and cache < 9)
            assert off.used_guesses <= off.guesses
            off.clear()
            assert off.requests.sum() == off.hits.sum() == off.loads == 0
            run(model, prompt(1, 1))
            assert off.requests.sum() == 6


class LateLane(Lane):
    """A lane on which nothing arrives before somebody waits for it: the worst that a GPU may do."""

    def __init__(self, device):
        super().__init__(device)
        self.travelling = []

    def send(self, to, given, *, after):
        self.travelling.append(list(zip(to, given, strict=True)))
        return self.travelling[-1]

    def wait(self, event):
        while event is not None and any(pairs is event for pairs in self.travelling):
            for target, source in self.travelling.pop(0):
                target.copy_(source)

    def finish(self):
        self.wait(self.travelling[-1] if self.travelling else None)


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("policy", ["lru", "lfu", "fixed"])
def test_nothing_is_read_before_it_arrives(policy, scope, monkeypatch):
    monkeypatch.setattr("moesaic.routing.offload.Lane", LateLane)
    model = tiny("mixtral", layers=3)
    usage = np.ones((3, EXPERTS)) if policy == "fixed" else None
    with moesaic.offload(model, cache=1.5, policy=policy, scope=scope, usage=usage) as off:
        found = [run(model, prompt(1 + seed % 3, 1 + 40 * (seed % 2), seed)) for seed in range(24)]
        assert off.used_guesses > 0
    for seed, logits in enumerate(found):
        expected = run(model, prompt(1 + seed % 3, 1 + 40 * (seed % 2), seed))
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_reading_too_early_would_show(monkeypatch):
    monkeypatch.setattr("moesaic.routing.offload.Lane", LateLane)
    monkeypatch.setattr(Bank, "settle", lambda *_: None)
    model = tiny("mixtral", layers=3)
    with moesaic.offload(model, cache=1.5):
        found = run(model, prompt())
    assert not torch.allclose(found, run(model, prompt()))


def test_slots():
    model = tiny("mixtral", layers=3)  # 2 of 6 experts

    def slots(**options):
        with moesaic.offload(model, **options) as off:
            return off.slots

    assert slots(cache=0.2) == (2, 2, 2)  # at least top_k
    assert slots(cache=1.25) == (3, 3, 3)
    assert slots(cache=100) == (6, 6, 6)
    assert slots(cache=0.2, scope="model") == (2,)
    assert slots(cache=1.5, scope="model") == (9,)
    assert slots(cache=100, scope="model") == (18,)


def test_a_miss_is_a_transfer_and_a_hit_is_none():
    model = tiny("mixtral", layers=2)
    with moesaic.offload(model, cache=1.5, prefetch=False) as off:
        for seed in range(30):  # one token at a time: nothing but the policy decides
            run(model, prompt(1, 1, seed))
        assert off.loads == (off.requests - off.hits).sum() + sum(off.slots)  # empty ones are free
    with moesaic.offload(model, cache=1.5) as guessing:
        for seed in range(30):
            run(model, prompt(1, 1, seed))
        assert guessing.hits.tolist() == off.hits.tolist()
        assert guessing.loads + guessing.used_guesses == off.loads
        assert guessing.used_guesses > 0


def test_fixed_keeps_the_most_used(tmp_path):
    model = tiny("mixtral", layers=3)
    with moesaic.recording(model, logits=False) as rec:
        run(model, prompt(4, 20))
    usage = np.stack(
        [np.bincount(ids.ravel(), minlength=6) for ids in chosen(rec)[0].swapaxes(0, 1)]
    )
    for scope in ("layer", "model"):
        with moesaic.offload(model, cache=1.5, policy="fixed", usage=usage, scope=scope) as off:
            logits = run(model, prompt(4, 20))
            simulated(rec, off, "fixed")
        torch.testing.assert_close(logits, run(model, prompt(4, 20)))


def test_a_policy_of_ones_own():
    class Oldest(PriorityPolicy):
        def priority(self, expert, history):
            return history.last[expert]

    class Prophet(PriorityPolicy):
        def priority(self, expert, history):
            return -(history.next(expert) or 10**9)

    model = tiny("qwen3_moe")
    found = []
    for policy in ("lru", Oldest()):
        with moesaic.offload(model, cache=1.5, policy=policy) as off:
            run(model, prompt())
        found.append(off.hits.tolist())
    assert found[0] == found[1]
    with (
        moesaic.offload(model, cache=1.0, policy=Prophet()),
        pytest.raises(UserError, match="what comes next"),
    ):
        run(model, prompt())


def test_everything_is_put_back():
    model, ids = tiny("olmoe"), prompt()
    before = {name: (p, p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    def interrupted():
        with moesaic.offload(model, cache=1.0):
            state = model.state_dict()  # whole inside the block too
            assert all(torch.equal(state[name], value) for name, (_, _, value) in before.items())
            run(model, ids)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    for name, p in model.named_parameters():
        held, address, value = before[name]
        assert p is held
        assert p.data_ptr() == address
        assert torch.equal(p, value)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    experts = model.model.layers[0].mlp.experts
    assert experts.num_experts == EXPERTS
    with moesaic.offload(model):  # again
        run(model, ids)


def test_an_error_inside_a_call_leaves_the_experts_whole():
    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("broken")

    model = tiny("mixtral")
    model.set_experts_implementation("eager")
    experts = model.model.layers[1].mlp.experts
    whole = experts.gate_up_proj
    with moesaic.offload(model, cache=1.0):
        act, experts.act_fn = experts.act_fn, Broken()
        with pytest.raises(RuntimeError, match="broken"):
            run(model, prompt())
        assert experts.gate_up_proj is whole
        assert experts.num_experts == EXPERTS
        experts.act_fn = act
        logits = run(model, prompt())
    assert torch.equal(logits, run(model, prompt()))


def test_the_device_never_holds_all_experts(tmp_path):
    tiny("mixtral", layers=3).save_pretrained(tmp_path)
    with moesaic.offload(tmp_path, cache=1.0, device="cpu") as off:
        assert not off.model.training
        run(off.model, prompt())
        assert off.device_bytes == (3 * 2 + 2) * off.expert_bytes  # slots, and two for guesses
        assert off.host_bytes == 3 * EXPERTS * off.expert_bytes
    assert off.device_bytes == 0
    assert torch.equal(run(off.model, prompt()), run(moesaic.load(tmp_path), prompt()))


def test_slots_are_let_go_of_while_the_counts_stay():
    model = tiny("mixtral", layers=3)
    with moesaic.offload(model, cache=1.0) as off:
        run(model, prompt())
        shelves = off._shelves
        banks = [bank for shelf in shelves for bank in (*shelf.banks, shelf.staging.bank)]
        alive = [weakref.ref(tensor) for bank in banks for tensor in bank.tensors.values()]
        assert alive
        del shelves, banks
    gc.collect()
    assert off.loads > 0
    assert not [tensor for tensor in alive if tensor() is not None]


def test_half_precision_in_rounds_rounds_no_more():
    model, ids = tiny("mixtral", width=32), prompt(3, 20)
    exact, half = run(model, ids), model.bfloat16()
    plain = run(half, ids).float()
    with moesaic.offload(half, cache=1.0) as off:
        found = run(half, ids).float()
        assert off.loads > sum(off.slots)
    assert (found - exact).abs().mean() < 1.1 * (plain - exact).abs().mean()


def test_dropped_choices_count_as_recorded():
    model = tiny(
        "llama_moe",
        gate_type="SwitchBalancedGate",
        calculator_type="SwitchDropTokenCalculator",
        num_selects=1,
        gate_add_noise=False,
        capacity_factor=0.5,
    )
    with moesaic.offload(model, cache=2.0) as off, moesaic.recording(model, logits=False) as rec:
        run(model, prompt(2, 20))
    ids = chosen(rec)
    assert (ids < 0).any()
    assert off.requests.sum() == (ids >= 0).sum()
    simulated(rec, off)


def test_measured_beside_predicted():
    model = tiny("mixtral", layers=2)
    with moesaic.offload(model, cache=1.0) as off:
        found = off.measure(prompt(1, 8), new_tokens=6)
        assert off.hits.sum() > 0
        logits = run(model, prompt())
    assert torch.equal(logits, run(model, prompt()))  # timing left no trace
    assert found.tokens == 6
    assert 0 <= found.hit_rate < 1
    assert found.misses == pytest.approx((1 - found.hit_rate) * 4)
    assert found.predicted.serial <= found.predicted.overlapped <= 1 / found.compute * 1.0001
    assert found.tokens_per_second > 0


def test_gradients_say_why_there_are_none():
    model = tiny("mixtral")
    with moesaic.offload(model):
        out = model(input_ids=prompt(), output_router_logits=False)
        with pytest.raises(MoesaicError, match="inference"):
            out.logits.sum().backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache": 0}, "cache=0"),
        ({"cache": float("nan")}, "cache=nan"),
        ({"policy": "lrv"}, "Did you mean 'lru'"),
        ({"policy": "belady"}, "future"),
        ({"policy": "fixed"}, "usage"),
        ({"policy": "fixed", "usage": [[1, 2]]}, "shape"),
        ({"scope": "all"}, "scope"),
        ({"device": "tpu9"}, "device"),
        ({"dtype": "float32"}, "loaded already"),
    ],
)
def test_what_is_refused(options, message):
    model = tiny("mixtral")
    with pytest.raises(UserError, match=message), moesaic.offload(model, **options):
        pass
    with moesaic.offload(model):  # nothing is left of the attempt
        run(model, prompt())
        with pytest.raises(UserError, match="already"), moesaic.offload(model):
            pass
        run(model, prompt())


def test_models_without_such_experts():
    from transformers import LlamaConfig, LlamaForCausalLM, SwitchTransformersConfig
    from transformers import SwitchTransformersForConditionalGeneration as Switch

    sizes = {"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    dense = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=32))
    with pytest.raises(UserError, match="dense"), moesaic.offload(dense):
        pass
    switch = Switch(SwitchTransformersConfig(vocab_size=97, d_model=16, d_ff=32, num_layers=2))
    with pytest.raises(UserError, match="3-D"), moesaic.offload(switch):
        pass
