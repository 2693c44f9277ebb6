"""Each family loads with our kernels, and a step's loss and every gradient are its own loop's."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moesaic.kernels import select
from tests.kernels.families import FAMILIES, tiny

UNUSUAL = {"gpt_oss"}  # biases, transposed and interleaved weights, a gating of its own


@pytest.fixture
def calls(monkeypatch):
    """Names of the experts classes that ran through "moesaic", in order."""
    seen = []

    def counted(module, *arguments):
        seen.append(type(module).__name__)
        return select.experts_forward(module, *arguments)

    before = ALL_EXPERTS_FUNCTIONS["moesaic"]
    ALL_EXPERTS_FUNCTIONS.register("moesaic", counted)
    yield seen
    ALL_EXPERTS_FUNCTIONS.register("moesaic", before)


@pytest.fixture
def said(monkeypatch):
    """What `select` said about the paths taken."""
    lines: list[str] = []
    monkeypatch.setattr(select, "_said", {})
    monkeypatch.setattr(select, "note", lines.append)
    return lines


def _step(model, device="cpu"):
    """Return the loss and the gradient of every parameter by name."""
    model.zero_grad()
    ids = torch.arange(1, 43, device=device).view(2, 21) * 7 % 97
    out = model(input_ids=ids, labels=ids, use_cache=False)
    out.loss.backward()
    return out.loss.item(), {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def _same(ours, own, tolerance):
    assert ours[0] == pytest.approx(own[0], rel=tolerance)
    assert ours[1].keys() == own[1].keys()
    norm = torch.stack([g.float().norm() for g in own[1].values()]).norm()
    for name, grad in own[1].items():
        error = (ours[1][name] - grad).float().norm()
        # a gradient that is zero but for rounding is compared with the whole gradient
        assert error <= tolerance * max(grad.float().norm(), 1e-3 * norm), name


@pytest.mark.parametrize("width", [24, 27])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_every_gradient_equal_the_own_loops(family, width, tmp_path, calls, said):
    tiny(family, width=width).save_pretrained(tmp_path)
    own = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager").eval()
    fast = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="moesaic").eval()
    expected = _step(own)
    assert not calls
    _same(_step(fast), expected, 1e-5)
    experts = [type(m).__name__ for m in fast.modules() if type(m).__name__.endswith("Experts")]
    assert calls == experts
    assert len(experts) == fast.config.num_hidden_layers
    assert any("experts" in name and grad.any() for name, grad in expected[1].items())
    assert len(said) == 1
    loop = "a loop over experts instead of "
    if family in UNUSUAL:
        wanted = f"{loop}our kernels" if width == 27 else "transformers' grouped_mm instead"
    else:
        wanted = f"{loop}grouped matmul" if width == 27 else "torch's grouped matmul: the fused"
    assert wanted in said[0]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_gpu_the_fused_kernels_run(family, dtype, calls, said):
    """One layer: in bf16 a second would route some tokens otherwise than the own loop does."""
    own = tiny(family, width=128, hidden=128, layers=1).to("cuda", dtype)
    fast = copy.deepcopy(own)
    own.set_experts_implementation("eager")
    fast.set_experts_implementation("moesaic")
    _same(_step(fast, "cuda"), _step(own, "cuda"), 1e-4 if dtype == torch.float32 else 3e-2)
    assert len(calls) == 1
    if family not in UNUSUAL and dtype == torch.bfloat16:
        assert "fused Triton kernels" in said[0]
