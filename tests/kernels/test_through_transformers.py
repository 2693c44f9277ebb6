"""The ways a user reaches our kernels, and what they must live with: all equal to plain eager."""

from __future__ import annotations

import copy
import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from moesaic.kernels import grouped, select, unusual
from tests.kernels.families import FAMILIES, tiny
from tests.kernels.test_families_step import UNUSUAL, _same, _step


def _as(model, implementation):
    model = copy.deepcopy(model)
    model.set_experts_implementation(implementation)
    return model


@pytest.fixture
def ran(monkeypatch):
    """Count the calls of our grouped experts."""
    calls = []
    ours = grouped.experts
    monkeypatch.setattr(grouped, "experts", lambda *a, **k: (calls.append(1), ours(*a, **k))[1])
    return calls


def test_every_way_to_ask_for_them(tmp_path, ran):
    tiny("mixtral").save_pretrained(tmp_path)
    load = AutoModelForCausalLM.from_pretrained
    by_argument = load(tmp_path, experts_implementation="moesaic")
    by_call = load(tmp_path)
    by_call.set_experts_implementation("moesaic")
    by_attribute = load(tmp_path)
    by_attribute.config._experts_implementation = "moesaic"
    by_config = AutoModelForCausalLM.from_config(
        by_call.config, experts_implementation="moesaic", dtype=torch.float32
    )
    own = _step(load(tmp_path, experts_implementation="eager").eval())
    for model in (by_argument, by_call, by_attribute, by_config):
        ran.clear()
        result = _step(model.eval())
        assert len(ran) == 2
        if model is not by_config:
            _same(result, own, 1e-5)


@pytest.mark.parametrize("width", [24, 27])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_compiles_without_a_graph_break(family, width):
    model = tiny(family, width=width, output_router_logits=False)
    own = _step(_as(model, "eager"))
    fast = _as(model, "moesaic")
    fast.forward = torch.compile(fast.forward, fullgraph=True, backend="aot_eager")
    _same(_step(fast), own, 1e-5)


