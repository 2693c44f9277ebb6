"""Which code runs an experts module, through transformers' own interface."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import moesaic.models  # noqa: F401 - registers "moesaic"
from moesaic.core.console import reporting
from moesaic.kernels import implementations, select

TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


class PlainExperts(nn.Module):
    """An experts module as transformers' decorator leaves it."""

    has_gate = True
    has_bias = is_transposed = has_post_expert_norm = _is_expert_parallel = False
    is_concatenated = True
    _apply_gate = _default_apply_gate

    def __init__(self, gate_up, down):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(gate_up), nn.Parameter(down)
        self.num_experts = gate_up.shape[0]
        self.act_fn = nn.SiLU()


class Notes:
    """A reporter that keeps what was said."""

    def __init__(self):
        self.said = []

    def note(self, text):
        self.said.append(text)

    def progress(self, what, total):
        raise AssertionError


@pytest.fixture
def notes(monkeypatch):
    monkeypatch.setattr(select, "_said", {})
    with reporting(Notes()) as reporter:
        yield reporter.said


def _model(model_type, **extra):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**{**TINY, **extra})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def _run(model, implementation, **options):
    model = copy.deepcopy(model)
    model.set_experts_implementation(implementation)
    ids = torch.arange(1, 43).view(2, 21) % 97
    loss = model(input_ids=ids, labels=ids, use_cache=False, **options).loss
    loss.backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return loss.item(), torch.cat(grads)


FAMILIES = {
    "mixtral": {"intermediate_size": 48, "num_local_experts": 5},
    "qwen2_moe": {
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "intermediate_size": 64,
        "num_experts": 6,
    },
    "qwen3_moe": {"moe_intermediate_size": 20, "intermediate_size": 64, "num_experts": 6},
    "olmoe": {"intermediate_size": 24, "num_experts": 6},
    "granitemoe": {"intermediate_size": 24, "num_local_experts": 6, "hidden_act": "gelu"},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_compute_the_same_as_their_own_loop(family, notes, monkeypatch):
    called = []
    ours = select.grouped.experts
    monkeypatch.setattr(
        select.grouped, "experts", lambda *a, **k: (called.append(k["backend"]), ours(*a, **k))[1]
    )
    model = _model(family, **FAMILIES[family])
    own_loss, own_grads = _run(model, "eager")
    loss, grads = _run(model, "moesaic")
    assert called == ["grouped"] * 2
    assert loss == pytest.approx(own_loss, abs=1e-6)
    assert (grads - own_grads).norm() < 1e-5 * own_grads.norm()
    assert len(notes) == 1  # not once a layer
    assert "torch's grouped matmul: the fused kernels need a GPU" in notes[0]


def test_sizes_that_torch_refuses_take_the_loop_and_say_so_once(notes):
    model = _model("mixtral", intermediate_size=43, num_local_experts=5)
    own_loss, own_grads = _run(model, "eager")
    for _ in range(2):
        loss, grads = _run(model, "moesaic")
        assert loss == pytest.approx(own_loss, abs=1e-6)
        assert (grads - own_grads).norm() < 1e-5 * own_grads.norm()
    assert len(notes) == 1
    assert "MixtralExperts" in notes[0]
    assert "multiples of 4 in float32, not 43" in notes[0]


@pytest.mark.parametrize("width", [24, 27])
def test_unusual_experts_go_to_transformers(width, notes):
    """gpt-oss: biases, transposed and interleaved weights, a gating of its own."""
    model = _model("gpt_oss", intermediate_size=width, num_local_experts=4)
    own_loss, own_grads = _run(model, "eager")
    loss, grads = _run(model, "moesaic")
    assert loss == pytest.approx(own_loss, abs=1e-6)
    assert (grads - own_grads).norm() < 1e-5 * own_grads.norm()
    assert len(notes) == 1
    assert "biases" in notes[0]
    assert ("grouped_mm" in notes[0]) == (width == 24)


def _experts(**attributes):
    generator = torch.Generator().manual_seed(0)
    module = PlainExperts(
        torch.randn(4, 48, 32, generator=generator), torch.randn(4, 32, 24, generator=generator)
    )
    for name, value in attributes.items():
        module._modules.pop(name, None)  # torch takes no plain function where a module was
        setattr(module, name, value)
    return module


def test_expert_parallel_sentinels_stay_out(notes):
    module = _experts(_is_expert_parallel=True)
    x = torch.randn(9, 32)
    ids = torch.tensor([[0, 4], [3, 1], [4, 4]]).repeat(3, 1)  # 4: the expert of another rank
    weights = torch.rand(9, 2).masked_fill(ids == 4, 0.0)
    expected = torch.zeros(9, 32)
    for t in range(9):
        for k in range(2):
            if ids[t, k] < 4:
                gate, up = (module.gate_up_proj[ids[t, k]] @ x[t]).chunk(2)
                y = module.down_proj[ids[t, k]] @ (nn.functional.silu(gate) * up)
                expected[t] += weights[t, k] * y
    out = ALL_EXPERTS_FUNCTIONS["moesaic"](module, x, ids, weights)
    assert torch.allclose(out, expected, atol=1e-4)
    assert "torch's grouped matmul" in notes[0]


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"has_gate": False}, "no gate"),
        ({"has_bias": True}, "biases"),
        ({"is_concatenated": False}, "interleaved"),
        ({"has_post_expert_norm": True}, "norm"),
        ({"act_fn": nn.ReLU()}, "ReLU"),
        ({"down_proj": None}, "no down_proj"),
    ],
)
def test_every_reason_is_named(attributes, reason):
    assert select.why_unusual(_experts()) is None
    assert reason in select.why_unusual(_experts(**attributes))


def test_a_gating_of_its_own_is_seen():
    class Clamped(PlainExperts):
        def _apply_gate(self, gate_up):
            return gate_up.chunk(2, dim=-1)[0].clamp(max=1)

    module = Clamped(torch.zeros(4, 48, 32), torch.zeros(4, 32, 24))
    assert "gating" in select.why_unusual(module)


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (nn.SiLU(), "silu"),
        (nn.functional.silu, "silu"),
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (nn.Tanh(), None),
    ],
)
def test_activation_names(act, name):
    assert select.activation_of(_experts(act_fn=act)) == name


def test_transformers_activations_mean_what_ours_mean():
    from transformers.activations import ACT2FN

    from moesaic.kernels.reference import activate

    x = torch.linspace(-4, 4, 101)
    for key in ("silu", "swish", "gelu", "gelu_pytorch_tanh"):
        name = select.activation_of(_experts(act_fn=ACT2FN[key]))
        assert name is not None, key
        assert torch.allclose(activate(x, name), ACT2FN[key](x), atol=1e-6)
    known = {key: select.activation_of(_experts(act_fn=ACT2FN[key])) for key in ACT2FN}
    for key, name in known.items():  # whatever is recognised must be what it is taken for
        if name is not None:
            assert torch.allclose(activate(x, name), ACT2FN[key](x), atol=1e-6), key


def test_gradient_checkpointing_through_transformers():
    model = _model("mixtral", intermediate_size=48, num_local_experts=5).train()
    plain = _run(model, "moesaic")
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)()
    recomputed = _run(model, "moesaic")
    assert recomputed[0] == plain[0]
    assert torch.equal(recomputed[1], plain[1])


def test_implementations_lists_ours_first():
    names = list(implementations())
    assert names[0] == "moesaic"
    assert {"eager", "grouped_mm"} <= set(names)
