"""A model's routers with the fused choice: the same numbers, hooks, files and ways back.

The choice itself is `router.reference` here, so that what is tested is the recipes and how they get
in; the kernel is tested against the reference in `test_triton_router`.
"""

from __future__ import annotations

import copy
import inspect
import io
from types import SimpleNamespace

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

import moesaic
from moesaic.core.config import parse
from moesaic.core.errors import UserError
from moesaic.kernels import fuse, fuse_routers, router, select, unfuse_routers
from moesaic.kernels.options import KernelsConfig
from moesaic.kernels.router import Scheme
from moesaic.models.decoder import SoftmaxRouter
from moesaic.models.gates import TopKBalancedNoisyGate
from moesaic.training import setup
from tests.kernels.families import FAMILIES, tiny
from tests.kernels.test_families_step import _same, _step

KNOWN = [f for f in FAMILIES if f not in ("phimoe", "jamba")]  # jamba: from 5.23, below


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Schemes of the fused choices, which run on the CPU; each line is said anew."""
    seen = []

    def choose(logits_TE, scheme, **how):
        seen.append(scheme)
        return router.reference(logits_TE, scheme, **how)

    monkeypatch.setattr(router, "_why_not_on", lambda device: None)
    monkeypatch.setattr(router, "_triton", lambda: SimpleNamespace(choose=choose))
    monkeypatch.setattr(select, "_said", {})
    return seen


def _routers(model):
    return [m for m in model.modules() if fuse.recipe_of(m) or hasattr(m, "scheme")]


@pytest.mark.parametrize("family", KNOWN)
def test_loss_every_gradient_and_what_is_recorded_equal_the_models_own(family, calls):
    own = tiny(family)
    own.set_experts_implementation("grouped_mm")
    ours = copy.deepcopy(own)
    done = fuse_routers(ours)
    assert len(done.routers) == own.config.num_hidden_layers
    assert not done.left
    expected = _step(own)
    assert not calls
    _same(_step(ours), expected, 1e-5)
    assert len(calls) == 2
    ids = torch.arange(20)[None]
    with moesaic.recording(own) as theirs:
        logits = own(input_ids=ids).get("router_logits")  # of some families from 5.23
    with moesaic.recording(ours) as mine:
        same_logits = ours(input_ids=ids).get("router_logits")
    assert len(calls) == 4
    for layer, chosen in theirs.experts.items():
        order, again = chosen.argsort(1), mine.experts[layer].argsort(1)
        assert torch.equal(chosen.gather(1, order), mine.experts[layer].gather(1, again))
        weights = theirs.weights[layer].gather(1, order), mine.weights[layer].gather(1, again)
        torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(theirs.logits[layer], mine.logits[layer], rtol=0, atol=1e-5)
    assert (logits is None) == (same_logits is None)
    if logits is not None:
        torch.testing.assert_close(logits, same_logits, rtol=0, atol=1e-5)


def _classes():
    """Routers of every recipe, one class for each: the first that this transformers has."""
    import importlib
    import pkgutil

    import transformers.models

    found = {}
    for package in pkgutil.iter_modules(transformers.models.__path__):
        name = f"transformers.models.{package.name}.modeling_{package.name}"
        spec = importlib.util.find_spec(name) if package.ispkg else None
        text = "" if spec is None else spec.loader.get_source(name)
        if not any(word in text for word in ("TopKRouter", "TopkRouter")):
            continue
        for cls in vars(importlib.import_module(name)).values():
            if inspect.isclass(cls) and cls.__module__ == name and "forward" in vars(cls):
                key = fuse.digest(cls.forward)
                if key in fuse.RECIPES:
                    found.setdefault(key, []).append(cls)
    return found


class _Config:
    """Answers what any router asks its config for."""

    topk_method = "group_limited_greedy"
    norm_topk_prob = True
    routed_scaling_factor = 2.5
    hidden_size = 32
    n_group = 4
    topk_group = 2

    def __getattr__(self, name):
        if name in ("moe_router_use_bias", "quantization_config"):
            return None
        if "per_tok" in name or "topk" in name or "top_k" in name:
            return 3
        if "experts" in name:
            return 12
        raise AttributeError(name)


@pytest.mark.slow
def test_every_class_with_a_known_forward_chooses_as_it_does(calls):
    """Imports a hundred modules: slow. What 5.23 knows is known; older versions have fewer."""
    found = _classes()
    missing = set(fuse.RECIPES) - set(found)
    assert len(missing) <= 4, missing
    tried = 0
    for cls in [cls for classes in found.values() for cls in classes]:
        torch.manual_seed(0)
        module = cls(_Config())
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.is_floating_point():
                    tensor.normal_(std=0.3)
        x_TD = torch.randn(40, 32)
        given = [x_TD]
        if "e_score_correction_bias" in inspect.signature(cls.forward).parameters:
            given.append(torch.randn(12))
        own = module(*given)
        assert fuse_routers(module).routers == [""], cls
        ours = module(*given)
        recipe = fuse.recipe_of(module)
        (weights, ids), (own_weights, own_ids) = (
            (o[1], o[0] if recipe.ids_first else o[2]) for o in (ours, own)
        )
        torch.testing.assert_close(*((o[2] if recipe.ids_first else o[0]) for o in (ours, own)))
        order, own_order = ids.argsort(1), own_ids.argsort(1)
        assert torch.equal(ids.gather(1, order), own_ids.gather(1, own_order)), cls
        torch.testing.assert_close(weights.gather(1, order), own_weights.gather(1, own_order))
        assert weights.dtype == own_weights.dtype
        assert ids.dtype == own_ids.dtype
        tried += 1
    assert len(calls) == tried >= 39


def test_what_is_saved_named_copied_and_pickled_stays(tmp_path, calls):
    model = tiny("mixtral")
    names = [name for name, _ in model.named_parameters()]
    model.save_pretrained(tmp_path / "before")
    fuse_routers(model)
    fuse_routers(model)  # again changes nothing
    assert [name for name, _ in model.named_parameters()] == names
    model.save_pretrained(tmp_path / "after")
    for file in ("config.json", "model.safetensors"):
        before, after = ((tmp_path / d / file).read_bytes() for d in ("before", "after"))
        assert before == after
    x_TD = torch.randn(5, 32)
    own = model.model.layers[0].mlp.gate
    twin = copy.deepcopy(model).model.layers[0].mlp.gate
    file = io.BytesIO()
    torch.save(own, file)
    file.seek(0)
    for other in (twin, torch.load(file, weights_only=False)):
        with torch.no_grad():
            other.weight.zero_()
        count = len(calls)
        assert not other(x_TD)[0].any()  # its own weight, not the first one's
        assert own(x_TD)[0].any()
        assert len(calls) == count + 2


def test_the_way_back(calls):
    model = tiny("qwen3_moe")
    expected = _step(model)
    assert len(fuse_routers(model).routers) == 2
    assert unfuse_routers(model) == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    assert unfuse_routers(model) == []
    _same(_step(model), expected, 0)
    assert not calls


def test_behind_hooks_of_accelerate(calls):
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Doubles(ModelHook):
        def pre_forward(self, module, x_TD):
            return (2 * x_TD,), {}

    gate = tiny("mixtral").model.layers[0].mlp.gate
    x_TD = torch.randn(5, 32)
    expected = gate(2 * x_TD)
    add_hook_to_module(gate, Doubles())
    fuse_routers(gate)
    for mine, own in zip(gate(x_TD), expected, strict=True):
        torch.testing.assert_close(mine, own)
    assert len(calls) == 1
    assert unfuse_routers(gate) == [""]
    torch.testing.assert_close(gate(x_TD)[1], expected[1])
    assert len(calls) == 1


def test_where_the_kernel_does_not_run_the_models_own_code_does(monkeypatch, calls):
    monkeypatch.setattr(router, "_why_not_on", lambda device: f"not on {device.type}")
    lines = []
    monkeypatch.setattr(select, "note", lines.append)
    model = tiny("olmoe")
    expected = _step(model)
    assert len(fuse_routers(model).routers) == 2
    _same(_step(model), expected, 0)
    _same(_step(model), expected, 0)
    assert not calls
    ours = [line for line in lines if "Router" in line]
    assert ours == ["OlmoeTopKRouter: its own code instead of our kernel: not on cpu."]
    left = fuse_routers(tiny("olmoe"), device=torch.device("cpu"))
    assert not left.routers
    assert left.left == {"OlmoeTopKRouter": "not on cpu"}


def test_a_router_that_is_not_known_keeps_its_code(monkeypatch, calls):
    lines = []
    monkeypatch.setattr(select, "note", lines.append)
    model = tiny("phimoe")
    for _ in range(2):
        done = fuse_routers(model)
        assert done.left == {"PhimoeTopKRouter": "how it chooses is not known to us"}
        assert not done.routers
    assert len(lines) == 1
    _step(model)
    assert not calls

    class Changed(MixtralTopKRouter):
        def forward(self, hidden_states):
            logits, weights, ids = super().forward(hidden_states)
            return logits, weights * 2, ids

    gate = tiny("mixtral").model.layers[0].mlp.gate
    gate.__class__ = Changed
    assert fuse_routers(gate).left == {"Changed": "how it chooses is not known to us"}
    dense = torch.nn.Linear(3, 3)
    assert fuse_routers(dense) == fuse.Fused()
    assert "no routers to fuse" in lines[-1]


def test_what_the_kernel_cannot_take_is_left_with_the_reason():
    gate = tiny("mixtral").model.layers[0].mlp.gate
    gate.num_experts, gate.top_k = 40, 17
    assert "17 of 40 experts" in fuse_routers(gate).left["MixtralTopKRouter"]
    for scheme, experts, words in (
        (Scheme(2), 513, "513 experts"),
        (Scheme(9), 8, "9 of 8"),
        (Scheme(2, groups=3, kept_groups=1), 8, "no 3 groups"),
        (Scheme(2, groups=4, kept_groups=2, group_rule="two highest"), 4, "no 4 groups"),
    ):
        assert words in router.why_not(scheme, experts)
    assert router.why_not(Scheme(2, groups=4, kept_groups=4), 6) is None  # no limit at all
    v2 = tiny("deepseek_v2").model.layers[0].mlp.gate
    v2.topk_method = "noaux_tc"
    assert fuse_routers(v2).left == {"DeepseekV2TopkRouter": "its topk_method is noaux_tc"}


def test_routers_of_this_package_tell_their_scheme(calls):
    torch.manual_seed(0)
    x_TD = torch.randn(9, 16)
    ours = SoftmaxRouter(16, 6, 2, renormalise=True, epsilon=0.25)
    torch.nn.init.normal_(ours.weight)
    expected = ours(x_TD)
    fuse_routers(ours)
    for mine, own in zip(ours(x_TD), expected, strict=True):
        torch.testing.assert_close(mine, own, rtol=1e-6, atol=1e-6)
    assert calls == [Scheme(2, renormalise=True, epsilon=0.25)]
    gate = TopKBalancedNoisyGate(16, 6, 2, network="mlp").eval()
    expected = gate(x_TD)
    fuse_routers(gate)
    for mine, own in zip(gate(x_TD), expected, strict=True):
        torch.testing.assert_close(mine, own, rtol=1e-6, atol=1e-6)
    assert len(calls) == 2
    gate.train()(x_TD)  # noise: it needs the score that just missed, too
    assert len(calls) == 2
    gate = TopKBalancedNoisyGate(16, 6, 2, network="mlp", use_softmax=False)
    assert fuse_routers(gate).left == {"TopKBalancedNoisyGate": "its scores are the logits"}


def test_loading_with_fused_routers(tmp_path, calls):
    tiny("mixtral").save_pretrained(tmp_path)
    ids = torch.arange(20)[None]
    plain = moesaic.load(tmp_path)(input_ids=ids).logits
    assert not calls
    torch.testing.assert_close(
        moesaic.load(tmp_path, fuse_routers=True)(input_ids=ids).logits, plain
    )
    assert len(calls) == 2


def test_a_run_fuses_routers_or_says_why_not():
    config = SimpleNamespace(kernels=parse(KernelsConfig, {"fuse_routers": True}, source="test"))
    model = tiny("mixtral")
    setup.configure_kernels(config, model, torch.device("cpu"), "fp32")
    assert fuse._is_ours(vars(model.model.layers[1].mlp.gate)["forward"])
    with pytest.raises(UserError, match=r"kernels.fuse_routers has no effect here: how it chooses"):
        setup.configure_kernels(config, tiny("phimoe"), torch.device("cpu"), "fp32")