def test_other_routing_recompiles_nothing():
    experts = tiny("qwen3_moe").model.layers[0].mlp.experts
    experts.config._experts_implementation = "moesaic"
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(experts, fullgraph=True, backend=backend)
    x, weights = torch.randn(9, 32), torch.rand(9, 2)
    for seed in range(3):
        ids = torch.randint(0, 6, (9, 2), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            assert torch.allclose(compiled(x, ids, weights), experts(x, ids, weights), atol=1e-6)
    assert len(graphs) == 1


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_gradient_checkpointing(family, reentrant):
    # transformers hooks the router's logits without a graph under the reentrant kind
    plain = _as(tiny(family, output_router_logits=False), "moesaic")
    recomputed = copy.deepcopy(plain).train()
    options = {"use_reentrant": reentrant}
    if hasattr(recomputed, "activation_checkpointing_enable"):
        recomputed.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        recomputed.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    _same(_step(recomputed), _step(plain), 1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("width", [24, 27])
def test_checkpointing_the_function_itself(width, reentrant):
    experts = _as(tiny("mixtral", width=width), "moesaic").model.layers[0].mlp.experts
    ids, weights = torch.randint(0, 6, (9, 2)), torch.rand(9, 2)
    grads = []
    for wrapped in (False, True):
        x = torch.randn(9, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        experts.zero_grad()
        if wrapped:
            out = checkpoint(experts, x, ids, weights, use_reentrant=reentrant)
        else:
            out = experts(x, ids, weights)
        out.square().sum().backward()
        grads.append([x.grad, *(p.grad.clone() for p in experts.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in UNUSUAL])
def test_autocast_computes_in_bf16_and_keeps_float32_gradients(family):
    model = tiny(family, layers=1)  # in a second layer bf16 would route otherwise
    exact = _step(_as(model, "eager"))
    fast = _as(model, "moesaic")
    seen = []
    hook = fast.get_submodule(_experts_name(fast)).register_forward_hook(
        lambda module, inputs, output: seen.append((inputs[0].dtype, output.dtype))
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, grads = _step(fast)
    hook.remove()
    assert all(given == returned for given, returned in seen)
    assert loss == pytest.approx(exact[0], rel=2e-2)
    for name, grad in exact[1].items():
        assert grads[name].dtype == torch.float32
        if "experts" in name and "shared" not in name:
            error = (grads[name] - grad).norm() / grad.norm()
            assert 1e-4 < error < 5e-2, name  # bf16 was used, and rightly


def _experts_name(model):
    return next(n for n, m in model.named_modules() if type(m).__name__.endswith("Experts"))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("width", [24, 27])
def test_lora_on_expert_parameters(family, width):
    """peft adds B A to the 3-D weights: the loss and the adapters' gradients are eager's."""
    peft = pytest.importorskip("peft")
    results = []
    for implementation in ("eager", "moesaic"):
        model = _as(tiny(family, width=width, output_router_logits=False), implementation)
        config = peft.LoraConfig(
            r=2,
            lora_alpha=4,
            target_modules=["q_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        )
        adapted = peft.get_peft_model(model, config)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():  # B starts at zero, which would hide A's gradient
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        results.append(_step(adapted.eval()))
    own, ours = results
    names = [name for name in own[1] if "experts" in name]
    assert len(names) == 2 * 2 * 2  # layers x weights x (A, B)
    assert all("lora_" in name for name in own[1])
    _same(ours, own, 1e-5)


def test_a_weight_is_read_once_a_call():
    """Under LoRA each reading computes W + B A anew."""
    experts = _as(tiny("mixtral"), "moesaic").model.layers[0].mlp.experts
    torch.nn.utils.parametrize.register_parametrization(experts, "gate_up_proj", _Counted())
    _Counted.calls = 0  # registering reads it too
    experts(torch.randn(5, 32), torch.zeros(5, 2, dtype=torch.int64), torch.rand(5, 2))
    assert _Counted.calls == 1


class _Counted(torch.nn.Module):
    calls = 0

    def forward(self, weight):
        _Counted.calls += 1
        return weight * 1


class _Fused:
    """Stands in for `moesaic.kernels.triton`: refuses small experts, computes by `grouped`."""

    def __init__(self, reason=None):
        self.reason, self.asked, self.ran = reason, [], []

    def why_not(self, x_TD, gate_up_EJD, down_EDI, ids_TK):
        self.asked.append({x_TD.dtype, gate_up_EJD.dtype, down_EDI.dtype})
        return self.reason

    def why_not_persistent(self, device, tile_rows):
        return None

    def experts(self, *operands, activation, sentinels):
        self.ran.append((activation, sentinels))
        return grouped.experts(*operands, activation=activation, sentinels=sentinels)


@pytest.mark.parametrize("reason", [None, "it is too small"])
def test_fused_kernels_run_wherever_they_do_not_refuse(reason, monkeypatch):
    fused, said = _Fused(reason), []
    monkeypatch.setattr(select, "_said", {})
    monkeypatch.setattr(select, "note", said.append)
    monkeypatch.setattr(select, "_triton", lambda: fused)
    monkeypatch.setattr(select, "_why_no_triton", lambda device: None)
    model = tiny("olmoe")
    own = _step(_as(model, "eager"))
    _same(_step(_as(model, "moesaic")), own, 1e-5)
    assert fused.ran == ([("silu", False)] * 2 if reason is None else [])
    assert len(said) == 1
    assert ("fused Triton kernels" if reason is None else "it is too small") in said[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, grads = _step(_as(model, "moesaic"))
    assert fused.asked[-1] == {torch.bfloat16}
    assert all(grad.dtype == torch.float32 for grad in grads.values())


def test_the_fused_path_traces_into_one_graph(monkeypatch):
    said = []
    monkeypatch.setattr(select, "_said", {})
    monkeypatch.setattr(select, "note", said.append)
    monkeypatch.setattr(select, "_triton", _Traced)
    monkeypatch.setattr(select, "_why_no_triton", lambda device: None)
    model = tiny("qwen3_moe", output_router_logits=False)
    fast = _as(model, "moesaic")
    fast.forward = torch.compile(fast.forward, fullgraph=True, backend="aot_eager")
    _same(_step(fast), _step(_as(model, "eager")), 1e-5)
    assert said == ["Qwen3MoeExperts: fused Triton kernels, tuned tiles, persistent."]


class _Traced:
    @staticmethod
    def why_not(x_TD, gate_up_EJD, down_EDI, ids_TK):
        return None if gate_up_EJD.is_contiguous() else "strides"

    @staticmethod
    def why_not_persistent(device, tile_rows):
        return None if device.type == "cpu" else "a real device"

    @staticmethod
    def experts(*operands, activation, sentinels):
        return grouped.experts(*operands, activation=activation, sentinels=sentinels)


def _unusual_experts(kind, width=11):
    config = {
        "hidden_size": 20,
        "intermediate_size": width,
        "moe_intermediate_size": width,
        "num_local_experts": 5,
        "n_routed_experts": 5,
        "moe_latent_size": None,
        "mlp_hidden_act": "relu2",
        "moe_hidden_size": 20,
        "hidden_act": "silu",
        "post_norm_eps": 1e-6,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
    }
    module, name = {
        "biases, interleaved": ("gpt_oss.modeling_gpt_oss", "GptOssExperts"),
        "no gate": ("nemotron_h.modeling_nemotron_h", "NemotronHExperts"),
        "a norm behind": ("muse_spark.modeling_muse_spark", "MuseSparkExperts"),
    }[kind]
    found = pytest.importorskip(f"transformers.models.{module}")
    torch.manual_seed(0)
    experts = getattr(found, name)(SimpleNamespace(**config))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return experts


@pytest.mark.parametrize("kind", ["biases, interleaved", "no gate", "a norm behind"])
@pytest.mark.parametrize("away", [False, True])
@pytest.mark.parametrize("backend", ["grouped", "loop"])
def test_unusual_experts_on_sorted_rows(kind, away, backend):
    """Values and gradients of the loop that stands in for transformers' own."""
    experts = _unusual_experts(kind, width=12 if backend == "grouped" else 11)
    assert select.why_unusual(experts) is not None
    own_loop = type(experts).forward.__wrapped__
    x, weights = torch.randn(17, 20), torch.rand(17, 3)
    ids = torch.rand(17, 4).argsort(dim=1)[:, :3]  # the last expert gets nothing
    gone = (ids == 2) if away else (ids < 0)  # experts of another rank: ids of num_experts
    results = []
    for function in (own_loop, unusual.experts):
        own = function is own_loop
        inputs = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
        experts.zero_grad()
        dirty = [torch.full((1024, 22), float("nan")) for _ in range(4)]
        del dirty  # uninitialised rows now tend to be NaN
        there = ids if own else ids.masked_fill(gone, 5)
        weight = inputs[1] * ~gone if own else inputs[1]
        how = {} if own else {"backend": backend}
        out = function(experts, inputs[0], there, weight, **how)
        out.square().sum().backward()
        grads = [t.grad for t in (*inputs, *experts.parameters())]
        results.append([out.detach(), *(g.clone() for g in grads)])
    for own, ours in zip(*results, strict=True):
        assert torch.allclose(ours, own, atol=1e-4, rtol=1e-4)


def test_unusual_experts_train_faster_than_by_their_own_loop():
    """The own loop makes one gradient of all experts' size for each expert."""
    experts = _unusual_experts("no gate")
    up, down = (torch.nn.Parameter(torch.randn(64, 129, 129) / 11) for _ in range(2))
    experts.up_proj, experts.down_proj, experts.num_experts = up, down, 64
    x, weights = torch.randn(64, 129, requires_grad=True), torch.rand(64, 2)
    ids = torch.rand(64, 64).argsort(dim=1)[:, :2]

    def seconds(function):
        started = time.process_time()
        function(experts, x, ids, weights).sum().backward()
        return time.process_time() - started

    own_loop = type(experts).forward.__wrapped__
    pairs = [(seconds(own_loop), seconds(unusual.experts)) for _ in range(5)]
    assert sorted(ours / own for own, ours in pairs)[2] < 0.7
