"""LLaMA-MoE on a GPU: every experts implementation, training and generation agree with the CPU."""

from __future__ import annotations

import copy

import pytest
import torch

import moesaic.models as families
from tests.models import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
WIDE = {"hidden_size": 64, "intermediate_size": 256}  # rows that the grouped matmul takes in bf16


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm", "moesaic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_agree_with_the_cpu(implementation, dtype):
    model = tiny.build(families.LlamaMoEForCausalLM, tiny.config(**WIDE))
    twin = copy.deepcopy(model).to("cuda", dtype)
    twin.set_experts_implementation(implementation)
    ids = tiny.ids()
    expected = model(ids, labels=ids)
    expected.loss.backward()
    found = twin(ids.cuda(), labels=ids.cuda())
    found.loss.backward()
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(found.loss.cpu().float(), expected.loss, atol=tolerance, rtol=0)
    if dtype == torch.float32:
        torch.testing.assert_close(found.gate_load[0].cpu(), expected.gate_load[0])
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None)  # noise weights take no part in eval
            if a.grad is not None:
                torch.testing.assert_close(b.grad.cpu(), a.grad, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("width", [256, 172])
def test_generation_on_the_gpu(width, tmp_path):
    config = tiny.config(hidden_size=64, intermediate_size=width)
    model = tiny.build(families.LlamaMoEForCausalLM, config)
    model.save_pretrained(tmp_path)
    ids = tiny.ids()
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, **settings)
    for device_map in ("auto", {"": 0}):
        loaded = families.LlamaMoEForCausalLM.from_pretrained(tmp_path, device_map=device_map)
        assert torch.equal(loaded.generate(ids.cuda(), **settings).cpu(), expected)
    half = families.LlamaMoEForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, device_map={"": 0}
    )
    assert half.generate(ids.cuda(), num_beams=2, **settings).shape == (2, 20)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_draws_the_same_noise_again(reentrant):
    model = tiny.build(families.LlamaMoEForCausalLM, tiny.config(**WIDE)).cuda().train()
    twin = copy.deepcopy(model)
    twin.gradient_checkpointing_enable({"use_reentrant": reentrant})
    twin.enable_input_require_grads()
    ids = tiny.ids().cuda()
    for one in (model, twin):
        torch.manual_seed(5)
        one(ids, labels=ids).loss.backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4)
